// csrc/persistent/cost.h: the cost model of the persistent kernels: what a block needs on a chip, and how long a step, a chunk
// and a launch are predicted to take. No CUDA, no torch.
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
StepCost predict_step(const Model& m, const Cut& cut, int64_t inputs, Home w_ih, int64_t blocks_running);

// When each layer of a launch has done its last chunk. Layers have chunks of the same length, so that all but the last of a
// layer take equally long, and F of them end at Σ (of the layers up to it) + (F-1) · the slowest of those.
double makespan_us(const Pass& pass, int64_t steps, const Costs& costs);

// What no schedule can be faster than: the weights once from memory, and all multiply-adds on all SMs. Backward: those of
// dL/dh; what is left of a large product's work may not be asked for.
double physical_limit_us(const Model& m);

// Gradients of weights and of the input, where they are made after all else.
double gradients_us(const Model& m);

}  // namespace stacked_lstm::persistent
