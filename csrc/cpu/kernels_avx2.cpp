// csrc/cpu/kernels_avx2.cpp: the kernels for AVX2 and FMA.
#include "target.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define STACKED_LSTM_AVX2
#define STACKED_LSTM_VECTOR_BYTES 32
#define STACKED_LSTM_VECTOR_REGISTERS 16

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
const CpuKernels<T>* kernels_avx2() {
#if defined(__x86_64__)
  return &kTable<T>;
#else
  return nullptr;
#endif
}
template const CpuKernels<float>* kernels_avx2();
template const CpuKernels<double>* kernels_avx2();

}  // namespace stacked_lstm::cpu
