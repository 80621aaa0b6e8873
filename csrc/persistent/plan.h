// csrc/persistent/plan.h: the planner of the persistent kernels: which blocks own what of a stack, what lives where on the
// chip, who waits for whom, and what it is predicted to cost on a GPU, beside the diagonal schedule. No CUDA, no torch.
//
//            t →  chunk 0  chunk 1  chunk 2  chunk 3        One launch, a block an SM. A layer is owned by a few blocks
//   layer 0      ■■■■■■■■ ■■■■■■■■ ■■■■■■■■ ■■■■■■■■       for the whole sequence: W_hh stays in their registers, W_ih
//   layer 1               ■■■■■■■■ ■■■■■■■■ ■■■■■■■■ …     in their shared memory if it fits. Inside a layer blocks
//   layer 2                        ■■■■■■■■ ■■■■■■■■ …     exchange h every step, between layers every chunk.
//
// A launch and its parts (Cut, lane, block, group, copy) are those of persistent/kernels.h. On top of them:
//   pass        a run of layers of one width that is on the chip at once, at most kMaxLanes lanes, all cut alike. Passes
//               come one after another: forward from the first layers up, backward from the last down.
//   round       batch groups that run side by side, as copies. What has no room runs in the next round: another launch.
//   segment     backward: steps of a launch of their own. Where the gates are computed again, so many that their
//               pre-activations have room in memory; and where a launch leaves SMs idle, so few that the weight gradients of
//               a segment are made on those beside the next one.
// Forward and backward are planned apart: nothing but tensors in memory goes from one to the other.
//
// Two directions: a bidirectional layer needs the whole layer beside it, so that each is a pass of its own.
//
// A plan is the cheapest of all that fit, by the model below. All times are predicted.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../cuda/device.h"
#include "../stack/stack.h"
#include "../stack/wavefront.h"
#include "kernels.h"

namespace stacked_lstm::persistent {

inline constexpr int kChunkSteps[] = {1, 2, 4, 8, 16, 32};
// Pre-activations that backward makes ahead of a launch, with Saving::recompute.
inline constexpr int64_t kRecomputeBytes = 256 * kMiB;
// Backward: how many segments are tried, so that weight gradients are made beside the recurrence, and the share of the time
// that has to be left for it to be done: less would be within the model's error, and takes memory.
inline constexpr int kSegments[] = {1, 2, 3, 4, 6, 8, 12, 16};
inline constexpr double kWorthSegments = 0.97;
// Backward: units of dh in a tile.
inline constexpr int kTileRows = 16;
// The kernels' sizes are 32-bit numbers: so that none of them, nor batch · batch groups, becomes too large.
inline constexpr int64_t kMostWidth = int64_t{1} << 20, kMostBatch = int64_t{1} << 16, kMostSteps = int64_t{1} << 30;

inline const char* name_of(Exchange e) { return e == Exchange::cluster ? "cluster" : "l2"; }
inline const char* name_of(Product p) { return p == Product::tensor ? "tensor" : "exact"; }

enum class Home { shared, l2, memory };  // where W_ih lives
inline const char* name_of(Home h) { return h == Home::shared ? "shared" : h == Home::l2 ? "l2" : "memory"; }

// What a plan is for, beside shape, device and costs.
struct Ask {
  int64_t bytes = 2;  // of an element: 2, or 4 for float32
  Product product = Product::tensor;
  Saving saving = Saving::none;  // none: no backward will follow
  // What is compiled for these elements.
  const Instance* forward = nullptr;
  int64_t forward_count = 0;
  const Instance* backward = nullptr;
  int64_t backward_count = 0;
  // How many blocks of such a launch the device holds at once, if the driver can be asked. It is, for the cuts of the
  // cheapest plan; where the answer is less than the Device promises, that counts, and the plan is made anew. (An answer that
  // is more changes nothing: the Device should promise no less than there is.)
  std::function<int64_t(bool backward, const Cut& cut, int most_inputs, int hidden, bool over)> capacity;
};

// ---- What a plan says -----------------------------------------------------------------------------------------------

// Predicted microseconds of a pass, by cause. What is said of a step is the slowest layer's; `fill` is how long the others
// work before it starts and after it is done.
struct Terms {
  double launch = 0;
  double load = 0;             // weights from memory to where they stay
  double exchange = 0;         // h inside the layer, backward: partial sums of dh
  double products = 0;         // with W_hh
  double gates = 0;            // sums of warps or blocks, activations, cell
  double saves = 0;            // writing what backward needs, and reading it: what goes on beside it taken off
  double chunks = 0;           // a chunk's beginning: whether the layer beside has done its own, the first rows of it
  double projection = 0;       // with W_ih: backward, that of the layer above
  double weights_from_l2 = 0;  // the same, where reading W_ih or rows from L2 or memory is what takes long
  double hand_over = 0;        // from a layer to the next
  double fill = 0;
  double large_products = 0;  // before and after launches: gates again, between passes, gradients of weights and input

  using Field = double Terms::*;
  struct Named {
    const char* name;
    Field field;
  };
  static constexpr Named kAll[] = {{"launch", &Terms::launch},
                                   {"load", &Terms::load},
                                   {"exchange", &Terms::exchange},
                                   {"products", &Terms::products},
                                   {"gates", &Terms::gates},
                                   {"saves", &Terms::saves},
                                   {"chunks", &Terms::chunks},
                                   {"projection", &Terms::projection},
                                   {"weights_from_l2", &Terms::weights_from_l2},
                                   {"hand_over", &Terms::hand_over},
                                   {"fill", &Terms::fill},
                                   {"large_products", &Terms::large_products}};

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
  double chunk = 0;         // a chunk's beginning: has the layer beside done its own?
  double project = 0;       // products with W_ih, a step
  double read_rows = 0;     // of x or h of the layer below, or of gate gradients of the one above, from L2, a step
  double stage_rows = 0;    // until the first of them are in shared memory
  double read_weights = 0;  // W_ih once, from where it lives
  int64_t reads_every = 1;  // steps that W_ih is read for, and rows are staged for, together
  Home w_ih = Home::shared;

  double step() const { return exchange + products + gates + saves; }
  // Products with W_ih for n steps. Shared memory is read beside the products and beside L2; W_ih from L2, after the rows.
  double projection_us(int64_t n) const {
    const double steps = static_cast<double>(n), reads = static_cast<double>((n + reads_every - 1) / reads_every);
    const double multiply = w_ih == Home::shared ? std::max(steps * project, reads * read_weights)
                                                 : std::max(steps * project, reads * read_weights + steps * read_rows);
    return reads * stage_rows + std::max(multiply, steps * read_rows);
  }
  bool reads_longest(int64_t n) const { return projection_us(n) > 2 * static_cast<double>(n) * project; }
  double chunk_us(int64_t n) const { return n == 0 ? 0 : static_cast<double>(n) * step() + projection_us(n) + chunk; }
};

struct LayerPlan {
  int64_t layer = 0;
  int64_t first_block = 0;      // of direction 0 in copy 0; see Pass::first_block
  int64_t registers_bytes = 0;  // W_hh of a copy: all lanes, padded
  int64_t w_ih_bytes =
      0;  // of the W_ih it multiplies by: all lanes of a copy, padded; backward, that of the layer above
  Home w_ih = Home::shared;
  StepCost cost;
  double step_us = 0;
};

struct Pass {
  int64_t first_layer = 0, last_layer = 0;  // one past it
  bool backward = false;
  bool over = false;  // backward: some lane has the lane above in this launch
  Cut cut;
  int64_t directions = 1;
  int64_t hidden = 0, most_inputs = 0;
  int64_t batch_groups = 1, copies = 1, rounds = 1;
  int64_t segment_steps = 0;  // steps of a launch: a multiple of the chunk's, or all
  // Backward: the weight gradients of a segment are made while what comes after it runs; else after all of the pass.
  bool products_beside = false;
  int64_t threads = 0, registers_thread = 0, weight_registers = 0, shared_bytes = 0;  // registers: predicted
  int64_t l2_bytes = 0;    // W_ih where it lives there, and the words of an exchange
  double ahead_us = 0;     // large products before its launches
  double makespan_us = 0;  // of a round, all of its segments, launches apart
  double step_us = 0;      // of the slowest layer
  Terms terms;
  std::vector<LayerPlan> layers;  // from first_layer up

  int64_t count() const { return last_layer - first_layer; }
  int64_t lanes() const { return count() * directions; }
  int64_t blocks_copy() const { return lanes() * cut.blocks; }
  int64_t blocks() const { return blocks_copy() * copies; }
  // Block b of a lane owns the units from first_unit(b) to first_unit(b + 1).
  int64_t first_unit(int64_t block) const { return std::min(hidden, block * cut.block_units()); }
  int64_t first_block(int64_t layer, int64_t direction, int64_t copy) const {
    return ((copy * count() + layer - first_layer) * directions + direction) * cut.blocks;
  }
  int64_t segments(int64_t steps) const { return (steps + segment_steps - 1) / segment_steps; }
  int64_t chunks(int64_t steps) const { return (steps + cut.chunk_steps - 1) / cut.chunk_steps; }
  // Sequences of a batch group: first, and one past the last.
  int64_t first_sequence(int64_t batch, int64_t group) const { return batch * group / batch_groups; }
  // Layers in the order in which a chunk comes to them.
  const LayerPlan& in_order(int64_t n) const { return layers[static_cast<size_t>(backward ? count() - 1 - n : n)]; }
};

struct Plan {
  std::string why_not;  // one sentence; empty if the persistent kernel can run the stack
  bool backward = false;
  std::vector<Pass> passes;  // in the order of layers
  Terms terms;
  // Large products after all launches: gradients of the input, and of weights as far as they were not made beside them.
  double after_us = 0;
  double predicted_us = 0, step_us = 0, limit_us = 0;
  const char* binds = "";
};

// ---- What a block needs ---------------------------------------------------------------------------------------------

// Registers of a thread that hold W_hh: 8 a piece and tile of 16 rows, of which a group has two forward.
constexpr int64_t weight_registers(const Instance& instance) {
  return 8 * instance.pieces * (instance.m_tiles > 0 ? instance.m_tiles : 2);
}
// All of them, predicted: weights, sums (a second chain beside one tile of columns; exact products: 8 columns of 4 rows
// before they are added up), c, and addresses. Forward fitted to one instance, 8 pieces and one tile: 243 on sm_90a.
constexpr int64_t registers_thread(const Instance& instance) {
  const int64_t sums = instance.product == Product::exact ? 32 : 0;
  const int64_t all = instance.m_tiles > 0
                          ? weight_registers(instance) + 4 * instance.m_tiles * std::max(instance.tiles, 1) + sums + 64
                          : weight_registers(instance) + 18 * instance.tiles + sums + 97;
  return std::min<int64_t>(all, kRegistersThread);  // the compiler's limit: cuda-check sees that nothing is spilled
}
inline Instance instance_of(const Cut& cut) { return {cut.product, cut.exchange, cut.tiles, cut.pieces, cut.m_tiles}; }

inline int64_t piece_elements(int64_t bytes) { return kPieceBytes / bytes; }

// Of a block. And words of 64 bits for a launch's exchange through L2.
inline int64_t shared_bytes(const Cut& cut, int64_t bytes, bool backward, int64_t most_inputs, int64_t hidden,
                            bool over) {
  const auto of = [&](auto element) {
    using T = decltype(element);
    return backward ? backward_shared_bytes<T>(cut, static_cast<int>(hidden), over)
                    : forward_shared_bytes<T>(cut, static_cast<int>(most_inputs));
  };
  return static_cast<int64_t>(bytes == 2 ? of(bfloat16{}) : of(float{}));
}
inline int64_t exchanged_words(const Cut& cut, int64_t bytes, bool backward, int64_t copies, int64_t lanes) {
  if (cut.exchange != Exchange::l2) return 0;
  const auto of = [&](auto element) {
    using T = decltype(element);
    return backward ? backward_words<T>(cut, static_cast<int>(copies), static_cast<int>(lanes))
                    : forward_words<T>(cut, static_cast<int>(copies), static_cast<int>(lanes));
  };
  return bytes == 2 ? of(bfloat16{}) : of(float{});
}

// ---- The cost model -------------------------------------------------------------------------------------------------
// Predicted, never measured.
//
//   step   = exchange + products + gates + saves       one after the other: each needs what the one before has made
//   chunk  = its steps, the products with W_ih for all of them, and its beginning
//   makespan of a launch: layer k's chunk c after its own c-1 and, a hand-over later, the layer before's c
//   pass   = large products ahead of it + rounds · segments · (launch + load) + rounds · makespan

struct Model {
  const StackShape& shape;
  const Device& device;
  const Costs& costs;
  const Ask& ask;
  bool backward = false;

  bool exact() const { return ask.product == Product::exact; }
  double peak() const {  // multiply-adds a clock an SM
    return exact() ? device.fma_rate : device.mma_rate * (ask.bytes == 4 ? 0.5 : ask.bytes == 8 ? 0.1 : 1);
  }
  double product_rate() const { return peak() * (exact() ? costs.fma_share : device.mma_share); }
  double memory_us(double bytes) const { return bytes / (device.memory_gb_s * 1000); }
  double cycles_us(double cycles) const { return device.cycles_us(cycles); }
  // A large product, or `products` of them that have so many multiply-adds in all. `elements`: of the weights, or of their
  // gradients, which go through memory.
  double large_us(double multiply_adds, double products, double elements) const {
    const double share = exact() ? costs.fma_share : costs.product_share;
    return std::max({products * costs.kernel_us, memory_us(elements * static_cast<double>(ask.bytes)),
                     cycles_us(multiply_adds / (peak() * share * static_cast<double>(device.sms)))});
  }
  const LayerShape& layer(int64_t k) const { return shape.layers[static_cast<size_t>(k)]; }
  // Multiply-adds of a row with all of a layer's W_ih, or W_hh.
  double input_work(int64_t k) const {
    return static_cast<double>(4 * layer(k).hidden * layer(k).input * shape.directions);
  }
  double recurrent_work(int64_t k) const {
    return static_cast<double>(4 * layer(k).hidden * layer(k).output() * shape.directions);
  }
};

// A step of a lane. `inputs`: forward, K of the projection; backward, whether (not 0) there is a lane above in the launch.
inline StepCost predict_step(const Model& m, const Cut& cut, int64_t inputs, Home w_ih, int64_t blocks_running) {
  const Costs& costs = m.costs;
  const auto number = [](int64_t n) { return static_cast<double>(n); };
  const double columns = cut.columns(), bytes = number(m.ask.bytes), units = cut.units(), rate = m.product_rate();
  const double tiles = cut.tiles, schedulers = 4;
  StepCost cost;
  cost.w_ih = w_ih;
  cost.reads_every = m.backward ? cut.chunk_steps : std::max(kPassTiles / cut.tiles, 1);

  // What comes to a block each step, if not from itself. Half of a word through L2 is its tag.
  const double arriving = columns * units * (m.backward ? 4 : bytes);
  cost.exchange = inside_block(cut, static_cast<size_t>(m.ask.bytes))
                      ? m.cycles_us(costs.barrier + costs.shared_latency)
                  : cut.exchange == Exchange::cluster ? costs.cluster_us + m.cycles_us(arriving / costs.cluster_rate)
                                                      : costs.l2_us + m.cycles_us(2 * arriving / costs.l2_rate);

  // Rows of W_hh, their K, and the warps that share them: tensor cores are busy, or a warp waits for its own sums, or for
  // the other operand. Forward, one tile of columns has two chains of sums.
  const double warps = m.backward ? kMaxWarps : cut.groups * cut.splits;
  const double rows = m.backward ? kMaxWarps * kTileRows * cut.m_tiles : 4 * cut.block_units();
  const double k = m.backward ? 4 * cut.block_units() : number(cut.pieces * cut.splits * piece_elements(m.ask.bytes));
  const double readers = m.backward ? kMaxWarps : cut.groups;                 // of all of the operand
  const double busiest = std::ceil(warps / schedulers) * schedulers / warps;  // schedulers share warps unevenly
  const double chain = 2.0 * cut.pieces / (!m.backward && cut.tiles == 1 ? 2 : 1);
  cost.products = m.cycles_us(std::max({rows * k * columns / rate * busiest, m.exact() ? 0 : chain * costs.mma_latency,
                                        readers * columns * k * bytes / costs.shared_rate}) +
                              costs.shared_latency);

  const double activations = m.ask.bytes == 4 ? costs.accurate : costs.mufu;  // of two cells a thread
  double in_memory;                                                           // bytes a cell, written or read
  if (m.backward) {
    // Every thread adds up the partial sums of its cells, in the order of blocks, and then has their gates' gradients.
    const double cells = std::ceil(cut.block_units() * columns / (kMaxWarps * kWarpThreads));
    const double sum = std::max(arriving / costs.shared_rate, cells * cut.blocks * costs.add) + costs.shared_latency;
    const double again = m.ask.saving == Saving::recompute ? activations / 2 * cells : 0;
    cost.gates = m.cycles_us(sum + costs.backward_gates * cells + again + costs.barrier);
    in_memory = 4 + 16 + bytes + 4 * bytes;  // c, gates, dL/dh; and the gates' gradients
  } else {
    // One warp of a group computes its cells, two a thread and tile.
    const double gate_warps = std::ceil(cut.groups / schedulers) * tiles;
    const double reduce = cut.splits > 1 ? costs.reduce + costs.reduce_words * (cut.splits - 1) * tiles : 0;
    cost.gates = m.cycles_us(activations * gate_warps + costs.gate_latency + reduce);
    in_memory = m.ask.saving == Saving::none ? 0 : bytes + 4 + (m.ask.saving == Saving::full ? 16 : 0);
    if (in_memory > 0) cost.saves = m.cycles_us(costs.save * gate_warps);
  }
  // All blocks together may be faster than memory; what remains runs beside the rest of the step.
  const double moved = m.memory_us(in_memory * cut.block_units() * columns * number(blocks_running));
  cost.saves += std::max(0.0, moved - cost.step());

  if (m.backward && inputs == 0) return cost;
  // A latency of L2 and two barriers: for the counters, and for the rows.
  cost.chunk = cost.stage_rows = m.cycles_us(costs.l2_latency + 2 * costs.barrier);
  // Forward: the block's gate rows over all inputs. Backward: all units, over the block's share of the gate rows above.
  const double depth = m.backward ? k : number(round_up(inputs, piece_elements(m.ask.bytes)));
  cost.project = m.cycles_us(rows * depth * columns / rate * busiest);
  cost.read_rows = m.cycles_us(depth * columns * bytes / costs.l2_rate);
  const double weights = rows * depth * bytes;
  cost.read_weights = w_ih == Home::shared ? m.cycles_us(weights / costs.shared_rate)
                      : w_ih == Home::l2   ? m.cycles_us(weights / costs.l2_rate)
                                           : m.memory_us(weights * number(blocks_running));
  return cost;
}

// When each layer of a launch has done its last chunk. Layers have chunks of the same length, so that all but the last of a
// layer take equally long, and F of them end at Σ (of the layers up to it) + (F-1) · the slowest of those.
inline double makespan_us(const Pass& pass, int64_t steps, const Costs& costs) {
  const int64_t chunk = pass.cut.chunk_steps, full = (steps - 1) / chunk, rest = steps - full * chunk;
  double sum = 0, slowest = 0, hand_over = 0, end = 0;
  for (int64_t n = 0; n < pass.count(); ++n) {
    const StepCost& cost = pass.in_order(n).cost;
    const double each = cost.chunk_us(chunk);
    sum += each, slowest = std::max(slowest, each);
    const double before = full == 0 ? 0 : sum + static_cast<double>(full - 1) * slowest + hand_over;
    end = std::max(before, n == 0 ? 0 : end + costs.hand_over_us) + cost.chunk_us(rest);
    hand_over += costs.hand_over_us;
  }
  return end;
}

// What no schedule can be faster than: the weights once from memory, and all multiply-adds on all SMs. Backward: those of
// dL/dh; what is left of a large product's work may not be asked for.
inline double physical_limit_us(const Model& m) {
  double weights = 0;
  for (int64_t k = 0; k < m.shape.depth(); ++k) {
    weights += m.recurrent_work(k) + (m.backward && k == 0 ? 0 : m.input_work(k));
  }
  const double work = weights * static_cast<double>(m.shape.rows());
  return std::max(m.memory_us(weights * static_cast<double>(m.ask.bytes)),
                  m.cycles_us(work / (m.peak() * static_cast<double>(m.device.sms))));
}

// Gradients of weights and of the input, where they are made after all else.
inline double gradients_us(const Model& m) {
  double work = m.input_work(0);
  for (int64_t k = 0; k < m.shape.depth(); ++k) work += m.input_work(k) + m.recurrent_work(k);
  return m.large_us(work * static_cast<double>(m.shape.rows()), static_cast<double>(2 * m.shape.lanes() + 1), work);
}

// ---- The planner ----------------------------------------------------------------------------------------------------

// All cuts of a lane of `hidden` units that an instance runs, but for chunks and the place of W_ih; whether or not there is
// room for them. Of instances that differ in `pieces` alone, forward, the least that holds the rows.
template <typename Visit>
void for_each_cut(const Ask& ask, bool backward, int64_t hidden, Visit&& visit) {
  const Instance* instances = backward ? ask.backward : ask.forward;
  const int64_t count = backward ? ask.backward_count : ask.forward_count, elements = piece_elements(ask.bytes);
  for (const Instance* i = instances; i < instances + count; ++i) {
    if (i->product != ask.product || (i->m_tiles > 0) != backward) continue;
    Cut cut;
    cut.product = i->product, cut.exchange = i->exchange;
    const int least_blocks = cut.exchange == Exchange::cluster ? kMinCluster : 1;
    cut.tiles = i->tiles, cut.pieces = i->pieces, cut.m_tiles = i->m_tiles;
    const auto own = [&](int64_t groups) {
      cut.groups = static_cast<int>(groups);
      cut.blocks = static_cast<int>((hidden + kGroupUnits * groups - 1) / (kGroupUnits * groups));
    };
    if (backward) {
      const int64_t rows = i->pieces * elements;
      if (rows % (4 * kGroupUnits) != 0) continue;
      own(rows / (4 * kGroupUnits));
      if (cut.blocks >= least_blocks && cut.units() <= kMaxWarps * kTileRows * i->m_tiles) visit(cut);
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
          return other.product == i->product && other.exchange == i->exchange && other.tiles == i->tiles &&
                 other.m_tiles == i->m_tiles && other.pieces < i->pieces && holds(other);
        });
        if (!smaller) visit(cut);
      }
    }
  }
}

inline int64_t threads_of(const Cut& cut) {
  return cut.m_tiles > 0 ? kMaxWarps * kWarpThreads : cut.groups * cut.splits * kWarpThreads;
}

// How many blocks of this cut the device holds at once, one an SM.
inline int64_t blocks_held(const Device& device, const Cut& cut) {
  const int64_t registers = round_up(registers_thread(instance_of(cut)), kRegisterGrain);
  if (threads_of(cut) * registers > device.registers_sm) return 0;
  if (cut.exchange == Exchange::l2) return device.sms;
  return cut.blocks > kMaxCluster || device.max_cluster < 2 ? 0 : device.clusters(cut.blocks) * cut.blocks;
}

// What the driver has said of a cut. A block has an SM to itself, so that how many there is room for depends on how they
// hang together, and not on what else they are: in clusters of that size, or alone. None at all, alone, is of this kernel.
struct Held {
  Cut cut;
  int64_t blocks;

  bool of(const Cut& other) const {
    const auto kernel = [](const Cut& c) {
      return std::tuple(c.product, c.tiles, c.pieces, c.splits, c.m_tiles, c.groups);
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
    // Each time round the driver has taken something away. It is asked of few cuts: most devices are as described.
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
      if (m_.layer(k).projection > 0) {
        return "layer " + text(k) + " has a projection of " + text(m_.layer(k).projection) +
               ": the persistent kernel exchanges h unprojected";
      }
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
    const std::string on = m_.device.name, pass = m_.backward ? "backward" : "forward";
    for (int64_t k = 0; k < depth_; ++k) {
      const int64_t hidden = m_.layer(k).hidden;
      const std::string who =
          "layer " + text(k) + " has " + text(hidden) + " hidden units of " + text(m_.ask.bytes) + " bytes";
      int64_t longest = 0, least_blocks = 0, least_shared = 0, least_held = 0;
      const Instance* instances = m_.backward ? m_.ask.backward : m_.ask.forward;
      for (int64_t n = 0; n < (m_.backward ? m_.ask.backward_count : m_.ask.forward_count); ++n) {
        const Instance& i = instances[n];
        if (i.product != m_.ask.product || (i.m_tiles > 0) != m_.backward) continue;
        longest = std::max(longest, m_.backward ? int64_t{kMaxWarps} * kTileRows * i.m_tiles
                                                : int64_t{kMaxWarps} * i.pieces * piece_elements(m_.ask.bytes));
      }
      if (longest == 0) {
        return "no " + pass + " kernel is compiled for elements of " + text(m_.ask.bytes) + " bytes and " +
               name_of(m_.ask.product) + " products";
      }
      if (hidden > longest) {
        return who + ", and the " + pass + " kernels hold recurrent rows of at most " + text(longest);
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
      if (least_shared == 0) return who + ", which the compiled " + pass + " kernels do not divide";
      if (least_blocks == 0) {
        return who + ": a block needs at least " + text(least_shared) + " bytes of shared memory, and " + on + " has " +
               text(m_.device.shared_block);
      }
      if (least_blocks > m_.device.sms) {
        return who + ": with its recurrent weights in registers, " + pass + " needs at least " + text(least_blocks) +
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

  // Asks the driver of the plan's passes; true if one of them does not fit after all.
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

  // The cheapest pass of the `count` layers from `first` on, but for products with layers beyond it; with no layers if
  // there is none. Passes of the same widths are the same.
  const Pass& best_pass(int64_t first, int64_t count) {
    const int64_t hidden = m_.layer(first).hidden;
    const auto key = std::tuple(m_.layer(first).input, hidden, count);
    if (const auto known = passes_.find(key); known != passes_.end()) return known->second;
    Pass best;
    double best_us = -1;
    int smallest_tiles = 0;  // that take the whole batch: more columns only cost more
    for_each_cut(m_.ask, m_.backward, hidden, [&](const Cut& cut) {
      if (cut.columns() >= m_.shape.batch && (smallest_tiles == 0 || cut.tiles < smallest_tiles)) {
        smallest_tiles = cut.tiles;
      }
    });
    for_each_cut(m_.ask, m_.backward, hidden, [&](const Cut& cut) {
      if (smallest_tiles > 0 && cut.tiles > smallest_tiles) return;
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

  // Decides what lives where, and predicts. False if there is no room for it. `most_steps`: of a segment.
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

    // W_hh as the registers hold it, W_ih as the products read it.
    const int64_t rows = m_.backward ? kMaxWarps * kTileRows * cut.m_tiles : 4 * cut.block_units();
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
      // Layers of the same inputs are alike: all but the lowest of a pass, or, backward, but the highest.
      const LayerPlan* alike = &layer == pass.layers.data() ? nullptr : &layer - 1;
      const bool same = alike && (m_.backward ? inputs == 1 : inputs == m_.layer(alike->layer).input);
      layer.w_ih = w_ih;
      layer.cost = same ? alike->cost : predict_step(m_, cut, inputs, w_ih, pass.blocks());
      layer.step_us = layer.cost.chunk_us(cut.chunk_steps) / cut.chunk_steps;
      if (!slowest || layer.step_us > slowest->step_us) slowest = &layer;
    }
    pass.step_us = slowest->step_us;

    // Of a segment, then of all of them. All but the last have whole chunks.
    const int64_t segments = pass.segments(steps), rest = steps - (segments - 1) * pass.segment_steps;
    const double last_us = makespan_us(pass, rest, m_.costs);
    pass.makespan_us =
        last_us +
        (segments > 1 ? static_cast<double>(segments - 1) * makespan_us(pass, pass.segment_steps, m_.costs) : 0);
    pass.ahead_us = ahead_us(pass, segments);

    const double rounds = static_cast<double>(pass.rounds), n = static_cast<double>(steps);
    const int64_t full = steps / cut.chunk_steps, partial = steps - full * cut.chunk_steps;
    const StepCost& cost = slowest->cost;
    const double projection = static_cast<double>(full) * cost.projection_us(cut.chunk_steps) +
                              (partial > 0 ? cost.projection_us(partial) : 0);
    const double chunks = static_cast<double>(full + (partial > 0)) * cost.chunk;
    const double launches = rounds * static_cast<double>(segments);
    Terms terms;
    terms.launch = launches * m_.costs.launch_us;
    terms.load = launches * m_.memory_us(static_cast<double>(loaded));  // copies find them in L2
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

  // Large products before a pass's launches: its gates again. (What comes from the layer above it: see boundary_us.)
  double ahead_us(const Pass& pass, int64_t segments) const {
    if (!m_.backward || m_.ask.saving != Saving::recompute) return 0;
    double work = 0;
    for (int64_t k = pass.first_layer; k < pass.last_layer; ++k) work += m_.input_work(k) + m_.recurrent_work(k);
    return m_.large_us(work * static_cast<double>(m_.shape.rows()), static_cast<double>(2 * pass.lanes() * segments),
                       work * static_cast<double>(segments));
  }

  // Backward: the product that takes gradients from a pass to the one below it, whose last layer is below `above`.
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
      if (pass.count() == 0) break;  // nor will more layers fit
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
    // Passes are chosen for themselves, not for the SMs that they leave to weight gradients; and the two exchanges differ in
    // those: clusters leave idle what does not make up a cluster. So a plan by each of them alone is compared as well.
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

  // By the exchange `only_`, if it is set.
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
      const int64_t up = k - pass.first_layer;  // it may have been made for layers that are alike
      pass.first_layer += up, pass.last_layer += up;
      for (LayerPlan& layer : pass.layers) layer.layer += up;
      plan.passes.push_back(pass);
    }
    plan.after_us = m_.backward ? gradients_us(m_) : 0;
    add_up(plan);
    return m_.backward ? with_products_beside(plan) : plan;
  }

  // The plan's figures from its passes', which it completes, and `after_us`.
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

  // Weight gradients beside the recurrence: the same passes, each in so many segments that it takes the least time in all,
  // if that is less by enough.
  Plan with_products_beside(const Plan& plain) const {
    Plan best = plain;
    const int64_t steps = m_.shape.steps;
    for (const int segments : kSegments) {
      if (segments > steps) break;
      Plan plan = plain;
      for (auto pass = plan.passes.begin(); pass != plan.passes.end(); ++pass) {
        if (!predict(*pass, (steps + segments - 1) / segments)) return best;
        pass->products_beside = pass != plan.passes.begin() || pass->segment_steps < steps;  // something comes after it
      }
      plan.after_us = after_us(plan);
      add_up(plan);
      if (plan.predicted_us < std::min(best.predicted_us, kWorthSegments * plain.predicted_us)) best = plan;
    }
    return best;
  }

  // What is left to do after all launches, where the products of a segment begin when it is done, and share with the launches
  // after it the SMs that those leave. Products that a launch waits for take the whole device meanwhile.
  double after_us(const Plan& plan) const {
    const auto number = [](int64_t n) { return static_cast<double>(n); };
    double left = 0;  // microseconds of all SMs
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

// The cheapest plan by the model above.
inline Plan plan(const StackShape& shape, const Device& device, const Costs& costs, const Ask& ask, bool backward) {
  return Planner(shape, device, costs, ask, backward).run();
}

// ---- The diagonal schedule beside it --------------------------------------------------------------------------------

// Predicted, as the driver in diagonal.cpp runs: a product and a kernel a diagonal, each as soon as the host has queued it
// and the device has done the one before; and large products.
struct DiagonalCost {
  double total_us = 0;
  double host_us = 0;    // of the diagonals, if the device were not to be waited for …
  double device_us = 0;  // … and if the host were not
  double large_us = 0;   // of the larger products: of stages, and after all of them
  int64_t diagonals = 0;

  const char* binds() const {
    return large_us > std::max(host_us, device_us) ? "large products"
           : host_us > device_us                   ? "launches by the host"
                                                   : "small kernels on the device";
  }
};

inline DiagonalCost predict_diagonals(const StackShape& shape, const Device& device, const Costs& costs, const Ask& ask,
                                      bool backward) {
  const Model m{shape, device, costs, ask, backward};
  DiagonalCost cost;
  if (shape.steps < 1 || shape.batch < 1 || shape.depth() < 1) return cost;
  const Diagonals schedule = plan_diagonals(shape, ask.bytes == 8 ? 8 : 4);
  const auto number = [](int64_t n) { return static_cast<double>(n); };
  const int64_t directions = shape.directions;
  // Up to layer k: multiply-adds of a row with W_hh, and with W_ih of layers 1 and up; units.
  std::vector<double> recurrent{0}, inputs{0}, units{0};
  for (int64_t k = 0; k < shape.depth(); ++k) {
    const double projected = number(m.layer(k).projection * m.layer(k).hidden * directions);
    recurrent.push_back(recurrent.back() + m.recurrent_work(k) + projected);
    inputs.push_back(inputs.back() + (k > 0 ? m.input_work(k) : 0));
    units.push_back(units.back() + number(m.layer(k).hidden * directions));
  }
  const double bytes = number(ask.bytes), batch = number(shape.rows()) / number(shape.steps);  // rows of a step
  const double kernels = m.layer(0).projection > 0 ? 2 : 1;                                    // of each kind
  // Recurrent weights are read every diagonal: from L2 if all of them stay there.
  const double l2 = costs.l2_rate * number(device.sms), all = recurrent.back() * bytes;
  const double in_cell = backward ? 24 + 8 * bytes : 36 + bytes + (ask.saving == Saving::none ? 0 : 20);

  for (int64_t stage = 0; stage < schedule.stages(); ++stage) {
    const Diagonals::Lanes lanes = schedule.lanes(stage);
    const auto first = static_cast<size_t>(lanes.first / directions);
    const auto last = static_cast<size_t>((lanes.first + lanes.count - 1) / directions + 1);
    const int64_t length = schedule.length_of_stage(stage);
    const double weights = recurrent[last] - recurrent[first], steps = number(length);
    const double reading =
        all <= 0.7 * number(device.l2_bytes) ? m.cycles_us(weights * bytes / l2) : m.memory_us(weights * bytes);
    // A product has at least 64 columns to its tiles' sides.
    const double multiplying = m.large_us(weights * std::max(batch, 64.0), 0, 0);
    const double product = std::max(costs.kernel_us, costs.kernel_us / 2 + std::max(reading, multiplying));
    const double gates = std::max(costs.kernel_us, m.memory_us((units[last] - units[first]) * batch * in_cell));
    const double host = kernels * (costs.host_product_us + costs.host_launch_us),
                 on_device = kernels * (product + gates);
    cost.host_us += steps * host, cost.device_us += steps * on_device;
    cost.total_us += steps * std::max(host, on_device);
    cost.diagonals += length;

    // One product for all layers of the stage; backward, gates again are two for each.
    const double from_below = inputs[last] - inputs[first], rows = batch * steps;
    double large = std::max(costs.host_product_us, m.large_us(from_below * rows, 1, 0));
    if (backward && ask.saving == Saving::recompute) {
      const double products = 2 * number(lanes.count), work = weights + from_below;
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

inline double diagonal_us(const StackShape& shape, const Device& device, const Costs& costs, const Ask& ask,
                          bool backward) {
  return predict_diagonals(shape, device, costs, ask, backward).total_us;
}

// ---- Which of the two -----------------------------------------------------------------------------------------------

struct Choice {
  bool persistent = false;
  std::string reason;      // one sentence
  Plan forward, backward;  // backward: without passes and without an obstacle where none will follow
  DiagonalCost diagonal_forward, diagonal_backward;
  double persistent_us = 0, diagonal_us = 0;  // of all that will run; persistent_us: 0 where it cannot
};

// A call runs forward and backward on the same schedule. Never an error: what the persistent kernels cannot run, or run more
// slowly by the model, goes to the diagonals.
inline Choice choose(const StackShape& shape, const Device& device, const Costs& costs, const Ask& ask) {
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

// ---- Who works when -------------------------------------------------------------------------------------------------

// A chunk of a lane for one batch group, on the blocks that own the lane. Chunks are counted as the lane takes them.
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
      for (int64_t group = 0; group < pass.batch_groups; ++group) {
        if (group % pass.copies == 0) start += prepare + (group > 0 ? makespan : 0);
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
              all.push_back({p, group, layer.layer, direction, first_chunk + chunk,
                             pass.first_block(layer.layer, direction, group % pass.copies), pass.cut.blocks,
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
