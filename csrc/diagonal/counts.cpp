// csrc/diagonal/counts.cpp: the schedule of a call in diagonals, and how many products and launches it will take.
#include <algorithm>

#include "../driver/driver.h"
#include "diagonal.h"

namespace stacked_lstm::diagonal {
namespace {

thread_local std::optional<int64_t> forced_chunk;

}  // namespace

Diagonals plan(const StackShape& shape, int64_t accumulator_bytes) {
  Diagonals plan = plan_diagonals(shape, accumulator_bytes);
  if (forced_chunk) {
    plan.chunk_steps = std::min(*forced_chunk, shape.steps);
    plan.input_chunks = 1;
  }
  return plan;
}

void force_chunk(std::optional<int64_t> steps) { forced_chunk = steps; }

DiagonalCounts predict(const StackShape& shape, const StackOptions& options, Saving saving, int64_t accumulator_bytes,
                       bool backward, bool weight_grad, bool input_grad) {
  const Diagonals schedule = plan(shape, accumulator_bytes);
  const int64_t lanes = shape.lanes(), projected = options.projects() ? 1 : 0, two = shape.directions == 2 ? 1 : 0;
  DiagonalCounts counts{schedule};
  if (shape.batch == 0) return counts;
  counts.launches = (1 + projected) * schedule.diagonals();
  counts.products = (1 + projected) * schedule.diagonals();
  for (int64_t stage = 0; stage < schedule.stages(); ++stage) {
    const Diagonals::Lanes some = schedule.lanes(stage);
    const int64_t chunk = schedule.chunk_of(stage, some.first);
    if (!backward) {
      if (two || some.first == 0) counts.products += chunk % schedule.input_chunks == 0 ? shape.directions : 0;
      if (!two && some.first + some.count > 1) ++counts.products;
      continue;
    }
    if (saving == Saving::recompute) counts.products += 2 * some.count;
    if (two) {
      if (some.first / 2 + 1 < shape.depth() && chunk + 1 == schedule.chunks()) ++counts.products;
      if (chunk + 1 == schedule.chunks()) --counts.products;  // a layer's last step has no recurrent product
    } else {
      const int64_t below = std::min(some.first + some.count, shape.depth() - 1) - some.first;
      const bool shorter = schedule.length(chunk) < schedule.chunk_steps;
      if (below > 0) counts.products += shorter && below > 1 ? 2 : 1;
      // A diagonal whose only lane is at its last step has none either.
      if (some.count == 1 && chunk + 1 == schedule.chunks()) --counts.products;
    }
  }
  if (!backward) return counts;
  ++counts.products;  // the gradient of h_0
  const auto launches = [](int64_t cells) { return (cells + driver::kCopiesALaunch - 1) / driver::kCopiesALaunch; };
  if (weight_grad || saving == Saving::recompute) {
    counts.launches += launches(lanes * (shape.steps > 1 ? 2 : 1));
    int64_t masked = 0;  // layers that read masked h
    for (int64_t k = 0; k + 1 < shape.depth(); ++k) masked += options.dropout[k] > 0 ? 1 : 0;
    counts.launches += launches(masked);
  }
  if (weight_grad) counts.products += (2 + projected) * lanes;
  if (input_grad) ++counts.products;
  return counts;
}

}  // namespace stacked_lstm::diagonal
