// csrc/persistent/cost.h: the cost model of the persistent kernels: what a block needs on a chip, and how long a step,
// a chunk and a launch are predicted to take. No CUDA, no torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../cuda/device.h"
#include "../stack/stack.h"
#include "kernels.h"
#include "plan.h"

namespace stacked_lstm::persistent {

// Backward: units of dh in a tile.
inline constexpr int kTileRows = 16;

// ---- What a block needs ---------------------------------------------------------------------------------------------

// Registers of a thread that hold W_hh: 8 for each piece and tile of 16 rows. A group has two such tiles in forward.
constexpr int64_t weight_registers(const Instance& instance) {
  return 8 * instance.pieces * (instance.unit_tiles > 0 ? instance.unit_tiles : 2);
}
// All registers of a thread, predicted: weights, sums (one tile of columns has a second chain; exact products have 8
// columns of 4 rows before they are added up), c, and addresses. The forward formula is fitted to one instance, of 8
// pieces and one tile: 243 on sm_90a.
constexpr int64_t registers_thread(const Instance& instance) {
  const int64_t sums = instance.product == Product::exact ? 32 : 0;
  const int64_t all =
      instance.unit_tiles > 0
          ? weight_registers(instance) + 4 * instance.unit_tiles * std::max(instance.batch_tiles, 1) + sums + 64
          : weight_registers(instance) + 18 * instance.batch_tiles + sums + 97;
  return std::min<int64_t>(all, kRegistersThread);  // the compiler's limit: cuda-check sees that nothing is spilled
}
inline Instance instance_of(const Cut& cut) {
  return {cut.product, cut.exchange, cut.batch_tiles, cut.pieces, cut.unit_tiles};
}

inline int64_t piece_elements(int64_t bytes) { return kPieceBytes / bytes; }

// Shared memory of a block, in bytes; and how many 64-bit words a launch's exchange through L2 takes.
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
//   makespan of a launch: layer k's chunk c begins after its own chunk c-1, and a hand-over after chunk c of the layer
//                         before
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
  // The time of `products` large products that have `multiply_adds` in all. `elements`: of the weights, or of their
  // gradients, which go through memory.
  double large_us(double multiply_adds, double products, double elements) const {
    const double share = exact() ? costs.fma_share : costs.product_share;
    return std::max({products * costs.kernel_us, memory_us(elements * static_cast<double>(ask.bytes)),
                     cycles_us(multiply_adds / (peak() * share * static_cast<double>(device.sms)))});
  }
  const LayerShape& layer(int64_t k) const { return shape.layers[static_cast<size_t>(k)]; }
  // Multiply-adds of one row with all of a layer's W_ih, or W_hh.
  double input_work(int64_t k) const {
    return static_cast<double>(4 * layer(k).hidden * layer(k).input * shape.directions);
  }
  double recurrent_work(int64_t k) const {
    return static_cast<double>(4 * layer(k).hidden * layer(k).output() * shape.directions);
  }
};

// The cost of a step of a lane. `inputs`: forward, K of the projection; backward, not 0 if there is a lane above in the
// launch.
LaneCost predict_step(const Model& m, const Cut& cut, int64_t inputs, Home w_ih, int64_t blocks_running);

// The time until all layers of a launch have done their last chunk. All chunks but the last have the same length, so
// they take equally long in a layer. A layer has done F of them after Σ (a chunk of each layer up to it) + (F-1) · the
// slowest of these, and hand-overs.
double makespan_us(const Pass& pass, int64_t steps, const Costs& costs);

// No schedule can be faster than this: reading the weights once from memory, and doing all multiply-adds on all SMs.
// Backward counts only the multiply-adds of dL/dh, since the caller may not ask for gradients of weights and input.
double physical_limit_us(const Model& m);

// The time of the gradients of weights and of the input, if they are computed after everything else.
double gradients_us(const Model& m);

}  // namespace stacked_lstm::persistent
