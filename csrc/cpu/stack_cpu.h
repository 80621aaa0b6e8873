// csrc/cpu/stack_cpu.h: a stack of LSTM layers on the CPU: the entry points, and what they need from the caller.
//
// The CPU kernels are free of torch, so that the sanitizers can watch every thread and every access (tests/sanitize).
// csrc/torch/cpu_call.cpp provides torch's thread pool as a Platform.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "../stack/stack.h"
#include "../stack/wavefront.h"
#include "call.h"
#include "kernels.h"

namespace stacked_lstm::cpu {

class Platform {
 public:
  virtual ~Platform() = default;
  // Calls member(share) on some threads; the shares add up to `workers`. Each call may have a thread of its own, or all
  // calls may run on one thread.
  virtual void parallel(int64_t workers, const std::function<void(int64_t share)>& member) = 0;
  // Whether all these calls run at the same time, so that one call may wait for another.
  virtual bool at_the_same_time() const = 0;
};

// The rates and cache sizes of this machine, for the cost model. `element`: bytes of a number.
const CpuMachine& machine(int64_t element);

// The schedule that a call of these sizes takes when `threads` are free. `element`: bytes of a number.
Schedule plan(const StackShape& shape, int64_t threads, int64_t element, Storage storage, bool backward);

// The workers that a call may have.
struct Workers {
  int64_t threads;                   // the most workers
  const Schedule* forced = nullptr;  // run this instead of the cheapest; why_not(…) must be null
};

template <typename T>
class PackedStack;  // packed.h

// Fill what the call points to, and return the schedule that was run. It is not the planned one if fewer threads came.
// Throw std::runtime_error when there is no memory for the workspace, before anything is written.
// With `packed`, forward reads the packed weights there; the first call with it packs them there. Without it, forward
// packs them for itself.
// With `check`, forward compares packed weights that are ready with their sources, by fingerprint, before it uses them.
// If the sources have changed, forward returns nothing and has computed nothing.
template <typename T>
std::optional<Schedule> forward(const ForwardCall<T>& call, const Workers& workers, Platform& platform,
                                PackedStack<T>* packed = nullptr, bool check = true);
template <typename T>
Schedule backward(const BackwardCall<T>& call, const Workers& workers, Platform& platform);

}  // namespace stacked_lstm::cpu
