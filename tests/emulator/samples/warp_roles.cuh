// tests/emulator/samples/warp_roles.cuh: one warp brings tiles, two work on them; named barriers between them.
//
//   producer   wait empty ── write slot ── arrive full ──────────>
//   consumers                              wait full ── read slot ── arrive empty ──>
//
// Nobody waits who has nothing to wait for: who only has news arrives, and goes on. As many arrive at `empty` as are
// waited for, so that no barrier is half full when the block exits.
#pragma once

#include "../../../csrc/cuda/primitives.cuh"

namespace stacked_lstm::cuda::samples {

struct WarpRoles {
  static constexpr int kSlots = 2, kTile = 64, kThreads = 32 + kTile;
  static constexpr int kFull = 1, kEmpty = kFull + kSlots;  // the first of the barriers' numbers; 0 is the block's
  float slot[kSlots][kTile];
};

// out: every tile of `in`, turned round. `count` elements; what is missing in the last tile counts as zero.
__global__ void __launch_bounds__(WarpRoles::kThreads)
    turn_tiles_round(const float* __restrict__ in, float* __restrict__ out, int count) {
  using S = WarpRoles;
  S& shared = dynamic_shared<S>();
  const int thread = static_cast<int>(threadIdx.x), tiles = (count + S::kTile - 1) / S::kTile;
  if (thread < 32) {
    for (int tile = 0; tile < tiles; ++tile) {
      const int slot = tile % S::kSlots;
      // The consumers have read the tile that was in this slot: it may be written again.
      if (tile >= S::kSlots) named_barrier_sync(S::kEmpty + slot, S::kThreads);
#pragma unroll
      for (int half = 0; half < S::kTile / 32; ++half) {
        const int at = half * 32 + thread, index = tile * S::kTile + at;
        shared.slot[slot][at] = index < count ? in[index] : 0.0f;
      }
      named_barrier_arrive(S::kFull + slot, S::kThreads);  // the slot, just written, may be read by the consumers
    }
  } else {
    const int at = thread - 32;
    for (int tile = 0; tile < tiles; ++tile) {
      const int slot = tile % S::kSlots;
      named_barrier_sync(S::kFull + slot, S::kThreads);  // what the producer wrote into the slot is here to be read
      out[tile * S::kTile + at] = shared.slot[slot][S::kTile - 1 - at];
      // The slot has been read, and may be written by the producer.
      if (tile + S::kSlots < tiles) named_barrier_arrive(S::kEmpty + slot, S::kThreads);
    }
  }
}

}  // namespace stacked_lstm::cuda::samples
