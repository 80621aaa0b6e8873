// csrc/torch/operators.cpp: the operators stacked_lstm_ext::forward and ::backward: schemas, and which path runs a call.
//
// The schemas are part of the interface: stacked_lstm_ext/ops.py has their fakes and their autograd.
#include "operators.h"

#include <torch/library.h>

#include <memory>
#include <utility>

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
  auto decision = persistent::decide({call.shape, call.options, call.input.scalar_type(), call.input.device()});
  if (kind == Backend::automatic) return decision->choice.persistent ? decision : nullptr;
  TORCH_CHECK_VALUE(decision->why_not.empty(), "the persistent kernel cannot run this call: ", decision->why_not);
  return decision;
}

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
    results = forward_cpu(call, saving);
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
    gradients = backward_cpu(call, {output, reserve}, incoming, saving, input_grad, weight_grad);
  }
  return {gradients.input, gradients.h_0, gradients.c_0, std::move(gradients.weights)};
}

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
