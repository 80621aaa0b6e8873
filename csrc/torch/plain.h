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

}  // namespace stacked_lstm
