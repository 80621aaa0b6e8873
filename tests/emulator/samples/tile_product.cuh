// tests/emulator/samples/tile_product.cuh: a product of bfloat16 matrices on the tensor cores, fed by cp.async.
//
//   slot      0      1      2      0    ...     Three slots of shared memory: while tile k is multiplied, k + 1 and
//   tile   ── 0 ──── 1 ──── 2 ──── 3 ──         k + 2 are on their way. Copies are counted by groups, one a tile.
//
// Sizes need not be multiples of a tile: what lies outside the matrices arrives as zeros.
#pragma once

#include "../../../csrc/cuda/primitives.cuh"
#include "../../../csrc/stack/number.h"

namespace stacked_lstm::cuda::samples {

struct TileProduct {
  static constexpr int kRows = 32, kColumns = 16, kDepth = 16;  // of a block's tile
  static constexpr int kSlots = 3, kThreads = kRows / 16 * 32;  // a warp has 16 rows
  static constexpr int kStride = kDepth + 8;                    // eight rows of 48 bytes lie in different banks
  static constexpr int kCopies = (kRows + kColumns) * 2;        // of 16 bytes, in a tile of both matrices
  alignas(16) bfloat16 a[kSlots][kRows][kStride];
  alignas(16) bfloat16 b[kSlots][kColumns][kStride];
};

// Element (row, depth .. depth + 7) of a matrix of `rows` rows of `depth_end` elements to shared memory.
__device__ __forceinline__ void copy_eight(bfloat16* to, const bfloat16* matrix, int64_t stride, int row, int rows,
                                           int depth, int depth_end) {
  const bool inside = row < rows && depth < depth_end;
  const int left = depth_end - depth, elements = !inside ? 0 : left < 8 ? left : 8;
  const bfloat16* from = inside ? matrix + row * stride + depth : matrix;
  if (elements == 8) {
    copy_async<16>(shared_address(to), from);
  } else {
    copy_async<16>(shared_address(to), from, elements * static_cast<int>(sizeof(bfloat16)));
  }
}

// c (m, n) = a (m, k) · b (n, k)ᵀ; rows of a and b are `stride` elements long, a multiple of 8 and at least k.
__global__ void __launch_bounds__(TileProduct::kThreads)
    tile_product(const bfloat16* a, const bfloat16* b, float* c, int m, int n, int k, int stride) {
  using S = TileProduct;
  S& shared = dynamic_shared<S>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int first_row = static_cast<int>(blockIdx.x) * S::kRows,
            first_column = static_cast<int>(blockIdx.y) * S::kColumns;
  const int tiles = (k + S::kDepth - 1) / S::kDepth;

  const auto fetch = [&](int tile) {
    const int slot = tile % S::kSlots;
    for (int copy = thread; copy < S::kCopies; copy += S::kThreads) {
      const int row = copy / 2, depth = copy % 2 * 8;
      if (row < S::kRows) {
        copy_eight(&shared.a[slot][row][depth], a, stride, first_row + row, m, tile * S::kDepth + depth, k);
      } else {
        const int column = row - S::kRows;
        copy_eight(&shared.b[slot][column][depth], b, stride, first_column + column, n, tile * S::kDepth + depth, k);
      }
    }
  };
  for (int tile = 0; tile < S::kSlots - 1; ++tile) {
    if (tile < tiles) fetch(tile);
    copy_async_commit();  // even of nothing: group g is tile g, always
  }

  float sum[2][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    copy_async_wait<S::kSlots - 2>();  // this thread's copies of `tile` are in shared memory, …
    // … and after the barrier everybody's are. Also everybody has read tile - 1, whose slot is fetched into next.
    block_barrier();
    if (tile + S::kSlots - 1 < tiles) fetch(tile + S::kSlots - 1);
    copy_async_commit();
    const int slot = tile % S::kSlots;
    uint32_t a_part[4], b_part[4];
    load_matrix_x4(a_part, shared_address(&shared.a[slot][warp * 16 + lane % 16][lane / 16 * 8]));
    load_matrix_x4(b_part, shared_address(&shared.b[slot][lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t b_half[2] = {b_part[2 * half], b_part[2 * half + 1]};
      mma_bf16(sum[half], a_part, b_half);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n_of_4 = 0; n_of_4 < 4; ++n_of_4) {
      const int row = first_row + warp * 16 + lane / 4 + n_of_4 / 2 * 8;
      const int column = first_column + half * 8 + lane % 4 * 2 + n_of_4 % 2;
      if (row < m && column < n) c[row * n + column] = sum[half][n_of_4];
    }
  }
}

}  // namespace stacked_lstm::cuda::samples
