// csrc/torch/eager.cpp: see eager.h.
#include "eager.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "operators.h"
#include "packed_cache.h"
#include "plain.h"
#include "prepare.h"

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

template <typename T>
c10::IValue value_of(const T& option) {
  return option;
}
// One number, or a list.
template <typename T>
c10::IValue value_of(const PerLayer<T>& option) {
  return option.each.empty() ? c10::IValue(option.every) : c10::IValue(option.each);
}
c10::IValue value_of(LinkKind option) { return static_cast<int64_t>(option); }
template <typename T>
void take(const c10::IValue& value, T& option) {
  option = value.to<T>();
}
template <typename T>
void take(const c10::IValue& value, PerLayer<T>& option) {
  option = value.isList() ? PerLayer<T>(value.to<std::vector<T>>()) : PerLayer<T>(value.to<T>());
}

void take(const c10::IValue& value, LinkKind& option) { option = static_cast<LinkKind>(value.toInt()); }

// The options as a value that compiled autograd can use as a key: the fields in their order, then the backend.
c10::IValue to_value(const StackOptions& options, const std::string& backend) {
  std::vector<c10::IValue> elements;
  for_each_option([&](const char*, auto field) { elements.push_back(value_of(options.*field)); });
  elements.emplace_back(backend);
  return c10::ivalue::Tuple::create(std::move(elements));
}
std::pair<StackOptions, std::string> from_value(const c10::IValue& value) {
  const std::vector<c10::IValue> elements = value.toTupleRef().elements().vec();
  StackOptions options;
  size_t n = 0;
  for_each_option([&](const char*, auto field) { take(elements[n++], options.*field); });
  return {options, elements[n].toStringRef()};
}
constexpr const char* kOptions = "options";

// While an object lives, operators run below autograd and autocast. The caller has already cast for autocast.
struct Below {
  at::AutoDispatchBelowADInplaceOrView autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

Tensor defined_or_empty(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }
OptionalTensor optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

Saving saving_of(const StackOptions& options) { return options.recompute ? Saving::recompute : Saving::full; }

struct StackedLSTMBackward : torch::autograd::Function<StackedLSTMBackward> {
  // Tensors that can have gradients are separate arguments; the others come with `call`.
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& h_0, const Tensor& c_0,
                               at::TensorList weights, const EagerCall* call, const StackShape* shape) {
    const StackOptions& options = call->options;
    const Below below;
    Results results = stacked_lstm::forward({input, call->batch_sizes, h_0, c_0, weights, call->seed, options,
                                             saving_of(options), call->backend, call->lengths, call->resets},
                                            shape);
    variable_list saved{input,
                        defined_or_empty(call->batch_sizes),
                        h_0,
                        c_0,
                        defined_or_empty(call->seed),
                        results.output,
                        std::move(results.reserve),
                        defined_or_empty(call->lengths),
                        defined_or_empty(call->resets)};
    saved.insert(saved.end(), weights.begin(), weights.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data[kOptions] = to_value(options, call->backend);
    ctx->set_materialize_grads(false);
    return {std::move(results.output), std::move(results.h_n), std::move(results.c_n)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& flowing) {
    const variable_list all = ctx->get_saved_variables();
    const auto [options, backend] = from_value(ctx->saved_data.at(kOptions));
    const EagerSaved saved{
        all[0],           optional(all[1]), all[2], all[3],  variable_list(all.begin() + 9, all.end()),
        optional(all[4]), all[5],           all[6], options, backend,
        optional(all[7]), optional(all[8])};
    variable_list gradients(3 + saved.weights.size() + 2);  // the last two are the call's and the shape's
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
    const OptionalTensor grad_output = optional(flowing[0]), grad_h_n = optional(flowing[1]),
                         grad_c_n = optional(flowing[2]);
    Gradients found = stacked_lstm::backward(
        {saved.input, saved.batch_sizes, saved.h_0, saved.c_0, saved.weights, saved.seed, options, saving_of(options),
         backend, saved.lengths, saved.resets},
        {saved.output, saved.reserve}, {grad_output, grad_h_n, grad_c_n, {}, {}}, needs[0], any_weight);
    if (needs[0]) gradients[0] = std::move(found.input);
    if (needs[1]) gradients[1] = std::move(found.h_0);
    if (needs[2]) gradients[2] = std::move(found.c_0);
    for (size_t n = 0; n < found.weights.size(); ++n) {
      if (needs[3 + n]) gradients[3 + n] = std::move(found.weights[n]);
    }
    return gradients;
  }
};

Tensor zeros(at::IntArrayRef sizes, const Tensor& like) {
  Tensor state = at::detail::empty_cpu(sizes, like.scalar_type());
  std::memset(state.mutable_data_ptr(), 0, state.nbytes());
  return state;
}

}  // namespace

std::optional<EagerResults> call_eagerly(const EagerCall& call) {
  const StackOptions& options = call.options;
  const Tensor& input = call.input;
  const auto type = input.scalar_type();
  const at::Device device = input.device();
  const auto alike = [&](const Tensor& tensor) {
    return is_plain(tensor) && tensor.scalar_type() == type && tensor.device() == device;
  };
  if (!alike(input) || somebody_watches()) return {};
  if (call.h_0.has_value() != call.c_0.has_value()) return {};
  if ((call.h_0 && !alike(*call.h_0)) || (call.c_0 && !alike(*call.c_0))) return {};
  if ((call.lengths && !is_plain(*call.lengths)) || (call.resets && !is_plain(*call.resets))) return {};
  if (!std::all_of(call.weights.begin(), call.weights.end(), alike)) return {};
  if (options.bf16_weights && (type != at::kFloat || call.backend != "cpu")) return {};
  if ((call.backend == "cpu" || !call.h_0) && !device.is_cpu()) return {};
  if (call.backend == "cpu" &&
      !obstacle(Path::cpu, options, element_type(type), {call.lengths.has_value(), call.resets.has_value()}).empty()) {
    return {};
  }
  StackShape shape;
  const auto given = [](const OptionalTensor& tensor) { return tensor ? &*tensor : nullptr; };
  if (!prepare({input, given(call.batch_sizes), given(call.h_0), given(call.c_0), call.weights, options, false,
                given(call.lengths), given(call.resets)},
               Misfit::declines, shape)) {
    return {};
  }

  RECORD_FUNCTION("stacked_lstm_ext::forward", {});  // for the profiler: this call bypasses the dispatcher
  Tensor h_0, c_0;
  if (call.h_0) {
    h_0 = *call.h_0, c_0 = *call.c_0;
  } else {
    h_0 = zeros(h_sizes(shape), input);
    c_0 = zeros(c_sizes(shape), input);
  }
  const auto requires_grad = [](const Tensor& tensor) { return tensor.requires_grad(); };
  if (c10::GradMode::is_enabled() && (input.requires_grad() || h_0.requires_grad() || c_0.requires_grad() ||
                                      std::any_of(call.weights.begin(), call.weights.end(), requires_grad))) {
    variable_list results = StackedLSTMBackward::apply(input, h_0, c_0, call.weights, &call, &shape);
    return EagerResults{std::move(results[0]), std::move(results[1]), std::move(results[2])};
  }
  const Below below;
  const Trust trust(call.frozen);
  Results results = forward({input, call.batch_sizes, h_0, c_0, call.weights, call.seed, options, Saving::none,
                             call.backend, call.lengths, call.resets},
                            &shape);
  return EagerResults{std::move(results.output), std::move(results.h_n), std::move(results.c_n)};
}

void set_formula(Formula f) { formula() = std::move(f); }

}  // namespace stacked_lstm
