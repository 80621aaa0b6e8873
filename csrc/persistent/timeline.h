// csrc/persistent/timeline.h: which blocks work on what, and when, as a plan of the persistent kernels is predicted to
// run. No CUDA, no torch.
#pragma once

#include <cstdint>
#include <vector>

#include "../cuda/device.h"
#include "../stack/stack.h"
#include "plan.h"

namespace stacked_lstm::persistent {

// A chunk of a lane for one batch group, on the blocks that own the lane. Chunks are numbered in the order in which the
// lane takes them.
struct Work {
  int64_t pass, batch_group, layer, direction, chunk;
  int64_t first_block, blocks;
  int64_t needs_layer, needs_chunks;  // this many chunks of each direction of this layer, same batch group; -1: nothing
  double start_us, end_us;
};

// All work of a plan, in an order in which each entry comes after what it needs. A lane's blocks take their entries in
// this order.
std::vector<Work> timeline(const Plan& plan, const StackShape& shape, const Costs& costs);

}  // namespace stacked_lstm::persistent
