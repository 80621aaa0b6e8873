// csrc/persistent/backward_f16.cu: the backward kernel of a whole stack for float16.
#include "backward_entry.cuh"

namespace stacked_lstm::cuda::persistent {

template <>
Outcome BackwardEntry<float16>::launch(const BackwardArguments<float16>& arguments, void* stream) {
  return launch_backward_instance("float16", arguments, stream);
}

template <>
int64_t BackwardEntry<float16>::capacity(const Cut& cut, int hidden, bool over) {
  return backward_instance_capacity<float16>(cut, hidden, over);
}

}  // namespace stacked_lstm::cuda::persistent
