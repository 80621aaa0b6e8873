// csrc/cpu/reserve.h: what the reserve of a call on the CPU keeps, and where. Its layout is in stack/reserve.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../stack/reserve.h"
#include "../stack/stack.h"

namespace stacked_lstm {

// What a call keeps.
struct Keeping {
  Saving saving = Saving::none;
  bool keep_top = false;  // the top layer's h is kept too, because the caller's output holds it in fewer bits
  bool states = false;    // h and c of all rows are kept, because they are results

  bool anything() const { return saving != Saving::none || states; }
};

// Saving::recompute keeps c after every kCheckpointSteps-th step of a lane.
inline constexpr int64_t kCheckpointSteps = 8;
// Saving::recompute also keeps the gates of 1 / kKeptGates of the rows. They take about as much memory as the c that is
// not kept, and leave a third less to recompute.
inline constexpr int64_t kKeptGates = 3;

// The numbers depend on T, B and the number of rows alone, because a tracer of a call does not know how many rows of a
// packed batch each step has.
inline KeptRows kept_rows(const StackShape& shape, const Keeping& keeping) {
  if (!keeping.anything()) return {};
  const int64_t rows = shape.all_rows(), checkpoints = (std::max<int64_t>(shape.all_steps(), 1) - 1) / kCheckpointSteps;
  const bool all_c = keeping.saving != Saving::recompute || keeping.states;
  const int64_t gates = keeping.saving == Saving::none ? 0 : keeping.saving == Saving::full ? rows : rows / kKeptGates;
  return {all_c ? rows : checkpoints * shape.batch, gates, true, keeping.keep_top, keeping.saving != Saving::none};
}

inline int64_t reserve_elements(const StackShape& shape, const Keeping& keeping) {
  const ReserveSize size = reserve_size(shape, kept_rows(shape, keeping));
  return size.cells() + size.h + size.inputs;
}

// A reserve on the CPU. Saving::full keeps all rows of a lane. Saving::recompute keeps, of the lane's steps s,
//
//   s       0 ┄┄ 7  8 ┄ 15 16 ┄ 23 24 ┄ 31
//   h       ■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■   all of it
//   c            ■       ■       ■           after every kCheckpointSteps-th step but the lane's last, B rows each; with
//                                            `states` all of it, in the order of the rows
//   gates                          ■■■■■■■   of as many last steps as fit in 1/kKeptGates of the rows; backward takes
//                                            these steps first
template <typename T>
class CpuReserve {
 public:
  CpuReserve(T* data, const StackShape& shape, const Keeping& keeping)
      : shape_(shape), layout_(shape, kept_rows(shape, keeping)), data_(data) {
    checkpoints_ = keeping.saving == Saving::recompute && !keeping.states;
    some_gates_ = keeping.saving == Saving::recompute;
  }

  // c after step s of a lane, [sequence][padded_hidden]; null where it is not kept.
  T* c(int64_t lane, int64_t s) const {
    if (layout_.kept().c == 0) return nullptr;
    int64_t row = 0;
    if (!checkpoints_) {
      row = shape_.first_row(shape_.time(lane, s));
    } else {
      if ((s + 1) % kCheckpointSteps != 0 || s + 1 == shape_.steps) return nullptr;
      row = s / kCheckpointSteps * shape_.batch;
    }
    return data_ + layout_.c(lane) + row * padded(lane);
  }
  // The gates of step s of a lane, [sequence][4·padded_hidden]; null where they are not kept.
  T* gates(int64_t lane, int64_t s) const {
    if (layout_.kept().gates == 0) return nullptr;
    const int64_t t = shape_.time(lane, s);
    const int64_t row = shape_.first_row(t) - gates_from(lane);
    if (row < 0 || row + shape_.active(t) > layout_.kept().gates) return nullptr;
    return data_ + layout_.gates(lane) + row * 4 * padded(lane);
  }
  // h of all directions of a layer, [row][D·output].
  T* h(int64_t layer) const { return data_ + layout_.size().cells() + layout_.h(layer); }
  // A layer's input, where that is kept (keeps_input), likewise.
  T* input(int64_t layer) const { return data_ + layout_.size().cells() + layout_.input(layer); }

  // No step writes some rows of a lane's reserve: rows of gates, fewer than a step has; rows of c of sequences that have
  // ended or not started; with lengths, as many rows as there is padding. Clears units first … last-1 of them, so that equal
  // calls have equal reserves.
  void clear_rest(int64_t lane, int64_t first, int64_t last) const {
    const int64_t units = padded(lane);
    if (shape_.has_lengths()) {
      const int64_t used =
          !checkpoints_ ? shape_.rows() : (std::max<int64_t>(shape_.steps, 1) - 1) / kCheckpointSteps * shape_.batch;
      for (int64_t n = used; n < layout_.kept().c; ++n) {
        T* row = data_ + layout_.c(lane) + n * units;
        std::fill(row + first, row + last, T(0));
      }
    }
    if (checkpoints_ && layout_.kept().c > 0) {
      for (int64_t s = kCheckpointSteps - 1; s + 1 < shape_.steps; s += kCheckpointSteps) {
        for (int64_t b = shape_.active(shape_.time(lane, s)); b < shape_.batch; ++b) {
          T* row = c(lane, s) + b * units;
          std::fill(row + first, row + last, T(0));
        }
      }
    }
    if (!some_gates_ && !shape_.has_lengths()) return;
    const int64_t kept = layout_.kept().gates;
    int64_t used = 0;
    for (int64_t s = shape_.steps - 1; s >= 0 && gates(lane, s); --s) used += shape_.active(shape_.time(lane, s));
    for (int64_t n = 0; n < kept - used; ++n) {  // at the buffer's end that is further from the lane's last step
      T* row = data_ + layout_.gates(lane) + (lane % shape_.directions ? kept - 1 - n : n) * 4 * units;
      std::fill(row + first * 4, row + last * 4, T(0));
    }
  }

  // The same for h, and the input, of a layer: the rows that stand for padding.
  void clear_padding(int64_t layer) const {
    const int64_t padding = shape_.all_rows() - shape_.rows();
    const auto clear = [&](T* rows, int64_t width) {
      std::fill_n(rows + shape_.rows() * width, padding * width, T(0));
    };
    const LayerShape& sizes = shape_.layers[static_cast<size_t>(layer)];
    if (padding == 0) return;
    if (keeps_h(shape_, layout_.kept(), layer)) clear(h(layer), shape_.directions * sizes.output());
    if (keeps_input(shape_, layout_.kept(), layer)) clear(input(layer), sizes.input);
  }

 private:
  // The first row of the call whose gates a lane may keep.
  int64_t gates_from(int64_t lane) const { return lane % shape_.directions ? 0 : shape_.rows() - layout_.kept().gates; }
  int64_t padded(int64_t lane) const { return shape_.of_lane(lane).padded_hidden(); }

  const StackShape& shape_;
  const ReserveLayout layout_;
  T* const data_;
  bool checkpoints_ = false, some_gates_ = false;
};

}  // namespace stacked_lstm
