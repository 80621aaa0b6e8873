// csrc/torch/lengths.h: a padded batch whose sequences have lengths. The kernels want the sequences sorted by length, the
// longest first. If they are not, the operators sort copies of a call's tensors, and bring the results back to the caller's order.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../driver/call.h"
#include "../stack/stack.h"

namespace stacked_lstm {

// The order of a batch by length. Sequences of one length keep their order.
class LengthOrder {
 public:
  // `lengths`: as prepare() has checked them.
  LengthOrder(const OptionalTensor& lengths, const at::Tensor& input, const StackShape& shape);

  bool sorted() const { return !order_.defined(); }  // already: every function below returns its argument
  // A tensor (T, B, ...), from the caller's order to that of the kernels.
  at::Tensor sort(const at::Tensor& sequences) const;
  OptionalTensor sort(const OptionalTensor& sequences) const;
  // A state, likewise: h (width: of a lane's output) or c (its hidden size).
  at::Tensor sort_h(const at::Tensor& state) const { return states(state, order_, false); }
  at::Tensor sort_c(const at::Tensor& state) const { return states(state, order_, true); }
  OptionalTensor sort_h(const OptionalTensor& state) const { return state ? sort_h(*state) : state; }
  OptionalTensor sort_c(const OptionalTensor& state) const { return state ? sort_c(*state) : state; }
  // The way back.
  at::Tensor restore(const at::Tensor& sequences) const;
  at::Tensor restore_h(const at::Tensor& state) const { return states(state, inverse_, false); }
  at::Tensor restore_c(const at::Tensor& state) const { return states(state, inverse_, true); }

 private:
  at::Tensor states(const at::Tensor& state, const at::Tensor& index, bool cell) const;

  const StackShape& shape_;
  at::Tensor order_, inverse_;  // on the device of the input; undefined if sorted
};

// The numbers of the rows of a batch that exist, in their order: int64, on the CPU.
at::Tensor existing_rows(const StackShape& shape);

// The rows of a batch that lie behind their sequence's end, set to zero. `sequences`: (T, B, ...), contiguous, sorted.
void clear_padding(at::Tensor& sequences, const StackShape& shape);

}  // namespace stacked_lstm
