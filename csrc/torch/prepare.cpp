// csrc/torch/prepare.cpp: see prepare.h.
#include "prepare.h"

#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
#include <ATen/cuda/CUDAContext.h>
#endif

#include <algorithm>
#include <iterator>
#include <utility>

#include "../cuda/architectures.h"
#include "../stack/state_layout.h"
#include "../stack/weights.h"

namespace stacked_lstm {

using at::Tensor;
using at::TensorList;

Saving saving_of(const std::string& name) {
  if (name == "none") return Saving::none;
  if (name == "full") return Saving::full;
  TORCH_CHECK_VALUE(name == "recompute", "saving should be one of none, full, recompute, got: ", name);
  return Saving::recompute;
}

const char* name_of(Saving saving) {
  return saving == Saving::none ? "none" : saving == Saving::full ? "full" : "recompute";
}

LinkKind link_named(const std::string& name) {
  const auto* found = std::find(std::begin(kLinkNames), std::end(kLinkNames), name);
  TORCH_CHECK_VALUE(found != std::end(kLinkNames), "link should be one of plain, residual, skip, got: ", name);
  return static_cast<LinkKind>(found - std::begin(kLinkNames));
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

namespace {

// Checks conditions. If one does not hold, it raises an error with these words, or returns false.
class Fit {
 public:
  explicit Fit(Misfit misfit) : raises_(misfit == Misfit::raises) {}

  template <typename... Words>
  bool value(bool holds, const Words&... words) const {
    if (!holds && raises_) TORCH_CHECK_VALUE(false, words...);
    return holds;
  }
  template <typename... Words>
  bool type(bool holds, const Words&... words) const {
    if (!holds && raises_) TORCH_CHECK_TYPE(false, words...);
    return holds;
  }
  // check_same() and check_shape(). A caller that declines has compared dtypes and devices already.
  bool same(const Tensor& tensor, const Tensor& input, const char* name) const {
    if (raises_) check_same(tensor, input, name);
    return true;
  }
  bool shape(const Tensor& tensor, at::IntArrayRef sizes, const char* name, const char* direction = "",
             int64_t layer = -1) const {
    if (raises_) check_shape(tensor, sizes, name, direction, layer);
    return tensor.sizes() == sizes;
  }

 private:
  const bool raises_;
};

// Whether the entries of an option are as many as the stack has layers, or boundaries between layers.
template <typename T>
bool entries_fit(const PerLayer<T>& option, int64_t expected, const char* name, const Fit& fit) {
  const auto entries = static_cast<int64_t>(option.each.size());
  return fit.value(entries == 0 || entries == expected, name, " should have ", expected, " entries, got: ", entries);
}

bool options_fit(const StackOptions& options, const Fit& fit) {
  return fit.value(options.num_layers > 0, "num_layers should be greater than zero, got: ", options.num_layers) &&
         entries_fit(options.hidden_size, options.num_layers, "hidden_size", fit) &&
         entries_fit(options.proj_size, options.num_layers, "proj_size", fit) &&
         entries_fit(options.dropout, options.num_layers - 1, "dropout", fit) && options.dropout.all([&](double rate) {
           return fit.value(rate >= 0 && rate <= 1, "dropout should be in [0, 1], got: ", rate);
         }) &&
         options.proj_size.all(
             [&](int64_t size) { return fit.value(size >= 0, "proj_size should not be negative, got: ", size); });
}

// Takes the hidden sizes that the options do not have from the weights.
bool hidden_sizes_fit(const Arguments& a, StackOptions& options, const Fit& fit) {
  if (options.hidden_size.each.empty() && options.hidden_size.every == 0) {
    int64_t place = 0;
    bool same = true;
    std::vector<int64_t> found;
    for (int64_t k = 0; k < options.num_layers; ++k) {
      const LayerShape layer{0, 0, options.proj_size[k]};
      const Tensor& hh = a.weights[static_cast<size_t>(place + place_in_lane(layer, options.bias, Weight::hh))];
      if (!fit.value(hh.dim() == 2 && hh.size(0) > 0 && hh.size(0) % 4 == 0,
                     "weight_hh should have shape (4*hidden_size, ...), got: ", hh.sizes())) {
        return false;
      }
      found.push_back(hh.size(0) / 4);
      same = same && found.back() == found.front();
      place += options.directions() * weights_of_lane(layer, options.bias);
    }
    options.hidden_size = same ? PerLayer<int64_t>(found.front()) : PerLayer<int64_t>(std::move(found));
  }
  for (int64_t k = 0; k < options.num_layers; ++k) {
    const int64_t hidden = options.hidden_size[k], projected = options.proj_size[k];
    if (!fit.value(hidden > 0, "hidden_size should be greater than zero, got: ", hidden) ||
        !fit.value(projected < hidden, "proj_size should be smaller than hidden_size, ", hidden,
                   ", got: ", projected)) {
      return false;
    }
    if (options.hidden_size.each.empty() && options.proj_size.each.empty()) break;  // the other layers are the same
  }
  return true;
}

// Residual links add what layers read and give.
bool link_fits(const StackShape& shape, const Fit& fit) {
  if (shape.link != LinkKind::residual || shape.same_output()) return true;
  const int64_t first = shape.layers[0].output();
  int64_t k = 1;
  while (shape.layers[static_cast<size_t>(k)].output() == first) ++k;
  return fit.value(false, "residual links need layers whose h is equally wide, and that of layer 0 has ", first,
                   " features, that of layer ", k, " has ", shape.layers[static_cast<size_t>(k)].output());
}

bool weights_fit(const Arguments& a, const StackShape& shape, const Fit& fit) {
  const auto layer_of_lane = [&](int64_t lane) -> const LayerShape& { return shape.of_lane(lane); };
  return all_weights(shape.lanes(), a.options.bias, layer_of_lane, [&](int64_t lane, Weight name, int64_t place) {
    const Tensor& weight = a.weights[static_cast<size_t>(place)];
    const WeightSizes sizes = sizes_of(layer_of_lane(lane), name);
    const int64_t dimensions[] = {sizes.rows, sizes.columns};
    return fit.same(weight, a.input, "every weight") &&
           fit.shape(weight, at::IntArrayRef(dimensions, sizes.vector() ? 1 : 2), name_of(name),
                     lane % shape.directions ? "_reverse" : "", lane / shape.directions);
  });
}

// T, B and the rows of a packed batch.
bool packed_rows_fit(const Arguments& a, const Fit& fit, StackShape& shape) {
  const Tensor &sizes = *a.batch_sizes, &h_0 = *a.h_0;
  if (!fit.value(sizes.device().is_cpu() && sizes.scalar_type() == at::kLong && sizes.dim() == 1,
                 "batch_sizes should be a one-dimensional int64 tensor on the CPU, got: ", sizes.dim(),
                 " dimensions of ", sizes.scalar_type(), " on ", sizes.device())) {
    return false;
  }
  const Tensor contiguous = sizes.contiguous();
  const int64_t* size = contiguous.const_data_ptr<int64_t>();
  shape.steps = sizes.numel();
  if (!fit.value(shape.steps > 0, "batch_sizes should have at least one element")) return false;
  shape.batch = size[0];
  if (!fit.value(!shape.same_output() || (h_0.dim() == 3 && shape.batch == h_0.size(1)),
                 "batch_sizes should start with the batch of h_0, ", h_0.sizes(), ", got: ", shape.batch)) {
    return false;
  }
  shape.packed_rows.assign(1, 0);
  for (int64_t t = 0; t < shape.steps; ++t) {
    if (!fit.value(size[t] >= 1 && size[t] <= (t == 0 ? size[0] : size[t - 1]),
                   "batch_sizes should be at least 1 and never grow, got: ", size[t], " at step ", t)) {
      return false;
    }
    shape.packed_rows.push_back(shape.packed_rows.back() + size[t]);
  }
  return fit.value(a.input.size(0) == shape.rows(), "input should have as many rows as batch_sizes add up to, ",
                   shape.rows(), ", got: ", a.input.size(0));
}

// The steps of a padded batch whose sequences have lengths.
bool lengths_fit(const Tensor& lengths, const Fit& fit, StackShape& shape) {
  if (!fit.value(lengths.device().is_cpu() && lengths.scalar_type() == at::kLong && lengths.dim() == 1,
                 "lengths should be a one-dimensional int64 tensor on the CPU, got: ", lengths.dim(), " dimensions of ",
                 lengths.scalar_type(), " on ", lengths.device()) ||
      !fit.value(lengths.numel() == shape.batch, "lengths should have one entry for each of the ", shape.batch,
                 " sequences, got: ", lengths.numel())) {
    return false;
  }
  const Tensor contiguous = lengths.contiguous();
  const int64_t* const length = contiguous.const_data_ptr<int64_t>();
  int64_t longest = shape.batch > 0 ? 0 : shape.steps;
  for (int64_t b = 0; b < shape.batch; ++b) {
    if (!fit.value(length[b] >= 1 && length[b] <= shape.steps, "lengths should be in [1, ", shape.steps,
                   "], the steps of input, got: ", length[b], " for sequence ", b)) {
      return false;
    }
    longest = std::max(longest, length[b]);
  }
  shape.padded_steps = shape.steps, shape.steps = longest;
  shape.counts.assign(static_cast<size_t>(longest), 0);
  for (int64_t b = 0; b < shape.batch; ++b) ++shape.counts[static_cast<size_t>(length[b]) - 1];
  for (int64_t t = longest - 2; t >= 0; --t)
    shape.counts[static_cast<size_t>(t)] += shape.counts[static_cast<size_t>(t) + 1];
  return true;
}

}  // namespace

bool prepare(const Arguments& a, Misfit misfit, StackShape& shape) {
  const Fit fit(misfit);
  const Tensor& input = a.input;
  StackOptions options = a.options;
  if (!options_fit(options, fit)) return false;
  const auto type = input.scalar_type();
  if (!fit.type(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
                "input should be float32, float64, bfloat16 or float16, got: ", type)) {
    return false;
  }
  const bool unbatched = a.one_step && input.dim() == 1;
  const int64_t dimensions = unbatched ? 1 : a.batch_sizes || a.one_step ? 2 : 3;
  if (!fit.value(input.dim() == dimensions, "input should have ", dimensions, " dimensions, got: ", input.dim())) {
    return false;
  }
  const auto weights = static_cast<int64_t>(a.weights.size());
  // Every layer has two weights or more. This also bounds the loops over layers.
  if (!fit.value(options.num_layers <= weights, "weights should be more than ", weights, " tensors for ",
                 options.num_layers, " layers")) {
    return false;
  }
  int64_t expected = 0;
  for (int64_t k = 0; k < options.num_layers; ++k) {
    expected += options.directions() * weights_of_lane({0, 0, options.proj_size[k]}, options.bias);
  }
  if (!fit.value(weights == expected, "weights should be ", expected, " tensors, got: ", weights)) {
    return false;
  }
  if (options.input_size == 0) options.input_size = input.size(-1);
  if (!hidden_sizes_fit(a, options, fit) || !fit.value(input.size(-1) == options.input_size, "input should have ",
                                                       options.input_size, " features, got: ", input.size(-1))) {
    return false;
  }

  set_layers(options, shape);
  if (!link_fits(shape, fit) || !weights_fit(a, shape, fit)) return false;
  if (a.h_0 && (!fit.same(*a.h_0, input, "h_0") || !fit.same(*a.c_0, input, "c_0"))) return false;
  shape.packed_rows.clear(), shape.counts.clear(), shape.padded_steps = 0;
  if (a.batch_sizes) {
    if (!fit.value(!a.lengths && !a.resets, a.lengths ? "lengths" : "resets",
                   " should be left out where there are batch_sizes: a packed batch cannot have them") ||
        !a.h_0 || !packed_rows_fit(a, fit, shape)) {
      return false;
    }
  } else {
    shape.steps = a.one_step ? 1 : input.size(0);
    shape.batch = unbatched ? 1 : input.size(-2);
    if (!fit.value(shape.steps > 0, "input should have at least one step")) return false;
    if (a.resets) {
      const int64_t sizes[] = {shape.steps, shape.batch};
      if (!fit.value(a.resets->device() == input.device(), "resets should be on the device of input, ", input.device(),
                     ", got: ", a.resets->device()) ||
          !fit.type(a.resets->scalar_type() == at::kBool,
                    "resets should be of dtype bool, got: ", a.resets->scalar_type()) ||
          !fit.shape(*a.resets, sizes, "resets")) {
        return false;
      }
    }
    if (a.lengths && !lengths_fit(*a.lengths, fit, shape)) return false;
  }
  // No buffer is larger than all rows of a whole reserve. So if this check passes, no arithmetic on sizes can overflow.
  int64_t widest = 0;
  for (const LayerShape& layer : shape.layers) widest = std::max(widest, layer.hidden);
  const double elements = static_cast<double>(shape.all_steps()) *
                          static_cast<double>(std::max<int64_t>(shape.batch, 1)) * static_cast<double>(shape.lanes()) *
                          6 * static_cast<double>(widest + kUnitPadding);
  if (!fit.value(elements < 1e17, "the sizes are too large: ", shape.steps, " steps, batch ", shape.batch, ", ",
                 shape.lanes(), " layers and directions, hidden_size ", widest)) {
    return false;
  }
  return !a.h_0 ||
         (fit.shape(*a.h_0, h_sizes(shape, unbatched), "h_0") && fit.shape(*a.c_0, c_sizes(shape, unbatched), "c_0"));
}

at::DimVector h_sizes(const StackShape& shape, bool unbatched) {
  if (!shape.same_output()) return {StateLayout(shape).h(shape.lanes())};
  const int64_t width = shape.layers[0].output();
  return unbatched ? at::DimVector{shape.lanes(), width} : at::DimVector{shape.lanes(), shape.batch, width};
}

at::DimVector c_sizes(const StackShape& shape, bool unbatched) {
  if (!shape.same_hidden()) return {StateLayout(shape).c(shape.lanes())};
  const int64_t width = shape.layers[0].hidden;
  return unbatched ? at::DimVector{shape.lanes(), width} : at::DimVector{shape.lanes(), shape.batch, width};
}

StackShape prepare(const StackOptions& options, int64_t seq_len, int64_t batch_size) {
  options_fit(options, Fit(Misfit::raises));
  StackShape shape;
  shape.steps = seq_len;
  shape.batch = batch_size;
  set_layers(options, shape);
  return shape;
}

// The seed of the masks if there are masks to draw, otherwise nullopt.
OptionalTensor seed_of(const OptionalTensor& seed, const Tensor& input, const StackOptions& options) {
  if (!options.drops()) return std::nullopt;
  TORCH_CHECK_VALUE(seed.has_value(), "seed is needed with dropout and ", options.num_layers, " layers");
  TORCH_CHECK_VALUE(seed->numel() == 1 && seed->scalar_type() == at::kLong,
                    "seed should be an int64 tensor of one element, got: ", seed->numel(), " of ", seed->scalar_type());
  TORCH_CHECK_VALUE(seed->device() == input.device(), "seed should be on the device of input, ", input.device(),
                    ", got: ", seed->device());
  return seed;
}

at::ScalarType arithmetic_type(const Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace stacked_lstm
