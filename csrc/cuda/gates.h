// csrc/cuda/gates.h: what happens between two products of the diagonal schedule, element by element; host and device.
//
//   forward    a = W_ih·x + W_hh·h(t-1) + b   →   the cell   →   c, h, what backward needs
//   backward   dh (from the loss, the layer above, step t+1)   →   the cell's backward   →   dgates, dc
//   collect    the sum dh alone, where a projection stands between h and the gates
//   copy       rows, masked by dropout or taken from an initial state where a sequence begins
//
// Links (stack/link.h). Where the kernels store h, they also make what the layer above reads: h, masked by dropout, and with
// residual links plus what the layer itself has read. `collect` is the way back.
//
// A step is a list of cells (lane, t) that are computed side by side: all layers and directions of one diagonal. The
// functions at the end compute V neighbouring units of one row of one cell; a kernel is the loop over them:
// gates.cu on a GPU, gates_host.cpp on the CPU. V > 1 needs whole packs: widths and strides that V divides, and
// pointers aligned to V elements.
//
// T is the type that tensors hold, A = Accumulator<T> the type of the arithmetic. Cell is
// the policy that has the equations (cell.h). Rows b = 0 … rows-1 of a cell are consecutive.
#pragma once

#include <cstdint>
#include <string>

#include "elements.h"

namespace stacked_lstm::gates {

// ---- What a kernel is given -----------------------------------------------------------------------------------------

// The rows of a cell whose sequences are reset before its step (stack/resets.h): h and c of the step before are zero for them.
// The kernels select zeros in the place of what they read, so not even NaN crosses a reset.
struct RowResets {
  const uint8_t* reset = nullptr;  // of each row, 0 or 1; null: no row is reset
  int64_t rows = 0;  // the rows behind them begin at this step, and are not reset whatever `reset` has there

  STACKED_LSTM_HOST_DEVICE bool at(int64_t row) const { return reset && row < rows && reset[row]; }
};

template <typename T>
struct ForwardCell {
  using A = Accumulator<T>;
  const A* input_part;      // (rows, 4H): W_ih·x
  const A* recurrent_part;  // (rows, 4H): W_hh·h(t-1)
  const A* bias;            // (4H), or null
  A* c;                     // (rows, H): c(t-1) in, c(t) out
  T* h;                     // (rows, H)
  T* output;                // rows of h_stride: h once more, in the layer's output; or null
  T* above;                 // rows of output_stride: what the layer above reads; or null
  A* saved_c;               // rows of saved_stride, or null
  A* saved_gates;           // rows of 4·saved_stride: the activations; or null
  int64_t rows;
  Element element;
  RowResets resets = {};
  // With residual links, rows of output_stride. Both may be one place: a thread reads an element before it writes it.
  const T* below = nullptr;  // what the layer has read, as a term of `above`; or null
  T* sum = nullptr;          // `above` once more, the `below` of the layer above; or null
};

// What flows into the output of a cell. Null pointers count as zeros.
template <typename T>
struct Incoming {
  using A = Accumulator<T>;
  const T* grad_output;  // rows of h_stride, from the loss
  const A* above;        // rows of output_stride, from the layer above, before dropout's mask
  const A* recurrent;    // (carried, width): W_hhᵀ·dgates of the step after, for the rows that are in it, too
  const T* grad_last;    // (B, width): dL/dh_n, for the rows from `carried` on, whose last step this is
  int64_t carried;
  Element element;
  // With residual links, a second term of `above`: the layer above has added what it read to what it handed up, so the
  // gradient of the latter is part of that of the former. Rows of output_stride.
  const T* passed_output = nullptr;  // if the layer above is the top layer: dL/doutput; or null
  const A* passed = nullptr;         // else: `sum` of the layer above; or null
  A* sum = nullptr;                  // both terms, for the layer below; may be the place of `passed`; or null
};

template <typename T>
struct BackwardCell {
  using A = Accumulator<T>;
  Incoming<T> incoming;
  const A* gates;           // rows of 4·saved_stride: the activations; or null: computed from the next three
  const A* input_part;      // (rows, 4H), as in ForwardCell
  const A* recurrent_part;  // (rows, 4H)
  const A* bias;            // (4H), or null
  const A* c;               // rows of saved_stride
  const A* c_before;        // rows of saved_stride: c of the step before, for the first `continued` rows
  const T* c_0;             // (B, H): for the other rows, whose first step this is
  const T* grad_cell;       // rows of gates_stride / 4: dL/dc of this step, from the loss; or null
  A* grad_c;                // (rows, H): in and out
  T* grad_gates;            // (rows, 4H); zero for the rows that are reset: nothing flows to the step before
  T* all_grad_gates;        // rows of gates_stride: of all rows as they are, beside those of all other steps
  T* cell_h;                // (rows, H): o·tanh(c), for the gradient of W_hr; or null
  int64_t rows;
  int64_t continued;
  RowResets resets = {};
};

template <typename T>
struct CollectCell {
  Incoming<T> incoming;
  T* grad;      // (rows, P)
  T* all_grad;  // (rows, P): once more, beside those of all other steps
  int64_t rows;
};

template <typename T>
struct CopyCell {
  const T* source;  // rows of source_stride, for the first `carried` rows
  int64_t source_stride;
  const T* initial;  // (rows, width), for the other rows
  T* target;         // rows of target_stride
  int64_t target_stride;
  int64_t rows;
  int64_t carried;
  bool masked;  // by dropout
  Element element;
  RowResets resets = {};     // these rows become zero
  const T* below = nullptr;  // rows of target_stride, as in ForwardCell: added, behind the mask; or null
  T* sum = nullptr;          // rows of target_stride: once more; or null
};

// The kernels of one device. Each runs all cells, in one launch if they fit. It returns what went wrong, or "".
template <typename T>
struct GateKernels {
  std::string (*forward)(const CellSizes&, const ForwardCell<T>*, int64_t cells, void* stream);
  std::string (*backward)(const CellSizes&, const BackwardCell<T>*, int64_t cells, void* stream);
  std::string (*collect)(const CellSizes&, const CollectCell<T>*, int64_t cells, void* stream);
  std::string (*copy)(const CellSizes&, const CopyCell<T>*, int64_t cells, void* stream);
};

struct GateTable {
  GateKernels<float> float32;
  GateKernels<double> float64;
  GateKernels<bfloat16> bf16;
  GateKernels<float16> f16;
  // Writes `count` numbers of the host to the device. Reads `values` before it returns, also while a graph is captured.
  std::string (*numbers)(const int64_t* values, int64_t count, int64_t* target, void* stream);

  template <typename T>
  const GateKernels<T>& of() const;
};

template <>
inline const GateKernels<float>& GateTable::of<float>() const {
  return float32;
}
template <>
inline const GateKernels<double>& GateTable::of<double>() const {
  return float64;
}
template <>
inline const GateKernels<bfloat16>& GateTable::of<bfloat16>() const {
  return bf16;
}
template <>
inline const GateKernels<float16>& GateTable::of<float16>() const {
  return f16;
}

const GateTable& host_kernels();       // gates_host.cpp
const GateTable& cuda_gate_kernels();  // gates.cu

// How many units a thread takes if everything is aligned: 16 bytes of A.
template <typename T>
inline constexpr int kPack = 16 / sizeof(Accumulator<T>);

// ---- The four kernels, V units of one row at a time -----------------------------------------------------------------

// W_ih·x + W_hh·h + b of a ForwardCell or a BackwardCell. `reset`: h is zero.
template <typename CellArguments, int V, typename A>
STACKED_LSTM_HOST_DEVICE void preactivations(const CellArguments& cell, int64_t hidden, int64_t row, int64_t unit,
                                             bool reset, A (&a)[4][V]) {
  STACKED_LSTM_UNROLL
  for (int gate = 0; gate < 4; ++gate) {
    const int64_t at = (4 * row + gate) * hidden + unit;
    const Pack<A, V> input = load<V>(cell.input_part + at);
    Pack<A, V> recurrent = load<V>(cell.recurrent_part + at);
    if (reset) recurrent = {};
    STACKED_LSTM_UNROLL
    for (int n = 0; n < V; ++n) a[gate][n] = input.element[n] + recurrent.element[n];
    if (cell.bias) {
      const Pack<A, V> bias = load<V>(cell.bias + gate * hidden + unit);
      STACKED_LSTM_UNROLL
      for (int n = 0; n < V; ++n) a[gate][n] += bias.element[n];
    }
  }
}

template <int V, typename T, typename A>
STACKED_LSTM_HOST_DEVICE void add(A (&x)[V], const Pack<T, V>& pack) {
  STACKED_LSTM_UNROLL
  for (int n = 0; n < V; ++n) x[n] += widen(pack.element[n]);
}

template <int V, typename T, typename Cell = LstmCell>
STACKED_LSTM_HOST_DEVICE void forward_units(const CellSizes& sizes, const ForwardCell<T>& cell, int64_t row,
                                            int64_t unit) {
  using A = Accumulator<T>;
  const int64_t hidden = sizes.width;
  const bool reset = cell.resets.at(row);
  A a[4][V];
  preactivations(cell, hidden, row, unit, reset, a);

  Pack<A, V> c = load<V>(cell.c + row * hidden + unit);
  if (reset) c = {};
  A h[V];
  Pack<A, V> gates[4];
  STACKED_LSTM_UNROLL
  for (int n = 0; n < V; ++n) {
    Gates<A> y;
    h[n] = Cell::template forward<Maths>(Gates<A>{a[0][n], a[1][n], a[2][n], a[3][n]}, c.element[n], y);
    gates[0].element[n] = y.i;
    gates[1].element[n] = y.f;
    gates[2].element[n] = y.g;
    gates[3].element[n] = y.o;
  }

  store(cell.c + row * hidden + unit, c);
  const Pack<T, V> narrow_h = narrow_all<T>(h);
  store(cell.h + row * hidden + unit, narrow_h);
  if (cell.output) store(cell.output + row * sizes.h_stride + unit, narrow_h);
  if (cell.above) {
    STACKED_LSTM_UNROLL
    for (int n = 0; n < V; ++n) h[n] = widen(narrow_h.element[n]);  // the layer above reads what the output holds
    if (cell.element.mask.seed) apply_mask(h, sizes, cell.element, row, unit);
    const int64_t at = row * sizes.output_stride + unit;
    if (cell.below) add(h, load<V>(cell.below + at));
    const Pack<T, V> above = narrow_all<T>(h);
    store(cell.above + at, above);
    if (cell.sum) store(cell.sum + at, above);
  }
  if (cell.saved_c) store(cell.saved_c + row * sizes.saved_stride + unit, c);
  if (cell.saved_gates) {
    STACKED_LSTM_UNROLL
    for (int gate = 0; gate < 4; ++gate) {
      store(cell.saved_gates + (4 * row + gate) * sizes.saved_stride + unit, gates[gate]);
    }
  }
}

template <int V, typename T>
STACKED_LSTM_HOST_DEVICE void collect(const CellSizes& sizes, const Incoming<T>& incoming, int64_t row, int64_t unit,
                                      Accumulator<T> (&dh)[V]) {
  using A = Accumulator<T>;
  STACKED_LSTM_UNROLL
  for (int n = 0; n < V; ++n) dh[n] = 0;
  if (incoming.above) {
    const Pack<A, V> above = load<V>(incoming.above + row * sizes.output_stride + unit);
    STACKED_LSTM_UNROLL
    for (int n = 0; n < V; ++n) dh[n] = above.element[n];
    const int64_t at = row * sizes.output_stride + unit;
    if (incoming.passed_output) add(dh, load<V>(incoming.passed_output + at));
    if (incoming.passed) add(dh, load<V>(incoming.passed + at));
    if (incoming.sum) {
      Pack<A, V> sum;
      STACKED_LSTM_UNROLL
      for (int n = 0; n < V; ++n) sum.element[n] = dh[n];
      store(incoming.sum + at, sum);
    }
    if (incoming.element.mask.seed) apply_mask(dh, sizes, incoming.element, row, unit);
  }
  if (incoming.grad_output) {
    const Pack<T, V> grad = load<V>(incoming.grad_output + row * sizes.h_stride + unit);
    STACKED_LSTM_UNROLL
    for (int n = 0; n < V; ++n) dh[n] += widen(grad.element[n]);
  }
  if (row < incoming.carried) {
    const Pack<A, V> recurrent = load<V>(incoming.recurrent + row * sizes.width + unit);
    STACKED_LSTM_UNROLL
    for (int n = 0; n < V; ++n) dh[n] += recurrent.element[n];
  } else if (incoming.grad_last) {
    const Pack<T, V> grad = load<V>(incoming.grad_last + row * sizes.width + unit);
    STACKED_LSTM_UNROLL
    for (int n = 0; n < V; ++n) dh[n] += widen(grad.element[n]);
  }
}

template <int V, typename T, typename Cell = LstmCell>
STACKED_LSTM_HOST_DEVICE void backward_units(const CellSizes& sizes, const BackwardCell<T>& cell, int64_t row,
                                             int64_t unit) {
  using A = Accumulator<T>;
  const int64_t hidden = sizes.width;
  const bool reset = cell.resets.at(row);
  A dh[V];
  collect(sizes, cell.incoming, row, unit, dh);

  A y[4][V];
  if (cell.gates) {
    STACKED_LSTM_UNROLL
    for (int gate = 0; gate < 4; ++gate) {
      const Pack<A, V> saved = load<V>(cell.gates + (4 * row + gate) * sizes.saved_stride + unit);
      STACKED_LSTM_UNROLL
      for (int n = 0; n < V; ++n) y[gate][n] = saved.element[n];
    }
  } else {
    preactivations(cell, hidden, row, unit, reset, y);
  }
  // dc is complete before c is read. In the other order, nvcc takes 8 registers more for 16-bit numbers.
  Pack<A, V> dc = load<V>(cell.grad_c + row * hidden + unit);
  if (cell.grad_cell) {
    const Pack<T, V> grad = load<V>(cell.grad_cell + row * (sizes.gates_stride / 4) + unit);
    STACKED_LSTM_UNROLL
    for (int n = 0; n < V; ++n) dc.element[n] += widen(grad.element[n]);
  }
  const Pack<A, V> c = load<V>(cell.c + row * sizes.saved_stride + unit);
  A c_before[V];
  if (row < cell.continued) {
    const Pack<A, V> before = load<V>(cell.c_before + row * sizes.saved_stride + unit);
    STACKED_LSTM_UNROLL
    for (int n = 0; n < V; ++n) c_before[n] = before.element[n];
  } else {
    const Pack<T, V> before = load<V>(cell.c_0 + row * hidden + unit);
    STACKED_LSTM_UNROLL
    for (int n = 0; n < V; ++n) c_before[n] = widen(before.element[n]);
  }
  if (reset) {
    STACKED_LSTM_UNROLL
    for (int n = 0; n < V; ++n) c_before[n] = 0;
  }

  A grad[4][V], h[V];
  STACKED_LSTM_UNROLL
  for (int n = 0; n < V; ++n) {
    Gates<A> gates{y[0][n], y[1][n], y[2][n], y[3][n]};
    if (!cell.gates) gates = Cell::template activate<Maths>(gates, c_before[n], c.element[n]);
    const Gates<A> d = Cell::template backward<Maths>(gates, c_before[n], c.element[n], dh[n], dc.element[n]);
    grad[0][n] = d.i;
    grad[1][n] = d.f;
    grad[2][n] = d.g;
    grad[3][n] = d.o;
    h[n] = cell.cell_h ? Cell::template output<Maths>(gates, c.element[n]) : A(0);
  }

  if (reset) dc = {};
  store(cell.grad_c + row * hidden + unit, dc);
  STACKED_LSTM_UNROLL
  for (int gate = 0; gate < 4; ++gate) {
    Pack<T, V> narrow_grad = narrow_all<T>(grad[gate]);
    store(cell.all_grad_gates + row * sizes.gates_stride + gate * hidden + unit, narrow_grad);
    if (reset) narrow_grad = {};
    store(cell.grad_gates + (4 * row + gate) * hidden + unit, narrow_grad);
  }
  if (cell.cell_h) store(cell.cell_h + row * hidden + unit, narrow_all<T>(h));
}

template <int V, typename T>
STACKED_LSTM_HOST_DEVICE void collect_units(const CellSizes& sizes, const CollectCell<T>& cell, int64_t row,
                                            int64_t unit) {
  Accumulator<T> dh[V];
  collect(sizes, cell.incoming, row, unit, dh);
  const Pack<T, V> grad = narrow_all<T>(dh);
  store(cell.grad + row * sizes.width + unit, grad);
  store(cell.all_grad + row * sizes.width + unit, grad);
}

template <int V, typename T>
STACKED_LSTM_HOST_DEVICE void copy_units(const CellSizes& sizes, const CopyCell<T>& cell, int64_t row, int64_t unit) {
  Pack<T, V> pack = row < cell.carried ? load<V>(cell.source + row * cell.source_stride + unit)
                                       : load<V>(cell.initial + row * sizes.width + unit);
  if (cell.resets.at(row)) pack = {};
  const int64_t at = row * cell.target_stride + unit;
  if (cell.masked || cell.below) {
    Accumulator<T> x[V];
    STACKED_LSTM_UNROLL
    for (int n = 0; n < V; ++n) x[n] = widen(pack.element[n]);
    if (cell.masked) apply_mask(x, sizes, cell.element, row, unit);
    if (cell.below) add(x, load<V>(cell.below + at));
    pack = narrow_all<T>(x);
  }
  store(cell.target + at, pack);
  if (cell.sum) store(cell.sum + at, pack);
}

// ---- May packs be used? ---------------------------------------------------------------------------------------------

// Whether every pointer is null or aligned to a pack of V of its elements.
template <int V, typename... Pointer>
bool aligned(const Pointer*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % (sizeof(Pointer) * V) == 0) && ...);
}

template <int V>
bool packs_fit(const CellSizes& s) {
  return s.width % V == 0 && s.output_stride % V == 0 && s.saved_stride % V == 0 && s.gates_stride % V == 0 &&
         s.h_stride % V == 0;
}
template <int V, typename T>
bool packs_fit(const ForwardCell<T>& c) {
  return aligned<V>(c.input_part, c.recurrent_part, c.bias, c.c, c.h, c.output, c.above, c.saved_c, c.saved_gates,
                    c.below, c.sum) &&
         c.element.column % V == 0;
}
template <int V, typename T>
bool packs_fit(const Incoming<T>& c) {
  return aligned<V>(c.grad_output, c.above, c.recurrent, c.grad_last, c.passed_output, c.passed, c.sum) &&
         c.element.column % V == 0;
}
template <int V, typename T>
bool packs_fit(const BackwardCell<T>& c) {
  return packs_fit<V>(c.incoming) && aligned<V>(c.gates, c.input_part, c.recurrent_part, c.bias, c.c, c.c_before, c.c_0,
                                                c.grad_cell, c.grad_c, c.grad_gates, c.all_grad_gates, c.cell_h);
}
template <int V, typename T>
bool packs_fit(const CollectCell<T>& c) {
  return packs_fit<V>(c.incoming) && aligned<V>(c.grad, c.all_grad);
}
template <int V, typename T>
bool packs_fit(const CopyCell<T>& c) {
  return aligned<V>(c.source, c.initial, c.target, c.below, c.sum) && c.source_stride % V == 0 &&
         c.target_stride % V == 0 && c.element.column % V == 0;
}

// Whether a step may be computed V units at a time.
template <int V, typename CellArguments>
bool packs_fit(const CellSizes& sizes, const CellArguments* cells, int64_t count) {
  bool fit = packs_fit<V>(sizes);
  for (int64_t n = 0; fit && n < count; ++n) {
    fit = packs_fit<V>(cells[n]);
    if constexpr (requires { cells->grad_cell; }) fit = fit && (!cells[n].grad_cell || sizes.gates_stride / 4 % V == 0);
  }
  return fit;
}

}  // namespace stacked_lstm::gates
