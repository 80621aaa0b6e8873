// csrc/torch/plain.h: whether a call is the plain case, which the fast paths (step.h, eager.h) serve: ordinary tensors,
// and no mode or tracer that has to see the operators. In every other case, Python calls the operators themselves.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/jit/frontend/tracer.h>

namespace stacked_lstm {

// A dense tensor on the CPU or a GPU, with no dispatch keys but those of autograd and autocast.
inline bool is_plain(const at::Tensor& tensor) {
  constexpr auto ignored = c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset;
  const c10::DispatchKeySet keys = tensor.key_set() - ignored;
  return keys == c10::DispatchKeySet(c10::DispatchKey::CPU) || keys == c10::DispatchKeySet(c10::DispatchKey::CUDA);
}

inline bool somebody_watches() {
  return at::impl::torch_function_mode_enabled() || c10::impl::dispatch_mode_enabled() ||
         torch::jit::tracer::isTracing();
}

// Whether the weights are those of a stack of these sizes, in the operators' order.
inline bool weights_fit(at::TensorList weights, bool bias, int64_t layers, int64_t directions, int64_t input,
                        int64_t hidden, int64_t projection) {
  const int64_t a_lane = 2 + (bias ? 2 : 0) + (projection > 0 ? 1 : 0), output = projection > 0 ? projection : hidden;
  if (layers < 1 || static_cast<int64_t>(weights.size()) != layers * directions * a_lane) return false;
  for (int64_t lane = 0; lane < layers * directions; ++lane) {
    const at::Tensor* w = &weights[static_cast<size_t>(lane * a_lane)];
    const auto is = [](const at::Tensor& tensor, int64_t rows, int64_t columns) {
      return tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns;
    };
    const auto is_bias = [&](const at::Tensor& tensor) { return tensor.dim() == 1 && tensor.size(0) == 4 * hidden; };
    if (!is(w[0], 4 * hidden, lane < directions ? input : directions * output) || !is(w[1], 4 * hidden, output)) {
      return false;
    }
    if (bias && (!is_bias(w[2]) || !is_bias(w[3]))) return false;
    if (projection > 0 && !is(w[a_lane - 1], output, hidden)) return false;
  }
  return true;
}

}  // namespace stacked_lstm
