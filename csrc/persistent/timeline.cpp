// csrc/persistent/timeline.cpp: see timeline.h.
#include "timeline.h"

#include <algorithm>

#include "cost.h"

namespace stacked_lstm::persistent {

std::vector<Work> timeline(const Plan& plan, const StackShape& shape, const Costs& costs) {
  std::vector<Work> all;
  double start = 0;
  const auto count = static_cast<int64_t>(plan.passes.size());
  for (int64_t number = 0; number < count; ++number) {
    const int64_t p = plan.backward ? count - 1 - number : number;
    const Pass& pass = plan.passes[static_cast<size_t>(p)];
    const Pass* before = number == 0 ? nullptr : &plan.passes[static_cast<size_t>(plan.backward ? p + 1 : p - 1)];
    const int64_t segments = pass.segments(shape.steps), most = pass.segment_steps / pass.cut.chunk_steps;
    const double launches = static_cast<double>(pass.rounds * segments);
    const double prepare = (pass.terms.launch + pass.terms.load) / launches;
    for (int64_t segment = 0; segment < segments; ++segment) {
      start += pass.ahead_us / static_cast<double>(segments);
      const int64_t steps = std::min(pass.segment_steps, shape.steps - segment * pass.segment_steps);
      const int64_t first_chunk = segment * most, chunks = pass.chunks(steps);
      const double makespan = makespan_us(pass, steps, costs);
      for (int64_t batch_group = 0; batch_group < pass.batch_groups; ++batch_group) {
        if (batch_group % pass.copies == 0) start += prepare + (batch_group > 0 ? makespan : 0);
        std::vector<double> arrived(static_cast<size_t>(chunks));
        for (int64_t n = 0; n < pass.count(); ++n) {
          const LayerPlan& layer = pass.in_order(n);
          double free = start;
          for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            double& ready = arrived[static_cast<size_t>(chunk)];
            const double begin = std::max(free, n > 0 ? ready + costs.hand_over_us : start);
            const int64_t length = std::min<int64_t>(pass.cut.chunk_steps, steps - chunk * pass.cut.chunk_steps);
            free = ready = begin + layer.cost.chunk_us(length);
            for (int64_t direction = 0; direction < shape.directions; ++direction) {
              const bool waits = n > 0 || before;
              all.push_back({p, batch_group, layer.layer, direction, first_chunk + chunk,
                             pass.first_block(layer.layer, direction, batch_group % pass.copies), pass.cut.blocks,
                             !waits          ? -1
                             : plan.backward ? layer.layer + 1
                                             : layer.layer - 1,
                             n > 0    ? first_chunk + chunk + 1
                             : before ? before->chunks(shape.steps)
                                      : 0,
                             begin, free});
            }
          }
        }
      }
      start += makespan;
    }
  }
  return all;
}

}  // namespace stacked_lstm::persistent
