// tests/ptx/backward_instances.cpp: all instances of the backward kernel that are compiled, for tests/emulator's program, which
// otherwise runs a few of them.
#include "../../csrc/persistent/dispatch.cuh"
#include "../emulator/persistent_backward_instances.h"

namespace stacked_lstm::persistent {

namespace {

template <typename T>
const std::vector<BackwardKernel<T>>& all() {
  using Entry = cuda::persistent::BackwardEntry<T>;
  static const std::vector<BackwardKernel<T>> entries = [] {
    std::vector<BackwardKernel<T>> list;
    for (const Instance& instance : kBackwardInstances<T>) list.push_back({instance, &Entry::launch, &Entry::capacity});
    return list;
  }();
  return entries;
}

}  // namespace

template <>
const std::vector<BackwardKernel<bfloat16>>& backward_kernels<bfloat16>() {
  return all<bfloat16>();
}
template <>
const std::vector<BackwardKernel<float16>>& backward_kernels<float16>() {
  return all<float16>();
}
template <>
const std::vector<BackwardKernel<float>>& backward_kernels<float>() {
  return all<float>();
}

}  // namespace stacked_lstm::persistent
