// csrc/persistent/backward_bf16.cu: the backward kernel of a whole stack for bfloat16.
#include "backward_entry.cuh"

namespace stacked_lstm::cuda::persistent {

template <>
Outcome BackwardEntry<bfloat16>::launch(const BackwardArguments<bfloat16>& arguments, void* stream) {
  return launch_backward_instance("bfloat16", arguments, stream);
}

template <>
int64_t BackwardEntry<bfloat16>::capacity(const Cut& cut, int hidden, bool over) {
  return backward_instance_capacity<bfloat16>(cut, hidden, over);
}

}  // namespace stacked_lstm::cuda::persistent
