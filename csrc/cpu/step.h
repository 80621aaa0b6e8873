// csrc/cpu/step.h: one time step of a stack, for streaming: the caller hands the state in and gets the next one back.
//
// forward() with T = 1 computes the same. step() starts from weights that are packed already, takes no memory beyond
// its workspace, which the thread keeps, and reads the state in place.
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
  const T* h_0;  // states: see stack/state_layout.h
  const T* c_0;
  T* output;  // (B, columns of the output)
  T* h_n;
  T* c_n;
  bool bf16_activations = false;  // as in a ForwardCall
  bool check = true;              // compare the packed weights with their sources
};

// Fills what the call points to; the units of every layer are shared out to `workers` workers. Returns the schedule
// that was run, with fewer workers if fewer came. The bits do not depend on their number. If the sources of the packed
// weights have changed, step() returns nothing, and what it has filled is invalid.
template <typename T>
std::optional<Schedule> step(const StepCall<T>& call, int64_t workers, Platform& platform);

// How many of `threads` threads should share a step, by the cost of reading the weights and of waking the other
// threads. `source_bytes`: bytes of the sources if they are to be checked, else 0.
int64_t step_workers(const StackShape& shape, int64_t threads, int64_t element, Storage storage, int64_t source_bytes);

}  // namespace stacked_lstm::cpu
