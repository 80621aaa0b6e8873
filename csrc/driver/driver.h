// csrc/driver/driver.h: what the drivers of both GPU schedules share, over ATen: dtypes, pointers, large products, the reserve,
// and copies of rows, which the products over all steps read.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "../cuda/gates.h"
#include "../stack/reserve.h"
#include "../stack/resets.h"
#include "call.h"

#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace stacked_lstm::driver {

using at::Tensor;

template <typename T>
constexpr at::ScalarType scalar_type() {
  if constexpr (std::is_same_v<T, double>) return at::kDouble;
  if constexpr (std::is_same_v<T, bfloat16>) return at::kBFloat16;
  if constexpr (std::is_same_v<T, float16>) return at::kHalf;
  return at::kFloat;
}

template <typename T>
T* data(const Tensor& tensor) {
  return tensor.defined() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}
template <typename T>
const T* const_data(const Tensor& tensor) {
  return tensor.defined() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
}

inline Tensor contiguous(const OptionalTensor& tensor) { return tensor ? tensor->contiguous() : Tensor(); }

// A matrix as a batch of one matrix.
inline Tensor single(const Tensor& matrix) { return matrix.unsqueeze(0); }

inline void* stream_for([[maybe_unused]] const at::Device& device) {
#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
  if (device.is_cuda()) return c10::cuda::getCurrentCUDAStream(device.index()).stream();
#endif
  return nullptr;
}

// While an object lives, calls run below autograd and autocast, on the tensors' device.
struct Guards {
  explicit Guards(const at::Device& device) : device_guard(device) {
#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
    if (device.is_cuda()) relaxed.emplace(cudaStreamCaptureModeRelaxed);
#endif
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  c10::DeviceGuard device_guard;
#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
  // The first call of a process may be captured. It then creates cuBLAS's handle and loads kernels. That takes CUDA
  // calls that a capture forbids by default (pytorch issue 99397), although they are not part of the captured graph.
  std::optional<c10::cuda::CUDAStreamCaptureModeGuard> relaxed;
#endif
};

// The mask of the link from a layer to the layer above.
inline gates::Mask mask_of(const Call& call, int64_t layer) {
  if (!call.seed || layer + 1 >= call.shape.depth() || !(call.options.dropout[layer] > 0)) return {};
  const Dropout dropout{call.options.dropout[layer], 0};
  return {dropout.threshold(), dropout.scale(), const_data<int64_t>(*call.seed)};
}

// Products of T with sums in Accumulator<T>, counted.
template <typename T>
class Products {
 public:
  using A = Accumulator<T>;

  explicit Products(int64_t& count) : count_(count) {}

  // result = a · b, in A.
  void multiply(const Tensor& result, const Tensor& a, const Tensor& b) const {
    ++count_;
    Tensor out = result;
    if (std::is_same_v<T, A>) {
      at::bmm_out(out, a, b);
    } else if (a.is_cuda()) {
      at::bmm_out(out, a, b, scalar_type<A>());
    } else {
      at::bmm_out(out, a.to(scalar_type<A>()), b.to(scalar_type<A>()));
    }
  }

  // result += a · b, likewise.
  void multiply_and_add(const Tensor& result, const Tensor& a, const Tensor& b) const {
    Tensor out = result;
    if (std::is_same_v<T, A>) {
      ++count_;
      at::baddbmm_out(out, out, a, b);
    } else {
      const Tensor product = at::empty(result.sizes(), result.options());
      multiply(product, a, b);
      out.add_(product);
    }
  }

  // The same, rounded to T at the end. `wide`: the sums are rounded after the product, not by it. A product that rounds
  // may split its sums over many rows and round the parts (torch's allow_bf16_reduced_precision_reduction).
  void multiply_and_round(const Tensor& result, const Tensor& a, const Tensor& b, bool wide = true) const {
    if (std::is_same_v<T, A>) return multiply(result, a, b);
    if (wide || !a.is_cuda()) {
      const Tensor sums = at::empty(result.sizes(), result.options().dtype(scalar_type<A>()));
      multiply(sums, a, b);
      result.copy_(sums);
      return;
    }
    ++count_;
    Tensor out = result;
    at::bmm_out(out, a, b);
  }

 private:
  int64_t& count_;
};

// What a GPU's reserve keeps. `states`: every layer's h and c are results.
inline KeptRows kept_rows(const StackShape& shape, Saving saving, bool states) {
  if (saving == Saving::none && !states) return {};
  return {shape.all_rows(), saving == Saving::full ? shape.all_rows() : 0, /*h=*/true, /*top=*/false,
          /*inputs=*/saving != Saving::none};
}

// Elements of the reserve, in Accumulator<T>. h and inputs are kept as T.
inline int64_t reserve_elements(const StackShape& shape, Saving saving, bool states, int64_t storage_bytes,
                                int64_t accumulator_bytes) {
  const ReserveSize size = reserve_size(shape, kept_rows(shape, saving, states));
  return size.cells() + ((size.h + size.inputs) * storage_bytes + accumulator_bytes - 1) / accumulator_bytes;
}

// A reserve for a forward pass. No kernel writes the padding of units, nor the half of an element behind an odd number of
// 16-bit h, nor the rows behind the end of a sequence. Zeros there make the bits of a reserve the same every time.
template <typename T>
Tensor make_reserve(const Call& call) {
  using A = Accumulator<T>;
  const StackShape& shape = call.shape;
  const ReserveSize size = reserve_size(shape, kept_rows(shape, call.saving, call.states));
  const auto padded = [](const LayerShape& layer) { return layer.hidden != layer.padded_hidden(); };
  const bool gaps = shape.has_lengths() ||
                    (size.h + size.inputs) * static_cast<int64_t>(sizeof(T)) % static_cast<int64_t>(sizeof(A)) != 0 ||
                    std::any_of(shape.layers.begin(), shape.layers.end(), padded);
  const Tensor reserve = at::empty({reserve_elements(shape, call.saving, call.states, sizeof(T), sizeof(A))},
                                   call.input.options().dtype(scalar_type<A>()));
  return gaps ? reserve.zero_() : reserve;
}

// The parts of a reserve: its layout is in stack/reserve.h. The pointers are null where nothing is kept.
template <typename T>
class GpuReserve {
 public:
  using A = Accumulator<T>;

  GpuReserve() = default;
  GpuReserve(Tensor reserve, const Call& call)
      : reserve_(std::move(reserve)),
        shape_(&call.shape),
        layout_(call.shape, kept_rows(call.shape, call.saving, call.states)) {}

  // c of a lane, rows of padded_hidden.
  A* c(int64_t lane) const { return layout_.kept().c > 0 ? cells() + layout_.c(lane) : nullptr; }
  // The gates of a lane, rows of 4·padded_hidden.
  A* gates(int64_t lane) const { return layout_.kept().gates > 0 ? cells() + layout_.gates(lane) : nullptr; }
  // h of a layer, where the reserve keeps it and not the output (keeps_h() in stack/reserve.h): rows of D·output.
  T* h(int64_t layer) const { return layout_.kept().h ? first_h() + layout_.h(layer) : nullptr; }
  // The input of a layer, where the reserve keeps it (keeps_input()): rows of D·output.
  T* input(int64_t layer) const { return first_h() + layout_.input(layer); }
  // The same as tensors: (rows, D·output).
  Tensor h_rows(int64_t layer) const {
    return rows_at(layout_.h(layer), shape_->directions * shape_->layers[static_cast<size_t>(layer)].output());
  }
  Tensor input_rows(int64_t layer) const {
    return rows_at(layout_.input(layer), shape_->layers[static_cast<size_t>(layer)].input);
  }

 private:
  A* cells() const { return data<A>(reserve_); }
  T* first_h() const { return reinterpret_cast<T*>(cells() + layout_.size().cells()); }
  Tensor rows_at(int64_t first, int64_t width) const {
    return reserve_.narrow(0, layout_.size().cells(), reserve_.numel() - layout_.size().cells())
        .view(scalar_type<T>())
        .narrow(0, first, shape_->rows() * width)
        .view({shape_->rows(), width});
  }

  Tensor reserve_;
  const StackShape* shape_ = nullptr;
  ReserveLayout layout_;
};

// The input, all rows: (rows, I), contiguous. With lengths, without the steps behind the longest sequence; the other padding
// is in it.
inline Tensor input_rows(const Call& call) {
  const Tensor steps = call.shape.has_lengths() ? call.input.narrow(0, 0, call.shape.steps) : call.input;
  return steps.reshape({call.shape.rows(), call.input.size(-1)}).contiguous();
}

// A tensor that kernels fill row by row. They write no padding. With lengths, the tensor is zero there: a result has to be, and a
// product over all rows must not meet NaN.
inline Tensor make_rows(const StackShape& shape, at::IntArrayRef sizes, const at::TensorOptions& options) {
  return shape.has_lengths() ? at::zeros(sizes, options) : at::empty(sizes, options);
}

// Of how many steps, from the first on, every row exists.
inline int64_t complete_steps(const StackShape& shape) {
  if (!shape.ragged()) return shape.steps;
  int64_t steps = 0;
  while (steps < shape.steps && shape.active(steps) == shape.batch) ++steps;
  return steps;
}

// How many rows of step t of a lane were also in the lane's step before. The other rows' sequences begin at t.
inline int64_t continued_rows(const StackShape& shape, int64_t lane, int64_t t) {
  if (lane % shape.directions == 0) return t > 0 ? shape.active(t) : 0;
  return t + 1 < shape.steps ? shape.active(t + 1) : 0;
}

// The resets of a call, or null.
inline const uint8_t* resets_of(const Call& call) {
  return call.resets ? static_cast<const uint8_t*>(call.resets->const_data_ptr()) : nullptr;
}

// The rows that are reset before a lane's step at time t.
inline gates::RowResets resets_before(const StackShape& shape, const uint8_t* resets, int64_t lane, int64_t t) {
  const int64_t boundary = boundary_before(shape, lane, t);
  if (!resets || boundary >= shape.steps) return {};
  return {resets + boundary * shape.batch, shape.active(boundary)};
}

// Calls add(cell) for each copy that is needed to make h(t-1) of every row of a lane, zero where a sequence is reset before t.
// `h`: where the lane's direction begins in its layer's output; `h_0`, `target`: (B, output) and (rows, output) of the lane.
template <typename T, typename Add>
void copies_of_previous(const StackShape& shape, int64_t lane, const T* h, const T* h_0, T* target, Add&& add,
                        const uint8_t* resets = nullptr, int64_t h_stride = 0) {
  const int64_t output = shape.of_lane(lane).output(), stride = h_stride ? h_stride : shape.directions * output;
  const bool reverse = lane % shape.directions != 0;
  const auto copy = [&](int64_t t, int64_t steps) {  // consecutive steps; if they are several, all rows continue
    const int64_t row = shape.first_row(t), rows = steps > 1 ? steps * shape.batch : shape.active(t);
    const int64_t continued = continued_rows(shape, lane, t), before = reverse ? t + 1 : t - 1;
    const T* const source = continued > 0 ? h + shape.first_row(before) * stride : nullptr;
    gates::RowResets of_rows = resets_before(shape, resets, lane, t);
    if (steps > 1) of_rows.rows = rows;
    add(gates::CopyCell<T>{
        source, stride, h_0, target + row * output, output, rows, steps > 1 ? rows : continued, false, {}, of_rows});
  };
  // Steps all of whose rows continue: of a forward lane from the second step on, of a reverse lane from the first step on.
  const int64_t together = shape.packed() ? 0 : complete_steps(shape) - 1, first = reverse ? 0 : 1;
  if (together > 0) copy(first, together);
  for (int64_t t = 0; t < shape.steps; ++t) {
    if (t < first || t >= first + together) copy(t, 1);
  }
}

// Calls add(cell) for each copy that is needed to make x without what is in its padding. `width`: of a row; `none`: (B, width)
// zeros.
template <typename T, typename Add>
void copies_without_padding(const StackShape& shape, int64_t width, const T* x, const T* none, T* target, Add&& add) {
  const int64_t complete = complete_steps(shape);
  for (int64_t t = 0; t < shape.steps; t += t < complete ? complete : 1) {
    const int64_t at = t * shape.batch * width, rows = t < complete ? complete * shape.batch : shape.batch;
    const int64_t exist = t < complete ? rows : shape.active(t);
    add(gates::CopyCell<T>{x + at, width, none, target + at, width, rows, exist, false, {}});
  }
}

// Calls add(cell) for each copy that is needed to make the input that the layer above `layer` has read: the output `h`
// of `layer` (rows, D·output), masked by dropout. `h_stride`: of a row of h, if it is not D·output.
template <typename T, typename Add>
void copies_of_masked(const StackShape& shape, int64_t layer, const gates::Mask& mask, const T* h, T* target, Add&& add,
                      int64_t h_stride = 0) {
  const int64_t stride = shape.directions * shape.layers[static_cast<size_t>(layer)].output();
  const int64_t source_stride = h_stride ? h_stride : stride;
  const int64_t runs = shape.packed() ? shape.steps : 1;
  for (int64_t t = 0; t < runs; ++t) {
    const int64_t row = shape.first_row(t), rows = shape.packed() ? shape.active(t) : shape.rows();
    add(gates::CopyCell<T>{h + row * source_stride,
                           source_stride,
                           nullptr,
                           target + row * stride,
                           stride,
                           rows,
                           rows,
                           true,
                           {t * shape.batch, 0, layer, mask}});
  }
}

// The most cells of one launch of the copy kernel.
inline constexpr int64_t kCopiesALaunch = 64;

}  // namespace stacked_lstm::driver
