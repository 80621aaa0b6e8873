// csrc/torch/prepare.h: checks the arguments of a call: saving mode, backend, shape, seed. Everything that a kernel
// relies on is checked here, before anything is allocated.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

#include "../driver/call.h"
#include "../stack/options.h"
#include "../stack/stack.h"

namespace stacked_lstm {

Saving saving_of(const std::string& name);
const char* name_of(Saving saving);

LinkKind link_named(const std::string& name);

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

// The tensors of a call, and the options that their stack is said to have.
struct Arguments {
  const at::Tensor& input;        // (T, B, I); with batch_sizes, (rows, I); of one step, (B, I) or (I)
  const at::Tensor* batch_sizes;  // or null
  const at::Tensor*
      h_0;  // (lanes, B, output), without B if the input has none; or flat (stack/state_layout.h); or null
  const at::Tensor* c_0;        // (lanes, B, hidden), likewise; null if h_0 is
  at::TensorList weights;       // in the order of stack/weights.h
  const StackOptions& options;  // if hidden_size or input_size is 0, the tensors say it
  bool one_step = false;
  const at::Tensor* lengths = nullptr;  // int64 (B) on the CPU, in any order, of a padded batch; or null
  const at::Tensor* resets = nullptr;   // bool (T, B), of a padded batch; or null
};

enum class Misfit { raises, declines };

// Checks that the arguments fit each other and the options, and makes the shape of the call, in memory that the caller may
// use again. If they do not fit: with Misfit::raises, a ValueError or TypeError says what is wrong; with Misfit::declines,
// the result is false, and the caller takes a path that raises. A call without h_0 and c_0 has zeros in their place; it
// cannot have batch_sizes. The shape is that of the sorted batch, if the lengths are not sorted.
bool prepare(const Arguments& arguments, Misfit misfit, StackShape& shape);

// The sizes of h_0, or of c_0, for a shape: stack/state_layout.h.
at::DimVector h_sizes(const StackShape& shape, bool unbatched = false);
at::DimVector c_sizes(const StackShape& shape, bool unbatched = false);

// The shape of a padded batch, for a plan. ValueError if no stack can have these options.
StackShape prepare(const StackOptions& options, int64_t seq_len, int64_t batch_size);

// The seed of the masks if there are masks to draw, otherwise nullopt.
OptionalTensor seed_of(const OptionalTensor& seed, const at::Tensor& input, const StackOptions& options);

// The kernels compute in float32 or float64; 16-bit tensors are converted on their way in and out.
at::ScalarType arithmetic_type(const at::Tensor& input);

}  // namespace stacked_lstm
