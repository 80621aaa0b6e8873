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
  const bool two = shape.directions == 2;
  const auto launches = [](int64_t cells) { return (cells + driver::kCopiesALaunch - 1) / driver::kCopiesALaunch; };
  // With skip links, what layers from 1 on do with their input takes a second product.
  const bool skip = shape.link == LinkKind::skip && shape.depth() > 1;
  const bool residual = shape.link == LinkKind::residual && shape.depth() > 1;
  DiagonalCounts counts{schedule};
  if (shape.batch == 0) return counts;
  for (const LayerRun& run : runs_of(shape)) {
    const int64_t first_lane = run.first_layer * shape.directions, lanes = run.layers() * shape.directions;
    const int64_t projected = shape.layers[static_cast<size_t>(run.first_layer)].projection > 0 ? 1 : 0;
    for (int64_t stage = 0; stage < schedule.stages(); ++stage) {
      const Diagonals::Lanes some = schedule.in_run(schedule.lanes(stage), run);
      if (some.count == 0) continue;
      const int64_t chunk = schedule.chunk_of(stage, some.first);
      const int64_t twice = skip ? some.count - (some.first == 0 ? shape.directions : 0) : 0;
      counts.launches += (1 + projected) * schedule.length_of(stage, some);
      counts.products += (1 + projected) * schedule.length_of(stage, some);
      if (!backward) {
        if (two || some.first == 0) {
          counts.products += chunk % schedule.input_chunks == 0 ? shape.directions + (two ? twice : 0) : 0;
        } else if (some.first == first_lane) {
          ++counts.products;
        }
        if (!two && some.first + some.count > first_lane + 1) ++counts.products;
        if (!two) counts.products += twice;
        continue;
      }
      if (saving == Saving::recompute) counts.products += 2 * some.count + twice;
      if (two) {
        if (some.first / 2 + 1 < shape.depth() && chunk + 1 == schedule.chunks()) ++counts.products;
        if (chunk + 1 == schedule.chunks()) --counts.products;  // a layer's last step has no recurrent product
      } else {
        const int64_t last = some.first + some.count;
        const int64_t inside =
            std::min(last, run.last_layer - 1) - some.first;  // lanes whose upper neighbour is in the run
        const bool shorter = schedule.length(chunk) < schedule.chunk_steps;
        if (inside > 0) counts.products += shorter && inside > 1 ? 2 : 1;
        if (last == run.last_layer && last < shape.depth()) ++counts.products;
        // If the only lane of the run that is in a diagonal is at its last step, there is no recurrent product either.
        if (some.count == 1 && chunk + 1 == schedule.chunks()) --counts.products;
      }
    }
    if (!backward) continue;
    ++counts.products;  // the gradient of h_0
    if (weight_grad || saving == Saving::recompute) {
      counts.launches += launches(lanes * (shape.steps > 1 ? 2 : 1));
      int64_t masked = 0;  // layers whose h is masked for the layer above
      for (int64_t k = run.first_layer; k < run.last_layer && k + 1 < shape.depth(); ++k) {
        masked += options.dropout[k] > 0 && !(residual && k > 0) ? 1 : 0;
      }
      counts.launches += launches(masked);
    }
    if (weight_grad) {
      counts.products += (2 + projected) * lanes;
      if (skip) counts.products += lanes - (first_lane == 0 ? shape.directions : 0);
    }
  }
  if (backward && input_grad) counts.products += skip ? shape.depth() : 1;
  return counts;
}

}  // namespace stacked_lstm::diagonal
