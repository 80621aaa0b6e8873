// benchmarks/primitives.cu: what the primitives cost on this GPU: the figures that the cost model plans with.
//
//   nvcc -std=c++20 -O3 -arch=native -Icsrc benchmarks/primitives.cu -o primitives && ./primitives
//
// prints a JSON object: for each primitive the median of several runs, the least and the most, and what was delivered
// wrongly (never anything). `--rounds N` makes the runs shorter.
//
// Each kernel has one thread read the clock before and after many rounds, and checks what the rounds hand over. Compiled by
// the host compiler, the same file runs on the emulator (tests/proof/test_gpu_primitives.py): there its figures mean nothing,
// but that it ends, and that what arrives is right, means the same.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/primitives.cuh"

namespace stacked_lstm::primitives {

using cuda::Scope;

constexpr int kWarp = 32;
constexpr int kMostCluster = 16;
constexpr uint64_t kNoAnswer = ~0ull;

// What a kernel reports.
struct Outcome {
  uint64_t cycles;
  uint64_t nanoseconds;
  uint64_t wrong;  // values that were not what had been sent
};

// A word with a cache line to itself.
struct alignas(128) Line {
  uint64_t word;
};

// Reads both clocks around a run.
struct Stopwatch {
  uint64_t cycles, nanoseconds;
  __device__ __forceinline__ Stopwatch() : cycles(cuda::clock_cycles()), nanoseconds(cuda::clock_nanoseconds()) {}
  __device__ __forceinline__ void stop(Outcome* outcome, uint64_t wrong) const {
    outcome->cycles = cuda::clock_cycles() - cycles;
    outcome->nanoseconds = cuda::clock_nanoseconds() - nanoseconds;
    outcome->wrong = wrong;
  }
};

// ---- Through L2, between two blocks ---------------------------------------------------------------------------------

// A flag there and a flag back, a release and an acquire each: two hand-overs a round.
__global__ void __launch_bounds__(kWarp) flag_round_trips(Line* flags, Outcome* outcome, int rounds) {
  if (threadIdx.x != 0) return;
  uint64_t* const mine = &flags[blockIdx.x].word;
  const uint64_t* const theirs = &flags[1 - blockIdx.x].word;
  const Stopwatch watch;
  for (uint64_t round = 1; round <= static_cast<uint64_t>(rounds); ++round) {
    if (blockIdx.x == 0) cuda::store_release<Scope::device>(mine, round);
    while (cuda::load_acquire<Scope::device>(theirs) < round) {
    }
    if (blockIdx.x == 1) cuda::store_release<Scope::device>(mine, round);
  }
  if (blockIdx.x == 0) watch.stop(outcome, 0);
}

// The same with a word that carries its own tag: no order is needed, for there is nothing beside it.
__global__ void __launch_bounds__(kWarp) tagged_round_trips(Line* words, Outcome* outcome, int rounds) {
  if (threadIdx.x != 0) return;
  uint64_t* const mine = &words[blockIdx.x].word;
  const uint64_t* const theirs = &words[1 - blockIdx.x].word;
  uint64_t wrong = 0;
  const Stopwatch watch;
  for (uint64_t round = 1; round <= static_cast<uint64_t>(rounds); ++round) {
    const uint64_t sent = (round * 0x9E3779B9u) << 32 | round;
    if (blockIdx.x == 0) cuda::store_relaxed<Scope::device>(mine, sent);
    uint64_t got;
    do {
      got = cuda::load_relaxed<Scope::device>(theirs);
    } while (static_cast<uint32_t>(got) != static_cast<uint32_t>(round));
    wrong += got != sent;
    if (blockIdx.x == 1) cuda::store_relaxed<Scope::device>(mine, sent);
  }
  if (blockIdx.x == 0) watch.stop(outcome, wrong);
}

// 16 bytes from each of the block's threads to the other block's, by a barrier, a flag and a barrier.
constexpr int kHandOverThreads = 128;
__global__ void __launch_bounds__(kHandOverThreads)
    flagged_hand_overs(uint4* data, Line* flags, Outcome* outcome, int rounds) {
  const unsigned me = blockIdx.x, other = 1 - me, thread = threadIdx.x;
  uint64_t wrong = 0;
  const Stopwatch watch;
  for (unsigned round = 1; round <= static_cast<unsigned>(rounds); ++round) {
    for (unsigned turn = 0; turn < 2; ++turn) {
      if (me == turn) {
        data[me * kHandOverThreads + thread] = make_uint4(round, thread, turn, 0);
        cuda::block_barrier();  // the block's data before thread 0's flag
        if (thread == 0) cuda::store_release<Scope::device>(&flags[me].word, static_cast<uint64_t>(round));
      } else {
        if (thread == 0) {
          while (cuda::load_acquire<Scope::device>(&flags[other].word) < round) {
          }
        }
        cuda::block_barrier();  // thread 0's acquire before the block's reads
        const uint4 got = cuda::load_l2(&data[other * kHandOverThreads + thread]);
        wrong += got.x != round || got.y != thread || got.z != turn;
      }
    }
  }
  if (me == 0 && thread == 0) watch.stop(outcome, wrong);
}

// A barrier of all blocks of the grid: what grid.sync() does.
__global__ void __launch_bounds__(kWarp) grid_barriers(Line* counter, Outcome* outcome, int rounds) {
  const Stopwatch watch;
  for (uint64_t round = 1; round <= static_cast<uint64_t>(rounds); ++round) {
    cuda::block_barrier();  // all of the block's work before its arrival
    if (threadIdx.x == 0) {
      cuda::add_release<Scope::device>(&counter->word, static_cast<uint64_t>(1));
      while (cuda::load_acquire<Scope::device>(&counter->word) < round * gridDim.x) {
      }
    }
    cuda::block_barrier();  // everybody's arrival before any of the block's next work
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) watch.stop(outcome, 0);
}

// ---- Inside a cluster -----------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kWarp) cluster_barriers(Outcome* outcome, int rounds) {
  cuda::cluster_barrier();
  const Stopwatch watch;
  for (int round = 0; round < rounds; ++round) cuda::cluster_barrier();
  if (blockIdx.x == 0 && threadIdx.x == 0) watch.stop(outcome, 0);
}

// One round of the exchange of h: every block sends its share to every block (itself too), 16 bytes a store, and waits
// for everybody's. Two buffers: a block sends round r + 2 into the buffer of round r only after all have sent round r + 1,
// which they do after they have read round r.
constexpr unsigned kMostShare = 2048;  // bytes
constexpr int kPushThreads = 128;
struct PushBuffers {
  alignas(128) unsigned char inbox[2][kMostCluster * kMostShare];
  alignas(128) unsigned char outbox[2][kMostShare];
  alignas(8) uint64_t barrier[2];
};

template <bool kBulk>
__global__ void __launch_bounds__(kPushThreads) cluster_pushes(Outcome* outcome, int rounds, unsigned share) {
  PushBuffers& shared = cuda::dynamic_shared<PushBuffers>();
  const unsigned rank = cuda::cluster_rank(), peers = cuda::cluster_size(), thread = threadIdx.x;
  const unsigned words = share / 16;
  if (thread < 2) cuda::mbarrier_init(cuda::shared_address(&shared.barrier[thread]), 1);
  cuda::mbarrier_init_fence();  // the inits before any peer's bytes are counted
  cuda::cluster_barrier();      // which nobody sends before this
  uint64_t wrong = 0;
  const Stopwatch watch;
  for (int round = 0; round < rounds; ++round) {
    const int buffer = round % 2;
    const uint32_t barrier = cuda::shared_address(&shared.barrier[buffer]);
    if (thread == 0) cuda::mbarrier_arrive_expect(barrier, share * peers);
    const unsigned tag = static_cast<unsigned>(round) * kMostCluster + rank;
    if (kBulk) {
      if (thread < words) {
        *reinterpret_cast<uint4*>(&shared.outbox[buffer][thread * 16]) = make_uint4(tag, thread, 0, 0);
        cuda::async_proxy_fence();  // this thread's words before the bulk copies that read them
      }
      cuda::block_barrier();  // all words, each fenced, before the threads that send
      if (thread < peers) {
        cuda::bulk_push(cuda::peer_address(cuda::shared_address(&shared.inbox[buffer][rank * share]), thread),
                        cuda::shared_address(shared.outbox[buffer]), share, cuda::peer_address(barrier, thread));
      }
    } else {
      for (unsigned n = thread; n < words * peers; n += kPushThreads) {
        const unsigned peer = n / words, word = n % words;
        cuda::store_async(
            cuda::peer_address(cuda::shared_address(&shared.inbox[buffer][rank * share + word * 16]), peer),
            make_uint4(tag, word, 0, 0), cuda::peer_address(barrier, peer));
      }
    }
    cuda::mbarrier_wait(barrier, static_cast<uint32_t>(round / 2 % 2));  // everybody's share before it is read
    for (unsigned n = thread; n < words * peers; n += kPushThreads) {
      const uint4 got = *reinterpret_cast<const uint4*>(&shared.inbox[buffer][n * 16]);
      wrong += got.x != static_cast<unsigned>(round) * kMostCluster + n / words || got.y != n % words;
    }
    cuda::block_barrier();  // the block has read this round before it sends the next
  }
  if (blockIdx.x == 0 && thread == 0) watch.stop(outcome, wrong);
  cuda::cluster_barrier();  // nobody exits while its peers still send to it
}

// ---- Inside a block -------------------------------------------------------------------------------------------------

// Arrive at the own mbarrier and wait for it: nobody else is there.
__global__ void __launch_bounds__(kWarp) mbarrier_phases(Outcome* outcome, int rounds) {
  struct Shared {
    alignas(8) uint64_t barrier;
  };
  const uint32_t barrier = cuda::shared_address(&cuda::static_shared<Shared>().barrier);
  if (threadIdx.x != 0) return;
  cuda::mbarrier_init(barrier, 1);
  const Stopwatch watch;
  for (int round = 0; round < rounds; ++round) {
    cuda::mbarrier_arrive(barrier);
    cuda::mbarrier_wait(barrier, static_cast<uint32_t>(round % 2));
  }
  watch.stop(outcome, 0);
}

__global__ void __launch_bounds__(256) block_barriers(Outcome* outcome, int rounds) {
  const Stopwatch watch;
  for (int round = 0; round < rounds; ++round) cuda::block_barrier();
  if (threadIdx.x == 0) watch.stop(outcome, 0);
}

// ---- Rates ----------------------------------------------------------------------------------------------------------

constexpr int kReadThreads = 512, kSharedWords = 2048;  // of 16 bytes

// Every warp reads the whole array again and again, 16 bytes a lane. The sum keeps the reads from being left out.
__global__ void __launch_bounds__(kReadThreads) shared_reads(Outcome* outcome, int rounds) {
  struct Shared {
    alignas(128) uint4 word[kSharedWords];
  };
  Shared& shared = cuda::dynamic_shared<Shared>();
  for (int n = static_cast<int>(threadIdx.x); n < kSharedWords; n += kReadThreads) {
    shared.word[n] = make_uint4(1, 0, 0, 0);
  }
  cuda::block_barrier();  // the array before it is read
  unsigned sum = 0;
  const Stopwatch watch;
  for (int round = 0; round < rounds; ++round) {
#pragma unroll 8
    for (int n = 0; n < kSharedWords / kReadThreads * 4; ++n) {
      const uint4 got = shared.word[(static_cast<int>(threadIdx.x) + (n + round) * 96) % kSharedWords];
      sum += got.x + got.y + got.z + got.w;
    }
  }
  cuda::block_barrier();  // all warps are done before the clock is read
  const uint64_t reads = static_cast<uint64_t>(rounds) * (kSharedWords / kReadThreads * 4);
  if (threadIdx.x == 0) watch.stop(outcome, sum != static_cast<unsigned>(reads));
}

// All blocks read the same array, which the L2 holds, past their L1.
__global__ void __launch_bounds__(kReadThreads)
    l2_reads(const uint4* data, uint64_t words, Outcome* outcome, int rounds) {
  unsigned sum = 0;
  const uint64_t stride = static_cast<uint64_t>(kReadThreads) * gridDim.x;
  const Stopwatch watch;
  for (int round = 0; round < rounds; ++round) {
#pragma unroll 8
    for (uint64_t n = static_cast<uint64_t>(blockIdx.x) * kReadThreads + threadIdx.x; n < words; n += stride) {
      const uint4 got = cuda::load_l2(&data[n]);
      sum += got.x + got.y + got.z + got.w;
    }
  }
  cuda::block_barrier();  // all warps are done before the clock is read
  if (threadIdx.x == 0) watch.stop(&outcome[blockIdx.x], sum != 0);
}

// Each load's address is what the one before has read.
__global__ void __launch_bounds__(kWarp) l2_latency(const uint32_t* next, Outcome* outcome, int rounds) {
  if (threadIdx.x != 0) return;
  uint32_t at = 0;
  const Stopwatch watch;
  for (int round = 0; round < rounds; ++round) at = cuda::load_l2(&next[at]);
  watch.stop(outcome, at >= 1u << 30);
}

// kChains independent chains of products a warp: one tells the latency, many the rate.
template <int kChains>
__global__ void __launch_bounds__(512) matrix_products(Outcome* outcome, float* sums, int rounds) {
  constexpr uint32_t kOnes = 0x3F803F80;  // two bf16
  const uint32_t a[4] = {kOnes, kOnes, kOnes, kOnes}, b[2] = {kOnes, kOnes};
  float d[kChains][4] = {};
  const Stopwatch watch;
#pragma unroll 4
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int chain = 0; chain < kChains; ++chain) cuda::mma_bf16(d[chain], a, b);
  }
  cuda::block_barrier();  // all warps are done before the clock is read
  float sum = 0;
  for (int chain = 0; chain < kChains; ++chain) sum += d[chain][0];
  sums[threadIdx.x] = sum;
  if (threadIdx.x == 0) watch.stop(outcome, sum != 16.0f * static_cast<float>(rounds) * kChains);
}

__global__ void __launch_bounds__(kWarp) nothing() {}

// ---- The host's side ------------------------------------------------------------------------------------------------

#if defined(__CUDACC__)

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Memory that both sides reach by the same address.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count) {
    check(cudaMallocManaged(&data_, count * sizeof(T)), "memory");
    clear();
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }
  void clear() {
    check(cudaDeviceSynchronize(), "waiting");
    std::memset(static_cast<void*>(data_), 0, count_ * sizeof(T));
    int device = 0;
    check(cudaGetDevice(&device), "device");
    cudaMemLocation place = {};
    place.type = cudaMemLocationTypeDevice;
    place.id = device;
    // Moved now, and not while the clock runs. A device that cannot do that moves it at the first, untimed, run.
    if (cudaMemPrefetchAsync(data_, count_ * sizeof(T), place, 0, nullptr) != cudaSuccess) cudaGetLastError();
    check(cudaDeviceSynchronize(), "waiting");
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

void wait() { check(cudaDeviceSynchronize(), "running a kernel"); }

int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  return count;
}

bool has_clusters() {
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  return major >= 9;
}

#else

template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count) : data_(count) {
    emulator::device_memory().push_back(
        {data_.data(), count * sizeof(T), "a buffer", emulator::Access::read_write, sizeof(T), nullptr, 0});
  }
  T* data() { return data_.data(); }
  void clear() { std::fill(data_.begin(), data_.end(), T{}); }

 private:
  std::vector<T> data_;
};
void wait() {}
int multiprocessors() { return 4; }
bool has_clusters() { return true; }

#endif

class Report {
 public:
  Report() { std::printf("{"); }
  void figure(const std::string& name, const char* unit, std::vector<double> values, uint64_t wrong) {
    std::sort(values.begin(), values.end());
    std::printf("%s\n \"%s\": {\"unit\": \"%s\", \"median\": %.6g, \"min\": %.6g, \"max\": %.6g, \"wrong\": %llu}",
                first_ ? "" : ",", name.c_str(), unit, values[values.size() / 2], values.front(), values.back(),
                static_cast<unsigned long long>(wrong));
    first_ = false;
    failed_ |= wrong != 0;
    std::fflush(stdout);
  }
  void failure(const std::string& name, const std::string& why) {
    std::string escaped;
    for (const char letter : why) escaped += letter == '"' || letter == '\\' || letter == '\n' ? ' ' : letter;
    std::printf("%s\n \"%s\": {\"error\": \"%s\"}", first_ ? "" : ",", name.c_str(), escaped.c_str());
    first_ = false, failed_ = true;
    std::fflush(stdout);
  }
  int end() {
    std::printf("\n}\n");
    return failed_ ? 1 : 0;
  }

 private:
  bool first_ = true, failed_ = false;
};

constexpr int kRuns = 7, kBriefRuns = 1;

// Runs `start` once to warm up, then `runs` times, and reports figure(outcome) of each.
void measure(Report& report, int runs, const std::string& name, const char* unit, Buffer<Outcome>& outcome,
             const std::function<cuda::Status()>& start, const std::function<double(const Outcome&)>& figure) {
  std::vector<double> values;
  uint64_t wrong = 0;
  for (int run = 0; run <= runs; ++run) {
    outcome.clear();
    outcome.data()[0].wrong = kNoAnswer;
    const cuda::Status status = start();
    if (!status.ok()) return report.failure(name, status.text);
    wait();
    wrong += outcome.data()[0].wrong;
    if (run > 0) values.push_back(figure(outcome.data()[0]));
  }
  report.figure(name, unit, values, wrong);
}

int run(int rounds) {
  const bool brief = rounds < 100;  // to see that it works, not to measure
  const int runs = brief ? kBriefRuns : kRuns;
  Report report;
  Buffer<Outcome> outcome(1024);
  Buffer<Line> lines(2);
  const auto a_round = [&](double parts) {
    return [=](const Outcome& o) { return static_cast<double>(o.nanoseconds) / (parts * rounds); };
  };
  const auto cycles = [&](double parts) {
    return [=](const Outcome& o) { return static_cast<double>(o.cycles) / (parts * rounds); };
  };
  const auto config = [](int blocks, int threads) {
    cuda::LaunchConfig made;
    made.grid = dim3(static_cast<unsigned>(blocks), 1, 1);
    made.block = dim3(static_cast<unsigned>(threads), 1, 1);
    made.co_resident = blocks > 1;
    return made;
  };

  // Through L2.
  measure(
      report, runs, "flag through L2, one way", "ns", outcome,
      [&] { return lines.clear(), launch(config(2, kWarp), flag_round_trips, lines.data(), outcome.data(), rounds); },
      a_round(2));
  measure(
      report, runs, "tagged word through L2, one way", "ns", outcome,
      [&] { return lines.clear(), launch(config(2, kWarp), tagged_round_trips, lines.data(), outcome.data(), rounds); },
      a_round(2));
  Buffer<uint4> data(2 * kHandOverThreads);
  measure(
      report, runs, "2 KiB and a flag through L2, block to block", "ns", outcome,
      [&] {
        return lines.clear(), launch(config(2, kHandOverThreads), flagged_hand_overs, data.data(), lines.data(),
                                     outcome.data(), rounds);
      },
      a_round(2));
  measure(
      report, runs, "barrier of the grid", "ns", outcome,
      [&] {
        return lines.clear(),
               launch(config(multiprocessors(), kWarp), grid_barriers, lines.data(), outcome.data(), rounds);
      },
      a_round(1));

  // Inside a cluster.
  for (int size = 2; size <= kMostCluster && has_clusters(); size *= 2) {
    const std::string blocks = ", " + std::to_string(size) + " blocks";
    cuda::LaunchConfig cluster = config(size, kWarp);
    cluster.cluster = static_cast<unsigned>(size);
    cluster.co_resident = false;
    measure(
        report, runs, "barrier of a cluster" + blocks, "ns", outcome,
        [&] { return launch(cluster, cluster_barriers, outcome.data(), rounds); }, a_round(1));
    cluster.block = dim3(kPushThreads, 1, 1);
    cluster.shared_bytes = sizeof(PushBuffers);
    for (unsigned share = 128; share <= (brief && size > 4 ? 128 : kMostShare); share *= 4) {
      const std::string what = blocks + ", " + std::to_string(share) + " bytes each";
      measure(
          report, runs, "exchange by st.async" + what, "ns", outcome,
          [&] { return launch(cluster, cluster_pushes<false>, outcome.data(), rounds, share); }, a_round(1));
      measure(
          report, runs, "exchange by bulk copies" + what, "ns", outcome,
          [&] { return launch(cluster, cluster_pushes<true>, outcome.data(), rounds, share); }, a_round(1));
    }
  }

  // Inside a block.
  measure(
      report, runs, "arrive at and wait for an own mbarrier", "cycles", outcome,
      [&] { return launch(config(1, kWarp), mbarrier_phases, outcome.data(), rounds); }, cycles(1));
  measure(
      report, runs, "barrier of 256 threads", "cycles", outcome,
      [&] { return launch(config(1, 256), block_barriers, outcome.data(), rounds); }, cycles(1));

  // Rates.
  cuda::LaunchConfig reading = config(1, kReadThreads);
  reading.shared_bytes = kSharedWords * sizeof(uint4);
  measure(
      report, runs, "reads from shared memory", "bytes/cycle", outcome,
      [&] { return launch(reading, shared_reads, outcome.data(), rounds); },
      [&](const Outcome& o) {
        return 4.0 * kSharedWords * sizeof(uint4) * rounds / static_cast<double>(std::max<uint64_t>(o.cycles, 1));
      });
  const uint64_t words = brief ? 4096 : (8u << 20) / sizeof(uint4);
  Buffer<uint4> array(words);
  measure(
      report, runs, "reads from L2, all multiprocessors, 8 MiB", "GB/s", outcome,
      [&] {
        cuda::LaunchConfig all = config(multiprocessors(), kReadThreads);
        all.co_resident = false;
        return launch(all, l2_reads, array.data(), words, outcome.data(), std::max(rounds / 50, 1));
      },
      [&](const Outcome& o) {
        return static_cast<double>(words * sizeof(uint4)) * std::max(rounds / 50, 1) /
               static_cast<double>(std::max<uint64_t>(o.nanoseconds, 1));
      });
  constexpr uint32_t kSteps = 4096, kStride = 64;  // 1 MiB, a line apart
  Buffer<uint32_t> chain(kSteps * kStride);
  for (uint32_t n = 0; n < kSteps; ++n) chain.data()[n * kStride] = (n + 1) * 1033 % kSteps * kStride;
  measure(
      report, runs, "latency of L2", "cycles", outcome,
      [&] { return launch(config(1, kWarp), l2_latency, chain.data(), outcome.data(), rounds); }, cycles(1));
  Buffer<float> sums(512);
  measure(
      report, runs, "latency of mma m16n8k16 bf16", "cycles", outcome,
      [&] { return launch(config(1, kWarp), matrix_products<1>, outcome.data(), sums.data(), rounds); }, cycles(1));
  measure(
      report, runs, "mma m16n8k16 bf16, one multiprocessor", "mma/cycle", outcome,
      [&] { return launch(config(1, 512), matrix_products<4>, outcome.data(), sums.data(), rounds); },
      [&](const Outcome& o) {
        return 4.0 * 512 / kWarp * rounds / static_cast<double>(std::max<uint64_t>(o.cycles, 1));
      });

#if defined(__CUDACC__)
  // Kernels one after the other, as a stream and as a graph: the time of each, all in all.
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "stream");
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  const int kernels = std::min(rounds, 1000);
  cuda::LaunchConfig empty = config(1, kWarp);
  empty.stream = stream;
  const auto queue = [&] {
    for (int n = 0; n < kernels; ++n) {
      const cuda::Status status = launch(empty, nothing);
      if (!status.ok()) std::fprintf(stderr, "%s\n", status.text.c_str()), std::exit(1);
    }
  };
  cudaGraph_t graph;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  queue();
  check(cudaStreamEndCapture(stream, &graph), "capture");
  cudaGraphExec_t replay;
  check(cudaGraphInstantiate(&replay, graph, 0), "graph");
  std::vector<double> in_stream, in_graph, host;
  for (int run = 0; run <= runs; ++run) {
    float ms = 0;
    check(cudaEventRecord(begin, stream), "event");
    const auto before = std::chrono::steady_clock::now();
    queue();
    const std::chrono::duration<double, std::nano> queued = std::chrono::steady_clock::now() - before;
    check(cudaEventRecord(end, stream), "event");
    check(cudaEventSynchronize(end), "event");
    check(cudaEventElapsedTime(&ms, begin, end), "event");
    if (run > 0) in_stream.push_back(ms * 1e6 / kernels), host.push_back(queued.count() / kernels);
    check(cudaEventRecord(begin, stream), "event");
    check(cudaGraphLaunch(replay, stream), "graph");
    check(cudaEventRecord(end, stream), "event");
    check(cudaEventSynchronize(end), "event");
    check(cudaEventElapsedTime(&ms, begin, end), "event");
    if (run > 0) in_graph.push_back(ms * 1e6 / kernels);
  }
  report.figure("an empty kernel in a stream", "ns", in_stream, 0);
  report.figure("an empty kernel in a graph", "ns", in_graph, 0);
  report.figure("a launch, on the host", "ns", host, 0);
#endif
  return report.end();
}

}  // namespace stacked_lstm::primitives

int main(int count, char** arguments) {
  int rounds = 20000;
  if (count == 3 && std::strcmp(arguments[1], "--rounds") == 0) rounds = std::atoi(arguments[2]);
  if (rounds < 2 || (count != 1 && count != 3)) {
    std::fprintf(stderr, "usage: primitives [--rounds N], N at least 2\n");
    return 2;
  }
  return stacked_lstm::primitives::run(rounds);
}
