// csrc/torch/prepare.h: checks the arguments of a call: saving mode, backend, shape, seed. Everything that a kernel
// relies on is checked here, before anything is allocated.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

#include "../driver/call.h"
#include "../stack/stack.h"

namespace stacked_lstm {

Saving saving_of(const std::string& name);

enum class Backend { cpu, diagonal, persistent, automatic };

// Checks that there may be kernels of this backend for the tensors' device.
Backend backend_of(const std::string& name, const at::Device& device);

// Whether the CPU kernels are to store packed weights in 16 bits: if the caller asks for rounded weights, or if the
// weights are bfloat16 already and lose nothing.
bool stores_bf16(bool asked, const std::string& backend, Backend kind, const at::Tensor& input);

// ValueError if a tensor is on another device than the input or has another dtype; `name` is in the message.
void check_same(const at::Tensor& tensor, const at::Tensor& input, const char* name);

// ValueError if a tensor has another shape. The weight's name (`name`, `layer`, `direction`) is built only when the
// check fails: a deep stack has many weights.
void check_shape(const at::Tensor& tensor, at::IntArrayRef shape, const char* name, const char* direction = "",
                 int64_t layer = -1);

// The shape of a call. ValueError or TypeError if its tensors do not fit each other.
StackShape shape_of(const at::Tensor& input, const OptionalTensor& batch_sizes, const at::Tensor& h_0,
                    const at::Tensor& c_0, at::TensorList weights, const Options& options);

// The seed of the masks if there are masks to draw, otherwise nullopt.
OptionalTensor seed_of(const OptionalTensor& seed, const at::Tensor& input, const Options& options);

// The kernels compute in float32 or float64; 16-bit tensors are converted on their way in and out.
at::ScalarType arithmetic_type(const at::Tensor& input);

// The shape of a padded batch, for plans.
StackShape padded_shape(int64_t input_size, int64_t hidden_size, int64_t proj_size, int64_t num_layers,
                        bool bidirectional, int64_t seq_len, int64_t batch_size);

}  // namespace stacked_lstm
