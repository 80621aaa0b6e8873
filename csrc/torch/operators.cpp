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
#include "../stack/obstacle.h"
#include "cpu_call.h"
#include "last_run.h"
#include "lengths.h"
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
  auto decision = persistent::decide({call.shape, call.options, call.saving, call.input.scalar_type(),
                                      call.input.device(), call.states, call.resets.has_value()});
  if (kind == Backend::automatic) return decision->choice.persistent ? decision : nullptr;
  TORCH_CHECK_VALUE(decision->why_not.empty(), "the persistent kernel cannot run this call: ", decision->why_not);
  return decision;
}

// ValueError if the path that is to run a call cannot run it.
void check_path(Path path, const Call& call) {
  const std::string why =
      obstacle(path, call.options, element_type(call.input.scalar_type()),
               {call.shape.has_lengths(), call.resets.has_value(), call.states, call.saving != Saving::none});
  TORCH_CHECK_VALUE(why.empty(), "backend ", path == Path::cpu ? "cpu" : "diagonal", " cannot run this call: ", why);
}

Results run_forward(Backend kind, const Call& call) {
  if (auto decision = persistent_decision(kind, call)) {
    persistent::PersistentCounts counts;
    Results results = persistent::forward(call, std::move(decision), counts);
    remember(counts, call, false);
    return results;
  }
  if (kind == Backend::cpu) return check_path(Path::cpu, call), forward_cpu(call);
  check_path(Path::diagonal, call);
  diagonal::DiagonalCounts counts;
  Results results = diagonal::forward(call, counts);
  remember(counts, call, false);
  return results;
}

Gradients run_backward(Backend kind, const Call& call, const Kept& kept, const IncomingGradients& incoming,
                       bool input_grad, bool weight_grad) {
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
  if (input_grad) clear_padding(gradients.input, call.shape);  // a weight may be infinite: then a product has NaN there
  remember(counts, call, true);
  return gradients;
}

Arguments tensors_of(const OperatorArguments& a) {
  const auto given = [](const OptionalTensor& tensor) { return tensor ? &*tensor : nullptr; };
  return {a.input, given(a.batch_sizes), &a.h_0,         &a.c_0, a.weights, a.options,
          false,   given(a.lengths),     given(a.resets)};
}

// The tensors of a call in the order of the kernels. A call points to them.
struct Sorted {
  Sorted(const OperatorArguments& a, const StackShape& shape)
      : order(a.lengths, a.input, shape),
        input(order.sort(a.input)),
        h_0(order.sort_h(a.h_0)),
        c_0(order.sort_c(a.c_0)),
        resets(a.resets ? OptionalTensor(order.sort(*a.resets).contiguous()) : std::nullopt) {}

  const LengthOrder order;
  const Tensor input, h_0, c_0;
  const OptionalTensor resets;
};

}  // namespace

Results forward(const OperatorArguments& a, const StackShape* checked, States* states) {
  const Backend kind = backend_of(a.backend, a.input.device());
  const bool stores = stores_bf16(a.options.bf16_weights, a.backend, kind, a.input);
  StackShape made;
  if (!checked) prepare(tensors_of(a), Misfit::raises, made);
  const StackShape& shape = checked ? *checked : made;
  const Sorted sorted(a, shape);
  const Call call{sorted.input,
                  a.batch_sizes.has_value(),
                  sorted.h_0,
                  sorted.c_0,
                  a.weights,
                  seed_of(a.seed, a.input, a.options),
                  a.options,
                  a.saving,
                  stores,
                  shape,
                  states != nullptr,
                  sorted.resets};
  Results results = run_forward(kind, call);
  if (states) *states = states_of(call, results, kind == Backend::cpu);
  if (states && a.saving == Saving::none) results.reserve = results.reserve.new_empty({0});
  const LengthOrder& order = sorted.order;
  if (order.sorted()) return results;
  results.output = order.restore(results.output);
  results.h_n = order.restore_h(results.h_n), results.c_n = order.restore_c(results.c_n);
  if (states) {
    for (Tensor& h : states->h) h = order.restore(h);
    for (Tensor& c : states->c) c = order.restore(c);
  }
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
  const Sorted sorted(a, shape);
  const LengthOrder& order = sorted.order;
  const Call call{sorted.input, a.batch_sizes.has_value(),
                  sorted.h_0,   sorted.c_0,
                  a.weights,    seed_of(a.seed, input, a.options),
                  a.options,    a.saving,
                  stores,       shape,
                  states,       sorted.resets};
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
  if (order.sorted()) return run_backward(kind, call, kept, incoming, input_grad, weight_grad);
  incoming.output = order.sort(incoming.output);
  incoming.h_n = order.sort_h(incoming.h_n), incoming.c_n = order.sort_c(incoming.c_n);
  for (OptionalTensor& h : incoming.h) h = order.sort(h);
  for (OptionalTensor& c : incoming.c) c = order.sort(c);
  const Tensor output = order.sort(kept.output);
  Gradients found = run_backward(kind, call, {output, reserve}, incoming, input_grad, weight_grad);
  if (input_grad) found.input = order.restore(found.input);
  found.h_0 = order.restore_h(found.h_0), found.c_0 = order.restore_c(found.c_0);
  return found;
}

namespace {

// The operators with the arguments of their schemas. The schemas have no hidden_size and no input_size: the tensors say them.

using Numbers = at::OptionalIntArrayRef;
using Rates = std::optional<at::ArrayRef<double>>;

StackOptions options_of(bool bias, int64_t num_layers, bool bidirectional, int64_t proj_size, double dropout,
                        bool bf16_weights, Numbers proj_sizes, Rates dropouts, const std::string& link) {
  StackOptions options;
  options.bias = bias, options.num_layers = num_layers, options.bidirectional = bidirectional;
  options.proj_size = proj_sizes ? PerLayer<int64_t>(proj_sizes->vec()) : PerLayer<int64_t>(proj_size);
  options.dropout = dropouts ? PerLayer<double>(dropouts->vec()) : PerLayer<double>(dropout);
  options.bf16_weights = bf16_weights;
  options.link = link_named(link);
  return options;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_operator(
    const Tensor& input, const OptionalTensor& batch_sizes, const Tensor& h_0, const Tensor& c_0, TensorList weights,
    const OptionalTensor& seed, bool bias, int64_t num_layers, bool bidirectional, int64_t proj_size, double dropout,
    const std::string& saving, const std::string& backend, bool bf16_weights, const OptionalTensor& lengths,
    const OptionalTensor& resets, Numbers proj_sizes, Rates dropouts, const std::string& link) {
  const StackOptions options =
      options_of(bias, num_layers, bidirectional, proj_size, dropout, bf16_weights, proj_sizes, dropouts, link);
  Results r =
      forward({input, batch_sizes, h_0, c_0, weights, seed, options, saving_of(saving), backend, lengths, resets});
  return {std::move(r.output), std::move(r.h_n), std::move(r.c_n), std::move(r.reserve)};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor> forward_states_operator(
    const Tensor& input, const OptionalTensor& batch_sizes, const Tensor& h_0, const Tensor& c_0, TensorList weights,
    const OptionalTensor& seed, bool bias, int64_t num_layers, bool bidirectional, int64_t proj_size, double dropout,
    const std::string& saving, const std::string& backend, bool bf16_weights, const OptionalTensor& lengths,
    const OptionalTensor& resets, Numbers proj_sizes, Rates dropouts, const std::string& link) {
  const StackOptions options =
      options_of(bias, num_layers, bidirectional, proj_size, dropout, bf16_weights, proj_sizes, dropouts, link);
  States states;
  Results r =
      forward({input, batch_sizes, h_0, c_0, weights, seed, options, saving_of(saving), backend, lengths, resets},
              nullptr, &states);
  return {std::move(r.output), std::move(r.h_n),    std::move(r.c_n),
          std::move(states.h), std::move(states.c), std::move(r.reserve)};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> backward_operator(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
    const Tensor& input, const OptionalTensor& batch_sizes, const Tensor& h_0, const Tensor& c_0, TensorList weights,
    const OptionalTensor& seed, const Tensor& output, const Tensor& reserve, bool bias, int64_t num_layers,
    bool bidirectional, int64_t proj_size, double dropout, const std::string& saving, bool input_grad, bool weight_grad,
    const std::string& backend, bool bf16_weights, const OptionalTensor& lengths, const OptionalTensor& resets,
    Numbers proj_sizes, Rates dropouts, const std::string& link) {
  const StackOptions options =
      options_of(bias, num_layers, bidirectional, proj_size, dropout, bf16_weights, proj_sizes, dropouts, link);
  Gradients g =
      backward({input, batch_sizes, h_0, c_0, weights, seed, options, saving_of(saving), backend, lengths, resets},
               {output, reserve}, {grad_output, grad_h_n, grad_c_n, {}, {}}, input_grad, weight_grad);
  return {std::move(g.input), std::move(g.h_0), std::move(g.c_0), std::move(g.weights)};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> backward_states_operator(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
    const c10::List<OptionalTensor>& grad_hidden, const c10::List<OptionalTensor>& grad_cell, const Tensor& input,
    const OptionalTensor& batch_sizes, const Tensor& h_0, const Tensor& c_0, TensorList weights,
    const OptionalTensor& seed, const Tensor& output, const Tensor& reserve, bool bias, int64_t num_layers,
    bool bidirectional, int64_t proj_size, double dropout, const std::string& saving, bool input_grad, bool weight_grad,
    const std::string& backend, bool bf16_weights, const OptionalTensor& lengths, const OptionalTensor& resets,
    Numbers proj_sizes, Rates dropouts, const std::string& link) {
  const StackOptions options =
      options_of(bias, num_layers, bidirectional, proj_size, dropout, bf16_weights, proj_sizes, dropouts, link);
  Gradients g =
      backward({input, batch_sizes, h_0, c_0, weights, seed, options, saving_of(saving), backend, lengths, resets},
               {output, reserve}, {grad_output, grad_h_n, grad_c_n, grad_hidden.vec(), grad_cell.vec()}, input_grad,
               weight_grad, true);
  return {std::move(g.input), std::move(g.h_0), std::move(g.c_0), std::move(g.weights)};
}

}  // namespace

}  // namespace stacked_lstm

// Every argument that came after the first release has a default, so that programs that were exported before it still load.
// It is keyword-only if it is no tensor. (torch cannot differentiate an operator that has keyword-only tensors.)
#define STACKED_LSTM_LATER_ARGUMENTS                                                                \
  "bool bf16_weights=False, Tensor? lengths=None, Tensor? resets=None, *, int[]? proj_sizes=None, " \
  "float[]? dropouts=None, str link=\"plain\")"
#define STACKED_LSTM_FORWARD_ARGUMENTS                                                                      \
  "(Tensor input, Tensor? batch_sizes, Tensor h_0, Tensor c_0, Tensor[] weights, Tensor? seed, bool bias, " \
  "int num_layers, bool bidirectional, int proj_size, float dropout, str saving, str "                      \
  "backend, " STACKED_LSTM_LATER_ARGUMENTS
#define STACKED_LSTM_BACKWARD_ARGUMENTS                                                                        \
  "Tensor input, Tensor? batch_sizes, Tensor h_0, Tensor c_0, Tensor[] weights, Tensor? seed, Tensor output, " \
  "Tensor reserve, bool bias, int num_layers, bool bidirectional, int proj_size, float dropout, str saving, "  \
  "bool input_grad, bool weight_grad, str backend, " STACKED_LSTM_LATER_ARGUMENTS                              \
  " -> (Tensor grad_input, Tensor grad_h_0, Tensor grad_c_0, Tensor[] grad_weights)"

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
