// csrc/torch/prepare.h: what a call says of itself, checked: saving mode, backend, shape, seed. Everything that a kernel relies
// on is checked here, before anything is allocated.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

#include "../driver/call.h"
#include "../stack/stack.h"

namespace stacked_lstm {

Saving saving_of(const std::string& name);
const char* name_of(Saving saving);

enum class Backend { cpu, diagonal, persistent, automatic };

// Checks that there may be kernels of this backend for the tensors' device.
Backend backend_of(const std::string& name, const at::Device& device);

// Whether the CPU kernels are to store packed weights in 16 bits: where the caller asks to have them rounded so, and
// where they are bfloat16 anyway and lose nothing.
bool stores_bf16(bool asked, const std::string& backend, Backend kind, const at::Tensor& input);

// ValueError where a tensor is on another device than the input, of another dtype or of another shape; `name` is in the message.
void check_same(const at::Tensor& tensor, const at::Tensor& input, const char* name);

// The parts of a weight's name are put together where it is wrong: a deep stack has many weights.
void check_shape(const at::Tensor& tensor, at::IntArrayRef shape, const char* name, const char* direction = "",
                 int64_t layer = -1);

// The tensors of a call, and what their stack is said to be.
struct Arguments {
  const at::Tensor& input;            // (T, B, I); with batch_sizes, (rows, I); of one step, (B, I) or (I)
  const at::Tensor* batch_sizes;      // or null
  const at::Tensor *h_0, *c_0;        // (lanes, B, output) and (lanes, B, hidden); without B where the input has none; or both null
  at::TensorList weights;             // in the order of stack/weights.h
  const StackOptions& options;        // hidden_size and input_size may be 0: then the tensors say them
  bool one_step = false;
};

enum class Misfit { raises, declines };

// Checks that all of it fits, and makes the shape of the call, in memory that may be used again. Where it does not fit, a call
// that raises says what is wrong in a ValueError or TypeError; one that declines returns false, and its caller finds a way
// that raises. A stack without states has zeros for them, and no batch_sizes.
bool prepare(const Arguments& arguments, Misfit misfit, StackShape& shape);

// The shape of a padded batch that is to be planned. ValueError where no stack has such options.
StackShape prepare(const StackOptions& options, int64_t seq_len, int64_t batch_size);

// The seed of the masks, where there are masks to draw.
OptionalTensor seed_of(const OptionalTensor& seed, const at::Tensor& input, const StackOptions& options);

// The kernels compute in float32 or float64; 16-bit tensors are converted on their way in and out.
at::ScalarType arithmetic_type(const at::Tensor& input);

}  // namespace stacked_lstm
