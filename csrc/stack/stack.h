// csrc/stack/stack.h: the sizes, options and pointers of a call, for a stack of LSTM layers. Plain data, no torch.
//
// Rows. Time-major: the sequences of step t (B of them, or fewer in a packed batch) are consecutive rows, from row
// first_row(t) on. A packed batch is sorted by length, so step t holds the sequences 0 … active(t) - 1, and active(t)
// never grows with t. Every kernel runs on this form, with or without lengths, so no padding is ever computed.
//
// Lanes. A lane is one direction of one layer; lane = layer·D + direction. A reverse lane takes steps from T-1 down.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "philox.h"

namespace stacked_lstm {

// What a training step keeps for its backward.
enum class Saving {
  none,       // nothing: inference
  full,       // h, c and the four gate activations of every cell
  recompute,  // h and c; backward recomputes the gates, by large products. The CPU keeps part of both: see Reserve
};

// Reserves and workspaces pad units to a multiple of this, so that every vector is complete.
inline constexpr int64_t kUnitPadding = 16;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct LayerShape {
  int64_t input;       // K of the input projection: I, or D·(P or H) of the layer below
  int64_t hidden;      // H
  int64_t projection;  // P, 0 for none

  int64_t output() const { return projection > 0 ? projection : hidden; }  // of one direction
  int64_t padded_hidden() const { return round_up(hidden, kUnitPadding); }
};

struct StackShape {
  int64_t steps = 0;  // T
  int64_t batch = 0;  // B
  int64_t directions = 1;
  std::vector<LayerShape> layers;
  std::vector<int64_t> packed_rows;  // first row of each step, then the number of rows: T + 1; empty without lengths

  int64_t depth() const { return static_cast<int64_t>(layers.size()); }
  int64_t lanes() const { return depth() * directions; }
  bool packed() const { return !packed_rows.empty(); }
  int64_t first_row(int64_t t) const { return packed() ? packed_rows[static_cast<size_t>(t)] : t * batch; }
  int64_t rows() const { return first_row(steps); }
  int64_t active(int64_t t) const { return first_row(t + 1) - first_row(t); }
  const LayerShape& of_lane(int64_t lane) const { return layers[lane / directions]; }
  // The time of a lane's step s. A lane numbers its steps in the order in which it takes them.
  int64_t time(int64_t lane, int64_t s) const { return lane % directions ? steps - 1 - s : s; }
};

// Saving::recompute keeps c after every kCheckpointSteps-th step of a lane.
inline constexpr int64_t kCheckpointSteps = 8;
// Saving::recompute also keeps the gates of 1 / kKeptGates of the rows. They take about as much memory as the c that is
// not kept, and leave a third less to recompute.
inline constexpr int64_t kKeptGates = 3;

// Rows of c and of gates that a lane keeps. They depend on T, B and the number of rows alone, because a tracer of a
// call does not know how many rows of a packed batch each step has.
struct KeptRows {
  int64_t c = 0, gates = 0;
};
inline KeptRows kept_rows(const StackShape& shape, Saving saving) {
  const int64_t rows = shape.rows();
  if (saving == Saving::none) return {};
  if (saving == Saving::full) return {rows, rows};
  return {(std::max<int64_t>(shape.steps, 1) - 1) / kCheckpointSteps * shape.batch, rows / kKeptGates};
}

// Elements of a call's reserve.
struct ReserveSize {
  int64_t c = 0, gates = 0, h = 0;
  int64_t total() const { return c + gates + h; }
};

// `keep_top`: the top layer's h is kept too, because the caller's output holds it in fewer bits.
inline ReserveSize reserve_size(const StackShape& shape, Saving saving, bool keep_top) {
  ReserveSize size;
  if (saving == Saving::none) return size;
  const KeptRows kept = kept_rows(shape, saving);
  for (int64_t k = 0; k < shape.depth(); ++k) {
    const LayerShape& layer = shape.layers[k];
    const int64_t units = shape.directions * layer.padded_hidden();
    size.c += kept.c * units;
    size.gates += 4 * kept.gates * units;
    if (k + 1 < shape.depth() || keep_top) size.h += shape.rows() * shape.directions * layer.output();
  }
  return size;
}

template <typename T>
struct LaneWeights {
  const T* weight_ih;  // (4H, input)
  const T* weight_hh;  // (4H, output)
  const T* bias_ih;    // (4H), or null
  const T* bias_hh;    // (4H), or null
  const T* weight_hr;  // (P, H), or null
};

template <typename T>
struct LaneGradients {
  T* weight_ih;
  T* weight_hh;
  T* bias_ih;
  T* bias_hh;
  T* weight_hr;
};

// The rows of the caller's input, or of the gradient of the output. Row (t, b) starts at
// data + t·step_stride + b·row_stride or, if packed, at data + (first_row(t) + b)·row_stride.
template <typename T>
struct Input {
  const T* data = nullptr;
  int64_t step_stride = 0;  // ignored if packed
  int64_t row_stride = 0;

  const T* row(const StackShape& shape, int64_t t, int64_t b) const {
    return shape.packed() ? data + (shape.first_row(t) + b) * row_stride : data + t * step_stride + b * row_stride;
  }
};

template <typename T>
struct ForwardCall {
  StackShape shape;
  Input<T> input;
  std::vector<LaneWeights<T>> weights;  // one per lane
  const T* h_0;                         // (lanes, B, output)
  const T* c_0;                         // (lanes, B, hidden)
  Dropout dropout;
  Saving saving;
  bool keep_top;  // see reserve_size
  T* output;      // (rows, D·output)
  T* h_n;
  T* c_n;
  T* reserve;
  bool bf16_weights = false;  // T is float; the products take weights that are rounded to bfloat16
  // The caller's tensors are bfloat16. So, where units multiply bfloat16, all products round their activations to
  // bfloat16, not only the input projections. Outside the products, what is carried from step to step is not rounded.
  bool bf16_activations = false;
};

template <typename T>
struct BackwardCall {
  StackShape shape;
  Input<T> input;
  std::vector<LaneWeights<T>> weights;
  const T* h_0;
  const T* c_0;
  Dropout dropout;
  Saving saving;
  bool keep_top;
  const T* output;
  const T* reserve;
  Input<T> grad_output;  // D·output columns; or null
  const T* grad_h_n;     // (lanes, B, output), or null
  const T* grad_c_n;     // (lanes, B, hidden), or null
  T* grad_input[2];      // (rows, input) of each direction, or null; the gradient is their sum
  T* grad_h_0;
  T* grad_c_0;
  std::vector<LaneGradients<T>> gradients;  // one per lane, or empty
  bool bf16_weights = false;                // as in the forward pass
  bool bf16_activations = false;            // likewise
};

// The parts of a call's reserve on the CPU: c of every lane, gates of every lane, h of every layer whose h is kept.
// Saving::full keeps all rows of a lane. Saving::recompute keeps, of the lane's steps s,
//
//   s       0 ┄┄ 7  8 ┄ 15 16 ┄ 23 24 ┄ 31
//   h       ■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■   all of it
//   c            ■       ■       ■           after every kCheckpointSteps-th step but the lane's last, B rows each
//   gates                          ■■■■■■■   of as many last steps as fit in 1/kKeptGates of the rows; backward takes
//                                            these steps first
template <typename T>
class CpuReserve {
 public:
  CpuReserve(T* data, const StackShape& shape, Saving saving, bool keep_top)
      : shape_(shape), full_(saving == Saving::full), kept_(kept_rows(shape, saving)) {
    const ReserveSize size = reserve_size(shape, saving, keep_top);
    if (size.total() == 0) return;
    c_ = data, gates_ = c_ + size.c, h_ = gates_ + size.gates;
  }

  // c after step s of a lane, [sequence][padded_hidden]; null where it is not kept.
  T* c(int64_t lane, int64_t s) const {
    int64_t row = shape_.first_row(shape_.time(lane, s));
    if (!full_) {
      if ((s + 1) % kCheckpointSteps != 0 || s + 1 == shape_.steps) return nullptr;
      row = s / kCheckpointSteps * shape_.batch;
    }
    return c_ ? c_ + (lane * kept_.c + row) * padded() : nullptr;
  }
  // The gates of step s of a lane, [sequence][4·padded_hidden]; null where they are not kept.
  T* gates(int64_t lane, int64_t s) const {
    const int64_t t = shape_.time(lane, s);
    const int64_t row = shape_.first_row(t) - gates_from(lane);
    if (row < 0 || row + shape_.active(t) > kept_.gates || !gates_) return nullptr;
    return gates_ + (lane * kept_.gates + row) * 4 * padded();
  }
  // h of all directions of a layer, [row][D·output].
  T* h(int64_t layer) const {
    T* h = h_;
    for (int64_t n = 0; n < layer; ++n) h += shape_.rows() * shape_.directions * shape_.layers[n].output();
    return h;
  }

  // Clears units first … last-1 of those rows of a lane's reserve that no step writes, so that equal calls have equal
  // reserves. These are rows of gates, fewer than a step has, and the rows of c of sequences that have ended or not
  // started.
  void clear_rest(int64_t lane, int64_t first, int64_t last) const {
    if (full_ || !c_) return;
    for (int64_t s = kCheckpointSteps - 1; s + 1 < shape_.steps; s += kCheckpointSteps) {
      for (int64_t b = shape_.active(shape_.time(lane, s)); b < shape_.batch; ++b) {
        T* row = c(lane, s) + b * padded();
        std::fill(row + first, row + last, T(0));
      }
    }
    int64_t used = 0;
    for (int64_t s = shape_.steps - 1; s >= 0 && gates(lane, s); --s) used += shape_.active(shape_.time(lane, s));
    for (int64_t n = 0; n < kept_.gates - used; ++n) {  // at the buffer's end that is further from the lane's last step
      T* row = gates_ + (lane * kept_.gates + (lane % shape_.directions ? kept_.gates - 1 - n : n)) * 4 * padded();
      std::fill(row + first * 4, row + last * 4, T(0));
    }
  }

 private:
  // The first row of the call whose gates a lane may keep.
  int64_t gates_from(int64_t lane) const { return lane % shape_.directions ? 0 : shape_.rows() - kept_.gates; }
  int64_t padded() const { return shape_.layers[0].padded_hidden(); }  // hidden is the same in all layers

  const StackShape& shape_;
  const bool full_;
  const KeptRows kept_;
  T *c_ = nullptr, *gates_ = nullptr, *h_ = nullptr;
};

}  // namespace stacked_lstm
