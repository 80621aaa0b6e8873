// csrc/stack/link.h: the links between the layers of a stack: what a layer reads of the layers below, what the stack's output
// is, and what flows back. u(k) is the input of layer k, x = u(0) that of the stack, m(k) the mask of the dropout behind
// layer k, or 1.
//
//              u(1)              u(k+1), k ≥ 1              output of L layers
//   plain      m(0) ⊙ h(0)       m(k) ⊙ h(k)                h(L-1)
//   residual   m(0) ⊙ h(0)       m(k) ⊙ h(k) + u(k)         h(L-1) + u(L-1), if L ≥ 2      Wu et al. 2016 (GNMT)
//   skip       [m(0) ⊙ h(0), x]  [m(k) ⊙ h(k), x]           [h(0), …, h(L-1)]              Graves 2013
//
// Back, with v(k) the gradient of u(k), and dy that of the output: of each layer, v(k) is dG·W_ih and what the table adds.
//
//              dh(k), k < L-1              dh(L-1)             v(k), k ≥ 1                     dx
//   plain      m(k) ⊙ v(k+1)               dy
//   residual   m(k) ⊙ v(k+1)               dy                  + v(k+1); + dy in layer L-1
//   skip       m(k) ⊙ v(k+1)h + dy(k)      dy(L-1)                                             + v(1)x + … + v(L-1)x
//
// v(k)h and v(k)x are the two parts of v(k), as [h, x] are of u(k); dy(k) are the columns of h(k) in dy.
//
// Host code calls the functions below on a row at a time. On a GPU, apply_mask() of csrc/cuda/elements.h does the same to the
// elements of a thread.
#pragma once

#include <cstdint>

#include "options.h"
#include "philox.h"

namespace stacked_lstm {

// Whether the link behind a layer adds the layer's own input: to what the layer above reads or, of the top layer, to the output.
inline bool adds_input(const StackShape& shape, int64_t layer) {
  return shape.link == LinkKind::residual && layer >= 1;
}
// Columns of a layer's input that come from the layer below. With skip links, those of x are behind them.
inline int64_t columns_from_below(const StackShape& shape, int64_t layer) {
  return shape.directions * shape.layers[static_cast<size_t>(layer - 1)].output();
}
// The first column of a layer's h in the stack's output.
inline int64_t output_column(const StackShape& shape, int64_t layer) {
  int64_t column = 0;
  for (int64_t k = 0; shape.link == LinkKind::skip && k < layer; ++k) column += columns_from_below(shape, k + 1);
  return column;
}

// What the link from layer k to layer k + 1 does to h: the mask. What it adds, and puts beside it, is up to the kernels.
struct Link {
  Dropout dropout;
  int64_t layer = 0;  // k

  // Whether the layer above reads something else than h itself.
  bool changes_h() const { return dropout.active(); }

  // Masks a row of h(k), in place. The row has `width` elements, of all directions, and the number t·B + b.
  template <typename T>
  void forward(T* row, int64_t width, int64_t row_number) const {
    if (dropout.active()) dropout.apply(row, width, row_number, layer);
  }
  // The same for the elements first … last-1 of the row alone.
  template <typename T>
  void forward(T* row, int64_t first, int64_t last, int64_t width, int64_t row_number) const {
    if (dropout.active()) dropout.apply(row, first, last, width, row_number, layer);
  }
  // Makes a row of the gradient of h(k) of a row of v(k+1), in place.
  template <typename T>
  void backward(T* row, int64_t width, int64_t row_number) const {
    if (dropout.active()) dropout.apply(row, width, row_number, layer);
  }
};

// All links of a call.
struct Links {
  PerLayer<double> rates;  // of dropout
  uint64_t seed = 0;

  Link operator[](int64_t k) const { return {{rates[k], seed}, k}; }
};

}  // namespace stacked_lstm
