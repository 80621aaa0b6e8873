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
#include "../stack/weights.h"
#include "last_run.h"
#include "lengths.h"
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

Links links_of(const Call& call) {
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

// The shape as the kernels have it: see "Lengths" in cpu/call.h.
StackShape packed_inside(const StackShape& shape) {
  StackShape inside = shape;
  if (!shape.has_lengths()) return inside;
  inside.packed_rows.assign(1, 0);
  for (const int64_t count : shape.counts) inside.packed_rows.push_back(inside.packed_rows.back() + count);
  inside.counts.clear();
  return inside;
}

ResetLists resets_of(const Call& call) {
  if (!call.resets) return {};
  return {reinterpret_cast<const uint8_t*>(call.resets->const_data_ptr<bool>()), call.shape};
}

// A struct of pointers for every lane, from a pointer for every place in the list of weights. Where a layer has no such
// weight, the pointer is null.
template <typename Lane, typename Pointer, typename PointerAt>
std::vector<Lane> by_lane(const Call& call, PointerAt&& pointer_at) {
  std::vector<ByWeight<Pointer>> found(static_cast<size_t>(call.shape.lanes()));
  all_weights(
      call.shape.lanes(), call.options.bias,
      [&](int64_t lane) -> const LayerShape& { return call.shape.of_lane(lane); },
      [&](int64_t lane, Weight weight, int64_t place) {
        found[static_cast<size_t>(lane)][weight] = pointer_at(place);
        return true;
      });
  std::vector<Lane> lanes;
  for (const ByWeight<Pointer>& w : found) {
    lanes.push_back({w[Weight::ih], w[Weight::hh], w[Weight::bias_ih], w[Weight::bias_hh], w[Weight::hr]});
  }
  return lanes;
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

  std::vector<LaneWeights<T>> weights(const Call& call) {
    return by_lane<LaneWeights<T>, const T*>(call, [&](int64_t place) { return take(call.weights[place]); });
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

// Copies to the reserve what it keeps of h, though the caller's output has it: that will be rounded. See stack/reserve.h.
void keep_output(const StackShape& shape, const Keeping& keeping, const Tensor& output, const Tensor& reserve) {
  const KeptRows kept = kept_rows(shape, keeping);
  const ReserveLayout layout(shape, kept);
  const Tensor all = output.view({shape.all_rows(), shape.output_width()});
  const Tensor rows = shape.has_lengths() ? all.index_select(0, existing_rows(shape)) : all;
  for (int64_t k = 0; k < shape.depth(); ++k) {
    const bool top = k + 1 == shape.depth();
    if (shape.link != LinkKind::skip && (!top || adds_input(shape, k))) continue;
    const int64_t width = columns_from_below(shape, k + 1), first = layout.size().cells() + layout.h(k);
    reserve.narrow(0, first, shape.rows() * width)
        .view({shape.rows(), width})
        .copy_(rows.narrow(1, output_column(shape, k), width));
  }
}

template <typename T>
Results run_forward(const Call& call) {
  const auto type = arithmetic_type(call.input);
  const auto floats = call.input.options().dtype(type);
  const bool keep_top = type != call.input.scalar_type();
  const StackShape& shape = call.shape;
  Tensor output = empty(call.output_sizes(), floats);
  const Tensor h_n = empty(call.h_0.sizes(), floats), c_n = empty(call.c_0.sizes(), floats);
  const Keeping keeping{call.saving, keep_top, call.states};
  const Tensor reserve = empty_reserve(reserve_elements(shape, keeping), floats);

  Operands<T> operands(type);
  ForwardCall<T> kernel;
  kernel.shape = packed_inside(shape);
  kernel.resets = resets_of(call);
  kernel.input = operands.rows(call.input, call.packed);
  const cpu::Storage storage = call.stores_bf16 ? cpu::Storage::bf16 : cpu::Storage::same;
  const bool may_keep = call.saving == Saving::none;  // training changes the weights at every step
  std::shared_ptr<cpu::PackedStack<T>> packed;
  if (may_keep) packed = find_packed<T>(call.weights, shape, storage);
  kernel.h_0 = operands.take(call.h_0);
  kernel.c_0 = operands.take(call.c_0);
  kernel.links = links_of(call);
  kernel.keeping = keeping;
  kernel.output = output.mutable_data_ptr<T>();
  kernel.h_n = h_n.mutable_data_ptr<T>();
  kernel.c_n = c_n.mutable_data_ptr<T>();
  kernel.reserve = reserve.mutable_data_ptr<T>();
  kernel.bf16_weights = call.stores_bf16;
  kernel.bf16_activations = call.input.scalar_type() == at::kBFloat16;
  const cpu::Workers workers = workers_for(kernel.shape);
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
    kernel.weights = operands.weights(call);
    done = cpu::forward(kernel, workers, platform, packed.get());
    if (packed) keep_packed(call.weights, shape, packed);
  }
  remember(*done, call, false);
  if (keep_top && keeping.anything()) keep_output(kernel.shape, keeping, output, reserve);
  clear_padding(output, shape);
  const auto out = call.input.scalar_type();
  return {output.to(out), h_n.to(out), c_n.to(out), reserve};
}

// The gradient of each layer's h before its link: the caller's, and what comes through the output.
std::vector<OptionalTensor> h_gradients(const StackShape& shape, const IncomingGradients& incoming) {
  std::vector<OptionalTensor> gradients = incoming.h;
  if (!incoming.output) return gradients;
  gradients.resize(static_cast<size_t>(shape.depth()));
  for (int64_t k = shape.link == LinkKind::skip ? 0 : shape.depth() - 1; k < shape.depth(); ++k) {
    OptionalTensor& h = gradients[static_cast<size_t>(k)];
    const Tensor part = incoming.output->narrow(-1, output_column(shape, k), columns_from_below(shape, k + 1));
    h = h ? h->add(part) : part;
  }
  return gradients;
}

template <typename T>
Gradients run_backward(const Call& call, const Kept& kept, const IncomingGradients& incoming, bool input_grad,
                       bool weight_grad) {
  const auto type = arithmetic_type(call.input);
  const auto floats = call.input.options().dtype(type);
  const StackShape& shape = call.shape;
  Operands<T> operands(type);
  BackwardCall<T> kernel;
  kernel.shape = packed_inside(shape);
  kernel.resets = resets_of(call);
  kernel.input = operands.rows(call.input, call.packed);
  kernel.weights = operands.weights(call);
  kernel.h_0 = operands.take(call.h_0);
  kernel.c_0 = operands.take(call.c_0);
  kernel.links = links_of(call);
  kernel.keeping = {call.saving, type != call.input.scalar_type(), call.states};
  kernel.output = kernel.keeping.keep_top ? nullptr : operands.take(kept.output);
  kernel.reserve = operands.take(kept.reserve);
  const auto rows_of_layers = [&](const std::vector<OptionalTensor>& gradients) {
    std::vector<Input<T>> rows;
    for (const OptionalTensor& gradient : gradients) {
      rows.push_back(gradient ? operands.rows(*gradient, call.packed) : Input<T>{});
    }
    return rows;
  };
  kernel.grad_h = rows_of_layers(h_gradients(shape, incoming));
  kernel.grad_c = rows_of_layers(incoming.c);
  if (incoming.output && shape.link == LinkKind::residual) {
    kernel.grad_output = operands.rows(*incoming.output, call.packed);
  }
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
    kernel.gradients = by_lane<LaneGradients<T>, T*>(
        call, [&](int64_t place) { return grad_weights[static_cast<size_t>(place)].template mutable_data_ptr<T>(); });
  }

  kernel.bf16_weights = call.stores_bf16;
  kernel.bf16_activations = call.input.scalar_type() == at::kBFloat16;
  TorchPlatform platform;
  remember(cpu::backward(kernel, workers_for(kernel.shape), platform), call, true);
  const auto out = call.input.scalar_type();
  if (!input_grad) grad_input[0] = empty({0}, floats);
  if (input_grad && shape.has_lengths()) clear_padding(grad_input[0], shape);
  if (input_grad && shape.directions == 2) {
    if (shape.has_lengths()) clear_padding(grad_input[1], shape);
    grad_input[0].add_(grad_input[1]);
  }
  for (Tensor& g : grad_weights) g = g.to(out);
  return {grad_input[0].to(out), grad_h_0.to(out), grad_c_0.to(out), std::move(grad_weights)};
}

}  // namespace

void force_cpu_schedule(std::optional<Schedule> schedule) { forced_schedule = std::move(schedule); }

Results forward_cpu(const Call& call) {
  return arithmetic_type(call.input) == at::kDouble ? run_forward<double>(call) : run_forward<float>(call);
}

Gradients backward_cpu(const Call& call, const Kept& kept, const IncomingGradients& incoming, bool input_grad,
                       bool weight_grad) {
  return arithmetic_type(call.input) == at::kDouble
             ? run_backward<double>(call, kept, incoming, input_grad, weight_grad)
             : run_backward<float>(call, kept, incoming, input_grad, weight_grad);
}

}  // namespace stacked_lstm
