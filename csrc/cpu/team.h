// csrc/cpu/team.h: threads that work together on one call, and how they wait for each other.
//
// A call asks a thread pool for workers, and may get fewer: in a nested region, under another library's limit, from a
// busy pool. A schedule in which workers hand data to each other must know which workers are really there. So the
// workers muster first, and the schedule is made for those that came.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace stacked_lstm::cpu {

// Thrown by wait() if another worker has failed. Team::work catches it and drops it, because rethrow() throws the first
// failure.
struct Abandoned {};

// A multiply-add with a denormal operand is about a hundred times slower, and an output gate that is nearly shut makes
// h denormal. So denormals are flushed to zero while a worker runs. Afterwards the thread has its own mode again.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (1ull << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
#else
  FlushDenormals() : saved_(0) {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if defined(__aarch64__)
  uint64_t saved_;
#else
  unsigned saved_;
#endif
};

// A count that one worker raises and others wait for. Each count has a pair of cache lines of its own, because the
// adjacent-line prefetcher fetches lines in pairs.
struct alignas(128) Count {
  std::atomic<int64_t> value{0};
};

class Team {
 public:
  // `sure`: it is certain that all shares are called, and that all calls run at the same time. One call may have the
  // shares of several workers.
  Team(int64_t wanted, bool sure) : wanted_(wanted), sure_(sure) {}

  // A pool's thread calls this with its share of the wanted workers. Once the team is complete, returns the thread's
  // rank, or -1 if the team started without this thread.
  int64_t muster(int64_t share) {
    int64_t rank;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (size_.load(std::memory_order_relaxed) > 0) return -1;
      rank = arrived_++;
      accounted_ += share;
      if (accounted_ == wanted_) size_.store(arrived_, std::memory_order_release);
    }
    // If a pool runs the shares one after the other, the team never becomes complete. So the first thread to come waits
    // a little, then starts the team with the threads that are there.
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(2);
    for (int64_t spins = 0; size_.load(std::memory_order_acquire) == 0; ++spins) {
      spins < 1000 ? relax() : std::this_thread::yield();
      if (!sure_ && rank == 0 && std::chrono::steady_clock::now() > deadline) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (size_.load(std::memory_order_relaxed) == 0) size_.store(arrived_, std::memory_order_release);
      }
    }
    return rank;
  }

  int64_t size() const { return size_.load(std::memory_order_acquire); }

  // Runs f(rank, size) as a member of the team. If f throws, the exception is kept, and the waits of all other members
  // end.
  template <typename F>
  void work(int64_t share, F&& f) {
    const int64_t rank = muster(share);
    if (rank < 0) return;
    try {
      const FlushDenormals flush;
      f(rank, size());
    } catch (const Abandoned&) {
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
      failed_.store(true, std::memory_order_release);
    }
  }

  void rethrow() {
    if (failure_) std::rethrow_exception(failure_);
  }

  // Waits until `count` is at least `value`. What the count's owner wrote before it raised the count is visible after
  // this.
  void wait(const Count& count, int64_t value) const {
    for (int64_t spins = 0; count.value.load(std::memory_order_acquire) < value; ++spins) {
      if (failed_.load(std::memory_order_acquire)) throw Abandoned();
      // After some tens of microseconds, the owner has probably lost its core to another process: yield this core to
      // it.
      spins < 1000 ? relax() : std::this_thread::yield();
    }
  }

  static void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

 private:
  const int64_t wanted_;
  const bool sure_;
  std::mutex mutex_;
  int64_t arrived_ = 0, accounted_ = 0;
  std::atomic<int64_t> size_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;
};

// Makes what this worker wrote before visible to every worker that waits for `value`.
inline void publish(Count& count, int64_t value) { count.value.store(value, std::memory_order_release); }

}  // namespace stacked_lstm::cpu
