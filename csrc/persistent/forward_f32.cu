// csrc/persistent/forward_f32.cu: the forward kernel of a whole stack for float32.
#include "forward_entry.cuh"

namespace stacked_lstm::cuda::persistent {

template <>
Outcome ForwardEntry<float>::launch(const ForwardArguments<float>& arguments, void* stream) {
  return launch_forward_instance("float32", arguments, stream);
}

template <>
int64_t ForwardEntry<float>::capacity(const Cut& cut, int most_inputs, int hidden) {
  return forward_instance_capacity<float>(cut, most_inputs, hidden);
}

}  // namespace stacked_lstm::cuda::persistent
