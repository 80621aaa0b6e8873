// csrc/torch/step.cpp: see step.h.
#include "step.h"

#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../cpu/step.h"
#include "../stack/state_layout.h"
#include "packed_cache.h"
#include "plain.h"
#include "prepare.h"

namespace stacked_lstm {
namespace {

using at::Tensor;

// A thread's memory for the fp32 numbers of 16-bit tensors. It only grows.
class Floats {
 public:
  explicit Floats(int64_t count) {
    if (static_cast<int64_t>(memory().size()) < count) memory().resize(static_cast<size_t>(count));
    next_ = memory().data();
  }
  float* take(int64_t count) {
    float* const place = next_;
    next_ += count;
    return place;
  }
  template <typename Narrow>
  const float* widened(const Tensor& tensor, int64_t count) {
    const Narrow* const from = tensor.const_data_ptr<Narrow>();
    return std::copy(from, from + count, next_), take(count);
  }

 private:
  static std::vector<float>& memory() {
    thread_local std::vector<float> floats;
    return floats;
  }
  float* next_;
};

// T: the type of the tensors. A: the type of the arithmetic.
template <typename T, typename A>
bool run(const StepArguments& a, const StackShape& shape, int64_t threads, cpu::Platform& platform,
         StepResults& results) {
  const bool bf16 = a.options.bf16_weights || std::is_same_v<T, at::BFloat16>;
  const auto storage = bf16 ? cpu::Storage::bf16 : cpu::Storage::same;
  const auto packed = peek_packed<A>(a.weights, shape.batch, storage);
  if (!packed) return false;
  int64_t source_bytes = 0;
  for (const cpu::Bytes& source : packed->sources()) source_bytes += a.frozen ? 0 : source.count;
  const int64_t workers = cpu::step_workers(shape, threads, sizeof(A), storage, source_bytes);
  std::array<int64_t, 2> sizes{shape.batch, shape.output_width()};
  const auto type = a.input.scalar_type();
  const at::IntArrayRef output_sizes = a.input.dim() == 2 ? at::IntArrayRef(sizes) : at::IntArrayRef(sizes).slice(1);
  results.output = at::detail::empty_cpu(output_sizes, type);
  results.h_n = at::detail::empty_cpu(a.h_0.sizes(), type);
  results.c_n = at::detail::empty_cpu(a.c_0.sizes(), type);
  T *const output = results.output.mutable_data_ptr<T>(), *const h_n = results.h_n.mutable_data_ptr<T>(),
           *const c_n = results.c_n.mutable_data_ptr<T>();
  const int64_t input_stride = a.input.dim() == 2 ? a.input.stride(0) : shape.layers[0].input;
  std::optional<Schedule> schedule;
  if constexpr (std::is_same_v<T, A>) {
    const cpu::StepCall<A> call{shape,
                                *packed,
                                a.input.const_data_ptr<A>(),
                                input_stride,
                                a.h_0.const_data_ptr<A>(),
                                a.c_0.const_data_ptr<A>(),
                                output,
                                h_n,
                                c_n,
                                false,
                                !a.frozen};
    schedule = cpu::step(call, workers, platform);
  } else {
    const int64_t inputs = a.input.numel(), outputs = results.output.numel(), hs = a.h_0.numel(), cs = a.c_0.numel();
    Floats floats(inputs + outputs + 2 * (hs + cs));
    const float *const x = floats.widened<T>(a.input, inputs), *const h_0 = floats.widened<T>(a.h_0, hs),
                       *const c_0 = floats.widened<T>(a.c_0, cs);
    float *const y = floats.take(outputs), *const h = floats.take(hs), *const c = floats.take(cs);
    const cpu::StepCall<A> call{shape, *packed, x, shape.layers[0].input, h_0, c_0, y, h, c, bf16, !a.frozen};
    schedule = cpu::step(call, workers, platform);
    std::copy(y, y + outputs, output), std::copy(h, h + hs, h_n), std::copy(c, c + cs, c_n);
  }
  if (!schedule) return false;  // the ordinary call that follows forgets the stack
  results.schedule = *schedule;
  count_hit();
  return true;
}

std::optional<StepResults> run_step(const StepArguments& a, const StackShape& shape, int64_t threads,
                                    cpu::Platform& platform) {
  RECORD_FUNCTION("stacked_lstm_ext::step", {});  // for the profiler, as in eager.cpp
  StepResults results;
  results.shape = &shape;
  bool done = false;
  const auto type = a.input.scalar_type();
  if (type == at::kFloat) {
    done = run<float, float>(a, shape, threads, platform, results);
  } else if (type == at::kDouble) {
    done = run<double, double>(a, shape, threads, platform, results);
  } else if (type == at::kBFloat16) {
    done = run<at::BFloat16, float>(a, shape, threads, platform, results);
  } else if (type == at::kHalf) {
    done = run<at::Half, float>(a, shape, threads, platform, results);
  }
  if (!done) return {};
  return results;
}

// A state without the part of the sequences that are to begin anew. Where none is, the state itself.
Tensor after_reset(const Tensor& state, const Tensor& reset, const StackShape& shape, bool cell) {
  const bool* const begins = reset.const_data_ptr<bool>();
  if (std::none_of(begins, begins + shape.batch, [](bool b) { return b; })) return state;
  Tensor fresh = state.clone();
  char* const data = static_cast<char*>(fresh.mutable_data_ptr());
  const StateLayout layout(shape);
  for (int64_t lane = 0; lane < shape.lanes(); ++lane) {
    const int64_t width = cell ? shape.of_lane(lane).hidden : shape.of_lane(lane).output();
    const int64_t place = cell ? layout.c(lane) : layout.h(lane), bytes = fresh.element_size();
    for (int64_t b = 0; b < shape.batch; ++b) {
      if (begins[b]) std::memset(data + (place + b * width) * bytes, 0, static_cast<size_t>(width * bytes));
    }
  }
  return fresh;
}

}  // namespace

std::optional<StepResults> step(const StepArguments& a, int64_t threads, cpu::Platform& platform) {
  const bool grad_mode = c10::GradMode::is_enabled();
  const auto type = a.input.scalar_type();
  const auto fits = [&](const Tensor& tensor) {
    return is_plain(tensor) && tensor.is_cpu() && !(grad_mode && tensor.requires_grad()) &&
           tensor.scalar_type() == type;
  };
  if (somebody_watches() || at::autocast::is_autocast_enabled(at::kCPU) || !fits(a.input) || !fits(a.h_0) ||
      !fits(a.c_0) || !std::all_of(a.weights.begin(), a.weights.end(), fits)) {
    return {};
  }
  // Rows of the input may lie apart, but not in 16 bits: Floats::widened copies them as one run.
  const bool wide = type == at::kFloat || type == at::kDouble;
  const bool rows_stand = wide ? a.input.dim() > 0 && a.input.stride(-1) == 1 : a.input.is_contiguous();
  if (!rows_stand || !a.h_0.is_contiguous() || !a.c_0.is_contiguous()) return {};
  if (a.options.bf16_weights && type != at::kFloat) return {};
  thread_local StackShape shape;  // keeps its memory
  if (a.options.bidirectional ||
      !prepare({a.input, nullptr, &a.h_0, &a.c_0, a.weights, a.options, true}, Misfit::declines, shape) ||
      shape.batch == 0) {
    return {};
  }

  if (!a.reset) return run_step(a, shape, threads, platform);
  const Tensor& reset = *a.reset;
  if (!is_plain(reset) || !reset.is_cpu() || reset.scalar_type() != at::kBool || !reset.is_contiguous() ||
      reset.sizes() != a.input.sizes().slice(0, a.input.dim() - 1)) {
    return {};
  }
  const Tensor h_0 = after_reset(a.h_0, reset, shape, false), c_0 = after_reset(a.c_0, reset, shape, true);
  return run_step({a.input, h_0, c_0, a.weights, a.options, a.frozen}, shape, threads, platform);
}

}  // namespace stacked_lstm
