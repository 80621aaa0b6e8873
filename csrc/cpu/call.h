// csrc/cpu/call.h: what the CPU kernels are given: the sizes, options and pointers of a call. Plain data, no torch.
#pragma once

#include <cstdint>
#include <vector>

#include "../stack/link.h"
#include "../stack/resets.h"
#include "../stack/stack.h"
#include "reserve.h"

namespace stacked_lstm {

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

// Lengths. A padded batch whose sequences have lengths runs as a packed one: shape.packed_rows says where its rows are in
// everything that the kernels keep. The caller's tensors are padded all the same (shape.caller_row).

// The rows of the caller's input, or of the gradient of the output. Row (t, b) starts at
// data + t·step_stride + b·row_stride or, if the caller's tensors are packed, at data + (first_row(t) + b)·row_stride.
template <typename T>
struct Input {
  const T* data = nullptr;
  int64_t step_stride = 0;  // ignored if packed
  int64_t row_stride = 0;

  const T* row(const StackShape& shape, int64_t t, int64_t b) const {
    return shape.packed() && !shape.has_lengths() ? data + (shape.first_row(t) + b) * row_stride
                                                  : data + t * step_stride + b * row_stride;
  }
};

template <typename T>
struct ForwardCall {
  StackShape shape;
  Input<T> input;
  std::vector<LaneWeights<T>> weights;  // one per lane
  const T* h_0;                         // states: see stack/state_layout.h
  const T* c_0;
  Links links;
  ResetLists resets;
  Keeping keeping;
  T* output;  // (rows of the caller, columns of the output)
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
  Links links;
  ResetLists resets;
  Keeping keeping;
  const T* output;
  const T* reserve;
  // Gradients of each layer's h before its link, D·output columns, and of its c, D·hidden columns; data is null where there
  // is none. What reaches h through the output is part of it. An empty list: none at all.
  std::vector<Input<T>> grad_h, grad_c;
  Input<T> grad_output;  // with residual links, of the output: what flows past the top layer's h
  const T* grad_h_n;     // states, or null
  const T* grad_c_n;
  T* grad_input[2];  // (rows of the caller, input) of each direction, or null; the gradient is their sum
  T* grad_h_0;
  T* grad_c_0;
  std::vector<LaneGradients<T>> gradients;  // one per lane, or empty
  bool bf16_weights = false;                // as in the forward pass
  bool bf16_activations = false;            // likewise
};

}  // namespace stacked_lstm
