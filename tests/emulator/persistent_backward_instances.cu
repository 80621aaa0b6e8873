// tests/emulator/persistent_backward_instances.cu: the persistent backward kernel, compiled for the shapes that the tests run.
#include "persistent_backward_instances.h"

#include "../../csrc/cuda/persistent_backward.cuh"

namespace stacked_lstm::persistent {

namespace {

// FEW_KERNELS: those of which each has something of its own, for builds that take long.
constexpr Product kTensor = Product::tensor, kExact = Product::exact;
constexpr Exchange kCluster = Exchange::cluster, kL2 = Exchange::l2;

template <typename T, Product product, Exchange exchange, int MTiles, int Pieces, int Tiles>
BackwardKernel<T> kernel() {
  return {{product, exchange, Tiles, Pieces, MTiles},
          &cuda::persistent::launch_backward<T, product, exchange, MTiles, Pieces, Tiles>,
          &cuda::persistent::backward_capacity<T, product, exchange, MTiles, Pieces, Tiles>};
}

}  // namespace

template <>
const std::vector<BackwardKernel<bfloat16>>& backward_kernels<bfloat16>() {
  using T = bfloat16;
  static const std::vector<BackwardKernel<T>> all = {
      kernel<T, kTensor, kCluster, 1, 4, 1>(), kernel<T, kTensor, kL2, 1, 4, 1>(),
      kernel<T, kTensor, kL2, 1, 4, 2>(),
#if !defined(FEW_KERNELS)
      kernel<T, kTensor, kCluster, 2, 4, 4>(), kernel<T, kTensor, kCluster, 4, 4, 1>(),
      kernel<T, kTensor, kL2, 6, 2, 1>(),
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

template <>
const std::vector<BackwardKernel<float>>& backward_kernels<float>() {
  using T = float;
  static const std::vector<BackwardKernel<T>> all = {
      kernel<T, kTensor, kCluster, 1, 4, 2>(),
      kernel<T, kExact, kL2, 2, 2, 1>(),
      kernel<T, kExact, kCluster, 2, 4, 1>(),
#if !defined(FEW_KERNELS)
      kernel<T, kTensor, kL2, 8, 2, 1>(),
#endif
  };
  return all;
}

}  // namespace stacked_lstm::persistent
