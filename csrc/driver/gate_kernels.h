// csrc/driver/gate_kernels.h: which kernels of gates.h run on the tensors of a device.
#pragma once

#include <ATen/core/Tensor.h>

#include "../cuda/gates.h"

namespace stacked_lstm::driver {

// The kernels for tensors of this device.
const gates::GateTable& gate_kernels(const at::Device& device);

// For tests: replaces the kernels for the CPU; null restores them.
void use_host_gate_kernels(const gates::GateTable* table);

}  // namespace stacked_lstm::driver
