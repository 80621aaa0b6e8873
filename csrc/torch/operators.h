// csrc/torch/operators.h: the operators stacked_lstm_ext::forward and ::backward, as C++ functions. Their arguments are
// those of the schemas (operators.cpp); the functions check all of them.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>
#include <vector>

#include "../driver/call.h"

namespace stacked_lstm {

using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;

ForwardResult forward(const at::Tensor& input, const OptionalTensor& batch_sizes, const at::Tensor& h_0,
                      const at::Tensor& c_0, at::TensorList weights, const OptionalTensor& seed, bool bias,
                      int64_t num_layers, bool bidirectional, int64_t proj_size, double dropout,
                      const std::string& saving, const std::string& backend, bool bf16_weights);

BackwardResult backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                        const OptionalTensor& grad_c_n, const at::Tensor& input, const OptionalTensor& batch_sizes,
                        const at::Tensor& h_0, const at::Tensor& c_0, at::TensorList weights,
                        const OptionalTensor& seed, const at::Tensor& output, const at::Tensor& reserve, bool bias,
                        int64_t num_layers, bool bidirectional, int64_t proj_size, double dropout,
                        const std::string& saving, bool input_grad, bool weight_grad, const std::string& backend,
                        bool bf16_weights);

}  // namespace stacked_lstm
