// csrc/stack/reserve.h: the layout of a call's reserve, on every path:
//
//   c of every lane        [row][padded_hidden]
//   gates of every lane    [row][4·padded_hidden]
//   h of every layer       [row][D·output]            the top layer's only where the caller's output does not hold it
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
  bool h = false;            // whether h of the layers below the top is kept
  bool top = false;          // whether h of the top layer is kept, too
};

class ReserveLayout {
 public:
  ReserveLayout() = default;
  ReserveLayout(const StackShape& shape, const KeptRows& kept) : kept_(kept) {
    if (!kept.h) return;
    int64_t units = 0;  // of all lanes, padded
    for (int64_t k = 0; k < shape.depth(); ++k) {
      const LayerShape& layer = shape.layers[k];
      for (int64_t d = 0; d < shape.directions; ++d, units += layer.padded_hidden()) units_before_.push_back(units);
      h_before_.push_back(h_);
      if (k + 1 < shape.depth() || kept.top) h_ += shape.rows() * shape.directions * layer.output();
    }
    c_ = kept.c * units, gates_ = 4 * kept.gates * units;
  }

  const KeptRows& kept() const { return kept_; }
  // Where a lane's c and its gates begin; in elements of the arithmetic's type.
  int64_t c(int64_t lane) const { return kept_.c * units_before(lane); }
  int64_t gates(int64_t lane) const { return c_ + 4 * kept_.gates * units_before(lane); }
  // Elements of all c and all gates. h begins behind them.
  int64_t cells() const { return c_ + gates_; }
  // Where a layer's h begins, counted from the first h, and the number of all h; in elements of h's type.
  int64_t h(int64_t layer) const { return h_before_[static_cast<size_t>(layer)]; }
  int64_t h_elements() const { return h_; }

 private:
  int64_t units_before(int64_t lane) const { return units_before_[static_cast<size_t>(lane)]; }

  KeptRows kept_;
  std::vector<int64_t> units_before_;  // padded units of all lanes before each lane
  std::vector<int64_t> h_before_;      // elements of h of all layers before each layer
  int64_t c_ = 0, gates_ = 0, h_ = 0;  // elements
};

}  // namespace stacked_lstm
