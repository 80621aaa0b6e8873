// csrc/torch/cpu_call.h: calls of the CPU kernels with torch's tensors, on torch's threads.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "../cpu/stack_cpu.h"
#include "../driver/call.h"
#include "../stack/wavefront.h"

namespace stacked_lstm {

// Runs the workers of the CPU kernels on torch's pool of threads.
class TorchPlatform : public cpu::Platform {
 public:
  void parallel(int64_t workers, const std::function<void(int64_t)>& member) override;
  bool at_the_same_time() const override;
};

// How many threads a call may use.
int64_t free_threads();

// Calls of this thread run with this schedule; nullopt: with the cheapest one.
void force_cpu_schedule(std::optional<Schedule> schedule);

Results forward_cpu(const Call& call, const std::string& saving);
Gradients backward_cpu(const Call& call, const Kept& kept, const IncomingGradients& incoming, const std::string& saving,
                       bool input_grad, bool weight_grad);

}  // namespace stacked_lstm
