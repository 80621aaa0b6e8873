// csrc/diagonal/diagonal.h: the diagonal schedule as a driver over ATen, on the CPU or on a GPU. See driver.h.
#pragma once

#include <optional>

#include "../driver/call.h"
#include "../stack/wavefront.h"

namespace stacked_lstm::diagonal {

// What a run consists of. Products are calls of a (batched) matrix product; launches are calls of a kernel of gates.h.
struct DiagonalCounts {
  Diagonals schedule;
  int64_t launches = 0;
  int64_t products = 0;
};

// The schedule, with the chunk of force_chunk if there is one.
Diagonals plan(const StackShape& shape, int64_t accumulator_bytes);

// Calls of this thread use chunks of `steps` steps; nullopt: as planned.
void force_chunk(std::optional<int64_t> steps);

// The counts of a forward or backward pass, without running it.
DiagonalCounts predict(const StackShape& shape, const StackOptions& options, Saving saving, int64_t accumulator_bytes,
                       bool backward, bool weight_grad, bool input_grad);

Results forward(const Call& call, DiagonalCounts& counts);

Gradients backward(const Call& call, const Kept& kept, const IncomingGradients& incoming, bool input_grad,
                   bool weight_grad, DiagonalCounts& counts);

}  // namespace stacked_lstm::diagonal
