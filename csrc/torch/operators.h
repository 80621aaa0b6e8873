// csrc/torch/operators.h: what the operators stacked_lstm_ext::forward and ::backward do, for callers in C++.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "../driver/call.h"
#include "states.h"

namespace stacked_lstm {

// What both operators are given: their schemas in operators.cpp say which tensors.
struct OperatorArguments {
  const at::Tensor& input;
  const OptionalTensor& batch_sizes;
  const at::Tensor& h_0;
  const at::Tensor& c_0;
  at::TensorList weights;
  const OptionalTensor& seed;
  const StackOptions& options;
  Saving saving;
  const std::string& backend;
  const OptionalTensor& lengths = kNoTensor;
  const OptionalTensor& resets = kNoTensor;
};

// Runs a forward pass. `checked`: the shape that prepare() has made of these arguments; null: they are checked here, and
// ValueError or TypeError says what is wrong. `states`: if not null, it is filled with every layer's h and c.
Results forward(const OperatorArguments& arguments, const StackShape* checked = nullptr, States* states = nullptr);

// Runs a backward pass, after checking all arguments. `states`: the forward pass had states as results.
Gradients backward(const OperatorArguments& arguments, const Kept& kept, IncomingGradients incoming, bool input_grad,
                   bool weight_grad, bool states = false);

}  // namespace stacked_lstm
