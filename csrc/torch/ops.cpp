// csrc/torch/ops.cpp: the operators stacked_lstm_ext::forward and ::backward: schemas, checks, allocation, dispatch; and the
// Python module _C, for what is not a tensor operator (the schedule, facts about the build).
//
// The schemas are part of the interface: stacked_lstm_ext/ops.py has their fakes and their autograd.
#include <ATen/Config.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
#include <ATen/cuda/CUDAContext.h>
#endif

#include <algorithm>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "../cpu/fingerprint.h"
#include "../cpu/kernels.h"
#include "../cpu/stack_cpu.h"
#include "../cpu/workspace.h"
#include "../cuda/architectures.h"
#include "../cuda/device.h"
#include "../diagonal/diagonal.h"
#include "../driver/call.h"
#include "../driver/driver.h"
#include "../driver/gate_kernels.h"
#include "../persistent/bindings.h"
#include "../persistent/persistent.h"
#include "../persistent/plan.h"
#include "../stack/stack.h"
#include "../stack/wavefront.h"
#include "eager.h"
#include "operators.h"
#include "packed_cache.h"
#include "step.h"

namespace stacked_lstm {
namespace {

using at::Tensor;
using at::TensorList;

// ---- What a call says of itself -------------------------------------------------------------------------------------

Saving saving_of(const std::string& name) {
  if (name == "none") return Saving::none;
  if (name == "full") return Saving::full;
  TORCH_CHECK_VALUE(name == "recompute", "saving should be one of none, full, recompute, got: ", name);
  return Saving::recompute;
}

enum class Backend { cpu, diagonal, persistent, automatic };
constexpr std::pair<const char*, Backend> kBackends[] = {{"cpu", Backend::cpu},
                                                         {"diagonal", Backend::diagonal},
                                                         {"persistent", Backend::persistent},
                                                         {"auto", Backend::automatic}};

// Checks that there may be kernels of this backend for the tensors' device.
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

// What runs a call of the backends `persistent` and `auto`; null: the diagonal schedule. Both have the same reserve.
// ValueError where the persistent kernels are asked for and cannot run it: nothing is allocated or launched by then.
std::shared_ptr<const persistent::Decision> persistent_decision(Backend kind, const Call& call) {
  if (kind != Backend::persistent && kind != Backend::automatic) return nullptr;
  auto decision = persistent::decide({call.shape, call.options, call.input.scalar_type(), call.input.device()});
  if (kind == Backend::automatic) return decision->choice.persistent ? decision : nullptr;
  TORCH_CHECK_VALUE(decision->why_not.empty(), "the persistent kernel cannot run this call: ", decision->why_not);
  return decision;
}

// Whether the CPU kernels are to store packed weights in 16 bits: where the caller asks to have them rounded so, and
// where they are bfloat16 anyway and lose nothing.
bool stores_bf16(bool asked, const std::string& backend, Backend kind, const Tensor& input) {
  TORCH_CHECK_VALUE(!asked || (kind == Backend::cpu && input.scalar_type() == at::kFloat),
                    "bf16_weights needs backend cpu and dtype float32 (others take weights that are rounded already), "
                    "got: ",
                    backend, " and ", input.scalar_type());
  return asked || (kind == Backend::cpu && input.scalar_type() == at::kBFloat16);
}

// The last call of this thread, for `last_run`.
struct Run {
  std::variant<Schedule, diagonal::Counts, persistent::Counts> how;
  std::string device;
  bool backward;
  std::string saving;
  StackShape shape;
  at::ScalarType type;
};
thread_local std::optional<Run> last_run;

// ---- torch's threads for the CPU kernels ----------------------------------------------------------------------------

class TorchPlatform : public cpu::Platform {
 public:
  void parallel(int64_t workers, const std::function<void(int64_t)>& member) override {
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) { member(end - begin); });
  }
  bool at_the_same_time() const override {
#if AT_PARALLEL_OPENMP
    return true;  // a parallel region has all of its threads from the start
#else
    return false;  // a pool's threads may be busy
#endif
  }
};

// ---- Checks: everything that a kernel relies on, before anything is allocated ---------------------------------------

void check_same(const Tensor& tensor, const Tensor& input, const char* name) {
  TORCH_CHECK_VALUE(tensor.device() == input.device(), name, " should be on the device of input, ", input.device(),
                    ", got: ", tensor.device());
  TORCH_CHECK_VALUE(tensor.scalar_type() == input.scalar_type(), name, " should have the dtype of input, ",
                    input.scalar_type(), ", got: ", tensor.scalar_type());
}

// The parts of a weight's name are put together where it is wrong: a deep stack has many weights.
void check_shape(const Tensor& tensor, at::IntArrayRef shape, const char* name, const char* direction = "",
                 int64_t layer = -1) {
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
  // No buffer is larger than all rows of a whole reserve; with this, none of the arithmetic on sizes can overflow.
  const double elements = static_cast<double>(shape.steps) * static_cast<double>(std::max<int64_t>(shape.batch, 1)) *
                          static_cast<double>(lanes) * 6 * static_cast<double>(round_up(hidden, kUnitPadding));
  TORCH_CHECK_VALUE(elements < 1e17, "the sizes are too large: ", shape.steps, " steps, batch ", shape.batch, ", ",
                    lanes, " layers and directions, hidden_size ", hidden);
  check_shape(h_0, {lanes, shape.batch, output}, "h_0");
  check_shape(c_0, {lanes, shape.batch, hidden}, "c_0");
  return shape;
}

// The seed of the masks, where there are masks to draw.
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

// ---- The CPU ------------------------------------------------------------------------------------------------------

// The kernels compute in float32 or float64; 16-bit tensors are converted on their way in and out.
at::ScalarType arithmetic_type(const Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

int64_t free_threads() {
#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
  return 1;  // built without OpenMP, at::parallel_for runs on one thread
#else
  return at::in_parallel_region() ? 1 : at::get_num_threads();
#endif
}

// Set from Python for the calls of this thread, to compare schedules.
thread_local std::optional<Schedule> forced_schedule;

Dropout dropout_on_host(const Call& call) {
  if (!call.seed) return {};
  return {call.options.dropout, static_cast<uint64_t>(*call.seed->const_data_ptr<int64_t>())};
}

cpu::Workers workers_for(const StackShape& shape) {
  const int64_t threads = free_threads();
  if (!forced_schedule) return {threads};
  const char* why = why_not(*forced_schedule, shape, threads);
  TORCH_CHECK(!why, "the forced schedule cannot run ", shape.depth(), " layers, batch ", shape.batch, ", on ", threads,
              " threads: ", why);
  return {threads, &*forced_schedule};
}

// Tensors in the arithmetic's dtype, contiguous, kept alive as long as a call points into them.
template <typename T>
class Operands {
 public:
  explicit Operands(at::ScalarType type) : type_(type) {}

  const T* take(const Tensor& tensor) {
    if (tensor.scalar_type() == type_ && tensor.is_contiguous()) return tensor.const_data_ptr<T>();  // the caller's
    kept_.push_back(tensor.to(type_).contiguous());
    return kept_.back().const_data_ptr<T>();
  }
  const T* take(const OptionalTensor& tensor) { return tensor ? take(*tensor) : nullptr; }

  // Rows stand where they are as long as each is contiguous. Of rows that are all the same one, expanded (the gradient of
  // a sum is), no more than that one is copied.
  Input<T> rows(const Tensor& tensor, bool packed) {
    const bool same = tensor.numel() > 0 && tensor.stride(0) == 0 && tensor.stride(-2) == 0;
    Tensor x = (!same ? tensor : packed ? tensor[0] : tensor[0][0]).to(type_);
    if (same || packed || x.stride(-1) != 1) x = x.contiguous();
    kept_.push_back(x);
    if (same) return {x.const_data_ptr<T>(), 0, 0};
    return {x.const_data_ptr<T>(), packed ? 0 : x.stride(0), x.stride(-2)};
  }

  std::vector<LaneWeights<T>> weights(TensorList tensors, const Options& options) {
    std::vector<LaneWeights<T>> lanes;
    const int64_t a_lane = options.weights_a_lane();
    for (int64_t n = 0; n < static_cast<int64_t>(tensors.size()); n += a_lane) {
      const Tensor* w = &tensors[n];
      lanes.push_back({take(w[0]), take(w[1]), options.bias ? take(w[2]) : nullptr, options.bias ? take(w[3]) : nullptr,
                       options.proj_size > 0 ? take(w[a_lane - 1]) : nullptr});
    }
    return lanes;
  }

 private:
  at::ScalarType type_;
  std::vector<Tensor> kept_;
};

Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor fresh = at::empty(sizes, options);
  cpu::prefer_huge_pages(fresh.mutable_data_ptr(), static_cast<int64_t>(fresh.nbytes()));
  return fresh;
}

Tensor empty_reserve(int64_t elements, const at::TensorOptions& options) {
  const int64_t bytes = elements * static_cast<int64_t>(options.dtype().itemsize());
  if (bytes < (int64_t{1} << 20)) return at::empty({elements}, options);
  cpu::LargeMemory* const memory = cpu::take_large(bytes);
  return at::from_blob(memory->data, {elements}, [memory](void*) { cpu::give_back(memory); }, options);
}

void remember(decltype(Run::how) how, const Call& call, const std::string& saving, bool backward) {
  last_run = Run{std::move(how), call.input.device().str(), backward, saving, call.shape, call.input.scalar_type()};
}

template <typename T>
Results forward_cpu(const Call& call, const std::string& saving) {
  const auto type = arithmetic_type(call.input);
  const auto floats = call.input.options().dtype(type);
  const bool keep_top = type != call.input.scalar_type();
  const StackShape& shape = call.shape;
  const Tensor output = empty(call.output_sizes(), floats);
  const Tensor h_n = empty(call.h_0.sizes(), floats), c_n = empty(call.c_0.sizes(), floats);
  const Tensor reserve = empty_reserve(reserve_size(shape, call.options.saving, keep_top).total(), floats);

  Operands<T> operands(type);
  ForwardCall<T> kernel;
  kernel.shape = shape;
  kernel.input = operands.rows(call.input, call.packed);
  const cpu::Storage storage = call.options.bf16_weights ? cpu::Storage::bf16 : cpu::Storage::same;
  const bool may_keep = call.options.saving == Saving::none;  // training changes the weights at every step
  std::shared_ptr<cpu::PackedStack<T>> packed;
  if (may_keep) packed = find_packed<T>(call.weights, shape, storage);
  kernel.h_0 = operands.take(call.h_0);
  kernel.c_0 = operands.take(call.c_0);
  kernel.dropout = dropout_on_host(call);
  kernel.saving = call.options.saving;
  kernel.keep_top = keep_top;
  kernel.output = output.mutable_data_ptr<T>();
  kernel.h_n = h_n.mutable_data_ptr<T>();
  kernel.c_n = c_n.mutable_data_ptr<T>();
  kernel.reserve = reserve.mutable_data_ptr<T>();
  kernel.bf16_weights = call.options.bf16_weights;
  kernel.bf16_activations = call.input.scalar_type() == at::kBFloat16;
  const cpu::Workers workers = workers_for(shape);
  TorchPlatform platform;
  std::optional<Schedule> done;
  if (packed && packed->ready()) {
    done = cpu::forward(kernel, workers, platform, packed.get(), !Trust::in_force());
    if (done) {
      count_hit();
    } else {
      forget_packed(call.weights, shape, packed);
      packed.reset();
    }
  }
  if (!done) {
    kernel.weights = operands.weights(call.weights, call.options);
    done = cpu::forward(kernel, workers, platform, packed.get());
    if (packed) keep_packed(call.weights, shape, packed);
  }
  remember(*done, call, saving, false);
  if (keep_top && call.options.saving != Saving::none) {  // the last part of the reserve; see stack.h
    reserve.narrow(0, reserve.numel() - output.numel(), output.numel()).copy_(output.flatten());
  }
  const auto out = call.input.scalar_type();
  return {output.to(out), h_n.to(out), c_n.to(out), reserve};
}

template <typename T>
Gradients backward_cpu(const Call& call, const Kept& kept, const IncomingGradients& incoming, const std::string& saving,
                       bool input_grad, bool weight_grad) {
  const auto type = arithmetic_type(call.input);
  const auto floats = call.input.options().dtype(type);
  const StackShape& shape = call.shape;
  const Options& options = call.options;
  Operands<T> operands(type);
  BackwardCall<T> kernel;
  kernel.shape = shape;
  kernel.input = operands.rows(call.input, call.packed);
  kernel.weights = operands.weights(call.weights, options);
  kernel.h_0 = operands.take(call.h_0);
  kernel.c_0 = operands.take(call.c_0);
  kernel.dropout = dropout_on_host(call);
  kernel.saving = options.saving;
  kernel.keep_top = type != call.input.scalar_type();
  kernel.output = kernel.keep_top ? nullptr : operands.take(kept.output);
  kernel.reserve = operands.take(kept.reserve);
  if (incoming.output) kernel.grad_output = operands.rows(*incoming.output, call.packed);
  kernel.grad_h_n = operands.take(incoming.h_n);
  kernel.grad_c_n = operands.take(incoming.c_n);

  Tensor grad_input[2];
  for (int64_t d = 0; d < 2; ++d) {
    const bool wanted = input_grad && d < shape.directions;
    if (wanted) grad_input[d] = empty(call.input.sizes(), floats);
    kernel.grad_input[d] = wanted ? grad_input[d].mutable_data_ptr<T>() : nullptr;
  }
  const Tensor grad_h_0 = empty(call.h_0.sizes(), floats), grad_c_0 = empty(call.c_0.sizes(), floats);
  kernel.grad_h_0 = grad_h_0.mutable_data_ptr<T>();
  kernel.grad_c_0 = grad_c_0.mutable_data_ptr<T>();
  std::vector<Tensor> grad_weights;
  if (weight_grad) {
    for (const Tensor& w : call.weights) grad_weights.push_back(empty(w.sizes(), floats));
    const int64_t a_lane = options.weights_a_lane();
    for (int64_t lane = 0; lane < shape.lanes(); ++lane) {
      const auto at = [&](int64_t n) {
        return grad_weights[static_cast<size_t>(lane * a_lane + n)].template mutable_data_ptr<T>();
      };
      kernel.gradients.push_back({at(0), at(1), options.bias ? at(2) : nullptr, options.bias ? at(3) : nullptr,
                                  options.proj_size > 0 ? at(a_lane - 1) : nullptr});
    }
  }

  kernel.bf16_weights = options.bf16_weights;
  kernel.bf16_activations = call.input.scalar_type() == at::kBFloat16;
  TorchPlatform platform;
  remember(cpu::backward(kernel, workers_for(shape), platform), call, saving, true);
  const auto out = call.input.scalar_type();
  if (!input_grad) grad_input[0] = empty({0}, floats);
  if (input_grad && shape.directions == 2) grad_input[0].add_(grad_input[1]);
  for (Tensor& g : grad_weights) g = g.to(out);
  return {grad_input[0].to(out), grad_h_0.to(out), grad_c_0.to(out), std::move(grad_weights)};
}

// ---- The operators --------------------------------------------------------------------------------------------------

}  // namespace

ForwardResult forward(const Tensor& input, const OptionalTensor& batch_sizes, const Tensor& h_0, const Tensor& c_0,
                      TensorList weights, const OptionalTensor& seed, bool bias, int64_t num_layers, bool bidirectional,
                      int64_t proj_size, double dropout, const std::string& saving, const std::string& backend,
                      bool bf16_weights) {
  const Backend kind = backend_of(backend, input.device());
  const Options options{bias,
                        num_layers,
                        bidirectional,
                        proj_size,
                        dropout,
                        saving_of(saving),
                        stores_bf16(bf16_weights, backend, kind, input)};
  const StackShape shape = shape_of(input, batch_sizes, h_0, c_0, weights, options);
  const Call call{input, batch_sizes.has_value(), h_0, c_0, weights, seed_of(seed, input, options), options, shape};
  Results results;
  if (auto decision = persistent_decision(kind, call)) {
    persistent::Counts counts;
    results = persistent::forward(call, std::move(decision), counts);
    remember(counts, call, saving, false);
  } else if (kind != Backend::cpu) {
    diagonal::Counts counts;
    results = diagonal::forward(call, counts);
    remember(counts, call, saving, false);
  } else {
    results =
        arithmetic_type(input) == at::kDouble ? forward_cpu<double>(call, saving) : forward_cpu<float>(call, saving);
  }
  return {results.output, results.h_n, results.c_n, results.reserve};
}

BackwardResult backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                        const OptionalTensor& grad_c_n, const Tensor& input, const OptionalTensor& batch_sizes,
                        const Tensor& h_0, const Tensor& c_0, TensorList weights, const OptionalTensor& seed,
                        const Tensor& output, const Tensor& reserve, bool bias, int64_t num_layers, bool bidirectional,
                        int64_t proj_size, double dropout, const std::string& saving, bool input_grad, bool weight_grad,
                        const std::string& backend, bool bf16_weights) {
  const Backend kind = backend_of(backend, input.device());
  const Options options{bias,
                        num_layers,
                        bidirectional,
                        proj_size,
                        dropout,
                        saving_of(saving),
                        stores_bf16(bf16_weights, backend, kind, input)};
  TORCH_CHECK_VALUE(options.saving != Saving::none,
                    "backward needs a forward with saving \"full\" or \"recompute\", got: ", saving);
  const StackShape shape = shape_of(input, batch_sizes, h_0, c_0, weights, options);
  const Call call{input, batch_sizes.has_value(), h_0, c_0, weights, seed_of(seed, input, options), options, shape};
  const auto type = arithmetic_type(input);
  const auto sizes = call.output_sizes();
  check_same(output, input, "output");
  check_shape(output, sizes, "output");
  TORCH_CHECK_VALUE(reserve.scalar_type() == type && reserve.device() == input.device(), "reserve should be ", type,
                    " on ", input.device(), ", got: ", reserve.scalar_type(), " on ", reserve.device());
  const int64_t kept = kind != Backend::cpu
                           ? driver::reserve_elements(shape, options.saving, static_cast<int64_t>(input.element_size()),
                                                      static_cast<int64_t>(reserve.element_size()))
                           : reserve_size(shape, options.saving, type != input.scalar_type()).total();
  check_shape(reserve, {kept}, "reserve");
  const IncomingGradients incoming{grad_output, grad_h_n, grad_c_n};
  if (grad_output) check_same(*grad_output, input, "grad_output"), check_shape(*grad_output, sizes, "grad_output");
  if (grad_h_n) check_same(*grad_h_n, input, "grad_h_n"), check_shape(*grad_h_n, h_0.sizes(), "grad_h_n");
  if (grad_c_n) check_same(*grad_c_n, input, "grad_c_n"), check_shape(*grad_c_n, c_0.sizes(), "grad_c_n");
  Gradients gradients;
  if (auto decision = persistent_decision(kind, call)) {
    persistent::Counts counts;
    gradients =
        persistent::backward(call, {output, reserve}, incoming, input_grad, weight_grad, std::move(decision), counts);
    remember(counts, call, saving, true);
  } else if (kind != Backend::cpu) {
    diagonal::Counts counts;
    gradients = diagonal::backward(call, {output, reserve}, incoming, input_grad, weight_grad, counts);
    remember(counts, call, saving, true);
  } else {
    gradients = type == at::kDouble
                    ? backward_cpu<double>(call, {output, reserve}, incoming, saving, input_grad, weight_grad)
                    : backward_cpu<float>(call, {output, reserve}, incoming, saving, input_grad, weight_grad);
  }
  return {gradients.input, gradients.h_0, gradients.c_0, std::move(gradients.weights)};
}

// ---- The Python module ----------------------------------------------------------------------------------------------

namespace {

namespace py = pybind11;

py::dict describe(const Schedule& schedule, int64_t directions) {
  py::list phases;
  for (int64_t p = 0; p < schedule.phases; ++p) {
    const Phase& phase = schedule.phase[p];
    phases.append(py::dict(py::arg("first_layer") = phase.first_layer, py::arg("last_layer") = phase.last_layer,
                           py::arg("layer_groups") = phase.layer_groups, py::arg("unit_slices") = phase.unit_slices));
  }
  std::string why = "one worker: more would cost more than they save";
  if (schedule.batch_slices > 1) {
    why = "the batch is shared out: the slices need nothing of each other";
  } else if (schedule.phase[0].layer_groups > 1) {
    why = directions == 2 ? "the two directions of a layer run side by side" : "layers run side by side, a chunk apart";
  } else if (schedule.phase[0].unit_slices > 1) {
    why = "the units of each layer are shared out";
  }
  return py::dict(py::arg("backend") = "cpu", py::arg("isa") = cpu::isa(), py::arg("threads") = schedule.workers(),
                  py::arg("batch_slices") = schedule.batch_slices, py::arg("chunk_steps") = schedule.chunk_steps,
                  py::arg("fill_steps") = schedule.fill_steps(directions), py::arg("phases") = phases,
                  py::arg("predicted_us") = schedule.predicted_us, py::arg("binds") = schedule.binds,
                  py::arg("why") = why);
}

py::dict describe(const diagonal::Counts& counts) {
  const Diagonals& schedule = counts.schedule;
  const std::string why = schedule.directions == 2
                              ? "the two directions of a layer run side by side, the layers in turn"
                          : schedule.depth == 1 ? "one layer: its steps in turn"
                                                : "all layers side by side, each a chunk behind the one below";
  return py::dict(py::arg("backend") = "diagonal", py::arg("chunk_steps") = schedule.chunk_steps,
                  py::arg("input_steps") = schedule.input_chunks * schedule.chunk_steps,
                  py::arg("diagonals") = schedule.diagonals(), py::arg("launches") = counts.launches,
                  py::arg("products") = counts.products, py::arg("why") = why,
                  py::arg("binds") = "two launches a diagonal");
}

const char* name_of(persistent::Product product, at::ScalarType type) {
  if (type != at::kFloat) return "tensor cores";
  return product == persistent::Product::tensor ? "tensor cores, as TF32" : "multiply-adds of float32";
}

// A pass of a plan, as what runs: which blocks each layer has, how h (or dh) goes from block to block, and when it is handed on.
py::dict describe_launches(const persistent::Pass& pass, const StackShape& shape, bool backward) {
  const persistent::Cut& cut = pass.cut;
  const int64_t last = pass.last_layer - 1, lanes = (pass.last_layer - pass.first_layer) * shape.directions;
  py::list layers;
  for (int64_t layer = pass.first_layer; layer <= last; ++layer) {  // backward begins at the top
    const int64_t before = (backward ? last - layer : layer - pass.first_layer) * shape.directions;
    layers.append(py::dict(py::arg("layer") = layer, py::arg("first_block") = before * cut.blocks,
                           py::arg("blocks") = shape.directions * cut.blocks));
  }
  py::dict described(
      py::arg("first_layer") = pass.first_layer, py::arg("last_layer") = pass.last_layer, py::arg("layers") = layers,
      py::arg("exchange") = cut.exchange == persistent::Exchange::cluster ? "cluster" : "l2",
      py::arg("blocks") = pass.copies * lanes * cut.blocks, py::arg("blocks_lane") = cut.blocks,
      py::arg("units_block") = cut.block_units(), py::arg("splits") = cut.splits, py::arg("pieces") = cut.pieces,
      py::arg("m_tiles") = cut.m_tiles, py::arg("tiles") = cut.tiles, py::arg("chunk_steps") = cut.chunk_steps,
      py::arg("inputs_in_shared") = cut.inputs_in_shared, py::arg("batch_groups") = pass.batch_groups,
      py::arg("copies") = pass.copies, py::arg("rounds") = pass.rounds);
  if (backward) {
    described["segment_steps"] = pass.segment_steps;
    described["products_beside"] = pass.products_beside;
  }
  return described;
}

py::dict describe_launches(const persistent::Decision& decision, const StackShape& shape, at::ScalarType type,
                           bool backward) {
  const persistent::Plan& plan = decision.plan(backward);
  py::list passes;
  for (const persistent::Pass& pass : plan.passes) passes.append(describe_launches(pass, shape, backward));
  return py::dict(py::arg("backend") = "persistent", py::arg("passes") = passes,
                  py::arg("launches") = persistent::launches(plan, shape),
                  py::arg("product") = name_of(decision.product, type), py::arg("predicted_us") = plan.predicted_us,
                  py::arg("step_us") = plan.step_us, py::arg("binds") = plan.binds,
                  py::arg("why") = decision.choice.reason);
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

persistent::Pass pass_of(const py::dict& d) {
  const auto number = [&](const char* name, int64_t otherwise) {
    return d.contains(name) ? d[name].cast<int64_t>() : otherwise;
  };
  const auto small = [&](const char* name, int otherwise) { return static_cast<int>(number(name, otherwise)); };
  persistent::Pass pass;
  pass.first_layer = number("first_layer", 0);
  pass.last_layer = number("last_layer", 1);
  pass.cut.product = number("exact", 0) ? persistent::Product::exact : persistent::Product::tensor;
  pass.cut.exchange = number("l2", 0) ? persistent::Exchange::l2 : persistent::Exchange::cluster;
  pass.cut.tiles = small("tiles", 1);
  pass.cut.pieces = small("pieces", 2);
  pass.cut.splits = small("splits", 1);
  pass.cut.m_tiles = small("m_tiles", 0);
  pass.cut.groups = small("groups", 1);
  pass.cut.blocks = small("blocks", 1);
  pass.cut.chunk_steps = small("chunk_steps", 1);
  pass.cut.inputs_in_shared = number("inputs_in_shared", 1) != 0;
  pass.batch_groups = number("batch_groups", 1);
  pass.copies = number("copies", pass.batch_groups);
  pass.rounds = (pass.batch_groups + pass.copies - 1) / std::max<int64_t>(pass.copies, 1);
  pass.segment_steps = number("segment_steps", std::numeric_limits<int>::max());
  pass.products_beside = number("products_beside", 0) != 0;
  return pass;
}

at::ScalarType dtype_named(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "float64") return at::kDouble;
  if (name == "bfloat16") return at::kBFloat16;
  TORCH_CHECK_VALUE(name == "float16", "dtype should be float32, float64, bfloat16 or float16, got: ", name);
  return at::kHalf;
}

// What the operators' backends `persistent` and `auto` do with such a call.
py::dict gpu_plan(int64_t input_size, int64_t hidden_size, int64_t proj_size, int64_t num_layers, bool bidirectional,
                  int64_t seq_len, int64_t batch_size, const std::string& dtype, const std::string& device,
                  const std::string& saving, double dropout) {
  const StackShape shape =
      padded_shape(input_size, hidden_size, proj_size, num_layers, bidirectional, seq_len, batch_size);
  const Options options{true, num_layers, bidirectional, proj_size, dropout, saving_of(saving), false};
  const at::ScalarType type = dtype_named(dtype);
  const auto decision = persistent::decide({shape, options, type, at::Device(device)});
  py::dict plan(py::arg("persistent") = decision->choice.persistent, py::arg("why_not") = decision->why_not,
                py::arg("reason") = decision->choice.reason, py::arg("persistent_us") = decision->choice.persistent_us,
                py::arg("diagonal_us") = decision->choice.diagonal_us);
  if (decision->why_not.empty()) {
    plan["forward"] = describe_launches(*decision, shape, type, false);
    if (options.saving != Saving::none) plan["backward"] = describe_launches(*decision, shape, type, true);
  }
  return plan;
}

// Whether the first weights are those of a module of such sizes. Others may have been put into it, and would fit each other:
// nn.LSTM refuses that by its own sizes.
bool of_sizes(TensorList weights, int64_t input_size, int64_t hidden_size) {
  return weights.size() > 1 && weights[0].dim() == 2 && weights[0].size(1) == input_size && weights[1].dim() == 2 &&
         weights[1].size(0) == 4 * hidden_size;
}

// (output, h_n, c_n), or None where `step` (step.h) declines or an argument is no tensor, or of a class of its own, which
// may override what torch's functions do.
py::object step_once(const py::handle& input, const py::handle& h_0, const py::handle& c_0, const py::list& weights,
                     int64_t input_size, int64_t hidden_size, bool bias, int64_t num_layers, int64_t proj_size,
                     bool bf16_weights, bool frozen) {
  thread_local std::vector<Tensor> tensors;  // keeps its memory, but no tensor
  const struct Emptied {
    ~Emptied() { tensors.clear(); }  // with the GIL
  } emptied;
  for (const py::handle& argument : {input, h_0, c_0}) {
    if (!THPVariable_CheckExact(argument.ptr())) return py::none();
    tensors.push_back(THPVariable_Unpack(argument.ptr()));
  }
  for (const py::handle weight : weights) {
    if (!THPVariable_CheckExact(weight.ptr())) return py::none();
    tensors.push_back(THPVariable_Unpack(weight.ptr()));
  }
  if (!of_sizes(TensorList(tensors).slice(3), input_size, hidden_size)) return py::none();
  const StepArguments arguments{tensors[0], tensors[1],   tensors[2], TensorList(tensors).slice(3), bias, num_layers,
                                proj_size,  bf16_weights, frozen};
  std::optional<StepResults> results;
  {
    const py::gil_scoped_release others_may_run;
    TorchPlatform platform;
    results = step(arguments, free_threads(), platform);
  }
  if (!results) return py::none();
  if (!last_run) last_run.emplace();
  Run& run = *last_run;  // keeps its memory: a step allocates nothing but its results
  run.how = results->schedule, run.device = "cpu", run.backward = false, run.saving = "none";
  run.shape = *results->shape, run.type = tensors[0].scalar_type();
  return py::make_tuple(std::move(results->output), std::move(results->h_n), std::move(results->c_n));
}

// A call of the module by the short way of eager.h; None where it declines. `h_0` and `c_0` None: zeros.
py::object call(const py::handle& input, const py::handle& batch_sizes, const py::handle& h_0, const py::handle& c_0,
                const py::list& weights, const py::handle& seed, int64_t input_size, int64_t hidden_size, bool bias,
                int64_t num_layers, bool bidirectional, int64_t proj_size, double dropout, bool recompute,
                std::string backend, bool bf16_weights, bool frozen) {
  const EagerOptions options{bias,      num_layers,         bidirectional, proj_size, dropout,
                             recompute, std::move(backend), bf16_weights,  frozen};
  std::vector<Tensor> tensors;
  tensors.reserve(weights.size());
  for (const py::handle weight : weights) {
    if (!THPVariable_CheckExact(weight.ptr())) return py::none();
    tensors.push_back(THPVariable_Unpack(weight.ptr()));
  }
  const auto ordinary = [](const py::handle& tensor) {
    return tensor.is_none() || THPVariable_CheckExact(tensor.ptr());
  };
  const auto optional = [](const py::handle& tensor) {
    return tensor.is_none() ? OptionalTensor() : OptionalTensor(THPVariable_Unpack(tensor.ptr()));
  };
  if (!of_sizes(tensors, input_size, hidden_size)) return py::none();
  if (!THPVariable_CheckExact(input.ptr()) || !ordinary(batch_sizes) || !ordinary(h_0) || !ordinary(c_0) ||
      !ordinary(seed)) {
    return py::none();
  }
  const EagerCall arguments{THPVariable_Unpack(input.ptr()),
                            optional(batch_sizes),
                            optional(h_0),
                            optional(c_0),
                            tensors,
                            optional(seed),
                            options};
  std::optional<EagerResults> results;
  {
    const py::gil_scoped_release others_may_run;
    results = call_eagerly(arguments);
  }
  if (!results) return py::none();
  return py::make_tuple(std::move(results->output), std::move(results->h_n), std::move(results->c_n));
}

// Has a backward pass that no kernel can do call `formula`, see ops.py.
void set_python_formula(py::object formula) {
  const auto* kept = new py::object(std::move(formula));  // never destroyed: the interpreter may end first
  set_formula([kept](const std::array<Tensor, 3>& flowing, const EagerSaved& saved, const std::vector<bool>& needs) {
    const py::gil_scoped_acquire gil;
    const EagerOptions& o = saved.options;
    const py::tuple found = (*kept)(
        py::make_tuple(flowing[0], flowing[1], flowing[2]),
        py::make_tuple(saved.input, saved.batch_sizes, saved.h_0, saved.c_0, saved.weights, saved.seed), saved.output,
        saved.reserve, needs, py::make_tuple(o.bias, o.num_layers, o.bidirectional, o.proj_size, o.dropout),
        o.recompute ? "recompute" : "full", o.backend, o.bf16_weights);
    std::vector<Tensor> gradients;
    const auto add = [&](const py::handle& one) { gradients.push_back(one.is_none() ? Tensor() : one.cast<Tensor>()); };
    for (size_t n = 0; n < 3; ++n) add(found[n]);
    for (const py::handle one : found[3].cast<py::list>()) add(one);
    return gradients;
  });
}

py::dict build_info() {
  py::list isas;
  isas.append("default");
  if (cpu::kernels_avx2<float>()) isas.append("avx2");
  if (cpu::kernels_avx512<float>()) isas.append("avx512");
  if (cpu::kernels_avx512_bf16<float>()) isas.append("avx512_bf16");
  py::object cuda = py::none();
  py::list archs;
#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
  cuda = py::str(STACKED_LSTM_EXT_CUDA_VERSION);
  for (const std::string& arch : split_archs(STACKED_LSTM_EXT_CUDA_ARCHS)) archs.append(arch);
#endif
#if defined(__clang__)
  const std::string compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
  const std::string compiler = "gcc " __VERSION__;
#else
  const std::string compiler = "unknown";
#endif
  return py::dict(py::arg("version") = STACKED_LSTM_EXT_VERSION, py::arg("torch") = TORCH_VERSION,
                  py::arg("compiler") = compiler, py::arg("cpp_standard") = static_cast<int64_t>(__cplusplus),
                  py::arg("isas") = isas, py::arg("cuda") = cuda, py::arg("cuda_archs") = archs);
}

}  // namespace
}  // namespace stacked_lstm

TORCH_LIBRARY(stacked_lstm_ext, m) {
  m.def(
      "forward(Tensor input, Tensor? batch_sizes, Tensor h_0, Tensor c_0, Tensor[] weights, Tensor? seed, bool bias, "
      "int num_layers, bool bidirectional, int proj_size, float dropout, str saving, str backend, "
      "bool bf16_weights=False) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor reserve)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor? batch_sizes, Tensor "
      "h_0, "
      "Tensor c_0, Tensor[] weights, Tensor? seed, Tensor output, Tensor reserve, bool bias, int num_layers, "
      "bool bidirectional, int proj_size, float dropout, str saving, bool input_grad, bool weight_grad, str backend, "
      "bool bf16_weights=False) -> (Tensor grad_input, Tensor grad_h_0, Tensor grad_c_0, Tensor[] grad_weights)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(stacked_lstm_ext, CPU, m) {
  m.impl("forward", &stacked_lstm::forward);
  m.impl("backward", &stacked_lstm::backward);
}

#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
TORCH_LIBRARY_IMPL(stacked_lstm_ext, CUDA, m) {
  m.impl("forward", &stacked_lstm::forward);
  m.impl("backward", &stacked_lstm::backward);
}
#endif

PYBIND11_MODULE(_C, m) {
  using namespace stacked_lstm;
  m.def("build_info", &build_info);
  m.def("isa", &cpu::isa);
  m.def("cpu_plan", [](int64_t input_size, int64_t hidden_size, int64_t proj_size, int64_t num_layers,
                       bool bidirectional, int64_t seq_len, int64_t batch_size, int64_t threads, bool double_precision,
                       bool backward, bool bf16_weights) {
    const StackShape shape =
        padded_shape(input_size, hidden_size, proj_size, num_layers, bidirectional, seq_len, batch_size);
#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
    threads = 1;
#endif
    const cpu::Storage storage = bf16_weights ? cpu::Storage::bf16 : cpu::Storage::same;
    return describe(cpu::plan(shape, threads, double_precision ? 8 : 4, storage, backward), shape.directions);
  });
  m.def("share_batch", [](const std::vector<int64_t>& batch_sizes, int64_t slices) {
    StackShape shape;
    shape.steps = static_cast<int64_t>(batch_sizes.size());
    shape.batch = batch_sizes.at(0);
    shape.packed_rows.assign(1, 0);
    for (const int64_t size : batch_sizes) shape.packed_rows.push_back(shape.packed_rows.back() + size);
    return share_batch(shape, slices).first;
  });
  m.def("force_cpu_schedule", [](const py::object& wanted) {
    forced_schedule.reset();
    if (wanted.is_none()) return;
    Schedule schedule;
    schedule.batch_slices = wanted["batch_slices"].cast<int64_t>();
    schedule.chunk_steps = wanted["chunk_steps"].cast<int64_t>();
    const auto phases = wanted["phases"].cast<std::vector<py::dict>>();
    TORCH_CHECK_VALUE(phases.size() == 1 || phases.size() == 2, "phases should be 1 or 2, got: ", phases.size());
    schedule.phases = static_cast<int64_t>(phases.size());
    for (size_t p = 0; p < phases.size(); ++p) {
      const auto field = [&](const char* name) { return phases[p][name].cast<int64_t>(); };
      schedule.phase[p] = {field("first_layer"), field("last_layer"), field("layer_groups"), field("unit_slices")};
    }
    forced_schedule = schedule;
  });
  // The whole schedule, for tests: every worker's chunks in its order, each with what it must wait for. Entries are
  // (layer, direction, batch_slice, unit_slice, chunk, ((layer, direction, chunks), …)).
  m.def("cpu_schedule",
        [](int64_t input_size, int64_t hidden_size, int64_t proj_size, int64_t num_layers, bool bidirectional,
           int64_t seq_len, int64_t batch_size, int64_t threads, bool double_precision, bool backward) {
          const StackShape shape =
              padded_shape(input_size, hidden_size, proj_size, num_layers, bidirectional, seq_len, batch_size);
          const Schedule schedule = cpu::plan(shape, threads, double_precision ? 8 : 4, cpu::Storage::same, backward);
          const int64_t directions = shape.directions, lanes = shape.lanes();
          py::list workers;
          for (int64_t worker = 0; worker < schedule.workers(); ++worker) {
            py::list tasks;
            schedule.for_each_position(directions, worker, [&](int64_t position, const Place& place) {
              const int64_t lane = lane_at(position, lanes, backward);
              for (int64_t chunk = 0; chunk < schedule.chunks(seq_len); ++chunk) {
                const Needs n = needs(schedule, seq_len, directions, position, chunk);
                py::list waits;
                for (int64_t p = n.first_position; p < n.first_position + n.positions; ++p) {
                  const int64_t other = lane_at(p, lanes, backward);
                  waits.append(py::make_tuple(other / directions, other % directions, n.chunks));
                }
                tasks.append(py::make_tuple(lane / directions, lane % directions, place.batch_slice, place.slice, chunk,
                                            py::tuple(waits)));
              }
            });
            workers.append(tasks);
          }
          return workers;
        });
  m.def("last_run", []() -> py::object {
    if (!last_run) return py::none();
    const Run& last = *last_run;
    py::dict run;
    if (const auto* schedule = std::get_if<Schedule>(&last.how)) run = describe(*schedule, last.shape.directions);
    if (const auto* counts = std::get_if<diagonal::Counts>(&last.how)) run = describe(*counts);
    if (const auto* counts = std::get_if<persistent::Counts>(&last.how)) {
      run = describe_launches(*counts->decision, last.shape, last.type, last.backward);
      run["launches"] = counts->launches;
      run["products"] = counts->products;
    }
    run["device"] = last.device;
    run["pass"] = last.backward ? "backward" : "forward";
    run["saving"] = last.saving;
    run["layers"] = last.shape.depth();
    run["seq_len"] = last.shape.steps;
    run["batch_size"] = last.shape.batch;
    return run;
  });
  m.def("cpu_workspace_bytes", &cpu::workspace_bytes);
  m.def("step", &step_once);
  m.def("call", &call);
  m.def("set_formula", &set_python_formula);
  m.def("clear_last_run", [] { last_run.reset(); });
  m.def("drop_packed", [](uintptr_t first_weight) { drop_packed(reinterpret_cast<const void*>(first_weight)); });
  m.def("packed_counts", [] {
    const PackedCounts counts = packed_counts();
    return py::dict(py::arg("stacks") = counts.stacks, py::arg("bytes") = counts.bytes, py::arg("noted") = counts.noted,
                    py::arg("hits") = counts.hits);
  });
  m.def("diagonal_plan", [](int64_t input_size, int64_t hidden_size, int64_t proj_size, int64_t num_layers,
                            bool bidirectional, int64_t seq_len, int64_t batch_size, bool double_precision,
                            bool backward, const std::string& saving, double dropout) {
    const StackShape shape =
        padded_shape(input_size, hidden_size, proj_size, num_layers, bidirectional, seq_len, batch_size);
    const Options options{true, num_layers, bidirectional, proj_size, dropout, saving_of(saving), false};
    return describe(diagonal::predict(shape, options, double_precision ? 8 : 4, backward, true, true));
  });
  // What the persistent kernels would do on a GPU that need not be here, and what it is predicted to cost.
  persistent::bind_persistent_plan(m);
  m.def("force_diagonal_chunk", [](std::optional<int64_t> steps) {
    TORCH_CHECK_VALUE(!steps || *steps > 0, "a chunk should have at least one step, got: ", steps.value_or(0));
    diagonal::force_chunk(steps);
  });
  // Why a GPU of this compute capability cannot run kernels built for `archs` (those of this build when not given).
  m.def(
      "cuda_obstacle",
      [](int major, int minor, const std::optional<std::string>& archs) {
        if (archs) return cuda_obstacle(*archs, major, minor);
#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
        return cuda_obstacle(STACKED_LSTM_EXT_CUDA_ARCHS, major, minor);
#else
        return std::string("this build has no CUDA kernels");
#endif
      },
      py::arg("major"), py::arg("minor"), py::arg("archs") = py::none());
  // For tests: the driver of the diagonal schedule runs these kernels on the CPU (the address of a gates::Table; 0: its
  // own), so that the CUDA kernels, emulated, can be seen at work.
  m.def("_use_gate_kernels",
        [](uintptr_t table) { driver::use_host_gate_kernels(reinterpret_cast<const gates::Table*>(table)); });
  // For tests: the persistent kernels' driver runs these on the CPU (the address of a persistent::Table; 0: none). `watchdog`:
  // they tell of a wait that took too long.
  m.def(
      "_use_persistent_kernels",
      [](uintptr_t table, bool watchdog) {
        persistent::use_host_kernels(reinterpret_cast<const persistent::Table*>(table), watchdog);
      },
      py::arg("table"), py::arg("watchdog") = false);
  m.def("gpu_plan", &gpu_plan);
  m.def("force_persistent_device", [](const py::object& device) {
    persistent::force_device(device.is_none() ? std::nullopt : std::optional(persistent::device_of(device)));
  });
  m.def("force_persistent_passes", [](bool backward, const std::optional<std::vector<py::dict>>& wanted) {
    if (!wanted) return persistent::force_passes(backward, std::nullopt);
    std::vector<persistent::Pass> passes;
    for (const py::dict& pass : *wanted) passes.push_back(pass_of(pass));
    persistent::force_passes(backward, std::move(passes));
  });
  // The contents of this memory, as a number: fingerprint.h.
  m.def("fingerprint", [](const std::vector<std::pair<uintptr_t, int64_t>>& pieces, int64_t part, int64_t parts) {
    std::vector<cpu::Bytes> memory;
    for (const auto& [data, bytes] : pieces) memory.push_back({reinterpret_cast<const void*>(data), bytes});
    const cpu::Fingerprint found = cpu::fingerprint(memory, part, parts);
    return std::pair(found.low, found.high);
  });
  m.def("cpu_maths", [](uintptr_t x, int64_t n, uintptr_t sigmoid, uintptr_t tanh, bool double_precision) {
    if (double_precision) {
      cpu::kernels<double>().maths(reinterpret_cast<const double*>(x), n, reinterpret_cast<double*>(sigmoid),
                                   reinterpret_cast<double*>(tanh));
    } else {
      cpu::kernels<float>().maths(reinterpret_cast<const float*>(x), n, reinterpret_cast<float*>(sigmoid),
                                  reinterpret_cast<float*>(tanh));
    }
  });
}
