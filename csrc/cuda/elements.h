// csrc/cuda/elements.h: what every kernel on a GPU does to a single element: σ and tanh, dropout's mask, and loads and stores of
// V neighbours as one access; host and device.
//
// T is the type that tensors hold, A = Accumulator<T> the type of the arithmetic.
#pragma once

#include <cstdint>

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

// ---- Where an element is, for dropout -------------------------------------------------------------------------------

// Dropout in the link of one layer to the layer above. Kernels read the seed from the memory of its tensor, so the host does not wait for it.
struct Mask {
  uint64_t threshold = 0;         // see Dropout in philox.h
  double scale = 1;               // of what is kept
  const int64_t* seed = nullptr;  // null: no dropout
};

// What the cells of a step share. Widths and strides are in elements.
struct CellSizes {
  int64_t width;          // units of a cell: H, or P where projected rows are copied or collected
  int64_t output_stride;  // of a row of a layer's output: D·(P or H)
  int64_t saved_stride;   // of a row of c in the reserve; a row of gates has four times as much
  int64_t gates_stride;   // of a row of gate gradients, of all steps: D·4H; a row of gradients of c has a quarter
  int64_t h_stride =
      0;  // of a row of what keeps a layer's h: output_stride, or with skip links the row of all layers' h
};

// The place of a cell's rows in dropout's numbering of elements.
struct Element {
  int64_t first_row;  // t·B
  int64_t column;     // where the lane's direction begins in a row of the layer's output
  int64_t layer;
  Mask mask;  // of the link from this layer
};

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

// Only for tests that compare a kernel's bits on two machines: these functions replace σ and tanh. Each of their
// operations is exact or rounded once, so a difference of the results comes from the kernel around them.
struct Maths {
  template <typename A>
  STACKED_LSTM_HOST_DEVICE static A tanh(A x) {
    return static_cast<A>(fmax(A{-1}, fmin(A{1}, x / 2)) + (x - x));  // fmin and fmax alone would lose a NaN
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
    return __fdividef(1.0f, 1.0f + expf(-x));  // 0 where expf is above 2^126, as it should be
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

// Multiplies V neighbours, which begin at `unit` of a lane, by their mask. If V > 1, V divides the column, so that the
// neighbours are words of one quad (philox.h).
template <int V, typename A>
STACKED_LSTM_HOST_DEVICE void apply_mask(A (&x)[V], const CellSizes& sizes, const Element& element, int64_t row,
                                         int64_t unit) {
  const uint64_t column = static_cast<uint64_t>(element.column + unit);
  const uint64_t quads = static_cast<uint64_t>(sizes.output_stride + 3) / 4;
  const uint64_t quad = static_cast<uint64_t>(element.first_row + row) * quads + column / 4;
  const uint64_t seed = static_cast<uint64_t>(*element.mask.seed);
  const Philox random = philox4x32_10(static_cast<uint32_t>(quad), static_cast<uint32_t>(quad >> 32),
                                      static_cast<uint32_t>(element.layer), 0, static_cast<uint32_t>(seed),
                                      static_cast<uint32_t>(seed >> 32));
  const A scale = static_cast<A>(element.mask.scale);
  const uint32_t first = static_cast<uint32_t>(column % 4);
  uint32_t kept = 0;  // a bit for each word. Every index is a constant, so that `random` stays in registers
  STACKED_LSTM_UNROLL
  for (int word = 0; word < 4; ++word) {
    const uint32_t keeps = random.word[word] >= element.mask.threshold ? 1 : 0;
    kept |= keeps << word;
  }
  STACKED_LSTM_UNROLL
  for (int n = 0; n < V; ++n) {
    // A product, so that a NaN shows in the result even if its element is dropped.
    x[n] *= kept >> (first + static_cast<uint32_t>(n)) & 1 ? scale : A(0);
  }
}

}  // namespace stacked_lstm::gates
