// csrc/device.h: a GPU as the planner of the persistent kernel sees it: limits, rates and what waiting costs. No CUDA.
//
// Limits and rates are published. SMs, L2, clocks (boost), memory and dense tensor rates: NVIDIA's A100 white paper and data
// sheet (80 GB SXM), H100 white paper (SXM5), H200 and L4 data sheets, Ada white paper (RTX 4090), HGX B200 data sheet.
// Registers and shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". A rate of
// multiply-adds a clock is the dense tensor rate over 2 · SMs · clock.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>

namespace stacked_lstm {

struct Device {
  const char* name;
  const char* full_name;
  int major, minor;
  int64_t sms;
  int64_t registers_sm;  // of 32 bits
  int64_t shared_block;  // bytes, when asked for
  int64_t shared_sm;
  int64_t l2_bytes;
  int64_t max_cluster;  // blocks; 1: no clusters. 16 is not portable and must be asked for
  // A cluster lies inside one GPC. How many SMs each has differs from chip to chip: the least, so that a plan is too small
  // rather than too large. Before a launch the driver is asked (cudaOccupancyMaxActiveClusters).
  int64_t gpcs, sms_gpc;
  double clock_mhz;
  double memory_gb_s;
  double mma_rate;  // multiply-adds a clock an SM, 16-bit operands, sums in float32; half of that for TF32
  double
      mma_share;  // how much of it mma.sync reaches. Hopper: published (about 0.6). Others: predicted, to be measured

  // How many clusters of `size` blocks, a block an SM, are resident at once.
  int64_t clusters(int64_t size) const {
    if (size <= 1) return sms;
    return size > std::min(max_cluster, sms_gpc) ? 0 : std::min(gpcs * (sms_gpc / size), sms / size);
  }
  double cycles_us(double cycles) const { return cycles / clock_mhz; }
};

inline constexpr int64_t kKiB = 1024, kMiB = 1024 * kKiB;

// clang-format off
inline constexpr std::array<Device, 6> kDevices{{
    //                                 cc      SMs  registers  shared a block, an SM       L2         cluster  GPCs   MHz   GB/s  mma   share
    {"a100",    "A100 80 GB SXM",      8, 0,  108,  65536,     163 * kKiB, 164 * kKiB,     40 * kMiB,   1,     7, 14, 1410, 2039, 1024, 0.90},
    {"h100",    "H100 80 GB SXM",      9, 0,  132,  65536,     227 * kKiB, 228 * kKiB,     50 * kMiB,  16,     8, 16, 1830, 3350, 2048, 0.60},
    {"h200",    "H200 141 GB SXM",     9, 0,  132,  65536,     227 * kKiB, 228 * kKiB,     50 * kMiB,  16,     8, 16, 1830, 4800, 2048, 0.60},
    {"l4",      "L4",                  8, 9,   58,  65536,      99 * kKiB, 100 * kKiB,     48 * kMiB,   1,     5, 10, 2040,  300,  512, 0.90},
    {"rtx4090", "GeForce RTX 4090",    8, 9,  128,  65536,      99 * kKiB, 100 * kKiB,     72 * kMiB,   1,    11, 10, 2520, 1008,  256, 0.90},
    {"b200",    "B200 180 GB SXM",    10, 0,  148,  65536,     227 * kKiB, 228 * kKiB,    126 * kMiB,  16,     8, 16, 1850, 8000, 4096, 0.30},
}};
// clang-format on

// Null for a name that is none of them.
inline const Device* device_named(const std::string& name) {
  const auto found = std::find_if(kDevices.begin(), kDevices.end(), [&](const Device& d) { return name == d.name; });
  return found == kDevices.end() ? nullptr : &*found;
}

// Limits of every GPU the kernels are written for (compute capability 8.0 and later).
inline constexpr int64_t kRegistersThread = 255;
inline constexpr int64_t kThreadsBlock = 1024;
inline constexpr int64_t kRegisterGrain = 8;  // registers a thread are allocated in eights

// What the cost model plans with. Latencies are an H100's, and taken for the same nanoseconds elsewhere (predicted).
// benchmarks/primitives.cu measures all of them.
struct Costs {
  // Published: a DSMEM access takes 180-210 cycles, 0.3-0.4 µs a step for the exchange in all. Predicted: the part of it
  // that does not grow with the bytes.
  double cluster_us = 0.25;
  double cluster_rate = 32;  // bytes a clock pushed into an SM by its peers. Predicted; the first to be measured
  // Published: 0.4-0.6 µs a step by tagged words through L2. Predicted: the part that does not grow with the bytes.
  double l2_us = 0.45;
  double l2_rate = 32;        // bytes a clock an SM reads from L2, all reading. Predicted (from published 5.5 TB/s)
  double block_us = 0.04;     // h kept in the own shared memory: a barrier and a round trip. Predicted
  double hand_over_us = 0.6;  // published: store + load through global memory, 0.55-0.63
  double launch_us = 4;       // of a cooperative launch. To be measured
  double shared_rate = 128;   // bytes a clock an SM. Published
  double mma_latency = 33;    // cycles of one mma.sync after another on the same sums. Published (Hopper)
  double ldmatrix = 30;       // cycles until the first fragment of h is there. Published
  double mufu =
      160;  // cycles of a scheduler for 20 MUFU of a warp: two cells a thread. Published rate: 4 lanes a clock
  double gate_latency = 60;  // cycles of the chain of operations in a cell. Predicted
  double reduce = 60;        // cycles for warps that share a group to meet; predicted
  double reduce_words = 10;  // and for each tile's sums of each warp more; predicted
  double save = 12;          // slots to save a thread's two cells for backward; predicted
};

}  // namespace stacked_lstm
