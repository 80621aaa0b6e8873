// csrc/cpu/packed.h: the weights of a stack in the order in which the forward kernels read them (panels: kernels.h).
//
// A call packs its weights into its own workspace, or into a PackedStack that its caller keeps for later calls
// (csrc/torch/packed_cache.h). Both hold the same numbers in the same order, so a call computes the same with either.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "../stack/stack.h"
#include "fingerprint.h"
#include "kernels.h"
#include "workspace.h"

namespace stacked_lstm::cpu {

// Vectors a panel of the recurrent product. If few rows share each weight, a panel has four vectors: the tile of these
// few rows is then as large as the registers allow. Else it has two. The batch alone decides: see "Bits" in kernels.h.
inline int64_t recurrent_width(int64_t batch) { return batch <= 6 ? 4 : 2; }
// Vectors a panel of all other products.
inline constexpr int64_t kWidth = 2;

inline int64_t panels_of(int64_t columns, int64_t width, int64_t vector_elements) {
  return (columns + width * vector_elements - 1) / (width * vector_elements);
}
inline int64_t panel_elements(int64_t columns, int64_t inner, int64_t width, int64_t vector_elements) {
  return panels_of(columns, width, vector_elements) * width * vector_elements * inner;
}

template <typename T>
struct PackedLane {
  void *weight_ih, *weight_hh;  // gate order; kWidth and recurrent_width(batch) vectors a panel
  T* bias;                      // b_ih + b_hh, gate order
  void* weight_hr;              // plain order; null without a projection
};

// The packed weights of every lane, in memory that take(bytes) returns.
template <typename T, typename Take>
std::vector<PackedLane<T>> lay_out(const StackShape& shape, Storage storage, Take&& take) {
  const int64_t stored = stored_bytes(storage, sizeof(T));
  std::vector<PackedLane<T>> lanes;
  for (int64_t n = 0; n < shape.lanes(); ++n) {
    const LayerShape& layer = shape.of_lane(n);
    const int64_t gate_rows = 4 * layer.padded_hidden();
    PackedLane<T> lane{};
    lane.weight_ih = take(gate_rows * stored_rows(storage, layer.input) * stored);
    lane.weight_hh = take(gate_rows * stored_rows(storage, layer.output()) * stored);
    lane.bias = reinterpret_cast<T*>(take(gate_rows * int64_t{sizeof(T)}));
    if (layer.projection > 0) {
      const int64_t rows = stored_rows(storage, layer.hidden);
      lane.weight_hr = take(panel_elements(layer.projection, rows, kWidth, kernels<T>().vector_elements) * stored);
    }
    lanes.push_back(lane);
  }
  return lanes;
}

template <typename T>
class PackedStack {
 public:
  // Takes memory for the packed weights of `shape`; the first call that is given the stack packs them. `sources` is
  // where the weights are, if they are to be checked; the constructor takes their fingerprint, before anything is
  // packed.
  // Throws std::runtime_error when there is no memory.
  PackedStack(const StackShape& shape, Storage storage, std::vector<Bytes> sources = {})
      : memory_(Workspace::Pages::as_needed),
        storage_(storage),
        sources_(std::move(sources)),
        fingerprint_(cpu::fingerprint(sources_)) {
    memory_.lay_out(
        [&] { lanes_ = cpu::lay_out<T>(shape, storage, [&](int64_t bytes) { return memory_.take<char>(bytes); }); });
  }

  const std::vector<PackedLane<T>>& lanes() const { return lanes_; }
  Storage storage() const { return storage_; }
  int64_t bytes() const { return memory_.bytes(); }
  // What was packed. The memory of `sources` may be read as long as the weights are still there.
  const std::vector<Bytes>& sources() const { return sources_; }
  const Fingerprint& fingerprint() const { return fingerprint_; }
  // Whether the weights are packed. The call that packs sets this once, before any other call is given the stack.
  bool ready() const { return ready_; }
  void set_ready() { ready_ = true; }

 private:
  Workspace memory_;
  const Storage storage_;
  const std::vector<Bytes> sources_;
  const Fingerprint fingerprint_;
  std::vector<PackedLane<T>> lanes_;
  bool ready_ = false;
};

}  // namespace stacked_lstm::cpu
