// csrc/cuda/gates.h: what happens between two products of the diagonal schedule, element by element; host and device.
//
//   forward    a = W_ih·x + W_hh·h(t-1) + b   →   activate, cell_forward   →   c, h, what backward needs
//   backward   dh (from the loss, the layer above, step t+1)   →   cell_backward   →   dgates, dc
//   collect    the sum dh alone, where a projection stands between h and the gates
//   copy       rows, masked by dropout or taken from an initial state where a sequence begins
//
// A step is a list of cells (lane, t) that are computed side by side: all layers and directions of one diagonal. The
// functions at the end do V neighbouring units of one row of one cell; a kernel is the loop over them:
// gates.cu on a GPU, gates_host.cpp here. V > 1 asks for whole packs: widths and strides that V divides, and
// pointers aligned to V elements.
//
// T is what tensors hold, A = Accumulator<T> what is computed in. Rows b = 0 … rows-1 of a cell are consecutive.
#pragma once

#include <cstdint>
#include <string>

#include "../stack/cell.h"
#include "../stack/number.h"
#include "../stack/philox.h"

#if defined(__CUDACC__)
#include "primitives.cuh"
#endif
#if !defined(__CUDA_ARCH__)
#include <cmath>
#endif

#if defined(__CUDACC__)
#define STACKED_LSTM_UNROLL _Pragma("unroll")
#else
#define STACKED_LSTM_UNROLL _Pragma("GCC unroll 4")
#endif

namespace stacked_lstm::gates {

// ---- What a kernel is given -----------------------------------------------------------------------------------------

// Dropout between layers. The seed lies in the tensors' memory, so that nobody waits for it.
struct Mask {
  uint64_t threshold = 0;         // see Dropout in philox.h
  double scale = 1;               // of what is kept
  const int64_t* seed = nullptr;  // null: no dropout
};

// What the cells of a step share. Widths and strides are in elements.
struct Sizes {
  int64_t width;          // units that a cell has here: H, or P where projected rows are copied or collected
  int64_t output_stride;  // of a row of a layer's output: D·(P or H)
  int64_t saved_stride;   // of a row of c in the reserve; a row of gates has four times as much
  int64_t gates_stride;   // of a row of gate gradients, of all steps: D·4H
  Mask mask;
};

// Where a cell's rows stand in dropout's numbering of elements.
struct Element {
  int64_t first_row;  // t·B
  int64_t column;     // where the lane's direction begins in a row of the layer's output
  int64_t layer;
};

template <typename T>
struct ForwardCell {
  using A = Accumulator<T>;
  const A* input_part;      // (rows, 4H): W_ih·x
  const A* recurrent_part;  // (rows, 4H): W_hh·h(t-1)
  const A* bias;            // (4H), or null
  A* c;                     // (rows, H): c(t-1) in, c(t) out
  T* h;                     // (rows, H)
  T* output;                // rows of output_stride: h once more, in the layer's output; or null
  T* above;                 // rows of output_stride: h as the layer above sees it, masked; or null
  A* saved_c;               // rows of saved_stride, or null
  A* saved_gates;           // rows of 4·saved_stride: the activations; or null
  int64_t rows;
  Element element;
};

// What flows into the output of a cell. Null pointers count as zeros.
template <typename T>
struct Incoming {
  using A = Accumulator<T>;
  const T* grad_output;  // rows of output_stride, from the loss
  const A* above;        // rows of output_stride, from the layer above, before dropout's mask
  const A* recurrent;    // (carried, width): W_hhᵀ·dgates of the step that came after, for rows that it had
  const T* grad_last;    // (B, width): dL/dh_n, for the rows from `carried` on, whose last step this is
  int64_t carried;
  Element element;
};

template <typename T>
struct BackwardCell {
  using A = Accumulator<T>;
  Incoming<T> incoming;
  const A* gates;           // rows of 4·saved_stride: the activations; or null: they are made from the next three
  const A* input_part;      // (rows, 4H), as in ForwardCell
  const A* recurrent_part;  // (rows, 4H)
  const A* bias;            // (4H), or null
  const A* c;               // rows of saved_stride
  const A* c_before;        // rows of saved_stride: c of the step before, for the first `continued` rows
  const T* c_0;             // (B, H): for the others, whose first step this is
  A* grad_c;                // (rows, H): in and out
  T* grad_gates;            // (rows, 4H)
  T* all_grad_gates;        // rows of gates_stride: once more, beside those of every other step
  T* cell_h;                // (rows, H): o·tanh(c), for the gradient of W_hr; or null
  int64_t rows;
  int64_t continued;
};

template <typename T>
struct CollectCell {
  Incoming<T> incoming;
  T* grad;      // (rows, P)
  T* all_grad;  // (rows, P): once more, beside those of every other step
  int64_t rows;
};

template <typename T>
struct CopyCell {
  const T* source;  // rows of source_stride, for the first `carried` rows
  int64_t source_stride;
  const T* initial;  // (rows, width), for the others
  T* target;         // rows of target_stride
  int64_t target_stride;
  int64_t rows;
  int64_t carried;
  bool masked;  // by dropout
  Element element;
};

// One device's kernels. Each runs every cell, in one launch where they fit one. They return what went wrong, or "".
template <typename T>
struct Kernels {
  std::string (*forward)(const Sizes&, const ForwardCell<T>*, int64_t cells, void* stream);
  std::string (*backward)(const Sizes&, const BackwardCell<T>*, int64_t cells, void* stream);
  std::string (*collect)(const Sizes&, const CollectCell<T>*, int64_t cells, void* stream);
  std::string (*copy)(const Sizes&, const CopyCell<T>*, int64_t cells, void* stream);
};

struct Table {
  Kernels<float> float32;
  Kernels<double> float64;
  Kernels<bfloat16> bf16;
  Kernels<float16> f16;
  // Writes `count` numbers of the host's to the device. They are read before this returns, also where a graph is captured.
  std::string (*numbers)(const int64_t* values, int64_t count, int64_t* target, void* stream);

  template <typename T>
  const Kernels<T>& of() const;
};

template <>
inline const Kernels<float>& Table::of<float>() const {
  return float32;
}
template <>
inline const Kernels<double>& Table::of<double>() const {
  return float64;
}
template <>
inline const Kernels<bfloat16>& Table::of<bfloat16>() const {
  return bf16;
}
template <>
inline const Kernels<float16>& Table::of<float16>() const {
  return f16;
}

const Table& host_kernels();  // gates_host.cpp
const Table& cuda_kernels();  // gates.cu

// Units that a thread takes where everything is aligned: 16 bytes of A.
template <typename T>
inline constexpr int kPack = 16 / sizeof(Accumulator<T>);

// ---- Packs: V neighbours as one access ------------------------------------------------------------------------------

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T element[V];
};

template <int V, typename T>
STACKED_LSTM_HOST_DEVICE Pack<T, V> load(const T* from) {
#if defined(__CUDA_ARCH__)
  return cuda::load_whole<T>(reinterpret_cast<const Pack<T, V>*>(from));
#else
  Pack<T, V> pack;
  __builtin_memcpy(&pack, __builtin_assume_aligned(from, sizeof(pack)), sizeof(pack));
  return pack;
#endif
}

template <int V, typename T>
STACKED_LSTM_HOST_DEVICE void store(T* to, const Pack<T, V>& pack) {
#if defined(__CUDA_ARCH__)
  cuda::store_whole<T>(reinterpret_cast<Pack<T, V>*>(to), pack);
#else
  __builtin_memcpy(__builtin_assume_aligned(to, sizeof(pack)), &pack, sizeof(pack));
#endif
}

template <typename T, int V>
STACKED_LSTM_HOST_DEVICE Pack<T, V> narrow_all(const Accumulator<T> (&x)[V]) {
  Pack<T, V> pack;
  STACKED_LSTM_UNROLL
  for (int n = 0; n < V; ++n) pack.element[n] = narrow<T>(x[n]);
  return pack;
}

// ---- σ and tanh -----------------------------------------------------------------------------------------------------

#if defined(STACKED_LSTM_PLAIN_MATHS)

// For tests alone: what stands for σ and tanh where a kernel's bits on two machines are compared. Every operation of these is
// exact or rounded once, so that a difference is one of the kernel around them.
struct Maths {
  template <typename A>
  STACKED_LSTM_HOST_DEVICE static A tanh(A x) {
    const auto bounded = static_cast<A>(fmax(A{-1}, fmin(A{1}, x / 2)));
    return x == x ? bounded : x;  // fmin and fmax would lose a NaN
  }
  template <typename A>
  STACKED_LSTM_HOST_DEVICE static A sigmoid(A x) {
    return (1 + tanh(x)) / 2;
  }
};

#else

struct Maths {
  STACKED_LSTM_HOST_DEVICE static float sigmoid(float x) {
#if defined(__CUDA_ARCH__)
    return __fdividef(1.0f, 1.0f + expf(-x));  // 0 where expf is past 2^126, as it should be
#else
    return 1.0f / (1.0f + std::exp(-x));
#endif
  }
  STACKED_LSTM_HOST_DEVICE static float tanh(float x) {
#if defined(__CUDA_ARCH__)
    return tanhf(x);
#else
    return std::tanh(x);
#endif
  }
  STACKED_LSTM_HOST_DEVICE static double sigmoid(double x) {
#if defined(__CUDA_ARCH__)
    return 1.0 / (1.0 + exp(-x));
#else
    return 1.0 / (1.0 + std::exp(-x));
#endif
  }
  STACKED_LSTM_HOST_DEVICE static double tanh(double x) {
#if defined(__CUDA_ARCH__)
    return ::tanh(x);
#else
    return std::tanh(x);
#endif
  }
};

#endif

// ---- Dropout --------------------------------------------------------------------------------------------------------

// Multiplies V neighbours, which begin at `unit` of a lane, by their mask. V divides the column where V > 1, so that
// the neighbours are words of one Philox block.
template <int V, typename A>
STACKED_LSTM_HOST_DEVICE void apply_mask(A (&x)[V], const Sizes& sizes, const Element& element, int64_t row,
                                         int64_t unit) {
  const uint64_t column = static_cast<uint64_t>(element.column + unit);
  const uint64_t blocks = static_cast<uint64_t>(sizes.output_stride + 3) / 4;
  const uint64_t block = static_cast<uint64_t>(element.first_row + row) * blocks + column / 4;
  const uint64_t seed = static_cast<uint64_t>(*sizes.mask.seed);
  const Philox random = philox4x32_10(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                                      static_cast<uint32_t>(element.layer), 0, static_cast<uint32_t>(seed),
                                      static_cast<uint32_t>(seed >> 32));
  const A scale = static_cast<A>(sizes.mask.scale);
  const uint32_t first = static_cast<uint32_t>(column % 4);
  uint32_t kept = 0;  // a bit for each word. Every index is a constant: `random` stays in registers
  STACKED_LSTM_UNROLL
  for (int word = 0; word < 4; ++word) {
    const uint32_t keeps = random.word[word] >= sizes.mask.threshold ? 1 : 0;
    kept |= keeps << word;
  }
  STACKED_LSTM_UNROLL
  for (int n = 0; n < V; ++n) {
    // A product, so that a NaN is seen even where it is dropped.
    x[n] *= kept >> (first + static_cast<uint32_t>(n)) & 1 ? scale : A(0);
  }
}

// ---- The four kernels, V units of one row at a time -----------------------------------------------------------------

// W_ih·x + W_hh·h + b of a ForwardCell or a BackwardCell.
template <typename Cell, int V, typename A>
STACKED_LSTM_HOST_DEVICE void preactivations(const Cell& cell, int64_t hidden, int64_t row, int64_t unit,
                                             A (&a)[4][V]) {
  STACKED_LSTM_UNROLL
  for (int gate = 0; gate < 4; ++gate) {
    const int64_t at = (4 * row + gate) * hidden + unit;
    const Pack<A, V> input = load<V>(cell.input_part + at), recurrent = load<V>(cell.recurrent_part + at);
    STACKED_LSTM_UNROLL
    for (int n = 0; n < V; ++n) a[gate][n] = input.element[n] + recurrent.element[n];
    if (cell.bias) {
      const Pack<A, V> bias = load<V>(cell.bias + gate * hidden + unit);
      STACKED_LSTM_UNROLL
      for (int n = 0; n < V; ++n) a[gate][n] += bias.element[n];
    }
  }
}

template <int V, typename T>
STACKED_LSTM_HOST_DEVICE void forward_units(const Sizes& sizes, const ForwardCell<T>& cell, int64_t row, int64_t unit) {
  using A = Accumulator<T>;
  const int64_t hidden = sizes.width;
  A a[4][V];
  preactivations(cell, hidden, row, unit, a);

  Pack<A, V> c = load<V>(cell.c + row * hidden + unit);
  A h[V];
  Pack<A, V> gates[4];
  STACKED_LSTM_UNROLL
  for (int n = 0; n < V; ++n) {
    const Gates<A> y = activate<Maths>(Gates<A>{a[0][n], a[1][n], a[2][n], a[3][n]});
    h[n] = cell_forward<Maths>(y, c.element[n]);
    gates[0].element[n] = y.i;
    gates[1].element[n] = y.f;
    gates[2].element[n] = y.g;
    gates[3].element[n] = y.o;
  }

  store(cell.c + row * hidden + unit, c);
  const Pack<T, V> narrow_h = narrow_all<T>(h);
  store(cell.h + row * hidden + unit, narrow_h);
  if (cell.output) store(cell.output + row * sizes.output_stride + unit, narrow_h);
  if (cell.above) {
    STACKED_LSTM_UNROLL
    for (int n = 0; n < V; ++n) h[n] = widen(narrow_h.element[n]);  // the layer above sees what the output holds
    if (sizes.mask.seed) apply_mask(h, sizes, cell.element, row, unit);
    store(cell.above + row * sizes.output_stride + unit, narrow_all<T>(h));
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
STACKED_LSTM_HOST_DEVICE void collect(const Sizes& sizes, const Incoming<T>& incoming, int64_t row, int64_t unit,
                                      Accumulator<T> (&dh)[V]) {
  using A = Accumulator<T>;
  STACKED_LSTM_UNROLL
  for (int n = 0; n < V; ++n) dh[n] = 0;
  if (incoming.above) {
    const Pack<A, V> above = load<V>(incoming.above + row * sizes.output_stride + unit);
    STACKED_LSTM_UNROLL
    for (int n = 0; n < V; ++n) dh[n] = above.element[n];
    if (sizes.mask.seed) apply_mask(dh, sizes, incoming.element, row, unit);
  }
  if (incoming.grad_output) {
    const Pack<T, V> grad = load<V>(incoming.grad_output + row * sizes.output_stride + unit);
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

template <int V, typename T>
STACKED_LSTM_HOST_DEVICE void backward_units(const Sizes& sizes, const BackwardCell<T>& cell, int64_t row,
                                             int64_t unit) {
  using A = Accumulator<T>;
  const int64_t hidden = sizes.width;
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
    preactivations(cell, hidden, row, unit, y);
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
  Pack<A, V> dc = load<V>(cell.grad_c + row * hidden + unit);

  A grad[4][V], h[V];
  STACKED_LSTM_UNROLL
  for (int n = 0; n < V; ++n) {
    Gates<A> gates{y[0][n], y[1][n], y[2][n], y[3][n]};
    if (!cell.gates) gates = activate<Maths>(gates);
    const Gates<A> d = cell_backward<Maths>(gates, c_before[n], c.element[n], dh[n], dc.element[n]);
    grad[0][n] = d.i;
    grad[1][n] = d.f;
    grad[2][n] = d.g;
    grad[3][n] = d.o;
    h[n] = cell.cell_h ? gates.o * Maths::tanh(c.element[n]) : A(0);
  }

  store(cell.grad_c + row * hidden + unit, dc);
  STACKED_LSTM_UNROLL
  for (int gate = 0; gate < 4; ++gate) {
    const Pack<T, V> narrow_grad = narrow_all<T>(grad[gate]);
    store(cell.grad_gates + (4 * row + gate) * hidden + unit, narrow_grad);
    store(cell.all_grad_gates + row * sizes.gates_stride + gate * hidden + unit, narrow_grad);
  }
  if (cell.cell_h) store(cell.cell_h + row * hidden + unit, narrow_all<T>(h));
}

template <int V, typename T>
STACKED_LSTM_HOST_DEVICE void collect_units(const Sizes& sizes, const CollectCell<T>& cell, int64_t row, int64_t unit) {
  Accumulator<T> dh[V];
  collect(sizes, cell.incoming, row, unit, dh);
  const Pack<T, V> grad = narrow_all<T>(dh);
  store(cell.grad + row * sizes.width + unit, grad);
  store(cell.all_grad + row * sizes.width + unit, grad);
}

template <int V, typename T>
STACKED_LSTM_HOST_DEVICE void copy_units(const Sizes& sizes, const CopyCell<T>& cell, int64_t row, int64_t unit) {
  Pack<T, V> pack = row < cell.carried ? load<V>(cell.source + row * cell.source_stride + unit)
                                       : load<V>(cell.initial + row * sizes.width + unit);
  if (cell.masked) {
    Accumulator<T> x[V];
    STACKED_LSTM_UNROLL
    for (int n = 0; n < V; ++n) x[n] = widen(pack.element[n]);
    apply_mask(x, sizes, cell.element, row, unit);
    pack = narrow_all<T>(x);
  }
  store(cell.target + row * cell.target_stride + unit, pack);
}

// ---- May packs be used? ---------------------------------------------------------------------------------------------

// Whether every one of the pointers that is not null stands on a whole pack of V of its elements.
template <int V, typename... Pointer>
bool aligned(const Pointer*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % (sizeof(Pointer) * V) == 0) && ...);
}

template <int V>
bool packs_fit(const Sizes& s) {
  return s.width % V == 0 && s.output_stride % V == 0 && s.saved_stride % V == 0 && s.gates_stride % V == 0;
}
template <int V, typename T>
bool packs_fit(const ForwardCell<T>& c) {
  return aligned<V>(c.input_part, c.recurrent_part, c.bias, c.c, c.h, c.output, c.above, c.saved_c, c.saved_gates) &&
         c.element.column % V == 0;
}
template <int V, typename T>
bool packs_fit(const Incoming<T>& c) {
  return aligned<V>(c.grad_output, c.above, c.recurrent, c.grad_last) && c.element.column % V == 0;
}
template <int V, typename T>
bool packs_fit(const BackwardCell<T>& c) {
  return packs_fit<V>(c.incoming) && aligned<V>(c.gates, c.input_part, c.recurrent_part, c.bias, c.c, c.c_before, c.c_0,
                                                c.grad_c, c.grad_gates, c.all_grad_gates, c.cell_h);
}
template <int V, typename T>
bool packs_fit(const CollectCell<T>& c) {
  return packs_fit<V>(c.incoming) && aligned<V>(c.grad, c.all_grad);
}
template <int V, typename T>
bool packs_fit(const CopyCell<T>& c) {
  return aligned<V>(c.source, c.initial, c.target) && c.source_stride % V == 0 && c.target_stride % V == 0 &&
         c.element.column % V == 0;
}

}  // namespace stacked_lstm::gates
