// csrc/torch/packed_cache.h: packed weights that are kept from one call to the next, where no gradient is recorded.
//
// torch's records (storages, versions) do not show every write: a write through `.data`, NumPy, memory that another
// process shares or any other alias leaves no trace there. So a call does not rely on these records (except under
// Trust). It compares all bytes of the originals with those that were packed, by fingerprint (cpu/fingerprint.h). If
// they differ, the call packs for itself. The records only save comparisons: if they show a change, nothing is
// compared.
//
// A stack's first call only notes its weights; the second call packs and keeps them. So weights that live for one call
// (a parametrization, autocast, functional_call) and weights that change before each call (an evaluation between
// training steps) cost no memory. What is kept for a weight that has died is freed when other weights are first seen,
// or by drop_packed, which ops.py calls when a module dies.
//
// Hazard: another thread or process may write while a call packs. The fingerprint is taken before and after packing,
// and the stack is kept only if both are equal. Otherwise its fingerprint could be that of numbers that were not
// packed.
//
// Any thread may call any of these functions at any time. A fork copies the cache in a complete state.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

#include "../cpu/packed.h"
#include "../stack/stack.h"

namespace stacked_lstm {

// Returns the stack that is kept for these weights; the call must compare it before use (unless Trust is in force). Or
// a stack that is not ready, which the call must pack and keep. Or null: the call packs for itself. Throws
// std::runtime_error when there is no memory for a stack that is to be kept.
template <typename T>
std::shared_ptr<cpu::PackedStack<T>> find_packed(at::TensorList weights, const StackShape& shape, cpu::Storage storage);

// Returns the stack that is kept for these weights and this batch size, which the call must compare likewise, or null.
// Does not note weights that it does not know, and allocates nothing.
template <typename T>
std::shared_ptr<const cpu::PackedStack<T>> peek_packed(at::TensorList weights, int64_t batch, cpu::Storage storage);

// Keeps a stack that find_packed returned and the call has packed.
template <typename T>
void keep_packed(at::TensorList weights, const StackShape& shape, const std::shared_ptr<cpu::PackedStack<T>>& stack);

// Forgets a stack whose weights were found to have changed.
template <typename T>
void forget_packed(at::TensorList weights, const StackShape& shape, const std::shared_ptr<cpu::PackedStack<T>>& stack);

// Forgets everything about stacks whose first weight is at this address; the weight need not exist any more.
void drop_packed(const void* first_weight);

// Counts a call that has used kept weights, for packed_counts.
void count_hit();

// While an object with `frozen` lives, calls of this thread use kept weights without comparing them:
// StackedLSTM.freeze.
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
  int64_t bytes;   // of these stacks
  int64_t noted;   // seen once
  int64_t hits;    // calls that used kept weights, since the process began
};
PackedCounts packed_counts();

}  // namespace stacked_lstm
