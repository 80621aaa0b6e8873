// csrc/stack/resets.h: resets part a sequence in two: what is before a reset has no influence on what comes after it.
//
// resets[t][b] resets sequence b between the steps t - 1 and t, in both directions: the state that would cross is zero.
//
//   forward lane   begins step t with h = c = 0; at t = 0 in place of h_0 and c_0
//   reverse lane   begins step t - 1 with h = c = 0; at t = 0 there is nothing to reset
//
// So one array serves both directions: the reset before step t of a forward lane is at boundary t, that of a reverse lane at
// boundary t + 1. A lane's output, and what is saved of a step, are what the step has computed. Only what the next step reads is
// zero. In a backward pass, no gradient of h or c crosses a reset.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "stack.h"

namespace stacked_lstm {

// The boundary that a lane crosses before its step at time t.
inline int64_t boundary_before(const StackShape& shape, int64_t lane, int64_t t) {
  return lane % shape.directions ? t + 1 : t;
}

// The resets of a call as lists, for host code: most boundaries have none.
class ResetLists {
 public:
  ResetLists() = default;
  // `resets`: (steps, batch) bytes, 0 or 1; null if there are none.
  ResetLists(const uint8_t* resets, const StackShape& shape) {
    if (!resets) return;
    first_.assign(static_cast<size_t>(shape.steps) + 2, 0);
    for (int64_t t = 0; t < shape.steps; ++t) {
      const uint8_t* const row = resets + t * shape.batch;
      for (int64_t b = 0; b < shape.active(t); ++b) {
        if (row[b]) sequences_.push_back(b);
      }
      first_[static_cast<size_t>(t) + 1] = sequences_.size();
    }
    first_.back() = sequences_.size();  // boundary `steps`: a reverse lane begins there, and nothing is reset
  }

  bool empty() const { return sequences_.empty(); }
  // The sequences that are reset at a boundary, in rising order.
  struct List {
    const int64_t *first = nullptr, *last = nullptr;
    const int64_t* begin() const { return first; }
    const int64_t* end() const { return last; }
    bool empty() const { return first == last; }
    bool has(int64_t sequence) const { return std::binary_search(first, last, sequence); }
    // Those of the sequences from … to-1.
    List within(int64_t from, int64_t to) const {
      const int64_t* const begins = std::lower_bound(first, last, from);
      return {begins, std::lower_bound(begins, last, to)};
    }
  };
  List at(int64_t boundary) const {
    if (empty()) return {};
    const size_t n = static_cast<size_t>(boundary);
    return {sequences_.data() + first_[n], sequences_.data() + first_[n + 1]};
  }
  // Whether any sequence is reset at one of the boundaries first … last-1.
  bool any(int64_t first, int64_t last) const {
    return !empty() && first_[static_cast<size_t>(first)] < first_[static_cast<size_t>(last)];
  }

 private:
  std::vector<int64_t> sequences_;
  std::vector<size_t> first_;  // of each boundary's list: steps + 2
};

}  // namespace stacked_lstm
