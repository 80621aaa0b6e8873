// csrc/driver/call.h: the checked arguments of an operator, as tensors: the form in which torch/operators.cpp passes
// them to a driver.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../stack/stack.h"

namespace stacked_lstm {

using OptionalTensor = std::optional<at::Tensor>;

struct Options {
  bool bias;
  int64_t layers;
  bool bidirectional;
  int64_t proj_size;
  double dropout;
  Saving saving;
  bool bf16_weights;  // the CPU kernels store packed weights as bfloat16

  int64_t directions() const { return bidirectional ? 2 : 1; }
  int64_t weights_a_lane() const { return 2 + (bias ? 2 : 0) + (proj_size > 0 ? 1 : 0); }
};

// The arguments that forward and backward share.
struct Call {
  const at::Tensor& input;  // (T, B, I), or, packed, (rows, I)
  bool packed;
  const at::Tensor& h_0;
  const at::Tensor& c_0;
  at::TensorList weights;
  OptionalTensor seed;  // set if dropout is in effect
  const Options& options;
  const StackShape& shape;

  std::vector<int64_t> output_sizes() const {
    const int64_t width = shape.directions * shape.layers.back().output();
    return packed ? std::vector<int64_t>{shape.rows(), width} : std::vector<int64_t>{shape.steps, shape.batch, width};
  }
};

struct Results {  // of a forward pass
  at::Tensor output, h_n, c_n, reserve;
};

struct Kept {  // from a forward pass, for its backward pass
  const at::Tensor& output;
  const at::Tensor& reserve;
};

struct IncomingGradients {
  const OptionalTensor &output, &h_n, &c_n;
};

struct Gradients {
  at::Tensor input;  // empty when not wanted
  at::Tensor h_0, c_0;
  std::vector<at::Tensor> weights;  // empty when not wanted
};

}  // namespace stacked_lstm
