// csrc/stack/state_layout.h: where each lane's states are in h_0, c_0, h_n, c_n and their gradients.
//
// A state tensor holds the lanes in order, each as (B, width of the lane). Where all layers have the same width, this is the
// tensor (lanes, B, width) of torch.nn.LSTM. Where they differ, it is a tensor of one dimension.
#pragma once

#include <cstdint>

#include "stack.h"

namespace stacked_lstm {

class StateLayout {
 public:
  explicit StateLayout(const StackShape& shape) : shape_(shape) {}

  // The first element of a lane's h, or c. The place of lane `shape.lanes()` is the number of elements of all lanes.
  int64_t h(int64_t lane) const {
    return place(lane, [](const LayerShape& layer) { return layer.output(); });
  }
  int64_t c(int64_t lane) const {
    return place(lane, [](const LayerShape& layer) { return layer.hidden; });
  }

 private:
  template <typename Width>
  int64_t place(int64_t lane, const Width& width) const {
    const int64_t layer = lane / shape_.directions, direction = lane % shape_.directions;
    int64_t before = 0;
    for (int64_t k = 0; k < layer; ++k) before += shape_.directions * width(shape_.layers[k]);
    if (direction > 0) before += direction * width(shape_.layers[layer]);
    return shape_.batch * before;
  }

  const StackShape& shape_;
};

}  // namespace stacked_lstm
