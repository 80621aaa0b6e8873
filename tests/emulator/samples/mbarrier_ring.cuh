// tests/emulator/samples/mbarrier_ring.cuh: a ring of tiles between warps, on mbarriers: full and empty, one of each a slot.
//
//   producer   wait empty ── cp.async into the slot ── the copies' completion arrives at full
//   consumers  wait full  ── read the slot          ── one lane a warp arrives at empty
//
// The n-th use of a slot is phase n of both of its barriers: a wait names the phase by its parity, n % 2.
#pragma once

#include "../../../csrc/cuda/primitives.cuh"

namespace stacked_lstm::cuda::samples {

struct MbarrierRing {
  static constexpr int kSlots = 3, kTile = 64, kConsumerWarps = kTile / 32, kThreads = 32 + kTile;
  float slot[kSlots][kTile];
  uint64_t full[kSlots], empty[kSlots];
};

// out: every tile of `in`, turned round. `count` elements; what is missing in the last tile arrives as zeros.
__global__ void __launch_bounds__(MbarrierRing::kThreads)
    turn_tiles_round_async(const float* __restrict__ in, float* __restrict__ out, int count) {
  using S = MbarrierRing;
  S& shared = dynamic_shared<S>();
  const int thread = static_cast<int>(threadIdx.x), tiles = (count + S::kTile - 1) / S::kTile;
  if (thread < S::kSlots) {
    mbarrier_init(shared_address(&shared.full[thread]), 32);  // every lane of the producer arrives
    mbarrier_init(shared_address(&shared.empty[thread]), S::kConsumerWarps);
  }
  block_barrier();  // the barriers are initialised, for all threads to use
  if (thread < 32) {
    for (int tile = 0; tile < tiles; ++tile) {
      const int slot = tile % S::kSlots, use = tile / S::kSlots;
      // The consumers have read what was in the slot: it may be copied into. At its first use nothing was, and nothing
      // is waited for: a new barrier counts as past a phase of parity 1.
      mbarrier_wait(shared_address(&shared.empty[slot]), static_cast<uint32_t>(use + 1) % 2);
#pragma unroll
      for (int half = 0; half < S::kTile / 32; ++half) {
        const int at = half * 32 + thread, index = tile * S::kTile + at;
        const bool inside = index < count;
        const uint32_t to = shared_address(&shared.slot[slot][at]);
        if (inside) {
          copy_async<4>(to, in + index);
        } else {
          copy_async<4>(to, in, 0);
        }
      }
      // Once this lane's copies have landed, it has arrived: the slot may be read by who waits for `full`.
      copy_async_arrive(shared_address(&shared.full[slot]));
    }
    // The block's memory must not go away under a copy. The consumers wait for all of them, and the block lives as
    // long as they do.
  } else {
    const int at = thread - 32;
    for (int tile = 0; tile < tiles; ++tile) {
      const int slot = tile % S::kSlots, use = tile / S::kSlots;
      mbarrier_wait(shared_address(&shared.full[slot]), static_cast<uint32_t>(use) % 2);  // the tile has landed
      out[tile * S::kTile + at] = shared.slot[slot][S::kTile - 1 - at];
      warp_barrier();  // all lanes have read the slot before one arrives for all of them
      if (thread % 32 == 0) mbarrier_arrive(shared_address(&shared.empty[slot]));  // it may be copied into again
    }
  }
}

}  // namespace stacked_lstm::cuda::samples
