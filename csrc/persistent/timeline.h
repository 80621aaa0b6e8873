// csrc/persistent/timeline.h: who works when, as a plan of the persistent kernels is predicted to run. No CUDA, no torch.
#pragma once

#include <cstdint>
#include <vector>

#include "../cuda/device.h"
#include "../stack/stack.h"
#include "plan.h"

namespace stacked_lstm::persistent {

// A chunk of a lane for one batch group, on the blocks that own the lane. Chunks are counted as the lane takes them.
struct Work {
  int64_t pass, batch_group, layer, direction, chunk;
  int64_t first_block, blocks;
  int64_t needs_layer, needs_chunks;  // so many chunks of every direction of that layer, same batch group; -1: none
  double start_us, end_us;
};

// All of it, in an order in which each entry stands after what it needs. A lane's blocks take theirs in this order.
std::vector<Work> timeline(const Plan& plan, const StackShape& shape, const Costs& costs);

}  // namespace stacked_lstm::persistent
