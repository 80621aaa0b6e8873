// tests/emulator/persistent_forward_instances.cu: the persistent forward kernel, compiled for what the tests run. FEW_KERNELS:
// for what sanitizers and the hunt for mutants run.
#include "persistent_forward_instances.h"

#include "../../csrc/persistent/forward.cuh"

namespace stacked_lstm::persistent {

namespace {

template <typename T, Product product, Exchange exchange, int Pieces, int Tiles>
ForwardEntry<T> entry() {
  return {{product, exchange, Tiles, Pieces, 0},
          &cuda::persistent::launch_forward<T, product, exchange, Pieces, Tiles>,
          &cuda::persistent::forward_capacity<T, product, exchange, Pieces, Tiles>};
}

constexpr auto kTensor = Product::tensor, kExact = Product::exact;
constexpr auto kCluster = Exchange::cluster, kL2 = Exchange::l2;

}  // namespace

template <>
const std::vector<ForwardEntry<bfloat16>>& forward_entries<bfloat16>() {
  using T = bfloat16;
  static const std::vector<ForwardEntry<T>> all = {
      entry<T, kTensor, kCluster, 2, 1>(), entry<T, kTensor, kL2, 2, 1>(), entry<T, kTensor, kCluster, 2, 4>(),
#if !defined(FEW_KERNELS)
      entry<T, kTensor, kL2, 2, 2>(),      entry<T, kTensor, kL2, 8, 1>(), entry<T, kTensor, kCluster, 2, 2>(),
#endif
  };
  return all;
}

template <>
const std::vector<ForwardEntry<float16>>& forward_entries<float16>() {
  using T = float16;
  static const std::vector<ForwardEntry<T>> all = {
#if !defined(FEW_KERNELS)
      entry<T, kTensor, kCluster, 2, 1>(),
      entry<T, kTensor, kL2, 2, 1>(),
#endif
  };
  return all;
}

template <>
const std::vector<ForwardEntry<float>>& forward_entries<float>() {
  using T = float;
  static const std::vector<ForwardEntry<T>> all = {
      entry<T, kTensor, kL2, 2, 1>(),      entry<T, kExact, kCluster, 2, 1>(), entry<T, kTensor, kCluster, 2, 4>(),
#if !defined(FEW_KERNELS)
      entry<T, kTensor, kCluster, 2, 1>(), entry<T, kExact, kL2, 2, 1>(),      entry<T, kExact, kL2, 2, 2>(),
#endif
  };
  return all;
}

}  // namespace stacked_lstm::persistent
