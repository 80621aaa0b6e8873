// csrc/cuda/launch.cuh: a kernel launch, from the host. No <<<>>> anywhere: the same call launches on a GPU and, compiled by
// the host compiler, on the emulator, with the same refusals.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>

#include "primitives.cuh"

namespace stacked_lstm::cuda {

// What became of a launch: cudaError_t's number, and what to tell the user.
struct Status {
  int code = 0;
  std::string text;
  bool ok() const { return code == 0; }
};

struct LaunchConfig {
  dim3 grid, block;
  size_t shared_bytes = 0;   // dynamic shared memory of a block
  unsigned cluster = 1;      // blocks, consecutive in x
  bool co_resident = false;  // blocks wait for each other: refused if not all fit on the device at once
  void* stream = nullptr;    // a cudaStream_t
};

namespace launch_detail {

inline uint64_t blocks(const LaunchConfig& config) {
  return static_cast<uint64_t>(config.grid.x) * config.grid.y * config.grid.z;
}

inline std::string does_not_fit(const LaunchConfig& config, uint64_t capacity) {
  std::string text = "too many blocks in cooperative launch: " + std::to_string(blocks(config));
  if (config.cluster > 1) text += " (in clusters of " + std::to_string(config.cluster) + ")";
  return text + " have to be resident at once, the device holds " + std::to_string(capacity);
}

}  // namespace launch_detail

}  // namespace stacked_lstm::cuda

#if defined(__CUDACC__)

namespace stacked_lstm::cuda::launch_detail {

// Returning the error also clears it, so that the next call of somebody else does not find it. (What the device itself
// reported, an illegal address say, stays: the context is lost.)
inline Status status_of(cudaError_t error) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();
  return {static_cast<int>(error), std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")"};
}

// How many blocks of this launch the current device holds at once.
inline cudaError_t resident_capacity(const LaunchConfig& config, const void* kernel, const cudaLaunchConfig_t& launch,
                                     uint64_t& capacity) {
  int count = 0;
  if (config.cluster > 1) {
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&count, kernel, &launch);
    capacity = static_cast<uint64_t>(count) * config.cluster;
    return error;
  }
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    const auto threads = static_cast<int>(config.block.x * config.block.y * config.block.z);
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, config.shared_bytes);
  }
  capacity = static_cast<uint64_t>(count) * static_cast<uint64_t>(multiprocessors);
  return error;
}

inline Status launch(const LaunchConfig& config, const void* kernel, void** arguments) {
  cudaLaunchConfig_t launch = {};
  launch.gridDim = config.grid;
  launch.blockDim = config.block;
  launch.dynamicSmemBytes = config.shared_bytes;
  launch.stream = static_cast<cudaStream_t>(config.stream);
  cudaLaunchAttribute attributes[2];
  launch.attrs = attributes;

  // Without asking, a block gets 48 KiB, of which its static memory is a part that is not known here: hence the margin.
  constexpr size_t kCertain = 16 << 10;
  if (config.shared_bytes > kCertain) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(config.shared_bytes));
    if (error != cudaSuccess) return status_of(error);
  }
  if (config.cluster > 1) {
    constexpr unsigned kPortableCluster = 8;  // every device with clusters has those; larger ones have to be allowed
    if (config.cluster > kPortableCluster) {
      const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      if (error != cudaSuccess) return status_of(error);
    }
    cudaLaunchAttribute& attribute = attributes[launch.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = config.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (config.co_resident) {
    uint64_t capacity = 0;
    const cudaError_t error = resident_capacity(config, kernel, launch, capacity);
    if (error != cudaSuccess) return status_of(error);
    if (blocks(config) > capacity) {
      return {static_cast<int>(cudaErrorCooperativeLaunchTooLarge), does_not_fit(config, capacity)};
    }
    // Asked again by the launch itself, which also keeps other kernels from taking the place of some blocks.
    cudaLaunchAttribute& attribute = attributes[launch.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  return status_of(cudaLaunchKernelExC(&launch, kernel, arguments));
}

}  // namespace stacked_lstm::cuda::launch_detail

#else

namespace stacked_lstm::cuda::launch_detail {

inline Status status_of(const LaunchConfig& config, const emulator::Shape& shape, const emulator::Report& report) {
  constexpr int kInvalidConfiguration = 9, kLaunchFailure = 719, kCooperativeLaunchTooLarge = 720;  // of cudaError_t
  switch (report.kind) {
    case emulator::Kind::none:
      return {};
    case emulator::Kind::bad_launch:
      return {kInvalidConfiguration, "invalid configuration argument: " + report.text};
    case emulator::Kind::co_residency:
      return {kCooperativeLaunchTooLarge, does_not_fit(config, emulator::resident_capacity(shape))};
    default:
      return {kLaunchFailure, report.text + "\n" + report.waiting};
  }
}

}  // namespace stacked_lstm::cuda::launch_detail

#endif

namespace stacked_lstm::cuda {

// Starts the kernel; the arguments are converted to its parameters' types. Not waited for: an error of the running kernel
// shows in a later call. (The emulator runs it now, and reports its errors here.)
template <typename... Parameters, typename... Arguments>
Status launch(const LaunchConfig& config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument for each of the kernel's parameters");
  std::tuple<Parameters...> values{static_cast<Parameters>(std::forward<Arguments>(arguments))...};
#if defined(__CUDACC__)
  return std::apply(
      [&](auto&... value) {
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(&value))..., nullptr};
        return launch_detail::launch(config, reinterpret_cast<const void*>(kernel), pointers);
      },
      values);
#else
  const emulator::Shape shape = {config.grid, config.block, config.shared_bytes, config.cluster, config.co_resident};
  return launch_detail::status_of(config, shape, emulator::run(shape, [&] { std::apply(kernel, values); }));
#endif
}

}  // namespace stacked_lstm::cuda
