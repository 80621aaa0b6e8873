// tests/emulator/persistent_forward_instances.h: the forward kernels that the tests run, by what they were compiled for.
#pragma once

#include <vector>

#include "../../csrc/persistent/kernels.h"
#include "../../csrc/stack/cell.h"

namespace stacked_lstm::persistent {

template <typename T>
struct ForwardEntry {
  Instance instance;
  Outcome (*launch)(const ForwardArguments<T>&, void* stream);
  int64_t (*capacity)(const Cut&, int most_inputs, int hidden);
};

template <typename T>
const std::vector<ForwardEntry<T>>& forward_entries();
template <>
const std::vector<ForwardEntry<bfloat16>>& forward_entries<bfloat16>();
template <>
const std::vector<ForwardEntry<float16>>& forward_entries<float16>();
template <>
const std::vector<ForwardEntry<float>>& forward_entries<float>();

// fast_maths.cu.
Gates<float> fast_gates(bool tanh_unit, const Gates<float>&);
float fast_tanh(bool tanh_unit, float);

}  // namespace stacked_lstm::persistent
