// csrc/cpu/vector.h: the vectors of one instruction set, and tanh and sigmoid on them.
//
// Included once by each kernels_<isa>.cpp, inside its own namespace and under its own target, after that file has
// defined STACKED_LSTM_VECTOR_BYTES and STACKED_LSTM_VECTOR_REGISTERS. Nothing here is visible to another file.
//
// The vectors are the compiler's own (GCC and Clang vector extensions): one source for SSE2, AVX2, AVX-512 and NEON.

inline constexpr int kRegisters = STACKED_LSTM_VECTOR_REGISTERS;

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float V __attribute__((vector_size(STACKED_LSTM_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(STACKED_LSTM_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double V __attribute__((vector_size(STACKED_LSTM_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(STACKED_LSTM_VECTOR_BYTES)));
};
template <typename T>
using Vec = typename VectorOf<T>::V;
template <typename T>
using IntVec = typename VectorOf<T>::I;
template <typename T>
inline constexpr int kVectorElements = STACKED_LSTM_VECTOR_BYTES / int{sizeof(T)};

template <typename T>
INLINE Vec<T> load(const T* p) {  // p need not be aligned
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <typename T>
INLINE Vec<T> load_first(const T* p, int64_t count) {  // the rest is zero
  alignas(STACKED_LSTM_VECTOR_BYTES) T buffer[kVectorElements<T>] = {};
  for (int64_t n = 0; n < count; ++n) buffer[n] = p[n];
  return load(buffer);
}
template <typename T>
INLINE void store_first(T* p, Vec<T> v, int64_t count) {
  if (count >= kVectorElements<T>) return store(p, v);
  for (int64_t n = 0; n < count; ++n) p[n] = v[n];
}
template <typename T>
INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// A number of 16 bits, the upper half of a float's bits. Two vectors of them make one vector of words: they are the
// words' low and high halves.
struct Bf16 {
  uint16_t bits;
};

INLINE void unpack_bf16(const Bf16* p, Vec<float>& even, Vec<float>& odd) {
  IntVec<float> words;
  __builtin_memcpy(&words, p, sizeof words);
  even = (Vec<float>)(words << 16);
  odd = (Vec<float>)(words & int32_t(0xffff0000));
}
// Rounds to nearest, ties to even, as torch does; the result is the upper half of each word. A NaN stays a NaN: its
// mantissa must not carry into the sign or become zero.
INLINE IntVec<float> round_to_bf16(Vec<float> x) {
  const IntVec<float> bits = (IntVec<float>)x;
  const IntVec<float> rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return x == x ? rounded : IntVec<float>{} + 0x7fc00000;
}
INLINE void pack_bf16(Bf16* p, Vec<float> even, Vec<float> odd) {
  const IntVec<float> words = ((round_to_bf16(even) >> 16) & 0xffff) | (round_to_bf16(odd) & int32_t(0xffff0000));
  __builtin_memcpy(p, &words, sizeof words);
}

#if defined(STACKED_LSTM_BF16_UNITS)
// sum + low·low + high·high, where low and high are the halves of a word. These units treat all denormals as zero.
INLINE Vec<float> dot_pairs(IntVec<float> a, IntVec<float> b, Vec<float> sum) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
// Rounds two vectors, one after the other, as above: word n holds their numbers 2n and 2n+1.
INLINE IntVec<float> round_to_pairs(Vec<float> first, Vec<float> second) {
  return (IntVec<float>)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
// Rounds two rows likewise: word n holds number n of the first row and number n of the second.
INLINE IntVec<float> round_row(Vec<float> x) {
  return (IntVec<float>)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
INLINE IntVec<float> round_rows(Vec<float> first, Vec<float> second) {
  return round_row(first) | (round_row(second) << 16);
}
// x minus its rounded numbers, which are in half 0 or 1 (`half`) of `pairs`. The difference is exact. It is zero for
// infinities and NaNs.
template <int half>
INLINE Vec<float> rest_of(Vec<float> x, IntVec<float> pairs) {
  const __m256i numbers = _mm512_maskz_extracti64x4_epi64(0xff, (__m512i)pairs, half);
  const Vec<float> rest = x - (Vec<float>)((IntVec<float>)_mm512_maskz_cvtepu16_epi32(0xffff, numbers) << 16);
  return rest - rest == Vec<float>{} ? rest : Vec<float>{};
}
#endif

// Calls f with the constants 0 … N-1: an unrolled loop whose index may pick a register.
template <int N, typename F>
INLINE void unroll(F&& f) {
  [&]<int... n>(std::integer_sequence<int, n...>)
      INLINE_LAMBDA { (f(std::integral_constant<int, n>{}), ...); }(std::make_integer_sequence<int, N>{});
}

// One of the two rows that take the place of rows a and b, which are pairs of runs of `distance` elements. It has runs
// of a and b in turn: of each pair the lower run, or with `upper` the upper run.
template <typename T, int distance, bool upper, int... element>
INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, std::integer_sequence<int, element...>) {
  constexpr int N = sizeof...(element);
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(
      a, b, ((element & distance) == 0 ? element + upper * distance : N + element - !upper * distance)...);
#else
  return __builtin_shuffle(
      a, b, IntVec<T>{((element & distance) == 0 ? element + upper * distance : N + element - !upper * distance)...});
#endif
}

// Transposes v, whose rows are one vector each: rows that are 1, 2, 4, … apart are interleaved, log2(kVectorElements)
// times in all.
template <typename T, int distance = 1>
INLINE void transpose(Vec<T> (&v)[kVectorElements<T>]) {
  if constexpr (distance < kVectorElements<T>) {
    constexpr auto elements = std::make_integer_sequence<int, kVectorElements<T>>{};
    unroll<kVectorElements<T>>([&](auto row) INLINE_LAMBDA {
      if constexpr ((row & distance) == 0) {
        const Vec<T> a = v[row], b = v[row + distance];
        v[row] = interleave<T, distance, false>(a, b, elements);
        v[row + distance] = interleave<T, distance, true>(a, b, elements);
      }
    });
    transpose<T, 2 * distance>(v);
  }
}

// 1/x for x in [1, 2^128). A division costs an AVX-512 core 16 cycles or more a vector, more than all else in a gate.
// An estimate of 14 bits and one Newton step cost less and give all 24 bits but the last.
template <typename T>
INLINE Vec<T> reciprocal(Vec<T> x) {
#if defined(STACKED_LSTM_AVX512)
  if constexpr (sizeof(T) == 4) {
    const Vec<T> r = (Vec<T>)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
    return r + r * (T(1) - x * r);
  }
#endif
  return T(1) / x;
}

// Coefficients of 2^r - 1 = r·(p[0] + p[1]·r + …) for |r| <= 1/2: those of Taylor, (ln 2)^n / n!. The first term that
// is left out is below a tenth of a rounding error.
template <typename T>
struct Exp2 {
  static constexpr int kTerms = sizeof(T) == 4 ? 7 : 13;
  static constexpr double kCoefficient[13] = {
      6.931471805599453094e-1,  2.402265069591007123e-1, 5.550410866482157995e-2,  9.618129107628477161e-3,
      1.333355814642844342e-3,  1.540353039338160995e-4, 1.525273380405984028e-5,  1.321548679014430949e-6,
      1.017808600923969973e-7,  7.054911620801123330e-9, 4.445538271870811498e-10, 2.567843599348820514e-11,
      1.369148885390412888e-12,
  };
  // Adding it to a number rounds to an integer (the ulp of 1.5·2^23 or 1.5·2^52 is 1) and leaves that integer in the
  // low mantissa bits.
  static constexpr T kRound = sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0);
  static constexpr int kMantissaBits = sizeof(T) == 4 ? 23 : 52;
  static constexpr int64_t kBias = sizeof(T) == 4 ? 127 : 1023;
};

// Splits y into an integer n and a rest r, and returns 2^n in `power` and 2^n·(2^r - 1) in `rest`. So
// 2^y = power + rest, and 2^y - 1 loses no precision where y is small. |y| must be at most 127 (1023 in double). If y
// is NaN, `rest` is NaN.
template <typename T>
INLINE void exp2_parts(Vec<T> y, Vec<T>& power, Vec<T>& rest) {
  using E = Exp2<T>;
  const Vec<T> shifted = y + E::kRound;
  const Vec<T> r = y - (shifted - E::kRound);
  power = (Vec<T>)(((IntVec<T>)shifted + E::kBias) << E::kMantissaBits);
  Vec<T> p = broadcast<T>(static_cast<T>(E::kCoefficient[E::kTerms - 1]));
  unroll<E::kTerms - 1>([&](auto n) INLINE_LAMBDA { p = p * r + static_cast<T>(E::kCoefficient[E::kTerms - 2 - n]); });
  rest = power * (p * r);
}

template <typename T>
INLINE Vec<T> clamp(Vec<T> x, T bound) {  // a NaN stays a NaN: both comparisons are false
  x = x > bound ? broadcast(bound) : x;
  return x < -bound ? broadcast(-bound) : x;
}

// The Math of csrc/stack/cell.h. tests/cpu/test_maths.py has the bounds of the errors against float64.
template <typename T>
struct Math {
  static constexpr T kLog2E = T(1.44269504088896340736);

  // 1 / (1 + 2^y), y = -x·log2(e). At the bound the result is denormal; where denormals are flushed it is exactly 0, as
  // in torch.
  static INLINE Vec<T> sigmoid(Vec<T> x) {
    Vec<T> power, rest;
    exp2_parts<T>(clamp<T>(x * -kLog2E, sizeof(T) == 4 ? T(127) : T(1023)), power, rest);
    return reciprocal<T>(T(1) + (power + rest));
  }

  // (e - 1) / (e + 1), e = 2^y, y = 2x·log2(e). If |y| reaches the bound, the quotient rounds to 1 or -1.
  static INLINE Vec<T> tanh(Vec<T> x) {
    Vec<T> power, rest;
    exp2_parts<T>(clamp<T>(x * (2 * kLog2E), sizeof(T) == 4 ? T(30) : T(60)), power, rest);
    return ((power - T(1)) + rest) * reciprocal<T>((power + T(1)) + rest);
  }
};
