// csrc/persistent/forward_entry.cuh: the instances of the forward kernel for one element type. Only
// persistent/forward_{bf16,f16,f32}.cu include it, each for its element type.
#pragma once

#include "dispatch.cuh"
#include "forward.cuh"

namespace stacked_lstm::cuda::persistent {

template <typename T>
Outcome launch_forward_instance(const char* element, const ForwardArguments<T>& arguments, void* stream) {
  return with_instance<kForwardInstances<T>>(
      arguments.cut, no_instance("forward", element, arguments.cut), [&](auto n) {
        constexpr Instance i = kForwardInstances<T>[n];
        return launch_forward<T, i.product, i.exchange, i.pieces, i.batch_tiles>(arguments, stream);
      });
}

template <typename T>
int64_t forward_instance_capacity(const Cut& cut, int most_inputs, int hidden) {
  return with_instance<kForwardInstances<T>>(cut, int64_t{0}, [&](auto n) {
    constexpr Instance i = kForwardInstances<T>[n];
    return forward_capacity<T, i.product, i.exchange, i.pieces, i.batch_tiles>(cut, most_inputs, hidden);
  });
}

}  // namespace stacked_lstm::cuda::persistent
