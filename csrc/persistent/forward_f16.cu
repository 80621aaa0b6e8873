// csrc/persistent/forward_f16.cu: the forward kernel of a whole stack for float16.
#include "forward_entry.cuh"

namespace stacked_lstm::cuda::persistent {

template <>
Outcome ForwardEntry<float16>::launch(const ForwardArguments<float16>& arguments, void* stream) {
  return launch_forward_instance("float16", arguments, stream);
}

template <>
int64_t ForwardEntry<float16>::capacity(const Cut& cut, int most_inputs, int hidden) {
  return forward_instance_capacity<float16>(cut, most_inputs, hidden);
}

}  // namespace stacked_lstm::cuda::persistent
