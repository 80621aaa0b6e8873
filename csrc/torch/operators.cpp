// csrc/torch/operators.cpp: the operators stacked_lstm_ext::forward and ::backward: schemas, and which path runs a call.
//
// The schemas are part of the interface: stacked_lstm_ext/ops.py has their fakes and their autograd.
#include "operators.h"

#include <torch/library.h>

#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/reserve.h"
#include "../diagonal/diagonal.h"
#include "../driver/driver.h"
#include "../persistent/persistent.h"
#include "cpu_call.h"
#include "last_run.h"
#include "prepare.h"

namespace stacked_lstm {

using at::Tensor;
using at::TensorList;

namespace {

// Decides what runs a call of the backends `persistent` and `auto`; null: the diagonal schedule. Both have the same
// reserve. ValueError, before any allocation or launch, if the persistent kernels are asked for and cannot run the
// call.
std::shared_ptr<const persistent::Decision> persistent_decision(Backend kind, const Call& call) {
  if (kind != Backend::persistent && kind != Backend::automatic) return nullptr;
  auto decision = persistent::decide(
      {call.shape, call.options, call.saving, call.input.scalar_type(), call.input.device(), call.states});
  if (kind == Backend::automatic) return decision->choice.persistent ? decision : nullptr;
  TORCH_CHECK_VALUE(decision->why_not.empty(), "the persistent kernel cannot run this call: ", decision->why_not);
  return decision;
}

Results run_forward(Backend kind, const Call& call) {
  if (auto decision = persistent_decision(kind, call)) {
    persistent::PersistentCounts counts;
    Results results = persistent::forward(call, std::move(decision), counts);
    remember(counts, call, false);
    return results;
  }
  if (kind == Backend::cpu) return forward_cpu(call);
  diagonal::DiagonalCounts counts;
  Results results = diagonal::forward(call, counts);
  remember(counts, call, false);
  return results;
}

Arguments tensors_of(const OperatorArguments& a) {
  return {a.input, a.batch_sizes ? &*a.batch_sizes : nullptr, &a.h_0, &a.c_0, a.weights, a.options};
}

}  // namespace

Results forward(const OperatorArguments& a, const StackShape* checked, States* states) {
  const Backend kind = backend_of(a.backend, a.input.device());
  const bool stores = stores_bf16(a.options.bf16_weights, a.backend, kind, a.input);
  StackShape made;
  if (!checked) prepare(tensors_of(a), Misfit::raises, made);
  const Call call{a.input,
                  a.batch_sizes.has_value(),
                  a.h_0,
                  a.c_0,
                  a.weights,
                  seed_of(a.seed, a.input, a.options),
                  a.options,
                  a.saving,
                  stores,
                  checked ? *checked : made,
                  states != nullptr};
  Results results = run_forward(kind, call);
  if (states) *states = states_of(call, results, kind == Backend::cpu);
  if (states && a.saving == Saving::none) results.reserve = results.reserve.new_empty({0});
  return results;
}

Gradients backward(const OperatorArguments& a, const Kept& kept, IncomingGradients incoming, bool input_grad,
                   bool weight_grad, bool states) {
  const Tensor& input = a.input;
  const Backend kind = backend_of(a.backend, input.device());
  const bool stores = stores_bf16(a.options.bf16_weights, a.backend, kind, input);
  TORCH_CHECK_VALUE(a.saving != Saving::none,
                    "backward needs a forward with saving \"full\" or \"recompute\", got: ", name_of(a.saving));
  StackShape shape;
  prepare(tensors_of(a), Misfit::raises, shape);
  const Call call{input,     a.batch_sizes.has_value(),
                  a.h_0,     a.c_0,
                  a.weights, seed_of(a.seed, input, a.options),
                  a.options, a.saving,
                  stores,    shape,
                  states};
  const auto type = arithmetic_type(input);
  const auto sizes = call.output_sizes();
  const Tensor& reserve = kept.reserve;
  check_same(kept.output, input, "output");
  check_shape(kept.output, sizes, "output");
  TORCH_CHECK_VALUE(reserve.scalar_type() == type && reserve.device() == input.device(), "reserve should be ", type,
                    " on ", input.device(), ", got: ", reserve.scalar_type(), " on ", reserve.device());
  const int64_t elements =
      kind == Backend::cpu
          ? reserve_elements(shape, {a.saving, type != input.scalar_type(), states})
          : driver::reserve_elements(shape, a.saving, states, input.element_size(), reserve.element_size());
  check_shape(reserve, {elements}, "reserve");
  const auto check = [&](const OptionalTensor& gradient, at::IntArrayRef expected, const char* name) {
    if (gradient) check_same(*gradient, input, name), check_shape(*gradient, expected, name);
  };
  check(incoming.output, sizes, "grad_output");
  check(incoming.h_n, a.h_0.sizes(), "grad_h_n");
  check(incoming.c_n, a.c_0.sizes(), "grad_c_n");
  if (states) take_state_gradients(call, incoming);
  if (auto decision = persistent_decision(kind, call)) {
    persistent::PersistentCounts counts;
    Gradients gradients =
        persistent::backward(call, kept, incoming, input_grad, weight_grad, std::move(decision), counts);
    remember(counts, call, true);
    return gradients;
  }
  if (kind == Backend::cpu) return backward_cpu(call, kept, incoming, input_grad, weight_grad);
  diagonal::DiagonalCounts counts;
  Gradients gradients = diagonal::backward(call, kept, incoming, input_grad, weight_grad, counts);
  remember(counts, call, true);
  return gradients;
}

namespace {

// The operators with the arguments of their schemas. The schemas have no hidden_size and no input_size: the tensors say them.

using Numbers = at::OptionalIntArrayRef;
using Rates = std::optional<at::ArrayRef<double>>;

StackOptions options_of(bool bias, int64_t num_layers, bool bidirectional, int64_t proj_size, double dropout,
                        bool bf16_weights, Numbers proj_sizes, Rates dropouts) {
  StackOptions options;
  options.bias = bias, options.num_layers = num_layers, options.bidirectional = bidirectional;
  options.proj_size = proj_sizes ? PerLayer<int64_t>(proj_sizes->vec()) : PerLayer<int64_t>(proj_size);
  options.dropout = dropouts ? PerLayer<double>(dropouts->vec()) : PerLayer<double>(dropout);
  options.bf16_weights = bf16_weights;
  return options;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_operator(const Tensor& input, const OptionalTensor& batch_sizes,
                                                            const Tensor& h_0, const Tensor& c_0, TensorList weights,
                                                            const OptionalTensor& seed, bool bias, int64_t num_layers,
                                                            bool bidirectional, int64_t proj_size, double dropout,
                                                            const std::string& saving, const std::string& backend,
                                                            bool bf16_weights, Numbers proj_sizes, Rates dropouts) {
  const StackOptions options =
      options_of(bias, num_layers, bidirectional, proj_size, dropout, bf16_weights, proj_sizes, dropouts);
  Results r = forward({input, batch_sizes, h_0, c_0, weights, seed, options, saving_of(saving), backend});
  return {std::move(r.output), std::move(r.h_n), std::move(r.c_n), std::move(r.reserve)};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor> forward_states_operator(
    const Tensor& input, const OptionalTensor& batch_sizes, const Tensor& h_0, const Tensor& c_0, TensorList weights,
    const OptionalTensor& seed, bool bias, int64_t num_layers, bool bidirectional, int64_t proj_size, double dropout,
    const std::string& saving, const std::string& backend, bool bf16_weights, Numbers proj_sizes, Rates dropouts) {
  const StackOptions options =
      options_of(bias, num_layers, bidirectional, proj_size, dropout, bf16_weights, proj_sizes, dropouts);
  States states;
  Results r =
      forward({input, batch_sizes, h_0, c_0, weights, seed, options, saving_of(saving), backend}, nullptr, &states);
  return {std::move(r.output), std::move(r.h_n),    std::move(r.c_n),
          std::move(states.h), std::move(states.c), std::move(r.reserve)};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> backward_operator(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
    const Tensor& input, const OptionalTensor& batch_sizes, const Tensor& h_0, const Tensor& c_0, TensorList weights,
    const OptionalTensor& seed, const Tensor& output, const Tensor& reserve, bool bias, int64_t num_layers,
    bool bidirectional, int64_t proj_size, double dropout, const std::string& saving, bool input_grad, bool weight_grad,
    const std::string& backend, bool bf16_weights, Numbers proj_sizes, Rates dropouts) {
  const StackOptions options =
      options_of(bias, num_layers, bidirectional, proj_size, dropout, bf16_weights, proj_sizes, dropouts);
  Gradients g = backward({input, batch_sizes, h_0, c_0, weights, seed, options, saving_of(saving), backend},
                         {output, reserve}, {grad_output, grad_h_n, grad_c_n, {}, {}}, input_grad, weight_grad);
  return {std::move(g.input), std::move(g.h_0), std::move(g.c_0), std::move(g.weights)};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> backward_states_operator(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
    const c10::List<OptionalTensor>& grad_hidden, const c10::List<OptionalTensor>& grad_cell, const Tensor& input,
    const OptionalTensor& batch_sizes, const Tensor& h_0, const Tensor& c_0, TensorList weights,
    const OptionalTensor& seed, const Tensor& output, const Tensor& reserve, bool bias, int64_t num_layers,
    bool bidirectional, int64_t proj_size, double dropout, const std::string& saving, bool input_grad, bool weight_grad,
    const std::string& backend, bool bf16_weights, Numbers proj_sizes, Rates dropouts) {
  const StackOptions options =
      options_of(bias, num_layers, bidirectional, proj_size, dropout, bf16_weights, proj_sizes, dropouts);
  Gradients g =
      backward({input, batch_sizes, h_0, c_0, weights, seed, options, saving_of(saving), backend}, {output, reserve},
               {grad_output, grad_h_n, grad_c_n, grad_hidden.vec(), grad_cell.vec()}, input_grad, weight_grad, true);
  return {std::move(g.input), std::move(g.h_0), std::move(g.c_0), std::move(g.weights)};
}

}  // namespace

}  // namespace stacked_lstm

// Every argument that came after the first release is keyword-only and has a default, so that programs that were exported
// before it still load.
#define STACKED_LSTM_FORWARD_ARGUMENTS                                                                      \
  "(Tensor input, Tensor? batch_sizes, Tensor h_0, Tensor c_0, Tensor[] weights, Tensor? seed, bool bias, " \
  "int num_layers, bool bidirectional, int proj_size, float dropout, str saving, str backend, "             \
  "bool bf16_weights=False, *, int[]? proj_sizes=None, float[]? dropouts=None)"
#define STACKED_LSTM_BACKWARD_ARGUMENTS                                                                        \
  "Tensor input, Tensor? batch_sizes, Tensor h_0, Tensor c_0, Tensor[] weights, Tensor? seed, Tensor output, " \
  "Tensor reserve, bool bias, int num_layers, bool bidirectional, int proj_size, float dropout, str saving, "  \
  "bool input_grad, bool weight_grad, str backend, bool bf16_weights=False, *, int[]? proj_sizes=None, "       \
  "float[]? dropouts=None) -> (Tensor grad_input, Tensor grad_h_0, Tensor grad_c_0, Tensor[] grad_weights)"

TORCH_LIBRARY(stacked_lstm_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("forward" STACKED_LSTM_FORWARD_ARGUMENTS " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor reserve)", tags);
  m.def("forward_states" STACKED_LSTM_FORWARD_ARGUMENTS
        " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor[] hidden, Tensor[] cell, Tensor reserve)",
        tags);
  m.def("backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, " STACKED_LSTM_BACKWARD_ARGUMENTS, tags);
  m.def(
      "backward_states(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor?[] grad_hidden, "
      "Tensor?[] grad_cell, " STACKED_LSTM_BACKWARD_ARGUMENTS,
      tags);
}

TORCH_LIBRARY_IMPL(stacked_lstm_ext, CPU, m) {
  m.impl("forward", &stacked_lstm::forward_operator);
  m.impl("forward_states", &stacked_lstm::forward_states_operator);
  m.impl("backward", &stacked_lstm::backward_operator);
  m.impl("backward_states", &stacked_lstm::backward_states_operator);
}

#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
TORCH_LIBRARY_IMPL(stacked_lstm_ext, CUDA, m) {
  m.impl("forward", &stacked_lstm::forward_operator);
  m.impl("forward_states", &stacked_lstm::forward_states_operator);
  m.impl("backward", &stacked_lstm::backward_operator);
  m.impl("backward_states", &stacked_lstm::backward_states_operator);
}
#endif
