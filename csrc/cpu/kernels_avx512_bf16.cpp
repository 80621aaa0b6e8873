// csrc/cpu/kernels_avx512_bf16.cpp: the kernels for AVX-512 (F, DQ, BW, VL) with units that multiply bfloat16 (BF16).
//
// Their results are bitwise those of kernels_avx512.cpp, except for products with panels that are stored as bfloat16,
// and for weight gradients of `rounded` operands.
#include "target.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma")
#endif

#define STACKED_LSTM_AVX512
#define STACKED_LSTM_BF16_UNITS
#define STACKED_LSTM_VECTOR_BYTES 64
#define STACKED_LSTM_VECTOR_REGISTERS 32

#include "../stack/cell.h"

namespace stacked_lstm::cpu {
namespace {
#include "vector.h"

#include "kernels.inc.h"
}  // namespace
}  // namespace stacked_lstm::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__

namespace stacked_lstm::cpu {

template <typename T>
const CpuKernels<T>* kernels_avx512_bf16() {
#if defined(__x86_64__)
  return &kTable<T>;
#else
  return nullptr;
#endif
}
template const CpuKernels<float>* kernels_avx512_bf16();
template const CpuKernels<double>* kernels_avx512_bf16();

}  // namespace stacked_lstm::cpu
