// csrc/torch/cpu_call.cpp: see cpu_call.h.
#include "cpu_call.h"

#include <ATen/Config.h>
#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <memory>
#include <utility>
#include <vector>

#include "../cpu/workspace.h"
#include "last_run.h"
#include "packed_cache.h"
#include "prepare.h"

namespace stacked_lstm {

using at::Tensor;
using at::TensorList;

void TorchPlatform::parallel(int64_t workers, const std::function<void(int64_t)>& member) {
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) { member(end - begin); });
}

bool TorchPlatform::at_the_same_time() const {
#if AT_PARALLEL_OPENMP
  return true;  // all threads of a parallel region run from its start
#else
  return false;  // threads of a pool may be busy
#endif
}

int64_t free_threads() {
#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
  return 1;  // built without OpenMP, at::parallel_for runs on one thread
#else
  return at::in_parallel_region() ? 1 : at::get_num_threads();
#endif
}

namespace {

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

// Tensors in the dtype of the arithmetic, contiguous. Copies live as long as this object: a call points into them.
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

  // Rows are not copied if each row is contiguous and has the right dtype. If all rows are one row, expanded (as in the
  // gradient of a sum), only that row is copied.
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

template <typename T>
Results run_forward(const Call& call, const std::string& saving) {
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
Gradients run_backward(const Call& call, const Kept& kept, const IncomingGradients& incoming, const std::string& saving,
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

}  // namespace

void force_cpu_schedule(std::optional<Schedule> schedule) { forced_schedule = std::move(schedule); }

Results forward_cpu(const Call& call, const std::string& saving) {
  return arithmetic_type(call.input) == at::kDouble ? run_forward<double>(call, saving)
                                                    : run_forward<float>(call, saving);
}

Gradients backward_cpu(const Call& call, const Kept& kept, const IncomingGradients& incoming, const std::string& saving,
                       bool input_grad, bool weight_grad) {
  return arithmetic_type(call.input) == at::kDouble
             ? run_backward<double>(call, kept, incoming, saving, input_grad, weight_grad)
             : run_backward<float>(call, kept, incoming, saving, input_grad, weight_grad);
}

}  // namespace stacked_lstm
