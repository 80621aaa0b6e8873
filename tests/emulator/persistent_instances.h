// tests/emulator/persistent_instances.h: the persistent kernels that the tests run, by what they were compiled for.
#pragma once

#include <vector>

#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/persistent.cuh"

namespace stacked_lstm::cuda::persistent {

enum class Exchange { cluster, l2 };

template <typename T>
struct Instance {
  int k_steps, splits, tiles;
  Exchange exchange;
  size_t (*shared_bytes)(const Sizes&, int inputs);
  Status (*forward)(const Arguments<T>&, void* stream);
};

template <typename T>
const std::vector<Instance<T>>& instances();
template <>
const std::vector<Instance<bfloat16>>& instances<bfloat16>();
template <>
const std::vector<Instance<float16>>& instances<float16>();

// On the device: words of packed_word, and units of packed_bias.
Status pack(const bfloat16* weight, int hidden, int depth, int k_steps, Order order, uint4* packed, int64_t words);
Status pack(const bfloat16* b_ih, const bfloat16* b_hh, int hidden, float4* packed, int units);

// FastMaths, as the kernels compute it.
float fast_sigmoid(float);
float fast_tanh(float);

}  // namespace stacked_lstm::cuda::persistent
