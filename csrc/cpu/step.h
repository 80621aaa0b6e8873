// csrc/cpu/step.h: one time step of a stack, its state handed in and out: streaming.
//
// A call of forward with T = 1 computes the same. This one starts from weights that are packed already, takes no
// memory beyond its workspace, which a thread keeps, and reads the state where it stands.
#pragma once

#include <cstdint>
#include <optional>

#include "packed.h"
#include "stack_cpu.h"

namespace stacked_lstm::cpu {

template <typename T>
struct StepCall {
  const StackShape& shape;  // one step, one direction
  const PackedStack<T>& weights;
  const T* input;  // (B, I), rows `input_stride` apart
  int64_t input_stride;
  const T* h_0;  // (L, B, output)
  const T* c_0;  // (L, B, hidden)
  T* output;     // (B, output)
  T* h_n;
  T* c_n;
  bool bf16_activations = false;  // as in a ForwardCall
  bool check = true;              // compare the packed weights with their sources
};

// Fills what the call points to, the units of every layer shared out to `workers`. Returns how it was done: with fewer
// when fewer came. The bits do not depend on that. Returns nothing where the sources of the packed weights have changed:
// what was filled is then worth nothing.
template <typename T>
std::optional<Schedule> step(const StepCall<T>& call, int64_t workers, Platform& platform);

// How many of `threads` to share a step out to, by what it costs to read the weights and to wake others for it.
// `source_bytes`: of the sources, if they are to be checked.
int64_t step_workers(const StackShape& shape, int64_t threads, int64_t element, Storage storage, int64_t source_bytes);

}  // namespace stacked_lstm::cpu
