// csrc/stack/reserve.h: the layout of a call's reserve, on every path:
//
//   c of every lane        [row][padded_hidden]
//   gates of every lane    [row][4·padded_hidden]
//   h of every layer       [row][D·output]            only where the caller's output does not hold it
//   input of every layer   [row][D·output]            with residual links, of layers from 2 on: that of layer 1 is h of layer 0
//                                                     through its mask
//
// Which rows of c and of gates a lane keeps is the path's own decision (csrc/cpu/reserve.h, csrc/driver/driver.h). Python has
// the same formulas for sizes that are symbols: stacked_lstm_ext/layout.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "stack.h"

namespace stacked_lstm {

struct KeptRows {
  int64_t c = 0, gates = 0;  // of each lane
  bool h = false;            // whether h of the layers is kept, as far as the caller's output does not hold it
  bool top = false;          // whether the caller's output holds it in other bits than the kernels compute with
  bool inputs = false;       // whether inputs of layers are kept
};

// Elements of the parts: c and gates in the arithmetic's type, h and inputs in their own.
struct ReserveSize {
  int64_t c = 0, gates = 0, h = 0, inputs = 0;

  int64_t cells() const { return c + gates; }
};

// Whether a reserve holds h of a layer, and a layer's input.
inline bool keeps_h(const StackShape& shape, const KeptRows& kept, int64_t layer) {
  if (!kept.h || kept.top) return kept.h;
  return shape.link == LinkKind::residual ? shape.depth() > 1
                                          : shape.link == LinkKind::plain && layer + 1 < shape.depth();
}
inline bool keeps_input(const StackShape& shape, const KeptRows& kept, int64_t layer) {
  return kept.inputs && shape.link == LinkKind::residual && layer >= 2;
}

inline ReserveSize reserve_size(const StackShape& shape, const KeptRows& kept) {
  if (!kept.h) return {};
  int64_t units = 0, outputs = 0, inputs = 0;  // units of all lanes, padded; columns of h, and of inputs, that are kept
  for (int64_t k = 0; k < shape.depth(); ++k) {
    const LayerShape& layer = shape.layers[k];
    units += shape.directions * layer.padded_hidden();
    if (keeps_h(shape, kept, k)) outputs += shape.directions * layer.output();
    if (keeps_input(shape, kept, k)) inputs += layer.input;
  }
  return {kept.c * units, 4 * kept.gates * units, shape.all_rows() * outputs, shape.all_rows() * inputs};
}

class ReserveLayout {
 public:
  ReserveLayout() = default;
  ReserveLayout(const StackShape& shape, const KeptRows& kept)
      : kept_(kept), size_(reserve_size(shape, kept)), directions_(shape.directions) {
    if (!kept.h) return;
    before_.reserve(static_cast<size_t>(shape.lanes()));
    Before next{};
    for (int64_t k = 0; k < shape.depth(); ++k) {
      const LayerShape& layer = shape.layers[k];
      for (int64_t d = 0; d < directions_; ++d) before_.push_back(next), next.units += layer.padded_hidden();
      if (keeps_h(shape, kept, k)) next.h += shape.all_rows() * directions_ * layer.output();
      if (keeps_input(shape, kept, k)) next.inputs += shape.all_rows() * layer.input;
    }
  }

  const KeptRows& kept() const { return kept_; }
  const ReserveSize& size() const { return size_; }
  // Where a lane's c and its gates begin; in elements of the arithmetic's type. h begins behind all of them.
  int64_t c(int64_t lane) const { return kept_.c * before(lane).units; }
  int64_t gates(int64_t lane) const { return size_.c + 4 * kept_.gates * before(lane).units; }
  // Where a layer's h begins, counted from the first h, in elements of h's type.
  int64_t h(int64_t layer) const { return before(layer * directions_).h; }
  // Where a layer's input begins, likewise counted from the first h.
  int64_t input(int64_t layer) const { return size_.h + before(layer * directions_).inputs; }

 private:
  struct Before {       // of all lanes before a lane, and of all layers before its layer
    int64_t units;      // padded
    int64_t h, inputs;  // elements
  };
  const Before& before(int64_t lane) const { return before_[static_cast<size_t>(lane)]; }

  KeptRows kept_;
  ReserveSize size_;
  int64_t directions_ = 1;
  std::vector<Before> before_;  // a lane each
};

}  // namespace stacked_lstm
