// csrc/persistent/cost.cpp: see cost.h.
#include "cost.h"

#include <cmath>

namespace stacked_lstm::persistent {

LaneCost predict_step(const Model& m, const Cut& cut, int64_t inputs, Home w_ih, int64_t blocks_running) {
  const Costs& costs = m.costs;
  const auto number = [](int64_t n) { return static_cast<double>(n); };
  const double columns = cut.columns(), bytes = number(m.ask.bytes), units = cut.units(), rate = m.product_rate();
  const double batch_tiles = cut.batch_tiles, schedulers = 4;
  LaneCost cost;
  cost.w_ih = w_ih;
  cost.reads_every = m.backward ? cut.chunk_steps : std::max(kProjectedTiles / cut.batch_tiles, 1);

  // Bytes that come to a block each step, unless they stay inside the block. Half of a word through L2 is its tag.
  const double arriving = columns * units * (m.backward ? 4 : bytes);
  cost.exchange = inside_block(cut, static_cast<size_t>(m.ask.bytes))
                      ? m.cycles_us(costs.barrier + costs.shared_latency)
                  : cut.exchange == Exchange::cluster ? costs.cluster_us + m.cycles_us(arriving / costs.cluster_rate)
                                                      : costs.l2_us + m.cycles_us(2 * arriving / costs.l2_rate);

  // Rows of W_hh, their K, and the warps that share them. Of three times the longest counts: that of the tensor cores,
  // that of a warp's chain of dependent products, and that of reading the other operand. Forward with one tile of
  // columns has two chains of sums.
  const double warps = m.backward ? kMaxWarps : cut.groups * cut.splits;
  const double rows = m.backward ? kMaxWarps * kTileRows * cut.unit_tiles : 4 * cut.block_units();
  const double k = m.backward ? 4 * cut.block_units() : number(cut.pieces * cut.splits * piece_elements(m.ask.bytes));
  const double readers = m.backward ? kMaxWarps : cut.groups;                 // how often all of the operand is read
  const double busiest = std::ceil(warps / schedulers) * schedulers / warps;  // schedulers share warps unevenly
  const double chain = 2.0 * cut.pieces / (!m.backward && cut.batch_tiles == 1 ? 2 : 1);
  cost.products = m.cycles_us(std::max({rows * k * columns / rate * busiest, m.exact() ? 0 : chain * costs.mma_latency,
                                        readers * columns * k * bytes / costs.shared_rate}) +
                              costs.shared_latency);

  const double activations = m.ask.bytes == 4 ? costs.accurate : costs.mufu;  // of two cells a thread
  double in_memory;                                                           // bytes a cell, written or read
  if (m.backward) {
    // Every thread adds up the partial sums of its cells, in the order of blocks, and then computes the gates'
    // gradients.
    const double cells = std::ceil(cut.block_units() * columns / (kMaxWarps * kWarpThreads));
    const double sum = std::max(arriving / costs.shared_rate, cells * cut.blocks * costs.add) + costs.shared_latency;
    const double again = m.ask.saving == Saving::recompute ? activations / 2 * cells : 0;
    cost.gates = m.cycles_us(sum + costs.backward_gates * cells + again + costs.barrier);
    in_memory = 4 + 16 + bytes + 4 * bytes;  // c, gates, dL/dh; and the gates' gradients
    if (m.ask.states) in_memory += bytes;    // dL/dc
  } else {
    // One warp of a group computes its cells, two a thread and tile.
    const double gate_warps = std::ceil(cut.groups / schedulers) * batch_tiles;
    const double reduce = cut.splits > 1 ? costs.reduce + costs.reduce_words * (cut.splits - 1) * batch_tiles : 0;
    cost.gates = m.cycles_us(activations * gate_warps + costs.gate_latency + reduce);
    in_memory = m.ask.keeps_c() ? bytes + 4 + (m.ask.saving == Saving::full ? 16 : 0) : 0;
    // A residual link: the warp reads its part of x once more, and writes the sum beside h. The latency of L2 passes while
    // the blocks exchange h.
    if (m.shape.link == LinkKind::residual && m.shape.depth() > 1) in_memory += 2 * bytes;
    if (in_memory > 0) cost.saves = m.cycles_us(costs.save * gate_warps);
  }
  // Memory may be slower than all blocks together. Memory works beside the rest of the step: only what takes longer
  // counts.
  const double moved = m.memory_us(in_memory * cut.block_units() * columns * number(blocks_running));
  cost.saves += std::max(0.0, moved - cost.step());

  if (m.backward && inputs == 0) return cost;
  // The counters take a latency of L2 and two barriers, and so do the rows.
  cost.chunk_start = cost.copy_rows = m.cycles_us(costs.l2_latency + 2 * costs.barrier);
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

double makespan_us(const Pass& pass, int64_t steps, const Costs& costs) {
  const int64_t chunk = pass.cut.chunk_steps, full = (steps - 1) / chunk, rest = steps - full * chunk;
  double sum = 0, slowest = 0, hand_over = 0, end = 0;
  for (int64_t n = 0; n < pass.count(); ++n) {
    const LaneCost& cost = pass.in_order(n).cost;
    const double each = cost.chunk_us(chunk);
    sum += each, slowest = std::max(slowest, each);
    const double before = full == 0 ? 0 : sum + static_cast<double>(full - 1) * slowest + hand_over;
    end = std::max(before, n == 0 ? 0 : end + costs.hand_over_us) + cost.chunk_us(rest);
    hand_over += costs.hand_over_us;
  }
  return end;
}

double physical_limit_us(const Model& m) {
  double weights = 0;
  for (int64_t k = 0; k < m.shape.depth(); ++k) {
    weights += m.recurrent_work(k) + (m.backward && k == 0 ? 0 : m.input_work(k));
  }
  const double work = weights * static_cast<double>(m.shape.rows());
  return std::max(m.memory_us(weights * static_cast<double>(m.ask.bytes)),
                  m.cycles_us(work / (m.peak() * static_cast<double>(m.device.sms))));
}

double gradients_us(const Model& m) {
  double work = m.input_work(0);
  for (int64_t k = 0; k < m.shape.depth(); ++k) work += m.input_work(k) + m.recurrent_work(k);
  return m.large_us(work * static_cast<double>(m.shape.rows()), static_cast<double>(2 * m.shape.lanes() + 1), work);
}

}  // namespace stacked_lstm::persistent
