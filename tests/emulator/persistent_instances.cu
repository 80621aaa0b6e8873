// tests/emulator/persistent_instances.cu: the persistent kernels, compiled for the shapes that the tests run; and, by a
// GPU's compiler, to see registers and spills. For an architecture without clusters their exchange is a trap.
#include "persistent_instances.h"

#include "../../csrc/cuda/persistent_forward.cuh"

namespace stacked_lstm::cuda::persistent {

namespace {

template <typename T, class C, template <typename, class> class ExchangeOf>
Instance<T> instance() {
  return {C::kSteps,
          C::kSplits,
          C::kTiles,
          ExchangeOf<T, C>::kCluster ? Exchange::cluster : Exchange::l2,
          [](const Sizes& sizes, int inputs) { return SharedLayout<T, C>(sizes, inputs).bytes; },
          &launch_forward<T, C, ExchangeOf>};
}

unsigned blocks_of(int64_t threads) { return static_cast<unsigned>((threads + kPackThreads - 1) / kPackThreads); }

}  // namespace

template <>
const std::vector<Instance<bfloat16>>& instances<bfloat16>() {
  using T = bfloat16;
  static const std::vector<Instance<T>> all = {
      instance<T, Cut<2, 1, 1>, ClusterExchange>(), instance<T, Cut<2, 1, 1>, L2Exchange>(),
      instance<T, Cut<4, 2, 2>, ClusterExchange>(), instance<T, Cut<4, 2, 2>, L2Exchange>(),
      instance<T, Cut<2, 4, 4>, ClusterExchange>(), instance<T, Cut<8, 2, 1>, ClusterExchange>(),
      instance<T, Cut<8, 2, 1>, L2Exchange>(),      instance<T, Cut<16, 2, 1>, ClusterExchange>(),
      instance<T, Cut<16, 2, 1>, L2Exchange>(),
  };
  return all;
}

template <>
const std::vector<Instance<float16>>& instances<float16>() {
  using T = float16;
  static const std::vector<Instance<T>> all = {
      instance<T, Cut<4, 2, 1>, ClusterExchange>(),
      instance<T, Cut<4, 2, 1>, L2Exchange>(),
  };
  return all;
}

Status pack(const bfloat16* weight, int hidden, int depth, int k_steps, Order order, uint4* packed, int64_t words) {
  LaunchConfig config;
  config.grid = dim3(blocks_of(words));
  config.block = dim3(kPackThreads);
  return launch(config, &pack_weight<bfloat16>, weight, hidden, depth, k_steps, order, packed, words);
}

Status pack(const bfloat16* b_ih, const bfloat16* b_hh, int hidden, float4* packed, int units) {
  LaunchConfig config;
  config.grid = dim3(blocks_of(units));
  config.block = dim3(kPackThreads);
  return launch(config, &pack_bias<bfloat16>, b_ih, b_hh, hidden, packed, units);
}

#if !defined(__CUDACC__)
float fast_sigmoid(float x) { return FastMaths::sigmoid(x); }
float fast_tanh(float x) { return FastMaths::tanh(x); }
#endif

}  // namespace stacked_lstm::cuda::persistent
