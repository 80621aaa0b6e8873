// csrc/torch/step.h: one time step of a stack whose packed weights are kept (packed_cache.h), for StackedLSTM.step.
//
// It serves the plain case alone, and that one quickly: no dispatcher, no autograd, no allocation but the results. For
// any other it declines, and its caller goes by the operator, which also says what is wrong with a wrong call.
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
  const at::Tensor& h_0;    // (L, B, P or H) or (L, P or H)
  const at::Tensor& c_0;    // (L, B, H) or (L, H)
  at::TensorList weights;   // as the operators'
  const StackOptions& options;
  bool frozen;  // kept packed weights are taken on trust
};

struct StepResults {
  at::Tensor output, h_n, c_n;  // shaped like the arguments, output as wide as h
  Schedule schedule;
  const StackShape* shape;  // of the calling thread, until its next step
};

// Nothing where a gradient may be wanted, a mode or subclass wants to see the call, the arguments do not fit each other
// or lie in memory otherwise than contiguously, or the weights are not kept (yet), or have changed since they were packed.
std::optional<StepResults> step(const StepArguments& arguments, int64_t threads, cpu::Platform& platform);

}  // namespace stacked_lstm
