// csrc/cpu/stack_cpu.h: a stack of LSTM layers on the CPU. The entry points, and what they ask of their surroundings.
//
// Free of torch, so that the sanitizers can watch every thread and every access (tests/sanitize); csrc/torch/cpu_call.cpp brings
// torch's thread pool as a Platform.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "../stack/stack.h"
#include "../stack/wavefront.h"
#include "kernels.h"

namespace stacked_lstm::cpu {

class Platform {
 public:
  virtual ~Platform() = default;
  // Calls member(share) on some threads, the shares adding up to `workers`; every call may run on its own thread, and
  // all may run on one.
  virtual void parallel(int64_t workers, const std::function<void(int64_t share)>& member) = 0;
  // Whether all those calls are under way at the same time, so that one may wait for another.
  virtual bool at_the_same_time() const = 0;
};

// Sizes of this machine's caches, for the cost model.
const CpuMachine& machine(int64_t element);

// The schedule that a call of these sizes takes when `threads` are free. `element`: bytes of a number.
Schedule plan(const StackShape& shape, int64_t threads, int64_t element, Storage storage, bool backward);

// Who may work on a call.
struct Workers {
  int64_t threads;                   // at most so many
  const Schedule* forced = nullptr;  // run this instead of the cheapest; why_not(…) must be null
};

template <typename T>
class PackedStack;  // packed.h

// Fill what the call points to; return the schedule that was run, which is another when fewer threads came.
// Throw std::runtime_error when there is no memory for the workspace, before anything is written.
// With `packed`, forward reads the weights there, once they are ready; the first call with it puts them there. Without,
// it packs them for itself.
// With `check`, weights that are ready are compared with their sources before they are used, by fingerprint. Where the
// sources have changed, forward returns nothing and has computed nothing.
template <typename T>
std::optional<Schedule> forward(const ForwardCall<T>& call, const Workers& workers, Platform& platform,
                                PackedStack<T>* packed = nullptr, bool check = true);
template <typename T>
Schedule backward(const BackwardCall<T>& call, const Workers& workers, Platform& platform);

}  // namespace stacked_lstm::cpu
