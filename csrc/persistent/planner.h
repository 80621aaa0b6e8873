// csrc/persistent/planner.h: the planner of the persistent kernels. No CUDA, no torch.
#pragma once

#include "../cuda/device.h"
#include "../stack/stack.h"
#include "plan.h"

namespace stacked_lstm::persistent {

// The cheapest plan of all that fit, by the model of cost.h.
Plan plan(const StackShape& shape, const Device& device, const Costs& costs, const Ask& ask, bool backward);

}  // namespace stacked_lstm::persistent
