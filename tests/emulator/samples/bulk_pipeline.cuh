// tests/emulator/samples/bulk_pipeline.cuh: two blocks as a pipeline, whole tiles moved by the copy engine.
//
//   global ──bulk_load──> block 0: in, work, out ──bulk_push──> block 1: in, work, out ──bulk_store──> global
//                              loaded              arrived ──>          <── free
//
// Block 0 turns a tile round, block 1 adds to every element the tile's first. Two slots of each, used in turn; the n-th
// use of a slot is phase n of its barriers.
//
// Hazards. Block 0 may write `out` again when its push has read it and block 1 has read what was pushed: `free` tells
// of both. Block 1 may write `out` again when its store has read it: thread 0 waits for that before a block barrier.
#pragma once

#include "../../../csrc/cuda/primitives.cuh"

namespace stacked_lstm::cuda::samples {

struct BulkPipeline {
  static constexpr int kTile = 64, kThreads = kTile, kSlots = 2;
  static constexpr uint32_t kBytes = kTile * sizeof(float);
  alignas(128) float in[kSlots][kTile];
  alignas(128) float out[kSlots][kTile];
  alignas(8) uint64_t full[kSlots];  // a tile is in `in`: loaded in block 0, pushed in block 1
  alignas(8) uint64_t free[kSlots];  // block 0's: what it pushed from this slot has been read
};

// One cluster of two blocks. in, out: `tiles` whole tiles, aligned to 16 bytes.
__global__ void __launch_bounds__(BulkPipeline::kThreads) bulk_pipeline(const float* in, float* out, int tiles) {
  using S = BulkPipeline;
  S& shared = dynamic_shared<S>();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < S::kSlots) {
    mbarrier_init(shared_address(&shared.full[thread]), 1);
    mbarrier_init(shared_address(&shared.free[thread]), 1);
  }
  mbarrier_init_fence();  // the initialised barriers are visible to the copy engine and to the other block, …
  cluster_barrier();      // … neither of which gets to see one before this.

  if (cluster_rank() == 0) {
    const auto load = [&](int tile) {
      const uint32_t full = shared_address(&shared.full[tile % S::kSlots]);
      mbarrier_arrive_expect(full, S::kBytes);
      bulk_load(shared_address(shared.in[tile % S::kSlots]), in + tile * S::kTile, S::kBytes, full);
    };
    if (thread == 0) {
      for (int tile = 0; tile < S::kSlots && tile < tiles; ++tile) load(tile);
    }
    for (int tile = 0; tile < tiles; ++tile) {
      const int slot = tile % S::kSlots, use = tile / S::kSlots;
      mbarrier_wait(shared_address(&shared.full[slot]), static_cast<uint32_t>(use) % 2);  // the tile is loaded
      const float value = shared.in[slot][S::kTile - 1 - thread];
      // The push from this slot's `out` has been read at the other end: `out` and the peer's `in` may be written. At
      // the first use nothing is waited for: a new barrier counts as past a phase of parity 1.
      mbarrier_wait(shared_address(&shared.free[slot]), static_cast<uint32_t>(use + 1) % 2);
      shared.out[slot][thread] = value;
      async_proxy_fence();  // what this thread wrote to `out` is visible to the copy engine, …
      block_barrier();      // … now of all threads; and all have read `in`, which may be loaded into.
      if (thread == 0) {
        bulk_push(peer_address(shared_address(shared.in[slot]), 1), shared_address(shared.out[slot]), S::kBytes,
                  peer_address(shared_address(&shared.full[slot]), 1));
        if (tile + S::kSlots < tiles) load(tile + S::kSlots);
      }
    }
  } else {
    if (thread == 0) {
      for (int slot = 0; slot < S::kSlots && slot < tiles; ++slot) {
        mbarrier_arrive_expect(shared_address(&shared.full[slot]), S::kBytes);
      }
    }
    for (int tile = 0; tile < tiles; ++tile) {
      const int slot = tile % S::kSlots, use = tile / S::kSlots;
      mbarrier_wait(shared_address(&shared.full[slot]), static_cast<uint32_t>(use) % 2);  // the pushed tile is here
      shared.out[slot][thread] = shared.in[slot][thread] + shared.in[slot][0];
      async_proxy_fence();  // what this thread wrote to `out` is visible to the copy engine, …
      bulk_wait<0>();       // thread 0's store of the tile before has read the other slot's `out`; others have none
      // … now of all threads. All have read `in`; and after it all may write the other slot's `out`.
      block_barrier();
      if (thread == 0) {
        if (tile + S::kSlots < tiles) {
          // Expected before the peer is told that it may push.
          mbarrier_arrive_expect(shared_address(&shared.full[slot]), S::kBytes);
          mbarrier_arrive_peer(peer_address(shared_address(&shared.free[slot]), 0));
        }
        bulk_store(out + tile * S::kTile, shared_address(shared.out[slot]), S::kBytes);
        bulk_commit();  // a group of its own, for bulk_wait
      }
    }
    bulk_wait<0>();  // thread 0's last store has read shared memory, which goes when the block does
  }
  cluster_barrier();  // block 0's memory is there until its pushes have been read from it, which block 1 has seen
}

}  // namespace stacked_lstm::cuda::samples
