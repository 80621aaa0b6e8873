// benchmarks/occupancy.cu: how many clusters of 1 … 16 blocks this GPU holds at once, where a multiprocessor has room for one
// block alone, as it has for one of the persistent kernels.
//
//   nvcc -std=c++20 -arch=sm_90a -Icsrc benchmarks/occupancy.cu -o occupancy && ./occupancy
//
// prints a JSON object a line for each size of a cluster: how many of them fit, and how many blocks that is.
//
// The blocks of a cluster lie in one GPC, and not every GPC of a chip has as many multiprocessors as its data sheet says. So
// the number of large clusters is a property of the chip, which the planner (csrc/persistent/planner.cpp) asks the driver for.
#include <cstdint>
#include <cstdio>

#include "cuda/launch.cuh"
#include "cuda/primitives.cuh"
#include "persistent/kernels.h"

namespace stacked_lstm::occupancy {

constexpr int kThreads = persistent::kMaxWarps * persistent::kWarpThreads;

// Never launched. It has the threads of a persistent kernel's block, and as much shared memory as is asked for.
__global__ void __launch_bounds__(kThreads, 1) probe(float* out) {
  float (&shared)[kThreads] = cuda::dynamic_shared<float[kThreads]>();
  shared[threadIdx.x] = out[threadIdx.x];
  cuda::block_barrier();
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

// Shared memory of a block, in bytes, of which a multiprocessor holds one: more than half of what it has.
size_t more_than_half() {
#if defined(__CUDACC__)
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) != cudaSuccess) {
    return 0;
  }
  return static_cast<size_t>(bytes) / 2 + 1024;
#else
  return 116 << 10;
#endif
}

int run() {
  cuda::LaunchConfig config;
  config.block = dim3(kThreads, 1, 1);
  config.shared_bytes = more_than_half();
  if (config.shared_bytes == 0) {
    std::fprintf(stderr, "the device does not say how much shared memory a multiprocessor has\n");
    return 1;
  }
  for (int size = 1; size <= persistent::kMaxCluster; ++size) {
    config.cluster = size > 1 ? static_cast<unsigned>(size) : 0;  // 0: no cluster
    config.grid = dim3(static_cast<unsigned>(size), 1, 1);
    const auto blocks = static_cast<unsigned long long>(cuda::capacity(config, probe));
    std::printf("{\"cluster\": %d, \"clusters\": %llu, \"blocks\": %llu, \"shared_bytes\": %zu}\n", size,
                blocks / static_cast<unsigned>(size), blocks, config.shared_bytes);
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace stacked_lstm::occupancy

int main() { return stacked_lstm::occupancy::run(); }
