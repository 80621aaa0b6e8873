// csrc/driver/gate_kernels.cpp: see gate_kernels.h.
#include "gate_kernels.h"

namespace stacked_lstm::driver {
namespace {

const gates::GateTable* replaced_host_kernels = nullptr;

}  // namespace

void use_host_gate_kernels(const gates::GateTable* table) { replaced_host_kernels = table; }

const gates::GateTable& gate_kernels(const at::Device& device) {
#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
  if (device.is_cuda()) return gates::cuda_gate_kernels();
#endif
  TORCH_CHECK(device.is_cpu(), "this build of stacked_lstm_ext has no kernels for ", device);
  return replaced_host_kernels ? *replaced_host_kernels : gates::host_kernels();
}

}  // namespace stacked_lstm::driver
