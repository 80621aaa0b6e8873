// tests/emulator/samples/chunk_flags.cuh: layers of blocks hand chunks on through global memory, with a flag a producer.
//
//   layer 0   blocks 0 1 ──chunk, flag──> layer 1   blocks 0 1 ──chunk, flag──> layer 2 ...
//
// Every block of a layer writes its part of a chunk, and then its own flag: how many chunks it has finished. A block
// of the layer above reads all parts, so it waits for all flags. Chunks are never overwritten: nobody waits for readers.
#pragma once

#include "../../../csrc/cuda/primitives.cuh"

namespace stacked_lstm::cuda::samples {

struct ChunkFlags {
  static constexpr int kProducers = 2, kThreads = 64;
  static constexpr int kChunk = kProducers * kThreads;  // elements: one a thread of a layer's blocks
};

// data: (layers + 1, chunks, kChunk), of which the first is given. flags: (layers, kProducers), zero at the launch.
// A layer computes y[i] = x[i] / 2 + x[kChunk - 1 - i]: half of it comes from the other producer.
__global__ void __launch_bounds__(ChunkFlags::kThreads) hand_chunks_on(float* data, uint32_t* flags, int chunks) {
  using S = ChunkFlags;
  const int thread = static_cast<int>(threadIdx.x);
  const int layer = static_cast<int>(blockIdx.x) / S::kProducers,
            producer = static_cast<int>(blockIdx.x) % S::kProducers;
  const float* below = data + layer * chunks * S::kChunk;
  float* mine = data + (layer + 1) * chunks * S::kChunk;
  const int unit = producer * S::kThreads + thread;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if (layer > 0) {
      if (thread < S::kProducers) {
        const uint32_t* flag = flags + (layer - 1) * S::kProducers + thread;
        // The flag's acquire makes the chunk that its producer wrote visible to this thread, …
        while (load_acquire<Scope::device>(flag) <= static_cast<uint32_t>(chunk)) nanosleep(20);
      }
      block_barrier();  // … and the barrier to all threads of the block, who read it next.
    }
    // From L2, never by the read-only path: another block wrote this during the launch.
    const float x = load_l2(below + chunk * S::kChunk + unit);
    const float other = load_l2(below + chunk * S::kChunk + S::kChunk - 1 - unit);
    stored(mine + chunk * S::kChunk + unit) = x / 2 + other;
    block_barrier();  // all threads have written their element of the chunk: thread 0's release covers them all
    if (thread == 0) {
      // What the block wrote is visible to who reads this number with acquire.
      store_release<Scope::device>(flags + layer * S::kProducers + producer, static_cast<uint32_t>(chunk + 1));
    }
  }
}

}  // namespace stacked_lstm::cuda::samples
