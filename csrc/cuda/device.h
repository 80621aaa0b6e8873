// csrc/cuda/device.h: a GPU as the planner of the persistent kernel sees it: limits, rates and what waiting costs. No CUDA.
//
// Limits and rates are published. SMs, L2, clocks (boost), memory and dense tensor rates: NVIDIA's A100 white paper and data
// sheet (80 GB SXM), H100 white paper (SXM5), H200 and L4 data sheets, Ada white paper (RTX 4090), HGX B200 data sheet.
// Registers and shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". A rate of
// multiply-adds per clock is the dense tensor rate over 2 · SMs · clock.
//
// Clusters of an H100 (an H200 has the same chip) were observed by others, not by us. On an H100, a grid of clusters of
// 8 blocks reached 120 of the 132 SMs (accel-sim/gpu-app-collection, pull request 87): 15 clusters at once. So one of
// its 8 GPCs has 8 to 14 SMs, and 7 clusters of 16 fit. A chip whose GPCs all have 16 SMs or more would hold 8. For a
// B200, nothing was found.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <string>

namespace stacked_lstm {

struct Device {
  std::string name;
  std::string full_name;
  std::string model;  // a part of the name that CUDA's driver reports
  int major = 0, minor = 0;
  int64_t sms = 0;
  int64_t registers_sm = 0;  // of 32 bits
  int64_t shared_block = 0;  // bytes, when asked for
  int64_t shared_sm = 0;
  int64_t l2_bytes = 0;
  int64_t max_cluster = 1;  // blocks; 1: no clusters. 16 is not portable and must be asked for
  // A cluster lies inside one GPC. How many SMs a GPC has differs from chip to chip. These are the smallest numbers
  // that were observed, so that a plan is too small rather than too large. Of the `gpcs` GPCs, `short_gpcs` have
  // sms_short_gpc SMs, the others have sms_gpc. (If CUDA's driver is there, it is asked: see device_from.)
  int64_t gpcs = 1, sms_gpc = 1, short_gpcs = 0, sms_short_gpc = 0;
  double clock_mhz = 0;
  double memory_gb_s = 0;
  double mma_rate = 0;  // multiply-adds per clock and SM, 16-bit operands, sums in float32; half of that for TF32
  // The share of mma_rate that mma.sync reaches. Hopper: published (about 0.6). Others: predicted, to be measured.
  double mma_share = 0;
  double fma_rate = 0;  // multiply-adds of float32 per clock and SM, one lane each

  // How many clusters of `size` blocks, one block on an SM, are resident at once.
  int64_t clusters(int64_t size) const {
    if (size <= 1) return sms;
    if (size > max_cluster) return 0;
    const int64_t short_ones = std::min(short_gpcs, gpcs);
    return std::min((gpcs - short_ones) * (sms_gpc / size) + short_ones * (sms_short_gpc / size), sms / size);
  }
  double cycles_us(double cycles) const { return cycles / clock_mhz; }
};

inline constexpr int64_t kKiB = 1024, kMiB = 1024 * kKiB;

// clang-format off
inline const std::array<Device, 6> kDevices{{
    //                                              cc      SMs  registers  shared a block, an SM       L2         cluster  GPCs, short   MHz   GB/s  mma   share  fma
    {"a100",    "A100 80 GB SXM",    "A100",      8, 0,  108,  65536,     163 * kKiB, 164 * kKiB,     40 * kMiB,   1,     7, 14, 0, 0, 1410, 2039, 1024, 0.90,   64},
    {"h100",    "H100 80 GB SXM",    "H100",      9, 0,  132,  65536,     227 * kKiB, 228 * kKiB,     50 * kMiB,  16,     8, 16, 1, 8, 1830, 3350, 2048, 0.60,  128},
    {"h200",    "H200 141 GB SXM",   "H200",      9, 0,  132,  65536,     227 * kKiB, 228 * kKiB,     50 * kMiB,  16,     8, 16, 1, 8, 1830, 4800, 2048, 0.60,  128},
    {"l4",      "L4",                "L4",        8, 9,   58,  65536,      99 * kKiB, 100 * kKiB,     48 * kMiB,   1,     5, 10, 0, 0, 2040,  300,  512, 0.90,  128},
    {"rtx4090", "GeForce RTX 4090",  "RTX 4090",  8, 9,  128,  65536,      99 * kKiB, 100 * kKiB,     72 * kMiB,   1,    11, 10, 0, 0, 2520, 1008,  256, 0.90,  128},
    {"b200",    "B200 180 GB SXM",   "B200",      10, 0,  148,  65536,     227 * kKiB, 228 * kKiB,    126 * kMiB,  16,     8, 16, 0, 0, 1850, 8000, 4096, 0.30,  128},
}};
// clang-format on

// The GPU of this name; null if there is none.
inline const Device* device_named(const std::string& name) {
  const auto found = std::find_if(kDevices.begin(), kDevices.end(), [&](const Device& d) { return name == d.name; });
  return found == kDevices.end() ? nullptr : &*found;
}

// What CUDA's driver reports about a GPU; 0 if it was not asked.
struct DeviceProperties {
  std::string name;  // as CUDA's driver reports it: "NVIDIA H100 80GB HBM3"
  int major = 0, minor = 0;
  int sms = 0;
  int registers_sm = 0;
  int shared_block = 0;  // when asked for (sharedMemPerBlockOptin)
  int shared_sm = 0;
  int64_t l2_bytes = 0;
  int max_cluster = 0;
  int clock_khz = 0;  // cudaDevAttrClockRate, cudaDevAttrMemoryClockRate, cudaDevAttrGlobalMemoryBusWidth
  int memory_clock_khz = 0, memory_bus_bits = 0;
};

// The GPU that CUDA's driver describes. Figures that it does not report (rates of an SM) are those of a known GPU of
// this model, or else of the nearest architecture.
inline Device device_from(const DeviceProperties& told) {
  const auto is_model = [&](const Device& known) {
    const size_t at = told.name.find(known.model), end = at + known.model.size();
    const bool whole =
        at != std::string::npos && (end == told.name.size() || told.name[end] == ' ' || told.name[end] == '-');
    return whole && known.major == told.major && known.minor == told.minor;
  };
  const auto distance = [&](const Device& known) {
    const int capability = told.major >= 12 ? 89 : 10 * told.major + told.minor;  // 12: GeForce, as 8.9
    return is_model(known) ? -1 : std::abs(10 * known.major + known.minor - capability);
  };
  Device device = *std::min_element(kDevices.begin(), kDevices.end(),
                                    [&](const Device& a, const Device& b) { return distance(a) < distance(b); });
  const bool known = is_model(device);
  const auto take = [](int64_t& to, int64_t value) {
    if (value > 0) to = value;
  };
  if (!known) device.name = "sm_" + std::to_string(told.major) + std::to_string(told.minor), device.model = "";
  device.full_name = told.name;
  device.major = told.major, device.minor = told.minor;
  take(device.sms, told.sms);
  take(device.registers_sm, told.registers_sm);
  take(device.shared_block, told.shared_block);
  take(device.shared_sm, told.shared_sm);
  take(device.l2_bytes, told.l2_bytes);
  if (!known) device.max_cluster = told.major >= 9 ? 8 : 1;  // 8: every GPU with clusters has these
  take(device.max_cluster, told.max_cluster);
  // CUDA's driver does not report which SMs form a GPC. It reports how many clusters of a launch fit
  // (cudaOccupancyMaxActiveClusters), and the planner asks it about the cheapest plan. So the number of clusters here
  // must be an upper bound. If it reports fewer, the planner plans again; the plan that it confirms is
  // then the cheapest that fits. If the number here were too low, the planner would not find the plans that need more.
  device.gpcs = 1, device.sms_gpc = device.sms, device.short_gpcs = device.sms_short_gpc = 0;
  if (told.clock_khz > 0) device.clock_mhz = told.clock_khz / 1e3;
  if (told.memory_clock_khz > 0 && told.memory_bus_bits > 0) {  // two transfers a clock
    device.memory_gb_s = 2.0 * told.memory_clock_khz * told.memory_bus_bits / 8 / 1e6;
  }
  return device;
}

// Limits of every GPU the kernels are written for (compute capability 8.0 and later).
inline constexpr int64_t kRegistersThread = 255;
inline constexpr int64_t kRegisterGrain = 8;  // registers of a thread are allocated in units of 8

// The figures that the cost model plans with. Latencies are those of an H100. Other GPUs are assumed to take the same
// time where a figure is in µs, and the same number of cycles where it is in cycles (predicted).
// benchmarks/primitives.cu measures most figures; `python -m stacked_lstm_ext.plan --costs` uses what it has measured.
struct Costs {
  // Published: a DSMEM access takes 180-210 cycles, the whole exchange 0.3-0.4 µs per step. Predicted: the part of it
  // that does not grow with the bytes.
  double cluster_us = 0.25;
  double cluster_rate = 32;  // bytes per clock that its peers push into an SM. Predicted; the first to be measured
  // Published: 0.4-0.6 µs per step by tagged words through L2. Predicted: the part that does not grow with the bytes.
  double l2_us = 0.45;
  double l2_rate = 32;          // bytes per clock and SM from L2, all SMs reading. Predicted (from published 5.5 TB/s)
  double l2_latency = 270;      // cycles of a read. Published (Hopper)
  double hand_over_us = 0.6;    // published: store + load through global memory, 0.55-0.63
  double launch_us = 4;         // of a cooperative launch. To be measured
  double shared_rate = 128;     // bytes per clock and SM. Published
  double shared_latency = 30;   // cycles until the first fragment of h has arrived. Published
  double mma_latency = 33;      // cycles of one mma.sync after another on the same sums. Published (Hopper)
  double fma_share = 0.7;       // share of fma_rate that exact products reach. Predicted
  double product_share = 0.65;  // share of mma_rate that large products reach. Predicted
  // Large products on SMs that a launch leaves idle: the share of their own rate that they reach beside the launch,
  // since both read through one L2. Predicted.
  double beside_share = 0.7;
  double barrier = 40;  // cycles, of a block. Predicted
  double mufu =
      160;  // cycles of a scheduler for 20 MUFU of a warp: two cells a thread. Published rate: 4 lanes per clock
  double accurate = 400;     // the same in float32, where σ and tanh are accurate: slots. Predicted
  double gate_latency = 60;  // cycles of the chain of operations in a cell, forward; predicted
  double backward_gates =
      110;                   // cycles from dh to gate gradients in shared memory, for each cell of a thread; predicted
  double add = 4;            // cycles of one float32 addition after another. Published
  double reduce = 60;        // cycles for warps that share a group to meet; predicted
  double reduce_words = 10;  // cycles more for each tile's sums of each further warp; predicted
  double save = 12;          // slots to save a thread's two cells for backward; predicted
  // The diagonal schedule: the time of a small kernel in a row of kernels on the device, and the times that the host
  // takes to queue a product through ATen and a kernel of ours. Predicted: the published gap of 1.3 µs in a graph is
  // between kernels that do nothing.
  double kernel_us = 3;
  double host_product_us = 6;
  double host_launch_us = 3;

  using Field = double Costs::*;
  struct Named {
    const char* name;
    Field field;
  };
  static constexpr Named kAll[] = {{"cluster_us", &Costs::cluster_us},
                                   {"cluster_rate", &Costs::cluster_rate},
                                   {"l2_us", &Costs::l2_us},
                                   {"l2_rate", &Costs::l2_rate},
                                   {"l2_latency", &Costs::l2_latency},
                                   {"hand_over_us", &Costs::hand_over_us},
                                   {"launch_us", &Costs::launch_us},
                                   {"shared_rate", &Costs::shared_rate},
                                   {"shared_latency", &Costs::shared_latency},
                                   {"mma_latency", &Costs::mma_latency},
                                   {"fma_share", &Costs::fma_share},
                                   {"product_share", &Costs::product_share},
                                   {"beside_share", &Costs::beside_share},
                                   {"barrier", &Costs::barrier},
                                   {"mufu", &Costs::mufu},
                                   {"accurate", &Costs::accurate},
                                   {"gate_latency", &Costs::gate_latency},
                                   {"backward_gates", &Costs::backward_gates},
                                   {"add", &Costs::add},
                                   {"reduce", &Costs::reduce},
                                   {"reduce_words", &Costs::reduce_words},
                                   {"save", &Costs::save},
                                   {"kernel_us", &Costs::kernel_us},
                                   {"host_product_us", &Costs::host_product_us},
                                   {"host_launch_us", &Costs::host_launch_us}};
};

}  // namespace stacked_lstm
