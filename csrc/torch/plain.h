// csrc/torch/plain.h: whether a call is the plain case, which the short ways (step.h, eager.h) serve: ordinary tensors, and
// nobody who would want to see the operators. For any other, Python goes by the operators themselves.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "../stack/weights.h"

namespace stacked_lstm {

// A dense tensor that nothing but autograd and autocast could want to see.
inline bool is_plain(const at::Tensor& tensor) {
  constexpr auto ignored = c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset;
  const c10::DispatchKeySet keys = tensor.key_set() - ignored;
  return keys == c10::DispatchKeySet(c10::DispatchKey::CPU) || keys == c10::DispatchKeySet(c10::DispatchKey::CUDA);
}

inline bool somebody_watches() {
  return at::impl::torch_function_mode_enabled() || c10::impl::dispatch_mode_enabled() ||
         torch::jit::tracer::isTracing();
}

// Whether the list holds the weights of a stack of these sizes, in the operators' order.
inline bool weights_fit(at::TensorList weights, bool bias, int64_t layers, int64_t directions, int64_t input,
                        int64_t hidden, int64_t projection) {
  const LayerShape above{directions * (projection > 0 ? projection : hidden), hidden, projection};
  const LayerShape lowest{input, hidden, projection};
  const int64_t lanes = layers * directions;
  if (layers < 1 || static_cast<int64_t>(weights.size()) != lanes * weights_of_lane(lowest, bias)) return false;
  const auto layer_of_lane = [&](int64_t lane) -> const LayerShape& { return lane < directions ? lowest : above; };
  return all_weights(lanes, bias, layer_of_lane, [&](int64_t lane, Weight name, int64_t place) {
    const at::Tensor& weight = weights[static_cast<size_t>(place)];
    const WeightSizes sizes = sizes_of(layer_of_lane(lane), name);
    return weight.dim() == (sizes.vector() ? 1 : 2) && weight.size(0) == sizes.rows &&
           (sizes.vector() || weight.size(1) == sizes.columns);
  });
}

}  // namespace stacked_lstm
