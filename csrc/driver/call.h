// csrc/driver/call.h: the checked arguments of an operator, as tensors: the form in which torch/operators.cpp passes
// them to a driver.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../stack/obstacle.h"
#include "../stack/options.h"
#include "../stack/stack.h"
#include "../stack/weights.h"

namespace stacked_lstm {

using OptionalTensor = std::optional<at::Tensor>;
inline const OptionalTensor kNoTensor;

inline ElementType element_type(at::ScalarType type) {
  return type == at::kDouble     ? ElementType::float64
         : type == at::kBFloat16 ? ElementType::bfloat16
         : type == at::kHalf     ? ElementType::float16
                                 : ElementType::float32;
}

// The arguments that forward and backward share.
struct Call {
  const at::Tensor& input;  // (T, B, I), or, packed, (rows, I)
  bool packed;
  const at::Tensor& h_0;
  const at::Tensor& c_0;
  at::TensorList weights;
  OptionalTensor seed;  // set if dropout is in effect
  const StackOptions& options;
  Saving saving;
  bool stores_bf16;  // the CPU kernels store packed weights as bfloat16
  const StackShape& shape;
  bool states = false;    // every layer's h and c of all steps are results
  OptionalTensor resets;  // bool (T, B), contiguous; see stack/resets.h

  // Whether the reserve of a forward pass keeps h and c of all layers.
  bool keeps_states() const { return saving != Saving::none || states; }

  std::vector<int64_t> output_sizes() const {
    const int64_t width = shape.output_width();
    return packed ? std::vector<int64_t>{shape.rows(), width}
                  : std::vector<int64_t>{shape.all_steps(), shape.batch, width};
  }
};

struct Results {  // of a forward pass
  at::Tensor output, h_n, c_n, reserve;
};

struct Kept {  // from a forward pass, for its backward pass
  const at::Tensor& output;
  const at::Tensor& reserve;
};

// Gradients that flow into a backward pass.
struct IncomingGradients {
  OptionalTensor output, h_n, c_n;
  // Of each layer's h, before its link, and c, of all steps: (T, B, D·output) and (T, B, D·hidden), or packed. Empty: none.
  // Where h is in the output, it has none here, but is part of `output`: the top layer's, with residual links no layer's, with
  // skip links every layer's.
  std::vector<OptionalTensor> h, c;
};

struct Gradients {
  at::Tensor input;  // empty when not wanted
  at::Tensor h_0, c_0;
  std::vector<at::Tensor> weights;  // empty when not wanted
};

}  // namespace stacked_lstm
