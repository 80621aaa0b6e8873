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
// A cell is a policy: a struct of functions, which a kernel calls `Cell`. This is a template argument of the kernel, or an
// alias if all instances have the same cell. Another cell (with peepholes, say) is another struct with the same functions.
// Each function does one unit:
//
//   forward     from the sums a and c: the activations, c' and h
//   activate    from a, c and c': the activations, as forward had them
//   state       from the activations and c: c', as forward had it
//   output      from the activations and c': h, as forward had it
//   backward    from the activations, c, c', dh and dc': the gradients of a, and dc
//   slopes, backward    the same in two parts, for a kernel that knows dh late and everything else early
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

template <typename Math, typename T>
STACKED_LSTM_HOST_DEVICE Gates<T> activate_gates(const Gates<T>& a) {
  if constexpr (requires { Math::activate(a); }) {
    return Math::activate(a);
  } else {
    return {Math::sigmoid(a.i), Math::sigmoid(a.f), Math::tanh(a.g), Math::sigmoid(a.o)};
  }
}

// The LSTM of torch.nn.LSTM.
struct LstmCell {
  static constexpr int kParameters = 0;  // of a unit, beside its weights and biases

  template <typename Math, typename T>
  STACKED_LSTM_HOST_DEVICE static Gates<T> activate(const Gates<T>& a, const T& /*c*/, const T& /*c_next*/) {
    return activate_gates<Math>(a);
  }

  template <typename T>
  STACKED_LSTM_HOST_DEVICE static T state(const Gates<T>& y, const T& c) {
    return y.f * c + y.i * y.g;
  }

  template <typename Math, typename T>
  STACKED_LSTM_HOST_DEVICE static T output(const Gates<T>& y, const T& c_next) {
    return y.o * Math::tanh(c_next);
  }

  // Takes c to c', in place. Returns h, and leaves the activations in y.
  template <typename Math, typename T>
  STACKED_LSTM_HOST_DEVICE static T forward(const Gates<T>& a, T& c, Gates<T>& y) {
    y = activate_gates<Math>(a);
    c = state(y, c);
    return output<Math>(y, c);
  }

  // `c` and `c_next` are the cell state before and after the step, `dh` the whole gradient of h (from the loss, the layer
  // above and step t+1). `dc` comes in as dL/dc' from step t+1 and leaves as dL/dc. Returns the gradients of the sums.
  template <typename Math, typename T>
  STACKED_LSTM_HOST_DEVICE static Gates<T> backward(const Gates<T>& y, const T& c, const T& c_next, const T& dh,
                                                    T& dc) {
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

  // The factors of all results of backward, which need no dh.
  template <typename T>
  struct Slopes {
    T c_next;   // d c'/d h: o·(1 - tanh²c')
    T i, f, g;  // factors of dc', the whole gradient of c'
    T o;        // factor of dh
    T c;        // factor of dc'
  };
  template <typename Math, typename T>
  STACKED_LSTM_HOST_DEVICE static Slopes<T> slopes(const Gates<T>& y, const T& c, const T& c_next) {
    const T tanh_c = Math::tanh(c_next);
    return {y.o * (1 - tanh_c * tanh_c), y.g * y.i * (1 - y.i),    c * y.f * (1 - y.f),
            y.i * (1 - y.g * y.g),       tanh_c * y.o * (1 - y.o), y.f};
  }
  // The rest of backward, once dh is known: six products.
  template <typename T>
  STACKED_LSTM_HOST_DEVICE static Gates<T> backward(const Slopes<T>& slope, const T& dh, T& dc) {
    const T dc_next = dc + dh * slope.c_next;
    dc = dc_next * slope.c;
    return {dc_next * slope.i, dc_next * slope.f, dc_next * slope.g, dh * slope.o};
  }
};

}  // namespace stacked_lstm
