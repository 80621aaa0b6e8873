// csrc/cpu/kernels_default.cpp: the kernels for the instructions that the compiler targets anyway (SSE2, NEON, …).
#include "target.h"

#define STACKED_LSTM_VECTOR_BYTES 16
#if defined(__aarch64__)
#define STACKED_LSTM_VECTOR_REGISTERS 32
#else
#define STACKED_LSTM_VECTOR_REGISTERS 16
#endif

#include "../stack/cell.h"

namespace stacked_lstm::cpu {
namespace {
#include "vector.h"

#include "kernels.inc.h"
}  // namespace

template <typename T>
const CpuKernels<T>* kernels_default() {
  return &kTable<T>;
}
template const CpuKernels<float>* kernels_default();
template const CpuKernels<double>* kernels_default();

}  // namespace stacked_lstm::cpu
