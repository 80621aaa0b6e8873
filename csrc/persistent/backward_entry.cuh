// csrc/persistent/backward_entry.cuh: the instances of the backward kernel for one element type. Only
// persistent/backward_{bf16,f16,f32}.cu include it, each for its element type.
#pragma once

#include "backward.cuh"
#include "dispatch.cuh"

namespace stacked_lstm::cuda::persistent {

template <typename T>
Outcome launch_backward_instance(const char* element, const BackwardArguments<T>& arguments, void* stream) {
  return with_instance<kBackwardInstances<T>>(
      arguments.cut, no_instance("backward", element, arguments.cut), [&](auto n) {
        constexpr Instance i = kBackwardInstances<T>[n];
        return launch_backward<T, i.product, i.exchange, i.unit_tiles, i.pieces, i.batch_tiles>(arguments, stream);
      });
}

template <typename T>
int64_t backward_instance_capacity(const Cut& cut, int hidden, bool over) {
  return with_instance<kBackwardInstances<T>>(cut, int64_t{0}, [&](auto n) {
    constexpr Instance i = kBackwardInstances<T>[n];
    return backward_capacity<T, i.product, i.exchange, i.unit_tiles, i.pieces, i.batch_tiles>(cut, hidden, over);
  });
}

}  // namespace stacked_lstm::cuda::persistent
