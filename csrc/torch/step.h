// csrc/torch/step.h: one time step of a stack whose packed weights are kept (packed_cache.h), for StackedLSTM.step.
//
// It serves only the plain case, and serves it fast: no dispatcher, no autograd, no allocation but the results. It
// declines every other case. The caller then uses the operator, which also reports what is wrong with a wrong call.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "../cpu/stack_cpu.h"
#include "../stack/options.h"
#include "../stack/wavefront.h"

namespace stacked_lstm {

struct StepArguments {
  const at::Tensor& input;  // (B, I) or (I)
  const at::Tensor& h_0;    // (L, B, output), or without B; or flat (stack/state_layout.h)
  const at::Tensor& c_0;    // (L, B, hidden), likewise
  at::TensorList weights;   // as the operators'
  const StackOptions& options;
  bool frozen;  // kept packed weights are used without comparing them with `weights`
  const at::Tensor* reset =
      nullptr;  // bool (B), or () without B: true puts zeros in the place of a sequence's states; or null
};

struct StepResults {
  at::Tensor output, h_n, c_n;  // shaped like the arguments, output as wide as h
  Schedule schedule;
  const StackShape* shape;  // of the calling thread, until its next step
};

// Returns nothing if a gradient may be wanted, a mode or subclass has to see the call, the arguments do not fit each
// other or are not contiguous, or the weights are not kept (yet) or have changed since they were packed.
std::optional<StepResults> step(const StepArguments& arguments, int64_t threads, cpu::Platform& platform);

}  // namespace stacked_lstm
