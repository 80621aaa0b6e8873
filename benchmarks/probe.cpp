// How fast this machine streams weights: each thread reads an array of its own, over and over, with one multiply-add a vector.
//
// That is the inner loop of a matrix-vector product, and nothing else of it; no LSTM can read its weights faster. Arrays that fit
// a core's L2 give L2's rate, larger ones L3's or the memory's. Built by limits.py for the machine it runs on.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <thread>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr std::size_t kLanes = kVectorBytes / sizeof(float);
constexpr std::size_t kAccumulators = 8;  // covers the latency of the multiply-add
constexpr std::size_t kHugePage = std::size_t{2} << 20;
typedef float Vector __attribute__((vector_size(kVectorBytes)));

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

__attribute__((noinline)) float read_once(const float* values, std::size_t count) {
  asm volatile("" ::: "memory");  // or the compiler, seeing the same result each time, would call this once
  Vector sums[kAccumulators] = {};
  const Vector weight = sums[0] + 0.5f;
  for (std::size_t i = 0; i < count; i += kAccumulators * kLanes) {
#pragma GCC unroll 8
    for (std::size_t k = 0; k < kAccumulators; ++k) {
      sums[k] += weight * *reinterpret_cast<const Vector*>(values + i + k * kLanes);
    }
  }
  Vector total = sums[0];
  for (std::size_t k = 1; k < kAccumulators; ++k) total += sums[k];
  return total[0];
}

}  // namespace

// Bytes a second, all threads together, best of several short spans in which all of them read. `bytes` is each thread's array.
extern "C" double stream_bytes_per_second(std::size_t bytes, int threads, double seconds) {
  const std::size_t step = kAccumulators * kVectorBytes;
  const std::size_t count = std::max<std::size_t>(bytes / step, 1) * step / sizeof(float);
  const std::size_t repeats = std::max<std::size_t>(1, (std::size_t{1} << 24) / (count * sizeof(float)));
  std::atomic<int> ready{0};
  std::atomic<float> sink{0.f};
  std::vector<double> best(threads, 0.0);
  std::vector<std::thread> workers;
  for (int id = 0; id < threads; ++id) {
    workers.emplace_back([&, id] {
      const std::size_t allocated = (count * sizeof(float) + kHugePage - 1) / kHugePage * kHugePage;
      float* values = static_cast<float*>(std::aligned_alloc(kHugePage, allocated));
#ifdef __linux__
      madvise(values, allocated, MADV_HUGEPAGE);
#endif
      for (std::size_t i = 0; i < count; ++i) values[i] = static_cast<float>(i & 7);
      ready.fetch_add(1);
      while (ready.load() < threads) std::this_thread::yield();  // so that all of them read at the same time
      for (const double end = now() + seconds; now() < end;) {
        const double start = now();
        float sum = 0.f;
        for (std::size_t r = 0; r < repeats; ++r) sum += read_once(values, count);
        sink.store(sum);
        best[id] = std::max(best[id], static_cast<double>(repeats * count * sizeof(float)) / (now() - start));
      }
      std::free(values);
    });
  }
  double total = 0.0;
  for (int id = 0; id < threads; ++id) {
    workers[id].join();
    total += best[id];
  }
  return total;
}
