// tests/emulator/samples/cluster_recurrence.cuh: a recurrent layer on a cluster; h is pushed into every block's memory.
//
//   h(t) = squash(x(t) + W·h(t-1)),  squash(v) = v / (1 + |v|)
//
// A block has 8 of the 32 units, a warp 4 of them, for all rows of the batch. After a step each warp pushes its 4 units
// to every block of the cluster, its own too (st.async). A barrier in the receiving block counts the bytes.
//
// Hazard: h has two buffers. A block may overwrite h(t-1) only because every peer's h(t) has arrived here, and a peer's
// warp sends h(t) only after it has read h(t-1). A third step in flight would break this.
// The last step's h is nobody's input: it is not pushed, since a peer may have exited.
#pragma once

#include "../../../csrc/cuda/primitives.cuh"

namespace stacked_lstm::cuda::samples {

struct ClusterRecurrence {
  static constexpr int kBlocks = 4, kWarps = 2, kThreads = kWarps * 32;
  static constexpr int kBatch = 8, kUnitsOfWarp = 4, kUnits = kWarps * kUnitsOfWarp, kHidden = kBlocks * kUnits;
  static constexpr uint32_t kBytes = kBatch * kHidden * sizeof(float);  // what a step brings to each block
  static_assert(kBatch * kUnitsOfWarp == 32 && kBatch * kBlocks == 32, "a lane has one h, and pushes one word of four");
  alignas(16) float h[2][kBatch][kHidden];  // h(t-1) of step t in h[t % 2]
  alignas(16) float staged[2][kWarps][kBatch][kUnitsOfWarp];
  alignas(8) uint64_t arrived[2];
};

// weight: (kHidden, kHidden). x, out: (steps, kBatch, kHidden). One cluster; h(-1) is zero.
__global__ void __launch_bounds__(ClusterRecurrence::kThreads)
    cluster_recurrence(const float* weight, const float* x, float* out, int steps) {
  using S = ClusterRecurrence;
  S& shared = dynamic_shared<S>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int first_unit = static_cast<int>(cluster_rank()) * S::kUnits + warp * S::kUnitsOfWarp;  // of the warp
  const int row = lane / S::kUnitsOfWarp, unit = first_unit + lane % S::kUnitsOfWarp;            // of the thread

  for (int n = thread; n < S::kBatch * S::kHidden; n += S::kThreads) shared.h[0][n / S::kHidden][n % S::kHidden] = 0;
  if (thread < 2) mbarrier_init(shared_address(&shared.arrived[thread]), 1);
  mbarrier_init_fence();  // the initialised barriers are visible to what arrives from the cluster, …
  cluster_barrier();      // … which arrives after this only; and h(-1) = 0 is there for all threads of the block.

  for (int t = 0; t < steps; ++t) {
    const int now = t % 2, next = 1 - now;
    const bool last = t + 1 == steps;
    // The phase of `next` ends when this has been said and as many bytes have come; in which order is all the same.
    if (thread == 0 && !last) mbarrier_arrive_expect(shared_address(&shared.arrived[next]), S::kBytes);
    // Every peer's share of h(t-1) has arrived in this block.
    if (t > 0) mbarrier_wait(shared_address(&shared.arrived[now]), static_cast<uint32_t>((t - 1) / 2) % 2);

    float v = x[(t * S::kBatch + row) * S::kHidden + unit];
#pragma unroll 4
    for (int j = 0; j < S::kHidden; ++j) v += load_readonly(weight + unit * S::kHidden + j) * shared.h[now][row][j];
    const float h = v / (1 + fabsf(v));
    out[(t * S::kBatch + row) * S::kHidden + unit] = h;

    shared.staged[now][warp][row][lane % S::kUnitsOfWarp] = h;
    // The lanes' h are staged, for each lane to read four of them. The staged h of the step before have been read by
    // all lanes, and may be overwritten in the next step: they have two places as well.
    warp_barrier();
    if (!last) {
      const int pushed_row = lane % S::kBatch;
      const uint32_t peer = static_cast<uint32_t>(lane / S::kBatch);
      const float4 word = *reinterpret_cast<const float4*>(shared.staged[now][warp][pushed_row]);
      store_async(peer_address(shared_address(&shared.h[next][pushed_row][first_unit]), peer), word,
                  peer_address(shared_address(&shared.arrived[next]), peer));
    }
  }
}

}  // namespace stacked_lstm::cuda::samples
