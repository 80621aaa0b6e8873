// csrc/persistent/planner.cpp: see planner.h. It tries all cuts of all passes that fit, and takes the cheapest.
#include "planner.h"

#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cost.h"

namespace stacked_lstm::persistent {

namespace {

inline constexpr int kChunkSteps[] = {1, 2, 4, 8, 16, 32};
// Room for the pre-activations that backward computes ahead of a launch, with Saving::recompute.
inline constexpr int64_t kRecomputeBytes = 256 * kMiB;
// Backward: the numbers of segments that are tried, so that weight gradients are computed beside the recurrence. They
// are used only if the time shrinks to less than this share: a smaller gain is within the model's error, and segments
// take memory.
inline constexpr int kSegments[] = {1, 2, 3, 4, 6, 8, 12, 16};
inline constexpr double kWorthSegments = 0.97;
// The kernels' sizes are 32-bit numbers. With these limits none of them, nor batch · batch groups, becomes too large.
inline constexpr int64_t kMostWidth = int64_t{1} << 20, kMostBatch = int64_t{1} << 16, kMostSteps = int64_t{1} << 30;

// Visits all cuts of a lane of `hidden` units that an instance runs, whether or not there is room for them. Chunks and
// the place of W_ih are not decided here. Forward, of instances that differ only in `pieces`, it takes only the one
// with the fewest that holds the rows.
template <typename Visit>
void for_each_cut(const Ask& ask, bool backward, int64_t hidden, Visit&& visit) {
  const Instance* instances = backward ? ask.backward : ask.forward;
  const int64_t count = backward ? ask.backward_count : ask.forward_count, elements = piece_elements(ask.bytes);
  for (const Instance* i = instances; i < instances + count; ++i) {
    if (i->product != ask.product || (i->unit_tiles > 0) != backward) continue;
    Cut cut;
    cut.product = i->product, cut.exchange = i->exchange;
    const int least_blocks = cut.exchange == Exchange::cluster ? kMinCluster : 1;
    cut.batch_tiles = i->batch_tiles, cut.pieces = i->pieces, cut.unit_tiles = i->unit_tiles;
    const auto own = [&](int64_t groups) {
      cut.groups = static_cast<int>(groups);
      cut.blocks = static_cast<int>((hidden + kGroupUnits * groups - 1) / (kGroupUnits * groups));
    };
    if (backward) {
      const int64_t rows = i->pieces * elements;
      if (rows % (4 * kGroupUnits) != 0) continue;
      own(rows / (4 * kGroupUnits));
      if (cut.blocks >= least_blocks && cut.units() <= kMaxWarps * kTileRows * i->unit_tiles) visit(cut);
      continue;
    }
    for (int splits = 1; splits <= kMaxWarps; ++splits) {
      const auto holds = [&](const Instance& other) { return other.pieces * splits * elements >= cut.units(); };
      cut.splits = splits;
      int64_t blocks_before = -1;
      for (int groups = 1; groups * splits <= kMaxWarps; ++groups) {
        own(groups);
        // More groups without fewer blocks only cost more.
        if (cut.blocks < least_blocks || cut.blocks == blocks_before || !holds(*i)) continue;
        blocks_before = cut.blocks;
        const bool smaller = std::any_of(instances, instances + count, [&](const Instance& other) {
          return other.product == i->product && other.exchange == i->exchange && other.batch_tiles == i->batch_tiles &&
                 other.unit_tiles == i->unit_tiles && other.pieces < i->pieces && holds(other);
        });
        if (!smaller) visit(cut);
      }
    }
  }
}

int64_t threads_of(const Cut& cut) {
  return cut.unit_tiles > 0 ? kMaxWarps * kWarpThreads : cut.groups * cut.splits * kWarpThreads;
}

// How many blocks of this cut the device holds at once, one an SM.
int64_t blocks_held(const Device& device, const Cut& cut) {
  const int64_t registers = round_up(registers_thread(instance_of(cut)), kRegisterGrain);
  if (threads_of(cut) * registers > device.registers_sm) return 0;
  if (cut.exchange == Exchange::l2) return device.sms;
  return cut.blocks > kMaxCluster || device.max_cluster < 2 ? 0 : device.clusters(cut.blocks) * cut.blocks;
}

// What CUDA's driver has said of a cut. A block has an SM to itself. So the number of blocks that fit depends only on
// whether they are in clusters, and of which size, and the answer holds for all cuts that are alike in this. Exception:
// `blocks` = 0 for an unclustered cut means that this kernel cannot run on the device at all.
struct Held {
  Cut cut;
  int64_t blocks;

  bool of(const Cut& other) const {
    const auto kernel = [](const Cut& c) {
      return std::tuple(c.product, c.batch_tiles, c.pieces, c.splits, c.unit_tiles, c.groups);
    };
    if (cut.exchange != other.exchange) return false;
    return cut.exchange == Exchange::cluster ? cut.blocks == other.blocks : blocks > 0 || kernel(cut) == kernel(other);
  }
};

class Planner {
 public:
  Planner(const StackShape& shape, const Device& device, const Costs& costs, const Ask& ask, bool backward)
      : m_{shape, device, costs, ask, backward}, directions_(shape.directions), depth_(shape.depth()) {}

  Plan run() {
    Plan plan = refuse(refusal());
    if (!plan.why_not.empty()) return plan;
    // At each further try CUDA's driver has said of one more cut that fewer blocks fit. There are few tries: most
    // devices are as described.
    for (int tries = 0; tries < 64; ++tries) {
      plan = cheapest();
      if (!plan.why_not.empty() || !m_.ask.capacity || !less_than_promised(plan)) return plan;
    }
    return refuse(m_.device.full_name + " holds fewer blocks than its description says, for 64 partitions in turn");
  }

 private:
  struct Tail {
    double us = -1;  // of all passes from a layer on; -1: impossible
    int64_t count = 0;
  };

  Plan refuse(const std::string& why) const {
    Plan none;
    none.backward = m_.backward;
    none.why_not = why;
    return none;
  }

  // Why no plan is tried at all, or "".
  std::string refusal() const {
    const auto text = [](int64_t n) { return std::to_string(n); };
    if (!m_.ask.obstacle.empty()) return m_.ask.obstacle;
    const Device& device = m_.device;
    if (device.major < 8) {
      return "compute capability " + text(device.major) + "." + text(device.minor) +
             " is below 8.0, the least supported";
    }
    if (m_.ask.bytes != 2 && m_.ask.bytes != 4) {
      return "elements of " + text(m_.ask.bytes) + " bytes: the persistent kernel multiplies those of 2 or 4";
    }
    if (m_.shape.steps < 1 || m_.shape.batch < 1 || depth_ < 1) {
      return "there is nothing to run: " + text(depth_) + " layers, " + text(m_.shape.steps) + " steps, batch " +
             text(m_.shape.batch);
    }
    for (int64_t k = 0; k < depth_; ++k) {
      const int64_t widest = std::max(m_.layer(k).hidden, m_.layer(k).input);
      if (widest > kMostWidth) {
        return "layer " + text(k) + " is " + text(widest) + " wide: the persistent kernel takes at most " +
               text(kMostWidth);
      }
    }
    if (m_.shape.batch > kMostBatch || m_.shape.steps > kMostSteps) {
      return "batch " + text(m_.shape.batch) + " and " + text(m_.shape.steps) +
             " steps: the persistent kernel takes at most " + text(kMostBatch) + " and " + text(kMostSteps);
    }
    return "";
  }

  // One sentence with numbers: why not even one layer a pass fits.
  std::string obstacle() const {
    const auto text = [](int64_t n) { return std::to_string(n); };
    const std::string on = m_.device.name, kind = m_.backward ? "backward" : "forward";
    for (int64_t k = 0; k < depth_; ++k) {
      const int64_t hidden = m_.layer(k).hidden;
      const std::string who =
          "layer " + text(k) + " has " + text(hidden) + " hidden units of " + text(m_.ask.bytes) + " bytes";
      int64_t longest = 0, least_blocks = 0, least_shared = 0, least_held = 0;
      const Instance* instances = m_.backward ? m_.ask.backward : m_.ask.forward;
      for (int64_t n = 0; n < (m_.backward ? m_.ask.backward_count : m_.ask.forward_count); ++n) {
        const Instance& i = instances[n];
        if (i.product != m_.ask.product || (i.unit_tiles > 0) != m_.backward) continue;
        longest = std::max(longest, m_.backward ? int64_t{kMaxWarps} * kTileRows * i.unit_tiles
                                                : int64_t{kMaxWarps} * i.pieces * piece_elements(m_.ask.bytes));
      }
      if (longest == 0) {
        return "no " + kind + " kernel is compiled for elements of " + text(m_.ask.bytes) + " bytes and " +
               name_of(m_.ask.product) + " products";
      }
      if (hidden > longest) {
        return who + ", and the " + kind + " kernels hold recurrent rows of at most " + text(longest);
      }
      const auto least = [](int64_t& to, int64_t value) { to = to == 0 ? value : std::min(to, value); };
      for_each_cut(m_.ask, m_.backward, hidden, [&](Cut cut) {
        cut.chunk_steps = 1, cut.inputs_in_shared = false;
        const int64_t shared = shared_bytes(cut, m_.ask.bytes, m_.backward, m_.layer(k).input, hidden, false);
        least(least_shared, shared);
        if (shared > m_.device.shared_block) return;
        least(least_blocks, directions_ * cut.blocks);
        if (held(cut) >= directions_ * cut.blocks) least_held = 1;
      });
      if (least_shared == 0) return who + ", which the compiled " + kind + " kernels do not divide";
      if (least_blocks == 0) {
        return who + ": a block needs at least " + text(least_shared) + " bytes of shared memory, and " + on + " has " +
               text(m_.device.shared_block);
      }
      if (least_blocks > m_.device.sms) {
        return who + ": with its recurrent weights in registers, " + kind + " needs at least " + text(least_blocks) +
               " blocks, one an SM, and " + on + " has " + text(m_.device.sms) + " SMs";
      }
      if (least_held == 0) {
        return who + ": no partition of it, of at least " + text(least_blocks) + " blocks, is held by the " +
               text(m_.device.sms) + " SMs of " + on + " at once with a kernel that is compiled";
      }
    }
    return "no partition of " + text(depth_) + " layers fits the " + text(m_.device.sms) + " SMs of " + on;
  }

  int64_t held(const Cut& cut) const {
    int64_t blocks = blocks_held(m_.device, cut);
    for (const Held& told : told_) {
      if (told.of(cut)) blocks = std::min(blocks, told.blocks);
    }
    return blocks;
  }

  // Asks CUDA's driver about the plan's passes; true if one of them does not fit after all.
  bool less_than_promised(const Plan& plan) {
    for (const Pass& pass : plan.passes) {
      const int64_t blocks = m_.ask.capacity(m_.backward, pass.cut, static_cast<int>(pass.most_inputs),
                                             static_cast<int>(pass.hidden), pass.over);
      if (blocks >= pass.blocks()) continue;
      told_.push_back({pass.cut, std::max<int64_t>(blocks, 0)});
      return true;
    }
    return false;
  }

  // The cheapest pass of the `count` layers from `first` on, without the products between it and other passes; it has
  // no layers if no pass fits. Passes of the same widths are the same, and are computed once.
  const Pass& best_pass(int64_t first, int64_t count) {
    const int64_t hidden = m_.layer(first).hidden;
    const auto key = std::tuple(m_.layer(first).input, hidden, count);
    if (const auto known = passes_.find(key); known != passes_.end()) return known->second;
    Pass best;
    double best_us = -1;
    int smallest_tiles = 0;  // the fewest that hold the whole batch: more columns only cost more
    for_each_cut(m_.ask, m_.backward, hidden, [&](const Cut& cut) {
      if (cut.columns() >= m_.shape.batch && (smallest_tiles == 0 || cut.batch_tiles < smallest_tiles)) {
        smallest_tiles = cut.batch_tiles;
      }
    });
    for_each_cut(m_.ask, m_.backward, hidden, [&](const Cut& cut) {
      if (smallest_tiles > 0 && cut.batch_tiles > smallest_tiles) return;
      if (only_ && cut.exchange != *only_) return;
      Pass pass;
      pass.first_layer = first, pass.last_layer = first + count;
      pass.backward = m_.backward, pass.directions = directions_, pass.hidden = hidden;
      pass.over = m_.backward && count > 1;
      pass.most_inputs = m_.layer(first).input;
      if (count > 1) pass.most_inputs = std::max(pass.most_inputs, m_.layer(first + 1).input);
      pass.cut = cut;
      if (held(cut) < pass.blocks_copy()) return;
      for (const bool in_shared : {true, false}) {
        if (m_.backward && !pass.over && !in_shared) continue;  // there is no W_ih
        for (const int chunk : kChunkSteps) {
          if (chunk > 1 && chunk / 2 >= m_.shape.steps) break;
          pass.cut.chunk_steps = chunk, pass.cut.inputs_in_shared = in_shared;
          if (!predict(pass, m_.shape.steps)) continue;
          const double us = pass.terms.total();
          if (best_us < 0 || us < best_us) best_us = us, best = pass;
        }
      }
    });
    return passes_[key] = best;
  }

  // Decides what is kept where, and predicts the times. False if there is no room for it. `most_steps`: of a segment.
  bool predict(Pass& pass, int64_t most_steps) const {
    const Cut& cut = pass.cut;
    const int64_t bytes = m_.ask.bytes, columns = cut.columns(), steps = m_.shape.steps;
    pass.shared_bytes = shared_bytes(cut, bytes, m_.backward, pass.most_inputs, pass.hidden, pass.over);
    if (pass.shared_bytes > m_.device.shared_block) return false;
    const int64_t copies = held(cut) / pass.blocks_copy();
    if (copies == 0) return false;
    pass.batch_groups = (m_.shape.batch + columns - 1) / columns;
    pass.copies = std::min(copies, pass.batch_groups);
    pass.rounds = (pass.batch_groups + pass.copies - 1) / pass.copies;
    pass.threads = threads_of(cut);
    pass.registers_thread = registers_thread(instance_of(cut));
    pass.weight_registers = weight_registers(instance_of(cut));
    pass.segment_steps = std::min(steps, round_up(most_steps, cut.chunk_steps));
    if (m_.backward && m_.ask.saving == Saving::recompute) {
      const int64_t a_step = m_.shape.batch * pass.lanes() * 4 * pass.hidden * 4;
      const int64_t chunks = kRecomputeBytes / a_step / cut.chunk_steps;
      if (chunks == 0 && cut.chunk_steps > 1) return false;
      pass.segment_steps = std::min(pass.segment_steps, std::max<int64_t>(chunks, 1) * cut.chunk_steps);
    }

    // The sizes of W_hh as the registers hold it, and of W_ih as the products read it.
    const int64_t rows = m_.backward ? kMaxWarps * kTileRows * cut.unit_tiles : 4 * cut.block_units();
    const int64_t k = m_.backward ? 4 * cut.block_units() : cut.pieces * cut.splits * piece_elements(bytes);
    const int64_t a_layer = directions_ * cut.blocks * rows * bytes;
    pass.l2_bytes = 8 * exchanged_words(cut, bytes, m_.backward, pass.copies, pass.lanes());
    pass.layers.assign(static_cast<size_t>(pass.count()), {});
    int64_t loaded = 0, from_l2 = pass.l2_bytes;
    for (int64_t n = 0; n < pass.count(); ++n) {
      LayerPlan& layer = pass.layers[static_cast<size_t>(n)];
      layer.layer = pass.first_layer + n;
      layer.first_block = pass.first_block(layer.layer, 0, 0);
      layer.registers_bytes = a_layer * k;
      const int64_t depth =
          m_.backward ? (n + 1 < pass.count() ? k : 0) : round_up(m_.layer(layer.layer).input, piece_elements(bytes));
      layer.w_ih_bytes = a_layer * depth;
      loaded += layer.registers_bytes + layer.w_ih_bytes;
      if (!cut.inputs_in_shared) from_l2 += layer.w_ih_bytes;
    }
    const Home w_ih = cut.inputs_in_shared ? Home::shared : from_l2 <= m_.device.l2_bytes ? Home::l2 : Home::memory;
    if (w_ih == Home::l2) pass.l2_bytes = from_l2;
    if (pass.l2_bytes > m_.device.l2_bytes) return false;

    const LayerPlan* slowest = nullptr;
    for (LayerPlan& layer : pass.layers) {
      const int64_t inputs = m_.backward ? (layer.layer + 1 < pass.last_layer ? 1 : 0) : m_.layer(layer.layer).input;
      // Layers of the same inputs are alike: forward, all but the lowest of a pass; backward, all but the highest.
      const LayerPlan* alike = &layer == pass.layers.data() ? nullptr : &layer - 1;
      const bool same = alike && (m_.backward ? inputs == 1 : inputs == m_.layer(alike->layer).input);
      layer.w_ih = w_ih;
      layer.cost = same ? alike->cost : predict_step(m_, cut, inputs, w_ih, pass.blocks());
      layer.step_us = layer.cost.chunk_us(cut.chunk_steps) / cut.chunk_steps;
      if (!slowest || layer.step_us > slowest->step_us) slowest = &layer;
    }
    pass.step_us = slowest->step_us;

    // First the makespan of the last segment, then of all of them. All segments but the last have whole chunks.
    const int64_t segments = pass.segments(steps), rest = steps - (segments - 1) * pass.segment_steps;
    const double last_us = makespan_us(pass, rest, m_.costs);
    pass.makespan_us =
        last_us +
        (segments > 1 ? static_cast<double>(segments - 1) * makespan_us(pass, pass.segment_steps, m_.costs) : 0);
    pass.ahead_us = ahead_us(pass, segments);

    const double rounds = static_cast<double>(pass.rounds), n = static_cast<double>(steps);
    const int64_t full = steps / cut.chunk_steps, partial = steps - full * cut.chunk_steps;
    const LaneCost& cost = slowest->cost;
    const double projection = static_cast<double>(full) * cost.projection_us(cut.chunk_steps) +
                              (partial > 0 ? cost.projection_us(partial) : 0);
    const double chunks = static_cast<double>(full + (partial > 0)) * cost.chunk_start;
    const double launches = rounds * static_cast<double>(segments);
    Terms terms;
    terms.launch = launches * m_.costs.launch_us;
    terms.load = launches * m_.memory_us(static_cast<double>(loaded));  // further copies find the weights in L2
    terms.exchange = rounds * n * cost.exchange;
    terms.products = rounds * n * cost.products;
    terms.gates = rounds * n * cost.gates;
    terms.saves = rounds * n * cost.saves;
    terms.chunks = rounds * chunks;
    (cost.reads_longest(cut.chunk_steps) && w_ih != Home::shared ? terms.weights_from_l2 : terms.projection) =
        rounds * projection;
    terms.hand_over = launches * static_cast<double>(pass.count() - 1) * m_.costs.hand_over_us;
    const double work = n * cost.step() + projection + chunks;
    terms.fill = std::max(0.0, rounds * (pass.makespan_us - work) - terms.hand_over);
    terms.large_products = pass.ahead_us;
    pass.terms = terms;
    return true;
  }

  // Large products before a pass's launches: its gates again. (For gradients from the layer above it see boundary_us.)
  double ahead_us(const Pass& pass, int64_t segments) const {
    if (!m_.backward || m_.ask.saving != Saving::recompute) return 0;
    double work = 0;
    for (int64_t k = pass.first_layer; k < pass.last_layer; ++k) work += m_.input_work(k) + m_.recurrent_work(k);
    return m_.large_us(work * static_cast<double>(m_.shape.rows()), static_cast<double>(2 * pass.lanes() * segments),
                       work * static_cast<double>(segments));
  }

  // Backward: the product that takes gradients from a pass, whose lowest layer is `above`, to the pass below it.
  double boundary_us(int64_t above) const {
    if (!m_.backward || above >= depth_) return 0;
    const double work = m_.input_work(above);
    return m_.large_us(work * static_cast<double>(m_.shape.rows()), 1, work);
  }

  const Tail& from(int64_t first) {
    Tail& tail = tails_[static_cast<size_t>(first)];
    if (tail.us >= 0 || tail.count < 0) return tail;
    tail.count = -1;  // tried
    const int64_t hidden = m_.layer(first).hidden;
    for (int64_t count = 1; first + count <= depth_; ++count) {
      if (m_.layer(first + count - 1).hidden != hidden || count * directions_ > kMaxLanes) break;
      if (count > 1 && directions_ == 2) break;
      const Pass& pass = best_pass(first, count);
      if (pass.count() == 0) break;  // more layers will not fit either
      const Tail& after = from(first + count);
      if (after.us < 0) continue;
      const double us = pass.terms.total() + boundary_us(first + count) + after.us;
      if (tail.us < 0 || us < tail.us) tail.us = us, tail.count = count;
    }
    return tail;
  }

  Plan cheapest() {
    only_.reset();
    Plan best = cheapest_passes();
    if (!m_.backward || !best.why_not.empty() || m_.device.max_cluster < kMinCluster) return best;
    // A pass is chosen for its own time, not for the SMs that it leaves to weight gradients. The two exchanges differ
    // in these: clusters leave those SMs idle that do not make up a whole cluster. So a plan with only clusters and a
    // plan with only L2 are compared as well.
    for (const Exchange exchange : {Exchange::cluster, Exchange::l2}) {
      if (std::all_of(best.passes.begin(), best.passes.end(), [&](auto& p) { return p.cut.exchange == exchange; }))
        continue;
      only_ = exchange;
      const Plan other = cheapest_passes();
      if (other.why_not.empty() && other.predicted_us < best.predicted_us) best = other;
    }
    only_.reset();
    return best;
  }

  // The cheapest plan with the exchange `only_`, if it is set.
  Plan cheapest_passes() {
    passes_.clear();
    tails_.assign(static_cast<size_t>(depth_ + 1), {});
    tails_.back() = {0, 0};
    Plan plan;
    plan.backward = m_.backward;
    plan.limit_us = physical_limit_us(m_);
    if (from(0).us < 0) return refuse(obstacle());
    for (int64_t k = 0; k < depth_; k = plan.passes.back().last_layer) {
      Pass pass = best_pass(k, from(k).count);
      const int64_t up = k - pass.first_layer;  // the pass may have been made for other layers that are alike
      pass.first_layer += up, pass.last_layer += up;
      for (LayerPlan& layer : pass.layers) layer.layer += up;
      plan.passes.push_back(pass);
    }
    plan.after_us = m_.backward ? gradients_us(m_) : 0;
    add_up(plan);
    return m_.backward ? with_products_beside(plan) : plan;
  }

  // Computes the plan's figures from those of its passes, which it completes, and from `after_us`.
  void add_up(Plan& plan) const {
    plan.terms = {};
    plan.step_us = 0;
    for (Pass& pass : plan.passes) {
      const double boundary = boundary_us(pass.last_layer);
      pass.ahead_us += boundary, pass.terms.large_products += boundary;
      plan.terms.add(pass.terms);
      plan.step_us += static_cast<double>(pass.rounds) * pass.step_us;
    }
    plan.terms.large_products += plan.after_us;
    plan.predicted_us = plan.terms.total();
    plan.binds = plan.terms.largest();
  }

  // Weight gradients beside the recurrence: the same passes, in the number of segments that takes the least time in
  // all, if enough time is gained.
  Plan with_products_beside(const Plan& plain) const {
    Plan best = plain;
    const int64_t steps = m_.shape.steps;
    for (const int segments : kSegments) {
      if (segments > steps) break;
      Plan plan = plain;
      for (auto pass = plan.passes.begin(); pass != plan.passes.end(); ++pass) {
        if (!predict(*pass, (steps + segments - 1) / segments)) return best;
        pass->products_beside = pass != plan.passes.begin() || pass->segment_steps < steps;  // a launch comes after it
      }
      plan.after_us = after_us(plan);
      add_up(plan);
      if (plan.predicted_us < std::min(best.predicted_us, kWorthSegments * plain.predicted_us)) best = plan;
    }
    return best;
  }

  // The time of the products that are left after all launches. The products of a segment begin when the segment is
  // done, and run on the SMs that later launches leave idle. Products that a launch waits for take the whole device
  // meanwhile.
  double after_us(const Plan& plan) const {
    const auto number = [](int64_t n) { return static_cast<double>(n); };
    double left = 0;  // in microseconds of all SMs
    for (auto pass = plan.passes.rbegin(); pass != plan.passes.rend(); ++pass) {
      double work = 0;
      for (int64_t k = pass->first_layer; k < pass->last_layer; ++k) work += m_.input_work(k) + m_.recurrent_work(k);
      const double idle = 1 - number(pass->blocks()) / number(m_.device.sms);
      const double launched = pass->terms.total() - pass->terms.large_products;
      const int64_t steps = m_.shape.steps;
      for (int64_t first = 0, last = steps; last > 0; last = first) {
        first = (last - 1) / pass->segment_steps * pass->segment_steps;
        const double share = number(last - first) / number(steps);
        left = std::max(0.0, left - share * launched * idle * m_.costs.beside_share);
        // Sums of segments are added up in float32.
        left += m_.large_us(work * share * number(m_.shape.rows()), number(2 * pass->lanes()), 3 * work);
      }
    }
    const double input = m_.input_work(0);
    return left + m_.large_us(input * number(m_.shape.rows()), 1, input);
  }

  const Model m_;
  const int64_t directions_, depth_;
  std::vector<Held> told_;
  std::optional<Exchange> only_;
  std::map<std::tuple<int64_t, int64_t, int64_t>, Pass> passes_;  // by the first layer's inputs, hidden and count
  std::vector<Tail> tails_;
};

}  // namespace

Plan plan(const StackShape& shape, const Device& device, const Costs& costs, const Ask& ask, bool backward) {
  return Planner(shape, device, costs, ask, backward).run();
}

}  // namespace stacked_lstm::persistent
