// tests/emulator/samples/row_shares.cuh: every element's share of its row's sum: a reduction over a block.
//
//   lane sums  ──shuffles──>  one sum a warp  ──shared memory──>  the row's sum, in every thread
//
// Hazard: a block goes on to its next row while some warps still read the sums of the last one. The sums have two
// places, taken in turn: the barrier of row r + 1 stands between the reads of row r and the writes of row r + 2.
#pragma once

#include "../../../csrc/cuda/primitives.cuh"

namespace stacked_lstm::cuda::samples {

struct RowShares {
  static constexpr int kWarps = 3, kThreads = kWarps * 32;
  float warp_sum[2][kWarps];
};

__global__ void __launch_bounds__(RowShares::kThreads)
    row_shares(const float* __restrict__ in, float* __restrict__ out, int rows, int columns) {
  RowShares& shared = static_shared<RowShares>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int place = 0;
  for (int row = static_cast<int>(blockIdx.x); row < rows; row += static_cast<int>(gridDim.x), place ^= 1) {
    float sum = 0;
    for (int column = thread; column < columns; column += RowShares::kThreads) sum += in[row * columns + column];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += shuffle_xor(kFullWarp, sum, distance);
    if (lane == 0) shared.warp_sum[place][warp] = sum;
    block_barrier();  // the warps' sums, just written, are there for every thread to read
    float total = 0;
#pragma unroll
    for (int w = 0; w < RowShares::kWarps; ++w) total += shared.warp_sum[place][w];
    for (int column = thread; column < columns; column += RowShares::kThreads) {
      out[row * columns + column] = in[row * columns + column] / total;
    }
  }
}

}  // namespace stacked_lstm::cuda::samples
