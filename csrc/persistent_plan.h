// csrc/persistent.h: the planner of the persistent kernel: which blocks own what of a stack, what lives where on the chip,
// who waits for whom, and what it is predicted to cost on a GPU. Nothing runs that kernel yet. No CUDA, no torch.
//
//            t →  chunk 0  chunk 1  chunk 2  chunk 3        One launch, a block an SM. A layer is owned by a few blocks
//   layer 0      ■■■■■■■■ ■■■■■■■■ ■■■■■■■■ ■■■■■■■■       for the whole sequence: W_hh stays in their registers, W_ih
//   layer 1               ■■■■■■■■ ■■■■■■■■ ■■■■■■■■ …     in their shared memory if it fits. Inside a layer blocks
//   layer 2                        ■■■■■■■■ ■■■■■■■■ …     exchange h every step, between layers every chunk.
//
// From the smallest to the largest:
//   group       8 hidden units. Its 32 gate rows are two tiles of mma.m16n8k16: i over f, and g over o, so that a thread's
//               accumulators hold all four gates of its unit.
//   splits      warps that share a group, each over its share of K: padded K = 16 · splits · k_steps.
//   block       groups · splits warps; owns 8 · groups units of one lane. The last block of a lane may own fewer.
//   lane        one direction of one layer. All blocks of a lane: one cluster (h pushed into peers), or any blocks of the
//               device (tagged words through L2).
//   copy        a batch group: at most 8 · tiles sequences that share nothing with others but weights. Copies of all lanes
//               run side by side where there is room, else in rounds.
//   pass        a run of layers that is on the chip at once: as many as fit. Passes come one after another, a launch each.
//
// A launch has one cluster size, one number of threads and one of registers: all lanes of a pass have the groups and
// splits of the pass, and occupy the blocks of its cluster size even where they own fewer.
//
// Two directions: a bidirectional layer needs the whole layer below it, so that each is a pass of its own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "device.h"
#include "stack.h"

namespace stacked_lstm::persistent {

inline constexpr int64_t kGroupUnits = 8, kTileColumns = 8, kMmaDepth = 16, kWarp = 32;
inline constexpr int64_t kMostGroups = 15;  // a named barrier each, and there are 16 with block_barrier's own
inline constexpr int64_t kKSteps[] = {2, 4, 8, 12, 16};
inline constexpr int64_t kSplits[] = {1, 2, 3, 4, 6, 8};
inline constexpr int64_t kTiles[] = {1, 2, 4};
inline constexpr int64_t kChunkSteps[] = {1, 2, 4, 8, 16, 32};

enum class Exchange { block, cluster, l2 };
inline const char* name_of(Exchange e) {
  return e == Exchange::block ? "block" : e == Exchange::cluster ? "cluster" : "l2";
}

enum class Home { shared, l2, memory };  // where W_ih lives
inline const char* name_of(Home h) { return h == Home::shared ? "shared" : h == Home::l2 ? "l2" : "memory"; }

// ---- What a plan says -----------------------------------------------------------------------------------------------

// Predicted microseconds of a pass, by cause. All but `fill` and `hand_over` are of the slowest layer; `fill` is how long
// the others work before it starts and after it is done.
struct Terms {
  double launch = 0;
  double load = 0;             // weights from memory to where they stay
  double exchange = 0;         // h inside the layer: what remains when the input projection has nothing to do meanwhile
  double products = 0;         // W_hh · h
  double gates = 0;            // sums of warps that share a group, activations, cell
  double saves = 0;            // what backward needs, in training
  double projection = 0;       // W_ih · x, as far as it takes longer than the exchange it runs beside
  double weights_from_l2 = 0;  // the same, where reading W_ih or x from L2 or memory is what takes long
  double hand_over = 0;        // from a layer to the next
  double fill = 0;

  using Field = double Terms::*;
  struct Named {
    const char* name;
    Field field;
  };
  static constexpr Named kAll[] = {{"launch", &Terms::launch},         {"load", &Terms::load},
                                   {"exchange", &Terms::exchange},     {"products", &Terms::products},
                                   {"gates", &Terms::gates},           {"saves", &Terms::saves},
                                   {"projection", &Terms::projection}, {"weights_from_l2", &Terms::weights_from_l2},
                                   {"hand_over", &Terms::hand_over},   {"fill", &Terms::fill}};

  double total() const {
    double sum = 0;
    for (const Named& term : kAll) sum += this->*term.field;
    return sum;
  }
  const char* largest() const {
    return std::max_element(std::begin(kAll), std::end(kAll),
                            [&](const Named& a, const Named& b) { return this->*a.field < this->*b.field; })
        ->name;
  }
  void add(const Terms& other) {
    for (const Named& term : kAll) this->*term.field += other.*term.field;
  }
};

// What a lane's blocks do in a step or for a chunk, in microseconds. See predict_step().
struct StepCost {
  double exchange = 0, products = 0, gates = 0, saves = 0;
  double project = 0;     // mma of the input projection, a step
  double read_step = 0;   // x or h of the layer below from L2, a step
  double read_chunk = 0;  // W_ih, a chunk: from shared memory, beside the mma; or from L2, beside reading x

  double own() const { return products + gates + saves; }
};

struct LayerPlan {
  int64_t layer = 0;
  int64_t blocks = 0;       // that own units of one lane
  int64_t first_block = 0;  // of direction 0 in copy 0; see Pass::first_block
  int64_t k_steps = 0;
  int64_t registers_thread = 0;  // predicted
  int64_t weight_registers = 0;  // of those, for fragments of W_hh
  int64_t registers_bytes = 0;   // W_hh of a copy: all lanes, padded
  int64_t shared_bytes = 0;      // a block
  int64_t w_ih_bytes = 0;        // of a copy: all lanes, padded
  Home w_ih = Home::shared;
  int64_t l2_bytes = 0;  // W_ih if it lives there, and tagged words of all copies
  StepCost cost;
  double step_us = 0;
};

struct Pass {
  int64_t first_layer = 0, last_layer = 0;  // one past it
  Exchange exchange = Exchange::block;
  int64_t cluster = 1;
  int64_t groups = 0, splits = 0;
  int64_t threads = 0, registers_thread = 0, shared_bytes = 0;  // of the launch: the most that any layer needs
  int64_t chunk_steps = 1;
  int64_t blocks_copy = 0;  // of all lanes of a batch group
  int64_t copies = 1;       // side by side
  int64_t rounds = 1;
  double makespan_us = 0;  // of a round
  double step_us = 0;      // of the slowest layer
  Terms terms;
  std::vector<LayerPlan> layers;

  int64_t units_block() const { return kGroupUnits * groups; }
  // Block b of a lane owns the units from first_unit(b) to first_unit(b + 1).
  int64_t first_unit(int64_t hidden, int64_t block) const { return std::min(hidden, block * units_block()); }
  int64_t blocks() const { return blocks_copy * copies; }
  int64_t reserved(const LayerPlan& layer) const { return exchange == Exchange::cluster ? cluster : layer.blocks; }
  int64_t first_block(const LayerPlan& layer, int64_t direction, int64_t copy) const {
    return copy * blocks_copy + layer.first_block + direction * reserved(layer);
  }
  int64_t chunks(int64_t steps) const { return (steps + chunk_steps - 1) / chunk_steps; }
};

struct Plan {
  std::string why_not;  // one sentence; empty if the persistent kernel can run the stack
  int64_t tiles = 1;
  int64_t batch_groups = 1;
  std::vector<Pass> passes;
  Terms terms;
  double predicted_us = 0, step_us = 0, limit_us = 0;
  const char* binds = "";

  // Sequences of a batch group: first, and one past the last.
  int64_t first_sequence(int64_t batch, int64_t group) const { return batch * group / batch_groups; }
};

// ---- What a block needs ---------------------------------------------------------------------------------------------

// Fragments of W_hh (4 registers a tile of 16 bits a k-step, twice that in 32 bits, two tiles), sums, c, input share and
// addresses. Predicted: the prototype has 226 at 16 k-steps and one tile of columns.
constexpr int64_t weight_registers(int64_t k_steps, int64_t bytes) { return 2 * 4 * k_steps * bytes / 2; }
constexpr int64_t registers_thread(int64_t k_steps, int64_t tiles, int64_t bytes) {
  return weight_registers(k_steps, bytes) + 80 + 18 * tiles;
}

// The least k_steps for this K; 0 if a lane of so many splits cannot hold it.
inline int64_t k_steps_for(int64_t hidden, int64_t splits) {
  for (const int64_t k_steps : kKSteps) {
    if (kMmaDepth * splits * k_steps >= hidden) return k_steps;
  }
  return 0;
}

// Whether an SM's registers hold a block.
inline bool registers_fit(const Device& device, int64_t threads, int64_t registers) {
  return registers <= kRegistersThread && threads <= kThreadsBlock &&
         threads * round_up(registers, kRegisterGrain) <= device.registers_sm;
}

// Shared memory of a block beside W_ih: two buffers of h (rows padded for ldmatrix), sums of the other splits, the h of
// a step before it is pushed, the input's share of the gates of a chunk, mbarriers.
inline int64_t shared_without_weights(int64_t padded_k, int64_t groups, int64_t splits, int64_t tiles,
                                      int64_t chunk_steps, int64_t bytes) {
  const int64_t columns = kTileColumns * tiles, units = kGroupUnits * groups;
  return 2 * columns * (padded_k + 16 / bytes) * bytes + (splits - 1) * 4 * units * columns * 4 +
         units * columns * bytes + chunk_steps * 4 * units * columns * 4 + 64;
}

// ---- The cost model -------------------------------------------------------------------------------------------------
// Predicted, never measured. With the figures of device.h it gives 0.80 µs a step for H = 512, B = 8 on an H100 by clusters
// and 0.60 for H = 256 (at 1830 MHz): inside the ranges of the prototype's count of issue slots, 0.58-0.93 and 0.47-0.67.
//
//   step = products + gates + saves + max(exchange, projection)     the projection runs in the time h takes to arrive
//   chunk = that for its steps, W_ih read once
//   makespan of a pass: layer k's chunk c after its own c-1 and, a hand-over later, layer k-1's c
//   pass = launch + load + rounds · makespan

struct Model {
  const StackShape& shape;
  const Device& device;
  const Costs& costs;
  int64_t bytes;  // of an element: 2, or 4 for float32 by TF32
  bool training;

  double mma_rate() const { return device.mma_rate * (bytes == 4 ? 0.5 : 1); }
  double memory_us(double n) const { return n / (device.memory_gb_s * 1000); }
  double cycles_us(double cycles) const { return device.cycles_us(cycles); }
};

inline StepCost predict_step(const Model& m, const LayerShape& layer, const Pass& pass, const LayerPlan& plan,
                             int64_t tiles) {
  const Costs& costs = m.costs;
  const double columns = static_cast<double>(kTileColumns * tiles),
               warps = static_cast<double>(pass.groups * pass.splits);
  const double rows = static_cast<double>(4 * pass.units_block()), bytes = static_cast<double>(m.bytes);
  const double padded_k = static_cast<double>(kMmaDepth * pass.splits * plan.k_steps);
  const double input = static_cast<double>(round_up(layer.input, kMmaDepth));
  const double rate = m.mma_rate() * m.device.mma_share;
  const double schedulers = 4,
               busiest = std::ceil(warps / schedulers) * schedulers / warps;  // warps share them unevenly
  StepCost cost;

  const double h_bytes = columns * static_cast<double>(layer.hidden) * bytes;
  switch (pass.exchange) {
    case Exchange::block:
      cost.exchange = costs.block_us;
      break;
    case Exchange::cluster:
      cost.exchange = costs.cluster_us + m.cycles_us(h_bytes / costs.cluster_rate);
      break;
    case Exchange::l2:  // half of a tagged word is its tag
      cost.exchange = costs.l2_us + m.cycles_us(2 * h_bytes / costs.l2_rate);
      break;
  }
  // Either the tensor cores are busy, or a warp waits for its own sums; with one tile of columns it keeps two chains.
  const double chain = static_cast<double>(plan.k_steps) * (m.bytes == 4 ? 2 : 1) / (tiles == 1 ? 2 : 1);
  cost.products =
      m.cycles_us(std::max(rows * padded_k * columns / rate * busiest, chain * costs.mma_latency) + costs.ldmatrix);
  // One warp of a group computes its cells, two a thread and tile.
  const double gate_warps = std::ceil(static_cast<double>(pass.groups) / schedulers) * static_cast<double>(tiles);
  const double splits = static_cast<double>(pass.splits);
  const double reduce =
      pass.splits > 1 ? costs.reduce + costs.reduce_words * (splits - 1) * static_cast<double>(tiles) : 0;
  cost.gates = m.cycles_us(costs.mufu * gate_warps + costs.gate_latency + reduce);
  cost.project = m.cycles_us(rows * input * columns / rate * busiest);
  cost.read_step = m.cycles_us(input * columns * bytes / costs.l2_rate);
  const double w_ih = rows * input * bytes;
  cost.read_chunk = plan.w_ih == Home::shared ? m.cycles_us(w_ih / costs.shared_rate)
                    : plan.w_ih == Home::l2   ? m.cycles_us(w_ih / costs.l2_rate)
                                              : m.memory_us(w_ih * static_cast<double>(m.device.sms));
  if (m.training) {
    const double slots = m.cycles_us(costs.save * gate_warps);
    // c and four gates in float32, and h: written while the step goes on, unless every block together is faster than memory.
    const double written = m.memory_us(rows / 4 * columns * (20 + bytes) * static_cast<double>(pass.blocks()));
    cost.saves = slots + std::max(0.0, written - cost.exchange - cost.products - cost.gates - slots);
  }
  return cost;
}

// The input projection of n steps: products, and what is read beside them.
inline double projection_us(const StepCost& cost, Home w_ih, double n) {
  if (n == 0) return 0;
  const double reads = n * cost.read_step;
  return w_ih == Home::shared ? std::max({n * cost.project, reads, cost.read_chunk})
                              : std::max(n * cost.project, reads + cost.read_chunk);
}

inline double chunk_us(const LayerPlan& layer, int64_t steps) {
  const double n = static_cast<double>(steps);
  return n * layer.cost.own() + std::max(n * layer.cost.exchange, projection_us(layer.cost, layer.w_ih, n));
}

// When each layer of a pass has done its last chunk; layers have chunks of the same length, so that all but the last of a
// layer take equally long, and F of them end at Σ (of the layers up to it) + (F-1) · the slowest of those.
inline double makespan_us(const Pass& pass, int64_t steps, const Costs& costs) {
  const int64_t full = (steps - 1) / pass.chunk_steps, rest = steps - full * pass.chunk_steps;
  double sum = 0, slowest = 0, hand_over = 0, end = 0;
  for (const LayerPlan& layer : pass.layers) {
    const double each = chunk_us(layer, pass.chunk_steps);
    sum += each, slowest = std::max(slowest, each);
    const double before = full == 0 ? 0 : sum + static_cast<double>(full - 1) * slowest + hand_over;
    end = std::max(before, &layer == &pass.layers.front() ? 0 : end + costs.hand_over_us) + chunk_us(layer, rest);
    hand_over += costs.hand_over_us;
  }
  return end;
}

// What no schedule can be faster than: all weights once from memory, and all multiply-adds on all tensor cores.
inline double physical_limit_us(const Model& m) {
  double weights = 0, work = 0;
  for (const LayerShape& layer : m.shape.layers) {
    const double lanes = static_cast<double>(4 * layer.hidden * m.shape.directions);
    weights += lanes * static_cast<double>(layer.input + layer.output());
    work += lanes * static_cast<double>(layer.input + layer.output()) * static_cast<double>(m.shape.rows());
  }
  return std::max(m.memory_us(weights * static_cast<double>(m.bytes)),
                  m.cycles_us(work / (m.mma_rate() * static_cast<double>(m.device.sms))));
}

// ---- The planner ----------------------------------------------------------------------------------------------------

struct Partition {
  Exchange exchange;  // cluster stands for block where one block is enough
  int64_t groups, splits, tiles, batch_groups;
};

// Where the layers from `first` on are put, as many as fit; with no layers if not even the first does.
inline Pass place(const Model& m, const Partition& p, int64_t first) {
  Pass pass;
  pass.first_layer = pass.last_layer = first;
  pass.groups = p.groups, pass.splits = p.splits;
  pass.threads = kWarp * p.groups * p.splits;
  const int64_t directions = m.shape.directions;
  int64_t most_blocks = 0;  // of a lane
  for (int64_t k = first; k < m.shape.depth(); ++k) {
    const LayerShape& shape = m.shape.layers[static_cast<size_t>(k)];
    LayerPlan layer;
    layer.layer = k;
    layer.blocks = (shape.hidden + pass.units_block() - 1) / pass.units_block();
    layer.k_steps = k_steps_for(shape.hidden, p.splits);
    if (layer.k_steps == 0) break;
    const int64_t padded_k = kMmaDepth * p.splits * layer.k_steps;
    layer.weight_registers = weight_registers(layer.k_steps, m.bytes);
    layer.registers_thread = registers_thread(layer.k_steps, p.tiles, m.bytes);
    layer.registers_bytes = directions * layer.blocks * 4 * pass.units_block() * padded_k * m.bytes;
    layer.w_ih_bytes = directions * layer.blocks * 4 * pass.units_block() * round_up(shape.input, kMmaDepth) * m.bytes;
    if (!registers_fit(m.device, pass.threads, layer.registers_thread)) break;
    if (shared_without_weights(padded_k, p.groups, p.splits, p.tiles, 1, m.bytes) > m.device.shared_block) break;

    const int64_t most = std::max(most_blocks, layer.blocks), lanes = (k - first + 1) * directions;
    int64_t cluster = 1, blocks = pass.blocks_copy + directions * layer.blocks, copies = 0;
    if (p.exchange == Exchange::cluster) {
      while (cluster < most) cluster *= 2;  // powers of two: sizes that every description of clusters allows
      blocks = lanes * cluster;
      copies = m.device.clusters(cluster) / lanes;
    } else {
      copies = m.device.sms / blocks;
    }
    if (copies == 0) break;
    most_blocks = most;
    pass.cluster = cluster, pass.blocks_copy = blocks, pass.copies = std::min(copies, p.batch_groups);
    pass.exchange = p.exchange == Exchange::l2 ? Exchange::l2 : most == 1 ? Exchange::block : Exchange::cluster;
    pass.layers.push_back(layer);
    pass.last_layer = k + 1;
    if (directions == 2) break;
  }
  pass.rounds = (p.batch_groups + pass.copies - 1) / pass.copies;
  int64_t block = 0;
  for (LayerPlan& layer : pass.layers) {
    layer.first_block = block;
    block += directions * pass.reserved(layer);
  }
  return pass;
}

// Decides with these chunks what stays in shared memory, and predicts. False if a block's shared memory is too small.
inline bool predict(const Model& m, int64_t tiles, int64_t chunk_steps, Pass& pass) {
  pass.chunk_steps = chunk_steps;
  pass.threads = kWarp * pass.groups * pass.splits;
  pass.registers_thread = pass.shared_bytes = 0;
  int64_t in_l2 = 0, loaded = 0;
  for (LayerPlan& layer : pass.layers) {
    const int64_t padded_k = kMmaDepth * pass.splits * layer.k_steps;
    const int64_t least = shared_without_weights(padded_k, pass.groups, pass.splits, tiles, chunk_steps, m.bytes);
    if (least > m.device.shared_block) return false;
    const int64_t input = round_up(m.shape.layers[static_cast<size_t>(layer.layer)].input, kMmaDepth);
    const int64_t with_weights = least + 4 * pass.units_block() * input * m.bytes;
    layer.w_ih = with_weights <= m.device.shared_block ? Home::shared : Home::l2;
    layer.shared_bytes = layer.w_ih == Home::shared ? with_weights : least;
    // Two buffers of h, a tag beside every 32 bits.
    const int64_t words =
        2 * 2 * kTileColumns * tiles * m.shape.layers[static_cast<size_t>(layer.layer)].hidden * m.bytes;
    layer.l2_bytes = pass.exchange == Exchange::l2 ? words * m.shape.directions * pass.copies : 0;
    in_l2 += layer.l2_bytes + (layer.w_ih == Home::l2 ? layer.w_ih_bytes : 0);
    loaded += layer.registers_bytes + layer.w_ih_bytes;
    pass.registers_thread = std::max(pass.registers_thread, layer.registers_thread);
    pass.shared_bytes = std::max(pass.shared_bytes, layer.shared_bytes);
  }
  const LayerPlan* slowest = nullptr;
  for (LayerPlan& layer : pass.layers) {
    if (layer.w_ih == Home::l2 && in_l2 > m.device.l2_bytes) layer.w_ih = Home::memory;
    if (layer.w_ih == Home::l2) layer.l2_bytes += layer.w_ih_bytes;
    layer.cost = predict_step(m, m.shape.layers[static_cast<size_t>(layer.layer)], pass, layer, tiles);
    layer.step_us = chunk_us(layer, chunk_steps) / static_cast<double>(chunk_steps);
    if (!slowest || layer.step_us > slowest->step_us) slowest = &layer;
  }
  pass.step_us = slowest->step_us;
  pass.makespan_us = makespan_us(pass, m.shape.steps, m.costs);

  const double rounds = static_cast<double>(pass.rounds), n = static_cast<double>(m.shape.steps);
  const int64_t full = m.shape.steps / chunk_steps;
  const StepCost& cost = slowest->cost;
  const auto excess = [&](int64_t steps) {
    const double length = static_cast<double>(steps);
    return std::max(0.0, projection_us(cost, slowest->w_ih, length) - length * cost.exchange);
  };
  const double beyond = static_cast<double>(full) * excess(chunk_steps) + excess(m.shape.steps - full * chunk_steps);
  const bool reading = projection_us(cost, slowest->w_ih, static_cast<double>(chunk_steps)) >
                       static_cast<double>(chunk_steps) * cost.project;
  Terms terms;
  terms.launch = m.costs.launch_us;
  terms.load = m.memory_us(static_cast<double>(loaded));
  terms.exchange = rounds * n * cost.exchange;
  terms.products = rounds * n * cost.products;
  terms.gates = rounds * n * cost.gates;
  terms.saves = rounds * n * cost.saves;
  (reading && slowest->w_ih != Home::shared ? terms.weights_from_l2 : terms.projection) = rounds * beyond;
  terms.hand_over = rounds * static_cast<double>(pass.layers.size() - 1) * m.costs.hand_over_us;
  terms.fill = std::max(0.0, rounds * (pass.makespan_us - n * (cost.exchange + cost.own()) - beyond) - terms.hand_over);
  pass.terms = terms;
  return true;
}

// One sentence with numbers: why not even one layer a pass fits.
inline std::string obstacle(const Model& m) {
  const auto text = [](int64_t n) { return std::to_string(n); };
  const std::string on = m.device.name;
  for (int64_t k = 0; k < m.shape.depth(); ++k) {
    const int64_t hidden = m.shape.layers[static_cast<size_t>(k)].hidden, lanes = m.shape.directions;
    const std::string who =
        "layer " + text(k) + " has " + text(hidden) + " hidden units of " + text(m.bytes) + " bytes";
    int64_t longest = 0, least_blocks = 0, least_shared = 0;
    for (const int64_t splits : kSplits) {
      for (const int64_t k_steps : kKSteps) {
        for (int64_t groups = 1; groups <= kMostGroups; ++groups) {
          if (!registers_fit(m.device, kWarp * groups * splits, registers_thread(k_steps, 1, m.bytes))) continue;
          longest = std::max(longest, kMmaDepth * splits * k_steps);
          if (kMmaDepth * splits * k_steps < hidden) continue;
          const int64_t shared = shared_without_weights(kMmaDepth * splits * k_steps, groups, splits, 1, 1, m.bytes);
          least_shared = least_shared == 0 ? shared : std::min(least_shared, shared);
          if (shared > m.device.shared_block) continue;
          const int64_t blocks = lanes * ((hidden + kGroupUnits * groups - 1) / (kGroupUnits * groups));
          least_blocks = least_blocks == 0 ? blocks : std::min(least_blocks, blocks);
        }
      }
    }
    if (hidden > longest) {
      return who + ", and the registers of a block hold recurrent rows of at most " + text(longest) + " on " + on;
    }
    if (least_blocks == 0) {
      return who + ": a block needs at least " + text(least_shared) + " bytes of shared memory, and " + on + " has " +
             text(m.device.shared_block);
    }
    if (least_blocks > m.device.sms) {
      return who + ": with its recurrent weights in registers it needs at least " + text(least_blocks) +
             " blocks, one an SM, and " + on + " has " + text(m.device.sms) + " SMs";
    }
  }
  return "no partition of " + text(m.shape.depth()) + " layers fits the " + text(m.device.sms) + " SMs of " + on;
}

// The cheapest plan by the model above. `bytes`: 2 for bfloat16 and float16, 4 for float32 (as TF32).
inline Plan plan(const StackShape& shape, const Device& device, const Costs& costs, int64_t bytes, bool training) {
  const Model m{shape, device, costs, bytes, training};
  Plan best;
  const auto refuse = [&](const std::string& why) {
    best.why_not = why;
    return best;
  };
  if (device.major < 8) {
    return refuse("compute capability " + std::to_string(device.major) + "." + std::to_string(device.minor) +
                  " is below 8.0, the least supported");
  }
  if (bytes != 2 && bytes != 4) {
    return refuse("elements of " + std::to_string(bytes) + " bytes: the persistent kernel multiplies those of 2 or 4");
  }
  if (shape.steps < 1 || shape.batch < 1 || shape.depth() < 1) {
    return refuse("there is nothing to run: " + std::to_string(shape.depth()) + " layers, " +
                  std::to_string(shape.steps) + " steps, batch " + std::to_string(shape.batch));
  }
  for (int64_t k = 0; k < shape.depth(); ++k) {
    const LayerShape& layer = shape.layers[static_cast<size_t>(k)];
    if (layer.projection > 0) {
      return refuse("layer " + std::to_string(k) + " has a projection of " + std::to_string(layer.projection) +
                    ": the persistent kernel exchanges h unprojected");
    }
  }
  best.limit_us = physical_limit_us(m);

  bool found = false;
  for (const int64_t tiles : kTiles) {
    const int64_t batch_groups = (shape.batch + kTileColumns * tiles - 1) / (kTileColumns * tiles);
    struct Tail {
      double us = -1;  // of all passes from a layer on; -1: impossible
      Pass first;
    };
    std::map<int64_t, Tail> tails;
    const std::function<const Tail&(int64_t)> from = [&](int64_t first) -> const Tail& {
      if (const auto known = tails.find(first); known != tails.end()) return known->second;
      Tail tail;
      if (first == shape.depth()) tail.us = 0;
      for (const Exchange exchange : {Exchange::cluster, Exchange::l2}) {
        for (const int64_t splits : kSplits) {
          int64_t units_before = 0;
          for (int64_t groups = 1; groups <= kMostGroups && first < shape.depth(); ++groups) {
            // More groups without fewer blocks only cost more.
            int64_t units = 0;
            for (const LayerShape& layer : shape.layers) {
              units += (layer.hidden + kGroupUnits * groups - 1) / (kGroupUnits * groups);
            }
            if (units == units_before) continue;
            units_before = units;
            Pass pass = place(m, {exchange, groups, splits, tiles, batch_groups}, first);
            if (pass.layers.empty()) continue;
            const double after = from(pass.last_layer).us;
            if (after < 0) continue;
            for (const int64_t chunk_steps : kChunkSteps) {
              if (!predict(m, tiles, chunk_steps, pass)) break;
              const double us = pass.terms.total() + after;
              if (tail.us < 0 || us < tail.us) tail = {us, pass};
            }
          }
        }
      }
      return tails[first] = tail;
    };
    if (from(0).us < 0 || (found && from(0).us >= best.predicted_us)) continue;
    found = true;
    best.tiles = tiles, best.batch_groups = batch_groups, best.predicted_us = from(0).us;
    best.passes.clear();
    for (int64_t k = 0; k < shape.depth(); k = best.passes.back().last_layer) best.passes.push_back(from(k).first);
  }
  if (!found) return refuse(obstacle(m));
  for (const Pass& pass : best.passes) {
    best.terms.add(pass.terms);
    best.step_us += static_cast<double>(pass.rounds) * pass.step_us;
  }
  best.predicted_us = best.terms.total();
  best.binds = best.terms.largest();
  return best;
}

// ---- Who works when -------------------------------------------------------------------------------------------------

// A chunk of a lane for one batch group, on the blocks that own the lane.
struct Work {
  int64_t pass, batch_group, layer, direction, chunk;
  int64_t first_block, blocks;
  int64_t needs_layer, needs_chunks;  // so many chunks of every direction of that layer, same batch group; -1: none
  double start_us, end_us;
};

// All of it, in an order in which each entry stands after what it needs. A lane's blocks take theirs in this order.
inline std::vector<Work> timeline(const Plan& plan, const StackShape& shape, const Costs& costs) {
  std::vector<Work> all;
  double start = 0;
  for (size_t p = 0; p < plan.passes.size(); ++p) {
    const Pass& pass = plan.passes[p];
    start += pass.terms.launch + pass.terms.load;
    const int64_t chunks = pass.chunks(shape.steps);
    for (int64_t group = 0; group < plan.batch_groups; ++group) {
      const double round = start + static_cast<double>(group / pass.copies) * pass.makespan_us;
      std::vector<double> below(static_cast<size_t>(chunks));
      for (const LayerPlan& layer : pass.layers) {
        double free = round;
        const bool waits = layer.layer > pass.first_layer;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          double& arrived = below[static_cast<size_t>(chunk)];
          const double begin = std::max(free, waits ? arrived + costs.hand_over_us : round);
          const int64_t length = std::min(pass.chunk_steps, shape.steps - chunk * pass.chunk_steps);
          free = arrived = begin + chunk_us(layer, length);
          for (int64_t direction = 0; direction < shape.directions; ++direction) {
            all.push_back({static_cast<int64_t>(p), group, layer.layer, direction, chunk,
                           pass.first_block(layer, direction, group % pass.copies), layer.blocks, layer.layer - 1,
                           layer.layer == 0 ? 0
                           : waits          ? chunk + 1
                                            : plan.passes[p - 1].chunks(shape.steps),
                           begin, free});
          }
        }
      }
    }
    start += static_cast<double>(pass.rounds) * pass.makespan_us;
  }
  return all;
}

}  // namespace stacked_lstm::persistent
