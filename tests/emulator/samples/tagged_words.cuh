// tests/emulator/samples/tagged_words.cuh: blocks exchange a vector every step; each value travels with its step's number.
//
//   a word of 64 bits:   step (32) | value (32)        one access, which the memory model keeps whole
//
// The tag says that the value is there: no flag, no fence. A step takes one crossing of L2.
//
// Hazard: words have two places, for even and odd steps. A block may write step t + 2 over step t because it has read
// all words of step t + 1, and each was written after its block had read all of step t.
#pragma once

#include "../../../csrc/cuda/primitives.cuh"

namespace stacked_lstm::cuda::samples {

struct TaggedWords {
  static constexpr int kBlocks = 3, kUnits = 32, kWidth = kBlocks * kUnits;  // units of a block; of all
  float value[2][kWidth];
};

__device__ __forceinline__ uint64_t tagged(uint32_t step, float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint64_t>(step) << 32 | bits;
}

__device__ __forceinline__ float value_of(uint64_t word) {
  const uint32_t bits = static_cast<uint32_t>(word);
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// v(t)[i] = (v(t-1)[i - 1] + v(t-1)[i + 33]) / 2 + t, indices modulo kWidth. words: (2, kWidth), holding v(0) with tag 0
// in the first half, and tags that are never waited for in the other. out: v(steps).
__global__ void __launch_bounds__(TaggedWords::kUnits) exchange_tagged(uint64_t* words, float* out, int steps) {
  using S = TaggedWords;
  S& shared = static_shared<S>();
  const int thread = static_cast<int>(threadIdx.x), unit = static_cast<int>(blockIdx.x) * S::kUnits + thread;
  for (int step = 1; step <= steps; ++step) {
    const int from = (step - 1) % 2, to = step % 2;
#pragma unroll
    for (int part = 0; part < S::kBlocks; ++part) {
      const int index = part * S::kUnits + thread;
      uint64_t word;
      do {
        word = load_relaxed<Scope::device>(words + from * S::kWidth + index);
      } while (word >> 32 != static_cast<uint64_t>(step - 1));
      shared.value[from][index] = value_of(word);
    }
    // All threads have read the words of the last step: the values are here for the sums below, and where the words
    // stood the step after this one may be written.
    block_barrier();
    const float* v = shared.value[from];
    const float next =
        (v[(unit + S::kWidth - 1) % S::kWidth] + v[(unit + 33) % S::kWidth]) / 2 + static_cast<float>(step);
    if (step < steps) {
      store_relaxed<Scope::device>(words + to * S::kWidth + unit, tagged(static_cast<uint32_t>(step), next));
    } else {
      out[unit] = next;
    }
  }
}

}  // namespace stacked_lstm::cuda::samples
