// tests/emulator/persistent_backward_kernel.h: one instance of the persistent backward kernel, of those that the tests run.
//
// With FEW_KERNELS, for builds that take long, there are only those of which each has something of its own.
#pragma once

#include "../../csrc/persistent/backward.cuh"
#include "persistent_backward_instances.h"

namespace stacked_lstm::persistent {

inline constexpr Product kTensor = Product::tensor, kExact = Product::exact;
inline constexpr Exchange kCluster = Exchange::cluster, kL2 = Exchange::l2;

template <typename T, Product product, Exchange exchange, int MTiles, int Pieces, int Tiles>
BackwardKernel<T> kernel() {
  return {{product, exchange, Tiles, Pieces, MTiles},
          &cuda::persistent::launch_backward<T, product, exchange, MTiles, Pieces, Tiles>,
          &cuda::persistent::backward_capacity<T, product, exchange, MTiles, Pieces, Tiles>};
}

}  // namespace stacked_lstm::persistent
