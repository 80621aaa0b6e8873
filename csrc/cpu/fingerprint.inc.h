// csrc/cpu/fingerprint.inc.h: a and b of a fingerprint block (fingerprint.h), included by kernels.inc.h for each
// instruction set.

typedef uint64_t Words64 __attribute__((vector_size(STACKED_LSTM_VECTOR_BYTES)));
typedef uint32_t Words32 __attribute__((vector_size(STACKED_LSTM_VECTOR_BYTES)));

INLINE Words64 load_words(const char* p) {
  Words64 words;
  __builtin_memcpy(&words, p, sizeof words);
  return words;
}

// Adds the key's halves to the halves of each word, and multiplies the two sums. Plain multiplications of 64 bits would
// take several times as many instructions.
INLINE Words64 keyed_product(Words64 words, Words64 key) {
  const Words64 sums = (Words64)((Words32)words + (Words32)key);
#if defined(STACKED_LSTM_AVX512)
  return (Words64)_mm512_maskz_mul_epu32(0xff, (__m512i)sums, (__m512i)(sums >> 32));
#elif defined(STACKED_LSTM_AVX2)
  return (Words64)_mm256_mul_epu32((__m256i)sums, (__m256i)(sums >> 32));
#elif defined(__SSE2__)
  return (Words64)_mm_mul_epu32((__m128i)sums, (__m128i)(sums >> 32));
#else
  return (sums & 0xffffffff) * (sums >> 32);
#endif
}

inline void digest(const void* data, int64_t bytes, const void* key, uint64_t* ab) {
  constexpr int64_t V = STACKED_LSTM_VECTOR_BYTES;
  const auto* const p = static_cast<const char*>(data);
  const auto* const k = static_cast<const char*>(key);
  Words64 a[2] = {}, b[2] = {};  // two partial sums each, so that no addition waits for the addition before it
  int64_t at = 0;
  for (; at + 2 * V <= bytes; at += 2 * V) {
    unroll<2>([&](auto n) INLINE_LAMBDA {
      const Words64 words = load_words(p + at + n * V);
      a[n] += keyed_product(words, load_words(k + at + n * V));
      b[n] += keyed_product(words, load_words(k + at + n * V + kFingerprintShift));
    });
  }
  for (; at < bytes; at += V) {
    alignas(STACKED_LSTM_VECTOR_BYTES) char rest[V] = {};
    __builtin_memcpy(rest, p + at, static_cast<size_t>(bytes - at < V ? bytes - at : V));
    a[0] += keyed_product(load_words(rest), load_words(k + at));
    b[0] += keyed_product(load_words(rest), load_words(k + at + kFingerprintShift));
  }
  const Words64 all_a = a[0] + a[1], all_b = b[0] + b[1];
  ab[0] = ab[1] = 0;
  for (int64_t n = 0; n < V / 8; ++n) ab[0] += all_a[n], ab[1] += all_b[n];
}
