// tests/emulator/persistent_backward_16.cu: the persistent backward kernel of 16 bits, for the shapes that the tests run.
#include "persistent_backward_kernel.h"

namespace stacked_lstm::persistent {

template <>
const std::vector<BackwardKernel<bfloat16>>& backward_kernels<bfloat16>() {
  using T = bfloat16;
  static const std::vector<BackwardKernel<T>> all = {
      kernel<T, kTensor, kCluster, 1, 4, 1>(), kernel<T, kTensor, kL2, 1, 4, 1>(),
      kernel<T, kTensor, kL2, 2, 4, 2>(),
#if !defined(FEW_KERNELS)
      kernel<T, kTensor, kCluster, 2, 4, 4>(), kernel<T, kTensor, kCluster, 4, 4, 1>(),
      kernel<T, kTensor, kL2, 6, 2, 1>(),      kernel<T, kTensor, kL2, 1, 4, 4>(),
#endif
  };
  return all;
}

template <>
const std::vector<BackwardKernel<float16>>& backward_kernels<float16>() {
  using T = float16;
  static const std::vector<BackwardKernel<T>> all = {
#if !defined(FEW_KERNELS)
      kernel<T, kTensor, kCluster, 2, 4, 1>(),
#endif
  };
  return all;
}

}  // namespace stacked_lstm::persistent
