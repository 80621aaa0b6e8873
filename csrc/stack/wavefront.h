// csrc/stack/wavefront.h: the schedule: which worker computes which (layer, chunk), when and after what, and the
// predicted cost.
//
//            t →  chunk 0  chunk 1  chunk 2  chunk 3        Layer k's chunk c needs layer k-1's chunk c and its own
//   layer 0      ■■■■■■■■ ■■■■■■■■ ■■■■■■■■ ■■■■■■■■       chunk c-1, so that L layers side by side take
//   layer 1               ■■■■■■■■ ■■■■■■■■ ■■■■■■■■ …     T + (L-1)·chunk_steps steps instead of T·L. The input
//   layer 2                        ■■■■■■■■ ■■■■■■■■ …     projection of a chunk is one product.
//
// The workers of a call form a box: batch_slices × layer_groups × unit_slices.
//   batch slices   share nothing but weights;
//   layer groups   are the wavefront: layer group g takes the lanes at positions g, g + G, …, each lane from its first
//                  chunk to its last (bands, not diagonals, so that a worker reads the same recurrent weights for the
//                  whole sequence);
//   unit slices    split one lane's hidden units and hand h over once a step.
// A schedule has one or two phases. A phase is some consecutive layers with their own layer groups × slices. If L is not a
// multiple of the layer groups, the second phase splits the remaining layers by units instead.
//
// Positions. A position is a lane's number in the order in which lanes are taken: forward from layer 0 up, backward
// from the top layer down. A position waits only for lower positions, and every worker takes its positions in rising
// order. So the lowest unfinished position can always go on, and workers never wait for each other in a circle.
//
// A bidirectional layer needs the whole layer below it. So its two directions run side by side, and the layers run in
// turn.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "stack.h"

namespace stacked_lstm {

struct Phase {
  int64_t first_layer = 0, last_layer = 0;  // in the order in which they are taken
  int64_t layer_groups = 1;
  int64_t unit_slices = 1;

  int64_t workers() const { return layer_groups * unit_slices; }
};

// Where a worker stands in a phase.
struct WorkerPlace {
  int64_t batch_slice, layer_group, slice;
};

struct Schedule {
  int64_t batch_slices = 1;
  int64_t chunk_steps = 1;
  int64_t phases = 1;
  Phase phase[2];
  double predicted_us = 0;
  const char* binds = "arithmetic";  // the largest term of the prediction

  int64_t workers_per_batch_slice() const {
    return phases == 2 ? std::max(phase[0].workers(), phase[1].workers()) : phase[0].workers();
  }
  int64_t workers() const { return batch_slices * workers_per_batch_slice(); }
  int64_t chunks(int64_t steps) const { return (steps + chunk_steps - 1) / chunk_steps; }

  const Phase& phase_of(int64_t position, int64_t directions) const {
    return phases == 2 && position >= phase[1].first_layer * directions ? phase[1] : phase[0];
  }
  // Steps that pass before the last layer starts.
  int64_t fill_steps(int64_t directions) const {
    int64_t layer_groups = 1;
    for (int64_t p = 0; p < phases; ++p) layer_groups = std::max(layer_groups, phase[p].layer_groups);
    return directions == 1 ? (layer_groups - 1) * chunk_steps : 0;
  }

  // Calls visit(position, place) for every position that `worker` has a part in, in the order in which it takes them.
  template <typename Visit>
  void for_each_position(int64_t directions, int64_t worker, Visit&& visit) const {
    const int64_t batch_slice = worker / workers_per_batch_slice(), index = worker % workers_per_batch_slice();
    for (int64_t p = 0; p < phases; ++p) {
      if (index >= phase[p].workers()) continue;
      const WorkerPlace place{batch_slice, index / phase[p].unit_slices, index % phase[p].unit_slices};
      const int64_t first = phase[p].first_layer * directions, last = phase[p].last_layer * directions;
      for (int64_t position = first + place.layer_group; position < last; position += phase[p].layer_groups) {
        visit(position, place);
      }
    }
  }
};

// Why a schedule cannot run a stack; null if it can.
inline const char* why_not(const Schedule& schedule, const StackShape& shape, int64_t threads) {
  if (schedule.workers() > threads) return "it has more workers than threads";
  if (schedule.batch_slices < 1 || schedule.batch_slices > std::max<int64_t>(shape.batch, 1)) {
    return "batch_slices should be between 1 and the batch";
  }
  if (schedule.chunk_steps < 1) return "chunk_steps should be at least 1";
  int64_t layer = 0;
  for (int64_t p = 0; p < schedule.phases; ++p) {
    const Phase& phase = schedule.phase[p];
    if (phase.first_layer != layer || phase.last_layer <= layer) return "its phases should take the layers in order";
    if (phase.layer_groups < 1 || phase.unit_slices < 1) return "groups and slices should be at least 1";
    layer = phase.last_layer;
  }
  return layer == shape.depth() ? nullptr : "its phases should take every layer";
}

// How the sequences of a call are shared out to batch slices. Every slice has at least one sequence.
struct BatchShares {
  std::vector<int64_t> first;  // the first sequence of each slice, then the batch
  int64_t most_rows = 0;       // rows of the largest slice, over all steps
};

// All slices get about the same number of rows. A packed batch is sorted by length, so its first slices have fewer,
// longer sequences.
inline BatchShares share_batch(const StackShape& shape, int64_t slices) {
  const int64_t batch = shape.batch;
  BatchShares shares{std::vector<int64_t>(static_cast<size_t>(slices + 1), batch)};
  const auto first = [&](int64_t slice) -> int64_t& { return shares.first[static_cast<size_t>(slice)]; };
  if (!shape.packed()) {
    for (int64_t slice = 0; slice < slices; ++slice) first(slice) = batch * slice / slices;
    shares.most_rows = (batch + slices - 1) / slices * shape.steps;
    return shares;
  }
  first(0) = 0;
  int64_t slice = 0, rows = 0, own_rows = 0, length = shape.steps;
  for (int64_t b = 0; b < batch; ++b) {
    while (length > 0 && shape.active(length - 1) <= b) --length;
    // Sequence b begins the next slice if more than half of its rows lie beyond this slice's share (`enough`), or if
    // only one sequence is left for each of the remaining slices (`must`).
    const bool enough = slices * (2 * rows + length) > 2 * shape.rows() * (slice + 1);
    const bool must = batch - b == slices - 1 - slice;
    if (b > first(slice) && slice + 1 < slices && (enough || must)) first(++slice) = b, own_rows = 0;
    rows += length, own_rows += length;
    shares.most_rows = std::max(shares.most_rows, own_rows);
  }
  return shares;
}

// What a chunk of a position needs of the layer before it (below it in forward, above it in backward).
struct Needs {
  int64_t first_position, positions;  // none when positions is 0
  int64_t chunks;                     // how many chunks each of them must have finished
};

inline Needs needs(const Schedule& schedule, int64_t steps, int64_t directions, int64_t position, int64_t chunk) {
  const int64_t layer = position / directions;
  if (layer == 0) return {0, 0, 0};
  return {(layer - 1) * directions, directions, directions == 1 ? chunk + 1 : schedule.chunks(steps)};
}

constexpr int64_t lane_at(int64_t position, int64_t lanes, bool backward) {
  return backward ? lanes - 1 - position : position;
}

// ---- The cost model -------------------------------------------------------------------------------------------------

// The rates of one core, in multiply-adds and bytes a nanosecond. They are what the kernels reach on a server core with
// AVX-512 (Zen 4, in a virtual machine), fitted so that the model picks the schedule that was the fastest of several
// forced ones. The cache sizes are read at run time.
struct CpuMachine {
  double multiply_adds = 50;   // of one element type, here with 16 elements a vector
  double l2_bytes = 1 << 20;   // what stays close to the core from step to step
  double near_rate = 90;       // bytes a nanosecond from L2
  double l3_bytes = 32 << 20;  // of all cores together
  double far_rate = 60;        // bytes a nanosecond from L3
  double memory_rate = 8;      // bytes a nanosecond from memory
  double cell = 0.5;           // nanoseconds a cell, beside its products
  double hand_over = 500;      // nanoseconds from one core's store to another's use, with the wait for the slower core
  double imbalance = 1.05;     // time of the slower of two slices that meet every step, divided by their mean
  double start = 4000;         // nanoseconds to wake a second worker
  int64_t unit_grain = 64;     // units are split no finer than this
};

namespace detail {

struct StepCost {
  double arithmetic, weights, hand_over;
  // Reading and multiplying do not overlap entirely.
  double total() const { return std::max(arithmetic, weights) + 0.25 * std::min(arithmetic, weights) + hand_over; }
};

inline StepCost step_cost(const LayerShape& layer, const CpuMachine& machine, int64_t weight, double rows,
                          const Phase& phase) {
  const auto slices = static_cast<double>(phase.unit_slices), layer_groups = static_cast<double>(phase.layer_groups);
  const auto grain = machine.unit_grain / 4;
  const auto units = static_cast<double>(round_up((layer.hidden + phase.unit_slices - 1) / phase.unit_slices, grain));
  double recurrent = 4 * units * static_cast<double>(layer.output());
  if (layer.projection > 0) recurrent += units * static_cast<double>(layer.projection);
  // Every other step reads the panels in reverse ("Alternating panel order" in csrc/cpu/kernels.h). So if the weights
  // are larger than a cache, the part that fits is still cached when it is read again.
  const double bytes = recurrent * static_cast<double>(weight), everybody = bytes * slices * layer_groups;
  const double near = std::min(bytes, 0.9 * machine.l2_bytes);
  const double beyond = std::min(bytes - near, bytes * std::max(1 - 0.75 * machine.l3_bytes / everybody, 0.0));
  const double reading =
      near / machine.near_rate + (bytes - near - beyond) / machine.far_rate + beyond / machine.memory_rate;
  const double input = 4 * units * static_cast<double>(layer.input) * rows / machine.multiply_adds;
  const double cells = rows * units * machine.cell;
  const double slower = slices > 1 ? machine.imbalance : 1;
  return {slower * (recurrent * rows / machine.multiply_adds + input + cells), slower * (reading + input + cells),
          slices > 1 ? machine.hand_over * (layer.projection > 0 ? 2 : 1) : 0};
}

inline int64_t chunk_for(const StackShape& shape, const Phase& phase, int64_t batch_slices, int64_t element) {
  const int64_t steps = shape.steps, rows = (shape.batch + batch_slices - 1) / batch_slices;
  int64_t chunk;
  if (phase.layer_groups > 1 && shape.directions == 1) {  // filling the wavefront costs a chunk a layer group
    const int64_t most = rows >= 32 ? 4 : rows >= 4 ? 16 : 32;
    chunk = std::min(std::max<int64_t>(steps * shape.depth() / (50 * phase.layer_groups), 8), most);
    chunk = std::min(chunk, std::max<int64_t>(steps / 6, 1));
  } else {  // enough rows for a product at full rate, few enough to stay in L2
    int64_t widest = 1;
    for (const LayerShape& layer : shape.layers) widest = std::max(widest, layer.padded_hidden());
    chunk =
        std::min<int64_t>(192, std::max<int64_t>((1 << 20) / (4 * widest * element), 16)) / std::max<int64_t>(rows, 1);
  }
  return std::min(std::max<int64_t>(chunk, 1), std::max<int64_t>(steps, 1));
}

inline void predict(Schedule& schedule, const StackShape& shape, double rows, const CpuMachine& machine, int64_t weight,
                    bool backward) {
  const int64_t depth = shape.depth(), directions = shape.directions;
  const double steps = static_cast<double>(shape.steps);
  const bool alike = shape.same_hidden() && shape.same_output();
  double total = 0, arithmetic = 0, weights = 0, hand_over = 0, fill = 0;
  for (int64_t p = 0; p < schedule.phases; ++p) {
    const Phase& phase = schedule.phase[p];
    double sum = 0, most = 0;
    double busiest = 0;  // the layer group with the most work
    std::vector<double> by_group(alike ? 0 : static_cast<size_t>(phase.layer_groups));
    for (int64_t n = phase.first_layer; n < phase.last_layer; ++n) {
      const StepCost cost = step_cost(shape.layers[backward ? depth - 1 - n : n], machine, weight, rows, phase);
      sum += cost.total(), most = std::max(most, cost.total());
      if (!alike) {
        double& group = by_group[static_cast<size_t>((n - phase.first_layer) % phase.layer_groups)];
        busiest = std::max(busiest, group += cost.total());
      }
      arithmetic += cost.arithmetic, weights += cost.weights, hand_over += cost.hand_over;
    }
    const double layers = static_cast<double>(phase.last_layer - phase.first_layer);
    if (directions == 2) {
      total += steps * sum * (phase.layer_groups >= 2 ? 1 : 2);
    } else {
      const int64_t bands = (phase.last_layer - phase.first_layer + phase.layer_groups - 1) / phase.layer_groups;
      // Layers of one width differ only in the input of the lowest, and not by much.
      total += alike ? steps * sum / layers * static_cast<double>(bands) : steps * busiest;
      fill += static_cast<double>((phase.layer_groups - 1) * schedule.chunk_steps) * most;
    }
  }
  total += fill;
  if (schedule.workers() > 1) total += machine.start;
  schedule.predicted_us = total * (backward ? 2 : 1) / 1000;
  schedule.binds = hand_over > std::max(arithmetic, weights) ? "hand-over of h"
                   : weights > arithmetic                    ? "reading the weights"
                   : fill > total / 2                        ? "filling the wavefront"
                                                             : "arithmetic";
}

}  // namespace detail

// The cheapest schedule for at most `threads` workers, by the model above. `element`: bytes of a number; `weight`:
// bytes of a packed weight.
inline Schedule plan_cpu(const StackShape& shape, int64_t threads, const CpuMachine& machine, int64_t element,
                         int64_t weight, bool backward) {
  const int64_t depth = shape.depth(), directions = shape.directions, steps = std::max<int64_t>(shape.steps, 1);
  int64_t widest = 0;  // a layer that is narrower than the slices has no units for some of them
  for (const LayerShape& layer : shape.layers) widest = std::max(widest, layer.output());
  const int64_t most_slices = std::max<int64_t>(widest / machine.unit_grain, 1);

  Schedule best;
  bool first = true;
  double rows = 0;  // mean rows a step of the largest batch slice
  const auto consider = [&](Schedule candidate) {
    candidate.chunk_steps = detail::chunk_for(shape, candidate.phase[0], candidate.batch_slices, element);
    detail::predict(candidate, shape, rows, machine, weight, backward);
    if (first || candidate.predicted_us < best.predicted_us) best = candidate;
    first = false;
  };
  for (int64_t batch_slices = 1; batch_slices <= std::min(threads, std::max<int64_t>(shape.batch, 1)); ++batch_slices) {
    const int64_t share = threads / batch_slices;
    rows = static_cast<double>(share_batch(shape, batch_slices).most_rows) / static_cast<double>(steps);
    for (int64_t layer_groups = 1; layer_groups <= std::min(share, directions == 2 ? 2 : depth); ++layer_groups) {
      const int64_t slices = std::min(share / layer_groups, most_slices);
      Schedule candidate;
      candidate.batch_slices = batch_slices;
      candidate.phase[0] = {0, depth, layer_groups, slices};
      consider(candidate);
      if (slices > 1) {
        candidate.phase[0].unit_slices = 1;
        consider(candidate);
      }
      const int64_t rest = directions == 1 ? depth % layer_groups : 0;
      if (rest > 0 && depth > layer_groups) {  // whole bands, then the remaining layers, split by units
        candidate.phases = 2;
        candidate.phase[0] = {0, depth - rest, layer_groups, 1};
        candidate.phase[1] = {depth - rest, depth, rest, std::min(share / rest, most_slices)};
        consider(candidate);
      }
    }
  }
  return best;
}

// ---- The diagonal schedule, for devices that run one kernel over everything at a time ------------------------------

// Neighbouring layers that are equally wide, as many as there are: first_layer … last_layer - 1. A stack whose layers all
// have one width is one run.
struct LayerRun {
  int64_t first_layer, last_layer;

  int64_t layers() const { return last_layer - first_layer; }
};

inline std::vector<LayerRun> runs_of(const StackShape& shape) {
  std::vector<LayerRun> runs;
  for (int64_t k = 0; k < shape.depth(); ++k) {
    if (k == 0 || !shape.alike(k - 1, k)) runs.push_back({k, k});
    runs.back().last_layer = k + 1;
  }
  return runs;
}

// Stage m holds the chunks (layer k, chunk m - k): all layers at once, each layer a chunk behind the layer below. The
// input projections of a run in a stage are one product, because the stage before has computed all that they need. (The
// run's first layer reads another width, so it has a product of its own.) Step s of a stage, for all its layers side by
// side, is a diagonal: for each run with a layer in it, one recurrent product and one kernel for the gates. The layers of
// a bidirectional stack have to wait for each other, so there a stage holds a chunk of both directions of one layer.
//
// Backward takes the same stages, and the steps in each, from the last to the first.
struct Diagonals {
  int64_t steps = 1;       // T
  int64_t depth = 1;       // L
  int64_t directions = 1;  // D
  int64_t chunk_steps = 1;
  int64_t input_chunks = 1;  // chunks that are projected at once where the whole input is known: of layer 0 or, with
                             // two directions, of every layer
  int64_t runs = 1;          // of the layers

  // The lanes of a stage or of a diagonal: `count` consecutive lanes from lane `first` on.
  struct Lanes {
    int64_t first, count;
  };

  int64_t chunks() const { return (steps + chunk_steps - 1) / chunk_steps; }
  int64_t stages() const { return directions == 2 ? depth * chunks() : chunks() + depth - 1; }
  int64_t chunk_of(int64_t stage, int64_t lane) const { return directions == 2 ? stage % chunks() : stage - lane; }
  int64_t length(int64_t chunk) const { return std::min(chunk_steps, steps - chunk * chunk_steps); }

  Lanes lanes(int64_t stage) const {
    if (directions == 2) return {stage / chunks() * 2, 2};
    const int64_t first = std::max<int64_t>(stage - chunks() + 1, 0);
    return {first, std::min(stage, depth - 1) - first + 1};
  }
  // The lanes of a stage that have a step s. Only the lowest lane (with two directions, both lanes) may lack it: it may
  // be in the last chunk, which may be shorter.
  Lanes lanes(int64_t stage, int64_t s) const {
    Lanes some = lanes(stage);
    if (length(chunk_of(stage, some.first)) <= s) {
      some.count = directions == 2 ? 0 : some.count - 1;
      ++some.first;
    }
    return some;
  }
  // Those of some lanes that are in a run. `count` is 0 if none is.
  Lanes in_run(const Lanes& some, const LayerRun& run) const {
    const int64_t first = std::max(some.first, run.first_layer * directions);
    const int64_t last = std::min(some.first + some.count, run.last_layer * directions);
    return {first, std::max<int64_t>(last - first, 0)};
  }
  // In how many diagonals of a stage one of these lanes of the stage is, of which there is at least one.
  int64_t length_of(int64_t stage, const Lanes& some) const {
    return length(chunk_of(stage, some.first + (directions == 2 ? 0 : some.count - 1)));
  }
  // How many diagonals a stage has.
  int64_t length_of_stage(int64_t stage) const { return length_of(stage, lanes(stage)); }
  int64_t diagonals() const {
    int64_t sum = 0;
    for (int64_t stage = 0; stage < stages(); ++stage) sum += length_of_stage(stage);
    return sum;
  }
};

// A diagonal takes two launches for each run that has a layer in it. So a run of n layers takes 2·(T + (n-1)·C) launches
// with chunks of C steps. That is a fill of 2·(L - runs)·C launches for the stack. Longer chunks save input products: a run
// has two a stage, that of its first layer and that of its other layers, and there are T/C stages; layer 0 has next to none.
// A stage's product is assumed to cost half of a diagonal's two launches and their work (an estimate: to be fitted on a
// GPU).
inline Diagonals plan_diagonals(const StackShape& shape, int64_t element_bytes) {
  const std::vector<LayerRun> runs = runs_of(shape);
  Diagonals plan{shape.steps, shape.depth(), shape.directions, 1, 1, static_cast<int64_t>(runs.size())};
  const int64_t batch = std::max<int64_t>(shape.batch, 1);
  int64_t widest = 1, units = 0;
  for (const LayerShape& layer : shape.layers) widest = std::max(widest, layer.hidden), units += layer.hidden;
  // Enough rows for a large product, but no more than 64 MiB of its results.
  const int64_t bytes = int64_t{64} << 20;
  const int64_t most_rows = bytes / (4 * widest * element_bytes * shape.directions);
  const int64_t rows = std::max(std::min<int64_t>(2048, most_rows), batch);
  const int64_t input_steps = std::min(std::max<int64_t>(rows / batch, 1), std::max<int64_t>(shape.steps, 1));
  if (shape.directions == 2 || shape.depth() == 1) {
    plan.chunk_steps = input_steps;  // there is no fill
    return plan;
  }
  const int64_t fill = shape.depth() - plan.runs;
  int64_t products = plan.runs - 1;  // of a stage
  for (const LayerRun& run : runs) products += run.layers() > 1 ? 1 : 0;
  // √(products·T / 2·fill). Without a fill only the results of a stage's products, of all layers, set a limit.
  int64_t most = input_steps;
  if (plan.runs > 1) most = std::min(most, std::max<int64_t>(bytes / (4 * units * element_bytes * batch), 1));
  int64_t chunk = 1;
  while (chunk < most && (chunk + 1) * (chunk + 1) * 2 * fill <= products * shape.steps) ++chunk;
  plan.chunk_steps = chunk;
  plan.input_chunks = std::max<int64_t>(input_steps / plan.chunk_steps, 1);
  return plan;
}

}  // namespace stacked_lstm
