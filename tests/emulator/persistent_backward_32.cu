// tests/emulator/persistent_backward_32.cu: the persistent backward kernel of float32, for the shapes that the tests run.
#include "persistent_backward_kernel.h"

namespace stacked_lstm::persistent {

template <>
const std::vector<BackwardKernel<float>>& backward_kernels<float>() {
  using T = float;
  static const std::vector<BackwardKernel<T>> all = {
      kernel<T, kTensor, kCluster, 1, 4, 2>(), kernel<T, kExact, kL2, 2, 2, 1>(),
      kernel<T, kExact, kCluster, 2, 2, 1>(),
#if !defined(FEW_KERNELS)
      kernel<T, kTensor, kL2, 8, 2, 1>(),      kernel<T, kTensor, kL2, 1, 4, 2>(),
      kernel<T, kExact, kL2, 1, 4, 1>(),
#endif
  };
  return all;
}

}  // namespace stacked_lstm::persistent
