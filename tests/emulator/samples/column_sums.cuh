// tests/emulator/samples/column_sums.cuh: sums of a matrix's columns, in the same order whatever the schedule.
//
//   slice 0   ┌───────┐  a block sums a slice of the rows of 32 columns: a warp every fourth row, the warps in order
//   slice 1   ├───────┤  ──> partial sums in global memory; a counter of the blocks that are done
//   slice 2   └───────┘  the block that finds itself last adds the slices, in order
//
// Which block is last is chance; what it adds, and in which order, is not: no float is ever added atomically.
#pragma once

#include "../../../csrc/cuda/primitives.cuh"

namespace stacked_lstm::cuda::samples {

struct ColumnSums {
  static constexpr int kWarps = 4, kThreads = kWarps * 32;
  float partial[kWarps][32];
  bool last;
};

// Grid: (tiles of 32 columns, slices). partial: (slices, columns). done: one a tile, zero at the launch.
__global__ void __launch_bounds__(ColumnSums::kThreads)
    column_sums(const float* __restrict__ in, float* partial, uint32_t* done, float* out, int rows, int columns) {
  using S = ColumnSums;
  S& shared = static_shared<S>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int slices = static_cast<int>(gridDim.y), slice = static_cast<int>(blockIdx.y);
  const int column = static_cast<int>(blockIdx.x) * 32 + lane;
  const int rows_of_slice = (rows + slices - 1) / slices, first = slice * rows_of_slice;
  const int end = first + rows_of_slice < rows ? first + rows_of_slice : rows;
  float sum = 0;
  if (column < columns) {
    for (int row = first + warp; row < end; row += S::kWarps) sum += in[row * columns + column];
  }
  shared.partial[warp][lane] = sum;
  block_barrier();  // the warps' sums are there for the first warp to add
  if (warp == 0 && column < columns) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) total += shared.partial[w][lane];
    stored(partial + slice * columns + column) = total;
  }
  block_barrier();  // the block's partial sums are written: thread 0's fence covers them
  if (thread == 0) {
    fence<Scope::device>();  // the partial sums are visible to the block that sees the count below
    shared.last = atomic_add(done + blockIdx.x, 1u) + 1 == gridDim.y;
    fence<Scope::device>();  // who sees the last count sees the partial sums that were written before all counts
  }
  block_barrier();  // thread 0's verdict, and what its fence made visible, for all threads
  if (shared.last && warp == 0 && column < columns) {
    float total = 0;
    for (int s = 0; s < slices; ++s) total += load_l2(partial + s * columns + column);
    out[column] = total;
  }
}

}  // namespace stacked_lstm::cuda::samples
