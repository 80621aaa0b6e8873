// csrc/persistent/persistent.h: the persistent kernels as a driver over ATen, and the decision whether they run: see
// driver.h and decision.cpp.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "../driver/call.h"
#include "choice.h"
#include "kernels.h"
#include "plan.h"

namespace stacked_lstm::persistent {

// What a call is to be decided by.
struct Question {
  const StackShape& shape;
  const StackOptions& options;
  Saving saving;
  at::ScalarType type;
  at::Device device;
};

// What would run it: the same for `auto`, for `plan` and for the forward and the backward pass of one call.
struct Decision {
  Choice choice;
  Product product = Product::tensor;
  // Why the persistent kernels cannot run this call: neither of its passes would; empty if they can.
  std::string why_not;

  const Plan& plan(bool backward) const { return backward ? choice.backward : choice.forward; }
};

// Nothing is allocated or launched. The device is asked once what it holds; the answer for a question is kept.
std::shared_ptr<const Decision> decide(const Question& question);

// What a run came to.
struct Counts {
  std::shared_ptr<const Decision> decision;
  int64_t launches = 0;  // of the persistent kernel
  int64_t products = 0;  // calls of a matrix product
};
// Launches that a pass will need.
int64_t launches(const Plan& plan, const StackShape& shape);

// `decision` has no why_not.
Results forward(const Call& call, std::shared_ptr<const Decision> decision, Counts& counts);
Gradients backward(const Call& call, const Kept& kept, const IncomingGradients& incoming, bool input_grad,
                   bool weight_grad, std::shared_ptr<const Decision> decision, Counts& counts);

// For tests, and in effect for all threads (torch has threads of its own for a backward pass on a GPU).
// These kernels run on the CPU; null: none do. `watchdog`: they fill the record of a wait that took too long.
void use_host_kernels(const Table* table, bool watchdog);
// Decisions are made for this device wherever the tensors are; nothing: for theirs.
void force_device(std::optional<Device> device);
// A pass is cut up like this, if it can be; nothing: as planned. Times are not predicted.
void force_passes(bool backward, std::optional<std::vector<Pass>> passes);

}  // namespace stacked_lstm::persistent
