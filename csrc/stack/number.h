// csrc/stack/number.h: the 16-bit storage types, and which type a kernel computes in. Host and device; no torch.
//
// A tensor's elements are stored in T. Sums, c and the gates are held in Accumulator<T>: float, or double for double.
#pragma once

#include <cstdint>

#include "cell.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace stacked_lstm {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

namespace number_detail {

union Word {
  float number;
  uint32_t bits;
};

STACKED_LSTM_HOST_DEVICE uint32_t bits_of(float x) {
  Word word;
  word.number = x;
  return word.bits;
}

STACKED_LSTM_HOST_DEVICE float float_of(uint32_t bits) {
  Word word;
  word.bits = bits;
  return word.number;
}

}  // namespace number_detail

STACKED_LSTM_HOST_DEVICE double widen(double x) { return x; }
STACKED_LSTM_HOST_DEVICE float widen(float x) { return x; }
STACKED_LSTM_HOST_DEVICE float widen(bfloat16 x) { return number_detail::float_of(uint32_t{x.bits} << 16); }

STACKED_LSTM_HOST_DEVICE float widen(float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return number_detail::float_of(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  // The shifted bits, read as a float, have an exponent that is 112 too small. The product corrects it exactly, for
  // denormals too.
  const float mended = number_detail::float_of(magnitude << 13) * 0x1p112f;
  return number_detail::float_of(sign | number_detail::bits_of(mended));
#endif
}

// The nearest number of T, ties to even. A NaN stays a NaN.
template <typename T>
STACKED_LSTM_HOST_DEVICE T narrow(Accumulator<T> x) {
  return x;
}

template <>
STACKED_LSTM_HOST_DEVICE bfloat16 narrow<bfloat16>(float x) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  if (x != x) return {0x7FFF};
  const uint32_t bits = number_detail::bits_of(x);
  return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16)};
#endif
}

template <>
STACKED_LSTM_HOST_DEVICE float16 narrow<float16>(float x) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = number_detail::bits_of(x), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t sign = bits >> 16 & 0x8000u;
  if (magnitude > 0x7F800000u) return {0x7FFF};
  if (magnitude >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // 65520 and more: infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14 a float16 is a multiple of 2^-24, the last bit of 0.5. So the addition of 0.5 rounds x to a multiple.
    const float shifted = number_detail::float_of(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (number_detail::bits_of(shifted) - 0x3F000000u))};
  }
  const uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

}  // namespace stacked_lstm
