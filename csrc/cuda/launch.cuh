// csrc/cuda/launch.cuh: kernel launches from the host, without <<<>>>. The same call launches on a GPU and, compiled by
// the host compiler, on the emulator; both refuse the same launches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <span>
#include <string>
#include <tuple>
#include <utility>

#include "primitives.cuh"
#include "turns.h"

namespace stacked_lstm::cuda {

// The result of a launch: the number of a cudaError_t, and a message for the user.
struct Status {
  int code = 0;
  std::string text;
  bool ok() const { return code == 0; }
};

struct LaunchConfig {
  dim3 grid, block;
  size_t shared_bytes = 0;  // dynamic shared memory of a block
  // Blocks of a cluster, consecutive in x; 0: a kernel without clusters. 1 is refused: a kernel that pushes to its peers
  // (st.async) is undefined in a cluster of one block.
  unsigned cluster = 0;
  bool co_resident = false;  // blocks wait for each other: refused if not all fit on the device at once
  void* stream = nullptr;    // a cudaStream_t
};

namespace launch_detail {

constexpr int kInvalidConfiguration = 9;  // of cudaError_t

inline uint64_t blocks(const LaunchConfig& config) {
  return static_cast<uint64_t>(config.grid.x) * config.grid.y * config.grid.z;
}

inline bool lone_cluster(const LaunchConfig& config) { return config.cluster == 1; }

// How many blocks the device places together.
inline unsigned placed_together(const LaunchConfig& config) { return config.cluster > 0 ? config.cluster : 1; }

inline std::string does_not_fit(const LaunchConfig& config, uint64_t capacity) {
  std::string text = "too many blocks in cooperative launch: " + std::to_string(blocks(config));
  if (config.cluster > 1) text += " (in clusters of " + std::to_string(config.cluster) + ")";
  return text + " have to be resident at once, the device holds " + std::to_string(capacity);
}

}  // namespace launch_detail

}  // namespace stacked_lstm::cuda

#if defined(__CUDACC__)

namespace stacked_lstm::cuda::launch_detail {

// Also clears the error, so that the next CUDA call of other code does not find it. (An error that the device itself
// reported, such as an illegal address, stays: the context is lost.)
inline Status status_of(cudaError_t error) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();
  return {static_cast<int>(error), std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")"};
}

// A launch in the form that the runtime takes. It must not be copied, since it points into itself.
struct Prepared {
  cudaLaunchConfig_t launch = {};
  cudaLaunchAttribute attributes[3];

  Prepared(const Prepared&) = delete;
  explicit Prepared(const LaunchConfig& config) {
    launch.gridDim = config.grid;
    launch.blockDim = config.block;
    launch.dynamicSmemBytes = config.shared_bytes;
    launch.stream = static_cast<cudaStream_t>(config.stream);
    launch.attrs = attributes;
    if (config.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[launch.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = config.cluster;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
  }
};

// While an object lives, the calling thread may do what a stream capture, in this or any other thread, forbids by
// default: for example, allocate memory. Loading a kernel and asking about it may take such calls, which are not part
// of the captured graph.
class Relaxed {
 public:
  Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// The CUDA calls of LaunchesInTurn.
struct Calls {
  using Error = cudaError_t;
  using Stream = cudaStream_t;
  using Event = cudaEvent_t;

  static bool is_default(Stream stream) { return stream == nullptr || stream == cudaStreamLegacy; }

  // The handle is not such a number: a new stream may get the handle of a stream that was destroyed and still has work
  // to do, and cudaStreamPerThread is a different stream in each thread.
  static Error number_of(Stream stream, uint64_t& number) {
    number = ~uint64_t{0};
    if (is_default(stream)) return cudaSuccess;
    unsigned long long id = 0;
    const Error error = cudaStreamGetId(stream, &id);
    number = id;
    return error;
  }

  static Error capture_of(Stream stream, uint64_t& capture) {
    capture = 0;
    if (is_default(stream)) return cudaSuccess;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    const Error error = cudaStreamGetCaptureInfo(stream, &status, &id);
    if (error == cudaSuccess && status == cudaStreamCaptureStatusActive) capture = id;
    return error;
  }

  static Error make(Event& event) { return cudaEventCreateWithFlags(&event, cudaEventDisableTiming); }

  static Error record(Event event, Stream stream) {
    // If another thread captures a blocking stream, recording here would spoil that capture. Asking first does not.
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    if (is_default(stream)) {
      if (const Error error = cudaStreamIsCapturing(cudaStreamLegacy, &status); error != cudaSuccess) return error;
    }
    return cudaEventRecord(event, stream);
  }

  static Error wait(Stream stream, Event event) { return cudaStreamWaitEvent(stream, event, 0); }
};

// The turns of a device. Never destroyed, since CUDA may already have ended when static objects are destroyed.
inline LaunchesInTurn<Calls>& in_turn(int device) {
  static std::mutex mutex;
  static auto* const all = new std::map<int, LaunchesInTurn<Calls>>;
  const std::lock_guard<std::mutex> lock(mutex);
  return (*all)[device];
}

// What kernels have been allowed on each device, and what CUDA's driver has answered about them. A question takes it
// microseconds, in which a small call could run, so each question is asked once. (A program has one such object,
// however many files launch kernels.)
class KernelFacts {
 public:
  static KernelFacts& instance() {
    static KernelFacts known;
    return known;
  }

  // Allows a kernel what it needs before it is launched like this: more shared memory, larger clusters.
  cudaError_t allow(const LaunchConfig& config, const void* kernel) {
    // A block gets 48 KiB without asking. Its static memory, not known here, is part of them; hence the margin.
    constexpr size_t kCertain = 16 << 10;
    constexpr unsigned kPortableCluster = 8;  // every device with clusters has these; larger ones have to be allowed
    const bool shared = config.shared_bytes > kCertain, cluster = config.cluster > kPortableCluster;
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
    thread_local std::pair<const void*, int> loaded;  // of this thread's last launch; the next is often the same
    if (!shared && !cluster && loaded == std::pair(kernel, device)) return cudaSuccess;
    const std::lock_guard<std::mutex> lock(mutex_);
    const Relaxed relaxed;
    const auto [known, is_new] = allowed_.try_emplace({kernel, device});
    Allowed& allowed = known->second;
    if (is_new) {
      // A kernel is loaded when it is first used. This call loads it, for the case that the first launch is captured.
      cudaFuncAttributes attributes;
      if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel); error != cudaSuccess) {
        allowed_.erase(known);
        return error;
      }
    }
    loaded = {kernel, device};
    // The limit only grows: a launch that was allowed what it needs must not fail because another lowered the limit.
    if (shared && config.shared_bytes > allowed.shared_bytes) {
      const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(config.shared_bytes));
      if (error != cudaSuccess) return error;
      allowed.shared_bytes = config.shared_bytes;
    }
    if (cluster && !allowed.cluster) {
      const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      if (error != cudaSuccess) return error;
      allowed.cluster = true;
    }
    return cudaSuccess;
  }

  // How many blocks of such a launch, whatever its grid, the current device holds at once. Call `allow` first.
  cudaError_t capacity(const LaunchConfig& config, const void* kernel, uint64_t& blocks) {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
    const auto threads = static_cast<int>(config.block.x * config.block.y * config.block.z);
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto [known, is_new] = capacity_.try_emplace({kernel, device, threads, config.shared_bytes, config.cluster});
    if (is_new) {
      const Relaxed relaxed;
      const cudaError_t error = ask(config, kernel, device, threads, known->second);
      if (error != cudaSuccess) {
        capacity_.erase(known);
        return error;
      }
    }
    blocks = known->second;
    return cudaSuccess;
  }

  // The greatest priority of a launch, the same for all devices of CUDA's driver; the default, 0, if it does not say.
  int greatest_priority() {
    static const int greatest = [] {
      int least = 0, most = 0;
      return cudaDeviceGetStreamPriorityRange(&least, &most) == cudaSuccess ? most : 0;
    }();
    return greatest;
  }

 private:
  struct Allowed {
    size_t shared_bytes = 0;
    bool cluster = false;
  };

  static cudaError_t ask(const LaunchConfig& config, const void* kernel, int device, int threads, uint64_t& blocks) {
    int count = 0;
    if (config.cluster > 1) {
      LaunchConfig one = config;
      one.grid = dim3(config.cluster);
      const Prepared prepared(one);
      const cudaError_t error = cudaOccupancyMaxActiveClusters(&count, kernel, &prepared.launch);
      blocks = static_cast<uint64_t>(count) * config.cluster;
      return error;
    }
    int multiprocessors = 0;
    cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, config.shared_bytes);
    }
    blocks = static_cast<uint64_t>(count) * static_cast<uint64_t>(multiprocessors);
    return error;
  }

  std::mutex mutex_;
  std::map<std::tuple<const void*, int>, Allowed> allowed_;
  std::map<std::tuple<const void*, int, int, size_t, unsigned>, uint64_t> capacity_;
};

inline Status launch(const LaunchConfig& config, const void* kernel, void** arguments) {
  Prepared prepared(config);
  if (const cudaError_t error = KernelFacts::instance().allow(config, kernel); error != cudaSuccess)
    return status_of(error);
  cudaLaunchConfig_t& launch = prepared.launch;
  const auto queue = [&] { return cudaLaunchKernelExC(&launch, kernel, arguments); };
  if (config.co_resident) {
    uint64_t capacity = 0;
    int device = 0, multiprocessors = 0;
    cudaError_t error = KernelFacts::instance().capacity(config, kernel, capacity);
    if (error == cudaSuccess) error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    if (error != cudaSuccess) return status_of(error);
    if (blocks(config) > capacity) {
      return {static_cast<int>(cudaErrorCooperativeLaunchTooLarge), does_not_fit(config, capacity)};
    }
    // CUDA checks this again, and promises: once a thread of such a grid runs, all threads of the grid will run.
    cudaLaunchAttribute& attribute = prepared.attributes[launch.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    // Only for speed, since CUDA treats a priority as a hint. Otherwise kernels of another stream would get SMs that
    // become free one by one, while resident blocks of this launch wait for its other blocks.
    cudaLaunchAttribute& priority = prepared.attributes[launch.numAttrs++];
    priority.id = cudaLaunchAttributePriority;
    priority.val.priority = KernelFacts::instance().greatest_priority();
    const Demand demand =
        demand_of(blocks(config), capacity, placed_together(config), static_cast<uint64_t>(multiprocessors));
    return status_of(in_turn(device).run(launch.stream, demand, queue));
  }
  return status_of(queue());
}

inline uint64_t capacity(const LaunchConfig& config, const void* kernel) {
  uint64_t blocks = 0;
  cudaError_t error = KernelFacts::instance().allow(config, kernel);
  if (error == cudaSuccess) error = KernelFacts::instance().capacity(config, kernel, blocks);
  return status_of(error).ok() ? blocks : 0;
}

}  // namespace stacked_lstm::cuda::launch_detail

#else

namespace stacked_lstm::cuda::launch_detail {

inline emulator::Shape shape_of(const LaunchConfig& config) {
  return {config.grid, config.block, config.shared_bytes, placed_together(config), config.co_resident};
}

template <typename... Parameters>
emulator::Kernel kernel_of(void (*kernel)(Parameters...), const std::tuple<Parameters...>& values) {
  return std::apply(
      [&](const auto&... value) {
        return emulator::Kernel{reinterpret_cast<const void*>(kernel), {std::as_bytes(std::span(&value, 1))...}};
      },
      values);
}

inline Status status_of(const LaunchConfig& config, const emulator::Shape& shape, const emulator::Report& report) {
  constexpr int kLaunchFailure = 719, kCooperativeLaunchTooLarge = 720;  // of cudaError_t
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

// Starts the kernel and does not wait for it. The arguments are converted to the types of its parameters. An error of
// the running kernel shows in a later call. (The emulator runs the kernel now, and reports its errors here.)
template <typename... Parameters, typename... Arguments>
Status launch(const LaunchConfig& config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument for each of the kernel's parameters");
  if (launch_detail::lone_cluster(config)) {
    return {launch_detail::kInvalidConfiguration, "invalid configuration: a cluster of one block has no peers"};
  }
  std::tuple<Parameters...> values{static_cast<Parameters>(std::forward<Arguments>(arguments))...};
#if defined(__CUDACC__)
  return std::apply(
      [&](auto&... value) {
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(&value))..., nullptr};
        return launch_detail::launch(config, reinterpret_cast<const void*>(kernel), pointers);
      },
      values);
#else
  const emulator::Shape shape = launch_detail::shape_of(config);
  return launch_detail::status_of(
      config, shape,
      emulator::run(shape, [&] { std::apply(kernel, values); }, launch_detail::kernel_of(kernel, values)));
#endif
}

// How many blocks of such a launch the current device holds at once; 0 if the launch cannot run at all. The grid of
// `config` does not count: CUDA is asked about the smallest grid, one cluster.
template <typename... Parameters>
uint64_t capacity(const LaunchConfig& config, void (*kernel)(Parameters...)) {
  if (launch_detail::lone_cluster(config)) return 0;
#if defined(__CUDACC__)
  return launch_detail::capacity(config, reinterpret_cast<const void*>(kernel));
#else
  static_cast<void>(kernel);
  const emulator::Device& device = emulator::options().device;
  if (config.shared_bytes > device.shared_per_block || config.cluster > device.largest_cluster) return 0;
  return emulator::resident_capacity(launch_detail::shape_of(config));
#endif
}

}  // namespace stacked_lstm::cuda
