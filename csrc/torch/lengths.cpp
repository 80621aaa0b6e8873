// csrc/torch/lengths.cpp: see lengths.h.
#include "lengths.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstring>
#include <numeric>

namespace stacked_lstm {

using at::Tensor;

LengthOrder::LengthOrder(const OptionalTensor& lengths, const Tensor& input, const StackShape& shape) : shape_(shape) {
  if (!lengths) return;
  const Tensor contiguous = lengths->contiguous();
  const int64_t* const length = contiguous.const_data_ptr<int64_t>();
  const int64_t count = contiguous.numel();
  const auto longer = [&](int64_t one, int64_t other) { return length[one] > length[other]; };
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  if (std::is_sorted(order.begin(), order.end(), longer)) return;
  std::stable_sort(order.begin(), order.end(), longer);
  std::vector<int64_t> inverse(order.size());
  for (size_t n = 0; n < order.size(); ++n) inverse[static_cast<size_t>(order[n])] = static_cast<int64_t>(n);
  const auto on_device = [&](std::vector<int64_t>& numbers) {
    return at::from_blob(numbers.data(), {count}, at::kLong).clone().to(input.device());
  };
  order_ = on_device(order), inverse_ = on_device(inverse);
}

Tensor LengthOrder::sort(const Tensor& sequences) const {
  return sorted() ? sequences : sequences.index_select(1, order_);
}
OptionalTensor LengthOrder::sort(const OptionalTensor& sequences) const {
  return sequences ? OptionalTensor(sort(*sequences)) : std::nullopt;
}
Tensor LengthOrder::restore(const Tensor& sequences) const {
  return sorted() ? sequences : sequences.index_select(1, inverse_);
}

Tensor LengthOrder::states(const Tensor& state, const Tensor& index, bool cell) const {
  if (sorted()) return state;
  if (state.dim() == 3) return state.index_select(1, index);
  std::vector<Tensor> parts;  // of a flat state: stack/state_layout.h
  int64_t first = 0;
  for (const LayerShape& layer : shape_.layers) {
    const int64_t width = cell ? layer.hidden : layer.output(), elements = shape_.directions * shape_.batch * width;
    const Tensor part = state.narrow(0, first, elements).view({shape_.directions, shape_.batch, width});
    parts.push_back(part.index_select(1, index).flatten());
    first += elements;
  }
  return at::cat(parts);
}

Tensor existing_rows(const StackShape& shape) {
  std::vector<int64_t> rows;
  for (int64_t t = 0; t < shape.steps; ++t) {
    for (int64_t b = 0; b < shape.active(t); ++b) rows.push_back(t * shape.batch + b);
  }
  return at::from_blob(rows.data(), {static_cast<int64_t>(rows.size())}, at::kLong).clone();
}

void clear_padding(Tensor& sequences, const StackShape& shape) {
  if (!shape.has_lengths() || sequences.numel() == 0) return;
  if (!sequences.is_cpu()) {
    Tensor counts = at::empty({shape.padded_steps}, at::kLong);
    int64_t* const count = counts.mutable_data_ptr<int64_t>();
    std::fill(std::copy(shape.counts.begin(), shape.counts.end(), count), count + shape.padded_steps, 0);
    const Tensor number = at::arange(shape.batch, sequences.options().dtype(at::kLong));
    const Tensor padding = number.unsqueeze(0).ge(counts.to(sequences.device()).unsqueeze(1));
    sequences.masked_fill_(padding.unsqueeze(2), 0);
    return;
  }
  const int64_t row_bytes = static_cast<int64_t>(sequences.nbytes()) / shape.all_rows();
  char* const data = static_cast<char*>(sequences.mutable_data_ptr());
  for (int64_t t = 0; t < shape.padded_steps; ++t) {
    const int64_t exist = t < shape.steps ? shape.active(t) : 0;
    std::memset(data + (t * shape.batch + exist) * row_bytes, 0,
                static_cast<size_t>((shape.batch - exist) * row_bytes));
  }
}

}  // namespace stacked_lstm
