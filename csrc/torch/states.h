// csrc/torch/states.h: every layer's h and c of all steps, as results of a forward pass. The kernels leave them in the
// reserve; here they are copied to tensors of their own.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../driver/call.h"

namespace stacked_lstm {

struct States {
  std::vector<at::Tensor> h;  // a layer's h before its link: (T, B, D·output), or packed (rows, D·output)
  std::vector<at::Tensor> c;  // (T, B, D·hidden), or packed (rows, D·hidden)
};

// From the output and the reserve of a call that keeps states. `on_cpu`: the CPU kernels ran it.
States states_of(const Call& call, const Results& results, bool on_cpu);

// Checks the gradients of states, and adds that of the top layer's h to that of the output, which is the same h.
void take_state_gradients(const Call& call, IncomingGradients& incoming);

}  // namespace stacked_lstm
