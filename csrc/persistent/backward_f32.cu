// csrc/persistent/backward_f32.cu: the backward kernel of a whole stack for float32.
#include "backward_entry.cuh"

namespace stacked_lstm::cuda::persistent {

template <>
Outcome BackwardEntry<float>::launch(const BackwardArguments<float>& arguments, void* stream) {
  return launch_backward_instance("float32", arguments, stream);
}

template <>
int64_t BackwardEntry<float>::capacity(const Cut& cut, int hidden, bool over) {
  return backward_instance_capacity<float>(cut, hidden, over);
}

}  // namespace stacked_lstm::cuda::persistent
