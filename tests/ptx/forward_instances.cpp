// tests/ptx/forward_instances.cpp: all instances of the forward kernel that are compiled, for tests/emulator's program, which
// otherwise runs a few of them.
#include "../../csrc/persistent/dispatch.cuh"
#include "../emulator/persistent_forward_instances.h"

namespace stacked_lstm::persistent {

namespace {

template <typename T>
const std::vector<ForwardEntry<T>>& all() {
  using Entry = cuda::persistent::ForwardEntry<T>;
  static const std::vector<ForwardEntry<T>> entries = [] {
    std::vector<ForwardEntry<T>> list;
    for (const Instance& instance : kForwardInstances<T>) list.push_back({instance, &Entry::launch, &Entry::capacity});
    return list;
  }();
  return entries;
}

}  // namespace

template <>
const std::vector<ForwardEntry<bfloat16>>& forward_entries<bfloat16>() {
  return all<bfloat16>();
}
template <>
const std::vector<ForwardEntry<float16>>& forward_entries<float16>() {
  return all<float16>();
}
template <>
const std::vector<ForwardEntry<float>>& forward_entries<float>() {
  return all<float>();
}

}  // namespace stacked_lstm::persistent
