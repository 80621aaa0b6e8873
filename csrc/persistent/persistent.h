// csrc/persistent/persistent.h: the driver of the persistent kernels over ATen (driver.h), and the decision whether
// they run a call (decision.cpp).
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

// What the decision depends on.
struct Question {
  const StackShape& shape;
  const StackOptions& options;
  Saving saving;
  at::ScalarType type;
  at::Device device;
  bool states = false;  // of the call
  bool resets = false;  // likewise
};

// What would run the call. `auto`, `plan` and both the forward and the backward pass of a call use the same decision.
struct Decision {
  Choice choice;
  Product product = Product::tensor;
  // Why the persistent kernels cannot run this call; empty if they can. If they cannot run either the forward or the
  // backward pass, they run neither.
  std::string why_not;

  const Plan& plan(bool backward) const { return backward ? choice.backward : choice.forward; }
};

// Allocates and launches nothing. The decision for a question is kept, so that the device is asked only once what it
// holds.
std::shared_ptr<const Decision> decide(const Question& question);

// What a run did.
struct PersistentCounts {
  std::shared_ptr<const Decision> decision;
  int64_t launches = 0;  // of the persistent kernel
  int64_t products = 0;  // calls of a matrix product
};
// How many launches a plan needs.
int64_t launches(const Plan& plan, const StackShape& shape);

// `decision->why_not` must be empty.
Results forward(const Call& call, std::shared_ptr<const Decision> decision, PersistentCounts& counts);
Gradients backward(const Call& call, const Kept& kept, const IncomingGradients& incoming, bool input_grad,
                   bool weight_grad, std::shared_ptr<const Decision> decision, PersistentCounts& counts);

// For tests. The settings hold for all threads: torch runs a backward pass on a GPU in threads of its own.
//
// Sets the kernels for CPU tensors; null: there are none. `watchdog`: they fill the record of a wait that took too
// long.
void use_host_kernels(const PersistentTable* table, bool watchdog);
// Decisions are made for this device, wherever the tensors are; nullopt: for the tensors' device.
void force_device(std::optional<Device> device);
// A forward or backward pass is divided into these runs of layers, if that is possible; nullopt: as planned. No times
// are predicted for them.
void force_passes(bool backward, std::optional<std::vector<Pass>> passes);

}  // namespace stacked_lstm::persistent
