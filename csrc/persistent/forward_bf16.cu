// csrc/persistent/forward_bf16.cu: the forward kernel of a whole stack for bfloat16.
#include "forward_entry.cuh"

namespace stacked_lstm::cuda::persistent {

template <>
Outcome ForwardEntry<bfloat16>::launch(const ForwardArguments<bfloat16>& arguments, void* stream) {
  return launch_forward_instance("bfloat16", arguments, stream);
}

template <>
int64_t ForwardEntry<bfloat16>::capacity(const Cut& cut, int most_inputs, int hidden) {
  return forward_instance_capacity<bfloat16>(cut, most_inputs, hidden);
}

}  // namespace stacked_lstm::cuda::persistent
