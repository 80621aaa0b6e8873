// csrc/stack/cell.h: the LSTM cell, and its derivative. Every kernel calls these; no kernel has equations of its own.
//
//   i = σ(a_i)   f = σ(a_f)   g = tanh(a_g)   o = σ(a_o)        (gate order i, f, g, o, as in torch.nn.LSTM)
//   c' = f·c + i·g            h = o·tanh(c')
//
// where a = W_ih·x + b_ih + W_hh·h + b_hh. With a projection, the cell's output is W_hr·h instead of h.
//
// Hochreiter & Schmidhuber 1997, with the forget gate of Gers, Schmidhuber & Cummins 2000 and the projection of
// Sak, Senior & Beaufays 2014.
//
// T is a number, or a vector of numbers: any type with + - * and a constructor-like conversion from 1. Math computes σ
// and tanh: it has `static T sigmoid(T)` and `static T tanh(T)`. If the σ of one cell share work, Math has
// `static Gates<T> activate(Gates<T>)` instead of sigmoid.
#pragma once

#if defined(__CUDACC__)
#define STACKED_LSTM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define STACKED_LSTM_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace stacked_lstm {

template <typename T>
struct Gates {
  T i, f, g, o;
};

// Pre-activations to activations.
template <typename Math, typename T>
STACKED_LSTM_HOST_DEVICE Gates<T> activate(const Gates<T>& a) {
  if constexpr (requires { Math::activate(a); }) {
    return Math::activate(a);
  } else {
    return {Math::sigmoid(a.i), Math::sigmoid(a.f), Math::tanh(a.g), Math::sigmoid(a.o)};
  }
}

// c' of one unit.
template <typename T>
STACKED_LSTM_HOST_DEVICE T cell_state(const Gates<T>& y, const T& c) {
  return y.f * c + y.i * y.g;
}

// One step of one unit: takes c to c', in place, and returns h.
template <typename Math, typename T>
STACKED_LSTM_HOST_DEVICE T cell_forward(const Gates<T>& y, T& c) {
  c = cell_state(y, c);
  return y.o * Math::tanh(c);
}

// Backward through one step of one unit. `y` are the activations, `c` and `c_next` the cell state before and after the
// step, `dh` the whole gradient of h (from the loss, the layer above and step t+1). `dc` comes in as dL/dc' from step
// t+1 and leaves as dL/dc. Returns the gradients of the pre-activations.
template <typename Math, typename T>
STACKED_LSTM_HOST_DEVICE Gates<T> cell_backward(const Gates<T>& y, const T& c, const T& c_next, const T& dh, T& dc) {
  const T tanh_c = Math::tanh(c_next);
  const T dc_next = dc + dh * y.o * (1 - tanh_c * tanh_c);
  dc = dc_next * y.f;
  return {
      dc_next * y.g * y.i * (1 - y.i),
      dc_next * c * y.f * (1 - y.f),
      dc_next * y.i * (1 - y.g * y.g),
      dh * tanh_c * y.o * (1 - y.o),
  };
}

// cell_backward in two parts, for a kernel that knows dh late and everything else early. The first part needs no dh: it
// computes the factors of all results.
template <typename T>
struct CellSlopes {
  T c_next;   // d c'/d h: o·(1 - tanh²c')
  T i, f, g;  // factors of dc', the whole gradient of c'
  T o;        // factor of dh
  T c;        // factor of dc'
};
template <typename Math, typename T>
STACKED_LSTM_HOST_DEVICE CellSlopes<T> cell_slopes(const Gates<T>& y, const T& c, const T& c_next) {
  const T tanh_c = Math::tanh(c_next);
  return {y.o * (1 - tanh_c * tanh_c), y.g * y.i * (1 - y.i),    c * y.f * (1 - y.f),
          y.i * (1 - y.g * y.g),       tanh_c * y.o * (1 - y.o), y.f};
}
// The second part, once dh is known: six products. dh and dc are those of cell_backward.
template <typename T>
STACKED_LSTM_HOST_DEVICE Gates<T> cell_backward(const CellSlopes<T>& slope, const T& dh, T& dc) {
  const T dc_next = dc + dh * slope.c_next;
  dc = dc_next * slope.c;
  return {dc_next * slope.i, dc_next * slope.f, dc_next * slope.g, dh * slope.o};
}

}  // namespace stacked_lstm
