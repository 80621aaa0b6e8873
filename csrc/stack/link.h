// csrc/stack/link.h: the links between the layers of a stack: what layer k + 1 reads of what layer k computes, and what layer
// k gets of the gradient of that.
//
//   forward    u(k+1) = m ⊙ h(k)         m: the mask of the dropout of this link, or 1
//   backward   dh(k) += m ⊙ du(k+1)
//
// Host code calls these functions on a row at a time. On a GPU, apply_mask() of csrc/cuda/elements.h does the same to the
// elements of a thread.
#pragma once

#include <cstdint>

#include "options.h"
#include "philox.h"

namespace stacked_lstm {

// The link from layer k to layer k + 1.
struct Link {
  Dropout dropout;
  int64_t layer = 0;  // k

  // Whether the layer above reads something else than h.
  bool changes_h() const { return dropout.active(); }

  // Makes a row of u(k+1) of a row of h(k), in place. The row has `width` elements, of all directions, and the number t·B + b.
  template <typename T>
  void forward(T* row, int64_t width, int64_t row_number) const {
    if (dropout.active()) dropout.apply(row, width, row_number, layer);
  }
  // Makes a row of the gradient of h(k) of a row of that of u(k+1), in place.
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
