// csrc/torch/prepare.cpp: see prepare.h.
#include "prepare.h"

#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
#include <ATen/cuda/CUDAContext.h>
#endif

#include <algorithm>
#include <iterator>
#include <utility>

#include "../cuda/architectures.h"

namespace stacked_lstm {

using at::Tensor;
using at::TensorList;

Saving saving_of(const std::string& name) {
  if (name == "none") return Saving::none;
  if (name == "full") return Saving::full;
  TORCH_CHECK_VALUE(name == "recompute", "saving should be one of none, full, recompute, got: ", name);
  return Saving::recompute;
}

namespace {

constexpr std::pair<const char*, Backend> kBackends[] = {{"cpu", Backend::cpu},
                                                         {"diagonal", Backend::diagonal},
                                                         {"persistent", Backend::persistent},
                                                         {"auto", Backend::automatic}};

}  // namespace

Backend backend_of(const std::string& name, const at::Device& device) {
  const auto* found = std::find_if(std::begin(kBackends), std::end(kBackends),
                                   [&](const auto& backend) { return name == backend.first; });
  TORCH_CHECK_VALUE(found != std::end(kBackends),
                    "backend should be one of cpu, diagonal, persistent, auto, got: ", name);
  if (found->second == Backend::cpu) {
    TORCH_CHECK_VALUE(device.is_cpu(), "backend cpu needs tensors on the CPU, got: ", device);
    return Backend::cpu;
  }
#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
  if (device.is_cuda()) {
    const cudaDeviceProp* properties = at::cuda::getDeviceProperties(device.index());
    const std::string obstacle = cuda_obstacle(STACKED_LSTM_EXT_CUDA_ARCHS, properties->major, properties->minor);
    TORCH_CHECK(obstacle.empty(), device, " (", properties->name, ") cannot run the kernels: ", obstacle);
  }
#endif
  return found->second;
}

bool stores_bf16(bool asked, const std::string& backend, Backend kind, const Tensor& input) {
  TORCH_CHECK_VALUE(!asked || (kind == Backend::cpu && input.scalar_type() == at::kFloat),
                    "bf16_weights needs backend cpu and dtype float32 (others take weights that are rounded already), "
                    "got: ",
                    backend, " and ", input.scalar_type());
  return asked || (kind == Backend::cpu && input.scalar_type() == at::kBFloat16);
}

void check_same(const Tensor& tensor, const Tensor& input, const char* name) {
  TORCH_CHECK_VALUE(tensor.device() == input.device(), name, " should be on the device of input, ", input.device(),
                    ", got: ", tensor.device());
  TORCH_CHECK_VALUE(tensor.scalar_type() == input.scalar_type(), name, " should have the dtype of input, ",
                    input.scalar_type(), ", got: ", tensor.scalar_type());
}

// The weight's name is built only when the check fails: a deep stack has many weights.
void check_shape(const Tensor& tensor, at::IntArrayRef shape, const char* name, const char* direction, int64_t layer) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, layer < 0 ? std::string() : "_l" + std::to_string(layer), direction,
                    " should have shape ", shape, ", got: ", tensor.sizes());
}

StackShape shape_of(const Tensor& input, const OptionalTensor& batch_sizes, const Tensor& h_0, const Tensor& c_0,
                    TensorList weights, const Options& options) {
  const int64_t directions = options.directions();
  TORCH_CHECK_VALUE(options.layers > 0, "num_layers should be greater than zero, got: ", options.layers);
  TORCH_CHECK_VALUE(options.dropout >= 0 && options.dropout <= 1,
                    "dropout should be in [0, 1], got: ", options.dropout);
  TORCH_CHECK_VALUE(options.proj_size >= 0, "proj_size should not be negative, got: ", options.proj_size);
  const auto type = input.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
                   "input should be float32, float64, bfloat16 or float16, got: ", type);
  TORCH_CHECK_VALUE(input.dim() == (batch_sizes ? 2 : 3), "input should have ", batch_sizes ? 2 : 3,
                    " dimensions, got: ", input.dim());
  const int64_t lanes = options.layers * directions, a_lane = options.weights_a_lane();
  TORCH_CHECK_VALUE(static_cast<int64_t>(weights.size()) == lanes * a_lane, "weights should be ", lanes * a_lane,
                    " tensors, got: ", weights.size());
  TORCH_CHECK_VALUE(weights[1].dim() == 2 && weights[1].size(0) > 0 && weights[1].size(0) % 4 == 0,
                    "weight_hh should have shape (4*hidden_size, ...), got: ", weights[1].sizes());
  const int64_t hidden = weights[1].size(0) / 4;
  TORCH_CHECK_VALUE(options.proj_size < hidden, "proj_size should be smaller than hidden_size, ", hidden,
                    ", got: ", options.proj_size);

  StackShape shape;
  shape.directions = directions;
  const int64_t output = options.proj_size > 0 ? options.proj_size : hidden;
  for (int64_t k = 0; k < options.layers; ++k) {
    shape.layers.push_back({k == 0 ? input.size(-1) : directions * output, hidden, options.proj_size});
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const LayerShape& layer = shape.of_lane(lane);
    const Tensor* w = &weights[lane * a_lane];
    const char* const direction = lane % directions ? "_reverse" : "";
    const auto check = [&](const Tensor& weight, at::IntArrayRef sizes, const char* name) {
      check_same(weight, input, "every weight");
      check_shape(weight, sizes, name, direction, lane / directions);
    };
    check(w[0], {4 * hidden, layer.input}, "weight_ih");
    check(w[1], {4 * hidden, output}, "weight_hh");
    if (options.bias) check(w[2], {4 * hidden}, "bias_ih");
    if (options.bias) check(w[3], {4 * hidden}, "bias_hh");
    if (options.proj_size > 0) check(w[a_lane - 1], {output, hidden}, "weight_hr");
  }

  check_same(h_0, input, "h_0");
  check_same(c_0, input, "c_0");
  if (batch_sizes) {
    const Tensor& sizes = *batch_sizes;
    TORCH_CHECK_VALUE(sizes.device().is_cpu() && sizes.scalar_type() == at::kLong && sizes.dim() == 1,
                      "batch_sizes should be a one-dimensional int64 tensor on the CPU, got: ", sizes.dim(),
                      " dimensions of ", sizes.scalar_type(), " on ", sizes.device());
    const Tensor contiguous = sizes.contiguous();
    const int64_t* size = contiguous.const_data_ptr<int64_t>();
    shape.steps = sizes.numel();
    TORCH_CHECK_VALUE(shape.steps > 0, "batch_sizes should have at least one element");
    shape.batch = size[0];
    TORCH_CHECK_VALUE(h_0.dim() == 3 && shape.batch == h_0.size(1), "batch_sizes should start with the batch of h_0, ",
                      h_0.sizes(), ", got: ", shape.batch);
    shape.packed_rows.assign(1, 0);
    for (int64_t t = 0; t < shape.steps; ++t) {
      TORCH_CHECK_VALUE(size[t] >= 1 && size[t] <= (t == 0 ? size[0] : size[t - 1]),
                        "batch_sizes should be at least 1 and never grow, got: ", size[t], " at step ", t);
      shape.packed_rows.push_back(shape.packed_rows.back() + size[t]);
    }
    TORCH_CHECK_VALUE(input.size(0) == shape.rows(), "input should have as many rows as batch_sizes add up to, ",
                      shape.rows(), ", got: ", input.size(0));
  } else {
    shape.steps = input.size(0);
    shape.batch = input.size(1);
    TORCH_CHECK_VALUE(shape.steps > 0, "input should have at least one step");
  }
  // No buffer is larger than all rows of a whole reserve. So if this check passes, no arithmetic on sizes can overflow.
  const double elements = static_cast<double>(shape.steps) * static_cast<double>(std::max<int64_t>(shape.batch, 1)) *
                          static_cast<double>(lanes) * 6 * static_cast<double>(round_up(hidden, kUnitPadding));
  TORCH_CHECK_VALUE(elements < 1e17, "the sizes are too large: ", shape.steps, " steps, batch ", shape.batch, ", ",
                    lanes, " layers and directions, hidden_size ", hidden);
  check_shape(h_0, {lanes, shape.batch, output}, "h_0");
  check_shape(c_0, {lanes, shape.batch, hidden}, "c_0");
  return shape;
}

// The seed of the masks if there are masks to draw, otherwise nullopt.
OptionalTensor seed_of(const OptionalTensor& seed, const Tensor& input, const Options& options) {
  if (options.dropout == 0 || options.layers == 1) return std::nullopt;
  TORCH_CHECK_VALUE(seed.has_value(), "seed is needed with dropout ", options.dropout, " and ", options.layers,
                    " layers");
  TORCH_CHECK_VALUE(seed->numel() == 1 && seed->scalar_type() == at::kLong,
                    "seed should be an int64 tensor of one element, got: ", seed->numel(), " of ", seed->scalar_type());
  TORCH_CHECK_VALUE(seed->device() == input.device(), "seed should be on the device of input, ", input.device(),
                    ", got: ", seed->device());
  return seed;
}

at::ScalarType arithmetic_type(const Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

StackShape padded_shape(int64_t input_size, int64_t hidden_size, int64_t proj_size, int64_t num_layers,
                        bool bidirectional, int64_t seq_len, int64_t batch_size) {
  StackShape shape;
  shape.steps = seq_len;
  shape.batch = batch_size;
  shape.directions = bidirectional ? 2 : 1;
  const int64_t output = proj_size > 0 ? proj_size : hidden_size;
  for (int64_t k = 0; k < num_layers; ++k) {
    shape.layers.push_back({k == 0 ? input_size : shape.directions * output, hidden_size, proj_size});
  }
  return shape;
}

}  // namespace stacked_lstm
