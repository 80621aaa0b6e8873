// csrc/persistent/choice.cpp: see choice.h.
#include "choice.h"

#include <cmath>
#include <vector>

#include "../stack/wavefront.h"
#include "cost.h"
#include "planner.h"

namespace stacked_lstm::persistent {

DiagonalCost predict_diagonals(const StackShape& shape, const Device& device, const Costs& costs, const Ask& ask,
                               bool backward) {
  const Model m{shape, device, costs, ask, backward};
  DiagonalCost cost;
  if (shape.steps < 1 || shape.batch < 1 || shape.depth() < 1) return cost;
  const Diagonals schedule = plan_diagonals(shape, ask.bytes == 8 ? 8 : 4);
  const auto number = [](int64_t n) { return static_cast<double>(n); };
  const int64_t directions = shape.directions;
  // Of all layers below k: multiply-adds of a row with W_hh; those with W_ih of layers 1 and up; units.
  std::vector<double> recurrent{0}, inputs{0}, units{0};
  for (int64_t k = 0; k < shape.depth(); ++k) {
    const double projected = number(m.layer(k).projection * m.layer(k).hidden * directions);
    recurrent.push_back(recurrent.back() + m.recurrent_work(k) + projected);
    inputs.push_back(inputs.back() + (k > 0 ? m.input_work(k) : 0));
    units.push_back(units.back() + number(m.layer(k).hidden * directions));
  }
  const double bytes = number(ask.bytes), batch = number(shape.rows()) / number(shape.steps);  // rows of a step
  // Recurrent weights are read every diagonal: from L2 if all of them stay there.
  const double l2 = costs.l2_rate * number(device.sms), all = recurrent.back() * bytes;
  const double kept = ask.saving != Saving::none ? 20 : ask.states ? 4 : 0;  // c, and the gates for a backward pass
  const double in_cell = backward ? 24 + 8 * bytes : 36 + bytes + kept;

  // What the layers of some lanes have of one of the sums above.
  const auto of = [&](const std::vector<double>& below, const Diagonals::Lanes& some) {
    const int64_t last = (some.first + some.count - 1) / directions;
    return below[static_cast<size_t>(last + 1)] - below[static_cast<size_t>(some.first / directions)];
  };

  const std::vector<LayerRun> runs = runs_of(shape);
  for (int64_t stage = 0; stage < schedule.stages(); ++stage) {
    const Diagonals::Lanes lanes = schedule.lanes(stage);
    const int64_t length = schedule.length_of_stage(stage);
    const double rows = batch * number(length);
    double host = 0, on_device = 0, large = 0;
    for (const LayerRun& run : runs) {
      const Diagonals::Lanes some = schedule.in_run(lanes, run);
      if (some.count == 0) continue;
      const double weights = of(recurrent, some), steps = number(schedule.length_of(stage, some));
      const double kernels = m.layer(run.first_layer).projection > 0 ? 2 : 1;  // of each kind
      const double reading =
          all <= 0.7 * number(device.l2_bytes) ? m.cycles_us(weights * bytes / l2) : m.memory_us(weights * bytes);
      // A product's tiles have at least 64 columns.
      const double multiplying = m.large_us(weights * std::max(batch, 64.0), 0, 0);
      const double product = std::max(costs.kernel_us, costs.kernel_us / 2 + std::max(reading, multiplying));
      const double gates = std::max(costs.kernel_us, m.memory_us(of(units, some) * batch * in_cell));
      host += steps * (kernels * (costs.host_product_us + costs.host_launch_us));
      on_device += steps * (kernels * (product + gates));

      // One product for all layers of the run. If the run is not the lowest one, its first layer has a product of its
      // own. The product of layer 0 is counted behind the loop.
      const bool own = directions == 1 && run.first_layer > 0 && some.first == run.first_layer;
      const double own_work = own ? m.input_work(run.first_layer) : 0;
      const auto product_us = [&](double work) {
        return std::max(costs.host_product_us, m.large_us(work * rows, 1, 0));
      };
      if (own) large += product_us(own_work);
      if (!own || some.count > 1) large += product_us(of(inputs, some) - own_work);
    }
    cost.host_us += host, cost.device_us += on_device;
    cost.total_us += std::max(host, on_device);
    cost.diagonals += length;

    if (backward && ask.saving == Saving::recompute) {  // computing the gates again takes two products for each lane
      const double products = 2 * number(lanes.count), work = of(recurrent, lanes) + of(inputs, lanes);
      large += std::max(products * costs.host_product_us, m.large_us(work * rows, products, 0));
    }
    cost.large_us += large;
  }
  const double input = m.input_work(0);
  if (!backward || ask.saving == Saving::recompute) {
    cost.large_us += m.large_us(input * number(shape.rows()), 1, input);
  }
  if (backward) cost.large_us += gradients_us(m);
  cost.total_us = std::max(cost.total_us + cost.large_us, physical_limit_us(m));  // all weights come from memory once
  return cost;
}

double diagonal_us(const StackShape& shape, const Device& device, const Costs& costs, const Ask& ask, bool backward) {
  return predict_diagonals(shape, device, costs, ask, backward).total_us;
}

Choice choose(const StackShape& shape, const Device& device, const Costs& costs, const Ask& ask) {
  const bool training = ask.saving != Saving::none;
  Choice choice;
  choice.forward = plan(shape, device, costs, ask, false);
  choice.backward.backward = true;
  choice.diagonal_forward = predict_diagonals(shape, device, costs, ask, false);
  if (training) {
    choice.backward = plan(shape, device, costs, ask, true);
    choice.diagonal_backward = predict_diagonals(shape, device, costs, ask, true);
  }
  choice.diagonal_us = choice.diagonal_forward.total_us + choice.diagonal_backward.total_us;
  const std::string& why_not = choice.forward.why_not.empty() ? choice.backward.why_not : choice.forward.why_not;
  if (!why_not.empty()) {
    choice.reason = "the persistent kernel cannot run it: " + why_not;
    return choice;
  }
  choice.persistent_us = choice.forward.predicted_us + choice.backward.predicted_us;
  choice.persistent = choice.persistent_us <= choice.diagonal_us;
  const auto text = [](double us) { return std::to_string(static_cast<int64_t>(std::llround(us))) + " µs"; };
  choice.reason = choice.persistent ? "the persistent kernel is predicted to take " + text(choice.persistent_us) +
                                          ", the diagonals " + text(choice.diagonal_us)
                                    : "the diagonals are predicted to take " + text(choice.diagonal_us) +
                                          ", the persistent kernel " + text(choice.persistent_us);
  return choice;
}

}  // namespace stacked_lstm::persistent
