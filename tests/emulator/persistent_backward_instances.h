// tests/emulator/persistent_backward_instances.h: the backward kernels that the tests run, by what they were compiled for.
#pragma once

#include <vector>

#include "../../csrc/persistent/kernels.h"

namespace stacked_lstm::persistent {

template <typename T>
struct BackwardKernel {
  Instance instance;
  Outcome (*launch)(const BackwardArguments<T>&, void* stream);
  int64_t (*capacity)(const Cut&, int hidden, bool over);
};

template <typename T>
const std::vector<BackwardKernel<T>>& backward_kernels();
template <>
const std::vector<BackwardKernel<bfloat16>>& backward_kernels<bfloat16>();
template <>
const std::vector<BackwardKernel<float16>>& backward_kernels<float16>();
template <>
const std::vector<BackwardKernel<float>>& backward_kernels<float>();

}  // namespace stacked_lstm::persistent
