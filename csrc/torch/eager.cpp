// csrc/torch/eager.cpp: see eager.h.
#include "eager.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "operators.h"
#include "packed_cache.h"
#include "plain.h"

namespace stacked_lstm {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Never destroyed: it may hold objects of a Python interpreter that ends first.
Formula& formula() {
  static Formula& kept = *new Formula;
  return kept;
}

// The options as a value that compiled autograd can use as a key.
c10::IValue to_value(const EagerOptions& o) {
  return c10::ivalue::Tuple::create(
      {o.bias, o.num_layers, o.bidirectional, o.proj_size, o.dropout, o.recompute, o.backend, o.bf16_weights});
}
EagerOptions from_value(const c10::IValue& value) {
  const std::vector<c10::IValue> e = value.toTupleRef().elements().vec();
  return {e[0].toBool(), e[1].toInt(),       e[2].toBool(), e[3].toInt(), e[4].toDouble(),
          e[5].toBool(), e[6].toStringRef(), e[7].toBool(), false};
}
constexpr const char* kOptions = "options";

// While an object lives, operators run below autograd and autocast. The caller has already cast for autocast.
struct Below {
  at::AutoDispatchBelowADInplaceOrView autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

Tensor defined_or_empty(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }
OptionalTensor optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

const char* saving_name(const EagerOptions& o) { return o.recompute ? "recompute" : "full"; }

struct StackedLSTMBackward : torch::autograd::Function<StackedLSTMBackward> {
  // Tensors that can have gradients are separate arguments; the others come with `call`.
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& h_0, const Tensor& c_0,
                               at::TensorList weights, const EagerCall* call) {
    const EagerOptions& o = call->options;
    const Below below;
    auto [output, h_n, c_n, reserve] =
        stacked_lstm::forward(input, call->batch_sizes, h_0, c_0, weights, call->seed, o.bias, o.num_layers,
                              o.bidirectional, o.proj_size, o.dropout, saving_name(o), o.backend, o.bf16_weights);
    variable_list saved{
        input, defined_or_empty(call->batch_sizes), h_0, c_0, defined_or_empty(call->seed), output, std::move(reserve)};
    saved.insert(saved.end(), weights.begin(), weights.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data[kOptions] = to_value(o);
    ctx->set_materialize_grads(false);
    return {std::move(output), std::move(h_n), std::move(c_n)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& flowing) {
    const variable_list all = ctx->get_saved_variables();
    const EagerOptions o = from_value(ctx->saved_data.at(kOptions));
    const EagerSaved saved{
        all[0],           optional(all[1]), all[2], all[3], variable_list(all.begin() + 7, all.end()),
        optional(all[4]), all[5],           all[6], o};
    variable_list gradients(3 + saved.weights.size() + 1);  // the last one belongs to the argument `call`
    if (std::none_of(flowing.begin(), flowing.end(), [](const Tensor& g) { return g.defined(); })) return gradients;
    std::vector<bool> needs;
    for (size_t n = 0; n < 3 + saved.weights.size(); ++n) needs.push_back(ctx->needs_input_grad(n));

    const bool plain =
        std::all_of(flowing.begin(), flowing.end(), [](const Tensor& g) { return !g.defined() || is_plain(g); });
    if (!plain || c10::GradMode::is_enabled() || somebody_watches()) {
      variable_list found = formula()({flowing[0], flowing[1], flowing[2]}, saved, needs);
      std::move(found.begin(), found.end(), gradients.begin());
      return gradients;
    }
    const Below below;
    const bool any_weight = std::find(needs.begin() + 3, needs.end(), true) != needs.end();
    auto [grad_input, grad_h_0, grad_c_0, grad_weights] = stacked_lstm::backward(
        optional(flowing[0]), optional(flowing[1]), optional(flowing[2]), saved.input, saved.batch_sizes, saved.h_0,
        saved.c_0, saved.weights, saved.seed, saved.output, saved.reserve, o.bias, o.num_layers, o.bidirectional,
        o.proj_size, o.dropout, saving_name(o), needs[0], any_weight, o.backend, o.bf16_weights);
    if (needs[0]) gradients[0] = std::move(grad_input);
    if (needs[1]) gradients[1] = std::move(grad_h_0);
    if (needs[2]) gradients[2] = std::move(grad_c_0);
    for (size_t n = 0; n < grad_weights.size(); ++n) {
      if (needs[3 + n]) gradients[3 + n] = std::move(grad_weights[n]);
    }
    return gradients;
  }
};

bool fits(const EagerCall& call) {
  const EagerOptions& o = call.options;
  const Tensor& input = call.input;
  if (input.dim() != (call.batch_sizes ? 2 : 3) || input.size(0) == 0) return false;
  if (call.h_0.has_value() != call.c_0.has_value()) return false;
  const int64_t directions = o.bidirectional ? 2 : 1;
  if (call.weights.size() < 2 || call.weights[1].dim() != 2 || call.weights[1].size(0) % 4 != 0) return false;
  const int64_t hidden = call.weights[1].size(0) / 4, output = o.proj_size > 0 ? o.proj_size : hidden;
  if (!weights_fit(call.weights, o.bias, o.num_layers, directions, input.size(-1), hidden, o.proj_size)) return false;
  if (!call.h_0) return !call.batch_sizes;
  const int64_t batch = call.batch_sizes ? call.h_0->dim() == 3 ? call.h_0->size(1) : -1 : input.size(1);
  const auto is_state = [&](const Tensor& state, int64_t width) {
    return state.dim() == 3 && state.size(0) == o.num_layers * directions && state.size(1) == batch &&
           state.size(2) == width;
  };
  return is_state(*call.h_0, output) && is_state(*call.c_0, hidden);
}

Tensor zeros(int64_t lanes, int64_t batch, int64_t width, const Tensor& like) {
  Tensor state = at::detail::empty_cpu({lanes, batch, width}, like.scalar_type());
  std::memset(state.mutable_data_ptr(), 0, state.nbytes());
  return state;
}

}  // namespace

std::optional<EagerResults> call_eagerly(const EagerCall& call) {
  const EagerOptions& o = call.options;
  const Tensor& input = call.input;
  const auto type = input.scalar_type();
  const at::Device device = input.device();
  const auto alike = [&](const Tensor& tensor) {
    return is_plain(tensor) && tensor.scalar_type() == type && tensor.device() == device;
  };
  if (!alike(input) || somebody_watches()) return {};
  if (type != at::kFloat && type != at::kDouble && type != at::kBFloat16 && type != at::kHalf) return {};
  if ((call.h_0 && !alike(*call.h_0)) || (call.c_0 && !alike(*call.c_0))) return {};
  if (!std::all_of(call.weights.begin(), call.weights.end(), alike) || !fits(call)) return {};
  if (o.bf16_weights && (type != at::kFloat || o.backend != "cpu")) return {};
  if (o.backend == "cpu" && !device.is_cpu()) return {};

  RECORD_FUNCTION("stacked_lstm_ext::forward", {});  // for the profiler: this call bypasses the dispatcher
  Tensor h_0, c_0;
  if (call.h_0) {
    h_0 = *call.h_0, c_0 = *call.c_0;
  } else {
    if (!device.is_cpu()) return {};
    const int64_t lanes = o.num_layers * (o.bidirectional ? 2 : 1), hidden = call.weights[1].size(0) / 4;
    h_0 = zeros(lanes, input.size(1), call.weights[1].size(1), input), c_0 = zeros(lanes, input.size(1), hidden, input);
  }
  const auto requires_grad = [](const Tensor& tensor) { return tensor.requires_grad(); };
  if (c10::GradMode::is_enabled() && (input.requires_grad() || h_0.requires_grad() || c_0.requires_grad() ||
                                      std::any_of(call.weights.begin(), call.weights.end(), requires_grad))) {
    variable_list results = StackedLSTMBackward::apply(input, h_0, c_0, call.weights, &call);
    return EagerResults{std::move(results[0]), std::move(results[1]), std::move(results[2])};
  }
  const Below below;
  const Trust trust(o.frozen);
  auto [output, h_n, c_n, reserve] =
      forward(input, call.batch_sizes, h_0, c_0, call.weights, call.seed, o.bias, o.num_layers, o.bidirectional,
              o.proj_size, o.dropout, "none", o.backend, o.bf16_weights);
  return EagerResults{std::move(output), std::move(h_n), std::move(c_n)};
}

void set_formula(Formula f) { formula() = std::move(f); }

}  // namespace stacked_lstm
