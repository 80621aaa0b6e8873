// csrc/packed_cache.h: packed weights that are kept from one call to the next, where no gradient is recorded.
//
// What is kept is valid while every weight is the same tensor, in the same storage, with the same version, and a sample
// of its elements has the same bits. Any in-place operation raises the version; setting `.data` brings another storage.
// A write through `.data` or another alias that torch does not know does neither: the sample sees one that changes most
// elements, not one that changes a few.
//
// A stack's first call only takes note of its weights, the second one packs them for keeps: weights that live for one
// call (a parametrization, autocast, functional_call) and weights that change before each (an evaluation between
// training steps) cost no memory. What is kept for a weight that has died goes when other weights are first seen, or by
// drop_packed, which ops.py calls when a module dies.
//
// Never kept: inference tensors, which have no version, and memory that torch does not own (shared between processes,
// a NumPy array's, a mapped file's), since whoever owns it may write it.
//
// Any thread may call anything at any time; a fork copies a whole state.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/packed.h"
#include "stack.h"

namespace stacked_lstm {

// What a call has to do about its weights.
template <typename T>
struct KeptWeights {
  std::shared_ptr<cpu::PackedStack<T>> stack;  // null: pack for this call alone
  uint64_t fingerprint = 0;                    // of the weights before the call read them

  bool ready() const { return stack && stack->ready(); }
};

// Throws std::runtime_error when there is no memory for what is to be kept.
template <typename T>
KeptWeights<T> find_packed(at::TensorList weights, const StackShape& shape, cpu::Storage storage);

// The stack that is kept for these weights and such a batch, or null. Takes no note of weights that it does not know,
// and no memory.
template <typename T>
std::shared_ptr<const cpu::PackedStack<T>> peek_packed(at::TensorList weights, int64_t batch, cpu::Storage storage);

// Keeps a stack that find_packed returned and the call has packed.
template <typename T>
void keep_packed(at::TensorList weights, const StackShape& shape, const KeptWeights<T>& packed);

// Forgets everything about stacks whose first weight is this TensorImpl; it need not exist any more.
void drop_packed(const void* first_weight);

struct PackedCounts {
  int64_t stacks;  // kept
  int64_t bytes;   // of those
  int64_t noted;   // seen once
  int64_t hits;    // calls that packed nothing, since the process began
};
PackedCounts packed_counts();

}  // namespace stacked_lstm
