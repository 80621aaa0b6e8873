// csrc/torch/packed_cache.h: packed weights that are kept from one call to the next, where no gradient is recorded.
//
// No call uses kept weights on the strength of what torch tells of the originals: a write through `.data`, NumPy, memory
// that another process shares or any other alias leaves no trace there. A call compares all bytes of the originals with
// those that were packed, by fingerprint (cpu/fingerprint.h), and packs for itself where they differ. What torch tells
// (storages, versions) only says beforehand that weights have probably changed: then nothing is compared.
//
// A stack's first call only takes note of its weights, the second one packs them for keeps: weights that live for one
// call (a parametrization, autocast, functional_call) and weights that change before each (an evaluation between
// training steps) cost no memory. What is kept for a weight that has died goes when other weights are first seen, or by
// drop_packed, which ops.py calls when a module dies.
//
// Hazard. Another thread or process may write while a call packs. The fingerprint is taken before and after, and the
// stack is kept only if both are equal: otherwise its fingerprint could be that of numbers that were not packed.
//
// Any thread may call anything at any time; a fork copies a whole state.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

#include "../cpu/packed.h"
#include "../stack/stack.h"

namespace stacked_lstm {

// What is kept for these weights, to be checked before it is used (unless Trust says otherwise); or a stack that is not
// ready, for this call to pack and keep; or null: the call packs for itself.
// Throws std::runtime_error when there is no memory for what is to be kept.
template <typename T>
std::shared_ptr<cpu::PackedStack<T>> find_packed(at::TensorList weights, const StackShape& shape, cpu::Storage storage);

// The stack that is kept for these weights and such a batch, to be checked likewise, or null. Takes no note of weights
// that it does not know, and no memory.
template <typename T>
std::shared_ptr<const cpu::PackedStack<T>> peek_packed(at::TensorList weights, int64_t batch, cpu::Storage storage);

// Keeps a stack that find_packed returned and the call has packed.
template <typename T>
void keep_packed(at::TensorList weights, const StackShape& shape, const std::shared_ptr<cpu::PackedStack<T>>& stack);

// Forgets a stack whose weights were found to have changed.
template <typename T>
void forget_packed(at::TensorList weights, const StackShape& shape, const std::shared_ptr<cpu::PackedStack<T>>& stack);

// Forgets everything about stacks whose first weight stands here; it need not exist any more.
void drop_packed(const void* first_weight);

// For packed_counts: a call has used kept weights.
void count_hit();

// While one lives, the calls of this thread take kept weights as they are, if `frozen`: StackedLSTM.freeze.
class Trust {
 public:
  explicit Trust(bool frozen);
  ~Trust();
  Trust(const Trust&) = delete;
  Trust& operator=(const Trust&) = delete;

  static bool in_force();

 private:
  const bool before_;
};

struct PackedCounts {
  int64_t stacks;  // kept
  int64_t bytes;   // of those
  int64_t noted;   // seen once
  int64_t hits;    // calls that used kept weights, since the process began
};
PackedCounts packed_counts();

}  // namespace stacked_lstm
