// How fast this machine streams weights: each thread reads an array of its own, over and over, with one multiply-add a vector.
//
// That is the inner loop of a matrix-vector product, and nothing else of it; no LSTM can read its weights faster. Arrays that fit
// a core's L2 give L2's rate, larger ones L3's or the memory's. Always from the first element to the last: a kernel that turns back
// at the end finds the rest of the pass before in a nearer cache, and may be faster. Built by limits.py for the machine it runs on.
//
// Arrays are allocated and written once, by stream_open, and threads started anew by every stream_bytes_per_second: a call of a few
// milliseconds, between two of which nothing of the probe runs.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <memory>
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
constexpr std::size_t kAccumulators = 8;               // covers the latency of the multiply-add
constexpr std::size_t kStep = kAccumulators * kLanes;  // elements
constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kSpanBytes = std::size_t{1} << 24;  // read at least, in one span: 0.1 ms or so
typedef float Vector __attribute__((vector_size(kVectorBytes)));

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

__attribute__((noinline)) float read_once(const float* values, std::size_t count) {
  asm volatile("" ::: "memory");  // or the compiler, seeing the same result each time, would call this once
  Vector sums[kAccumulators] = {};
  const Vector weight = sums[0] + 0.5f;
  for (std::size_t i = 0; i < count; i += kStep) {
#pragma GCC unroll 8
    for (std::size_t k = 0; k < kAccumulators; ++k) {
      sums[k] += weight * *reinterpret_cast<const Vector*>(values + i + k * kLanes);
    }
  }
  Vector total = sums[0];
  for (std::size_t k = 1; k < kAccumulators; ++k) total += sums[k];
  return total[0];
}

struct Free {
  void operator()(float* values) const { std::free(values); }
};

struct Stream {
  std::size_t count;  // of each thread's elements
  std::vector<std::unique_ptr<float, Free>> arrays;
};

// work(id) on `threads` threads, of which the caller is the first.
template <typename Work>
void on_threads(int threads, const Work& work) {
  std::vector<std::thread> others;
  for (int id = 1; id < threads; ++id) others.emplace_back(work, id);
  work(0);
  for (std::thread& other : others) other.join();
}

}  // namespace

// An array of `bytes` for each thread, written; null where there is not that much memory.
extern "C" void* stream_open(std::size_t bytes, int threads) {
  const std::size_t count = std::max<std::size_t>(bytes / sizeof(float) / kStep, 1) * kStep;
  const std::size_t allocated = (count * sizeof(float) + kHugePage - 1) / kHugePage * kHugePage;
  auto stream = std::make_unique<Stream>(Stream{count, {}});
  for (int id = 0; id < threads; ++id) {
    stream->arrays.emplace_back(static_cast<float*>(std::aligned_alloc(kHugePage, allocated)));
    if (!stream->arrays.back()) return nullptr;
#ifdef __linux__
    madvise(stream->arrays.back().get(), allocated, MADV_HUGEPAGE);
#endif
  }
  on_threads(threads, [&](int id) {
    for (std::size_t i = 0; i < count; ++i) stream->arrays[id].get()[i] = static_cast<float>(i & 7);
  });
  return stream.release();
}

extern "C" void stream_close(void* stream) { delete static_cast<Stream*>(stream); }

// Bytes a second, all threads together, best of several short spans in which all of them read: two spans at least.
extern "C" double stream_bytes_per_second(const void* opened, double seconds) {
  const Stream& stream = *static_cast<const Stream*>(opened);
  const int threads = static_cast<int>(stream.arrays.size());
  const std::size_t bytes = stream.count * sizeof(float);
  const std::size_t repeats = std::max<std::size_t>(1, kSpanBytes / bytes);
  std::atomic<int> ready{0};
  std::atomic<float> sink{0.f};
  std::vector<double> best(threads, 0.0);
  on_threads(threads, [&](int id) {
    const float* values = stream.arrays[id].get();
    float sum = read_once(values, stream.count);  // into the caches, not timed
    ready.fetch_add(1);
    while (ready.load() < threads) std::this_thread::yield();  // so that all of them read at the same time
    const double end = now() + seconds;
    for (int span = 0; span < 2 || now() < end; ++span) {
      const double start = now();
      for (std::size_t r = 0; r < repeats; ++r) sum += read_once(values, stream.count);
      best[id] = std::max(best[id], static_cast<double>(repeats * bytes) / (now() - start));
    }
    sink.store(sum);
  });
  double total = 0.0;
  for (const double rate : best) total += rate;
  return total;
}
