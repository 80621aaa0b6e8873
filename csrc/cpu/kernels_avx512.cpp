// csrc/cpu/kernels_avx512.cpp: the kernels for AVX-512 (F, DQ, BW, VL).
#include "target.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#endif

#define STACKED_LSTM_AVX512
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
const CpuKernels<T>* kernels_avx512() {
#if defined(__x86_64__)
  return &kTable<T>;
#else
  return nullptr;
#endif
}
template const CpuKernels<float>* kernels_avx512();
template const CpuKernels<double>* kernels_avx512();

}  // namespace stacked_lstm::cpu
