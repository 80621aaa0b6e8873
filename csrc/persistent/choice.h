// csrc/persistent/choice.h: whether the persistent kernels or the diagonal schedule run a call: the one that is
// predicted to be faster. No CUDA, no torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "../cuda/device.h"
#include "../stack/stack.h"
#include "plan.h"

namespace stacked_lstm::persistent {

// The predicted times of the driver of csrc/diagonal. It runs a product and a kernel a diagonal, and large products.
// Each starts as soon as the host has queued it and the device has done the one before.
struct DiagonalCost {
  double total_us = 0;
  double host_us = 0;    // of the diagonals, if nothing had to wait for the device
  double device_us = 0;  // of the diagonals, if nothing had to wait for the host
  double large_us = 0;   // of the large products: those of stages, and those after all stages
  int64_t diagonals = 0;

  const char* binds() const {
    return large_us > std::max(host_us, device_us) ? "large products"
           : host_us > device_us                   ? "launches by the host"
                                                   : "small kernels on the device";
  }
};

DiagonalCost predict_diagonals(const StackShape& shape, const Device& device, const Costs& costs, const Ask& ask,
                               bool backward);

double diagonal_us(const StackShape& shape, const Device& device, const Costs& costs, const Ask& ask, bool backward);

struct Choice {
  bool persistent = false;
  std::string reason;      // one sentence
  Plan forward, backward;  // backward: without passes and without a why_not if no backward pass will follow
  DiagonalCost diagonal_forward, diagonal_backward;
  double persistent_us = 0, diagonal_us = 0;  // of all passes that will run; persistent_us: 0 if the kernels cannot
};

// A call runs forward and backward on the same schedule. This is never an error: a call that the persistent kernels
// cannot run, or run more slowly by the model, goes to the diagonal schedule.
Choice choose(const StackShape& shape, const Device& device, const Costs& costs, const Ask& ask);

}  // namespace stacked_lstm::persistent
