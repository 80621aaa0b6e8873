// csrc/persistent/block.cuh: what the persistent kernels have in common: who a thread is, which sequences its block
// has, arithmetic, and waiting. A launch's arguments and its cut are in kernels.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../cuda/elements.h"
#include "../cuda/launch.cuh"
#include "../cuda/primitives.cuh"
#include "../stack/cell.h"
#include "../stack/number.h"
#include "kernels.h"

namespace stacked_lstm::cuda::persistent {

using namespace stacked_lstm::persistent;

// The cell of all instances. It is not a template argument: the list of instances is made for the registers that this
// cell needs (instances.h), so another cell needs another list.
using Cell = LstmCell;

inline Outcome outcome_of(const Status& status) {
  constexpr int kCooperativeLaunchTooLarge = 720;  // of cudaError_t
  if (status.ok()) return {};
  return {status.code == kCooperativeLaunchTooLarge ? Outcome::refused : Outcome::failed, status.text};
}

// ---- Who a thread is ------------------------------------------------------------------------------------------------

struct ThreadPlace {
  int thread, warp, warp_lane;
  int copy, lane, rank;  // of the block

  template <typename Arguments>
  explicit __device__ __forceinline__ ThreadPlace(const Arguments& arguments)
      : thread(kept(static_cast<int>(threadIdx.x))),
        warp(static_cast<int>(threadIdx.x / kWarpThreads)),
        warp_lane(static_cast<int>(threadIdx.x % kWarpThreads)) {
    const auto blocks = static_cast<unsigned>(arguments.cut.blocks),
               lanes = static_cast<unsigned>(arguments.sizes.lanes);
    rank = static_cast<int>(blockIdx.x % blocks);
    lane = static_cast<int>(blockIdx.x / blocks % lanes);
    copy = static_cast<int>(blockIdx.x / blocks / lanes);
  }
};

// Puts a number that all threads of the warp have, and need without delay in every step, into a register. The compiler
// would load a kernel's argument again each time, which takes 30 cycles. It cannot undo a shuffle unless it sees that
// all threads pass the same value; so only warp lane 0 passes it.
__device__ __forceinline__ int in_register(int value) {
  return shuffle(kFullWarp, threadIdx.x % kWarpThreads == 0 ? value : 0, 0);
}

// The counter of a block, in chunks_done.
template <typename Arguments>
__device__ __forceinline__ uint32_t* chunk_counter(const Arguments& arguments, int copy, int lane, int rank) {
  return arguments.chunks_done + (copy * arguments.sizes.lanes + lane) * arguments.cut.blocks + rank;
}

// Step number s of a lane, as a time; and the reverse.
__device__ __forceinline__ int time_of(const LaunchSizes& sizes, bool reverse, int s) {
  return reverse ? sizes.steps - 1 - s : s;
}

// An address that alternates between two values, for even and odd steps. It is carried from step to step. If it
// depended on the step's number, the compiler would compute it again in each step, just when it is needed.
struct TwoAddresses {
  int at, to_other;

  __device__ __forceinline__ void next() { at += to_other, to_other = -to_other; }
};

// The sequences of a batch group: `count` of them, from `first` on. Column b of the block is sequence first + b.
struct Sequences {
  const int64_t* rows_before;
  const uint8_t* resets;
  int packed, batch, first, count;

  __device__ __forceinline__ Sequences(const LaunchSizes& sizes, int copy)
      : rows_before(sizes.rows_before),
        resets(sizes.resets),
        packed(sizes.packed),
        batch(sizes.batch),
        first(sizes.first_sequence(sizes.first_batch_group + copy)),
        count(sizes.first_sequence(sizes.first_batch_group + copy + 1) - first) {}

  // Columns 0 … active(t) - 1 have a step t; if active(t) <= 0, no column has. (Sequences are sorted by length.)
  __device__ __forceinline__ int active(int t) const {
    if (!rows_before) return count;
    const auto all = static_cast<int>(load_readonly(rows_before + t + 1) - load_readonly(rows_before + t));
    return all - first < count ? all - first : count;
  }
  // The row of column 0 at time t, if the column is active then.
  __device__ __forceinline__ int64_t row(int t) const {
    return (packed ? load_readonly(rows_before + t) : int64_t{t} * batch) + first;
  }
  // Whether column `column` is reset before step number s of a lane: see stack/resets.h. Call it only if there are resets.
  // What stands behind a sequence's end is no reset. A reverse lane, which begins there, has not crossed anything yet.
  __device__ __forceinline__ bool reset_before(const LaunchSizes& sizes, bool reverse, int s, int column) const {
    const int boundary = reverse ? sizes.steps - s : s;
    return boundary < sizes.steps && column < active(boundary) &&
           load_readonly(resets + (int64_t{boundary} * batch + first + column)) != 0;
  }
};

// ---- Arithmetic -----------------------------------------------------------------------------------------------------

// σ and tanh of the 16-bit kernels. They use the special function unit, which executes few instructions a clock; so all
// σ of a cell share one reciprocal. With D = 1 + 2^(-x·log2 e) for each gate, σ = 1/D is 1/(D_i·D_f·…) times the D of
// the other gates. No exponent is above 30, so that the product stays finite. So σ is never below 2⁻³⁰ (absolute error
// below 10⁻⁹), and never more than 4 units in the last place above 1.
//
//   kTanhUnit = false   g is 2·σ(2x) - 1 and shares the reciprocal, too: 5 special functions for the gates, 2 for
//                       tanh c'. Absolute errors are below 2⁻²⁰, less than that of rounding to 16 bits. Exception: tanh
//                       of |x| below about 2⁻⁹, whose relative error grows.
//   kTanhUnit = true    tanh is one instruction, of relative error about 2⁻¹¹: a quarter of the largest error of
//                       rounding h to bfloat16. 5 special functions for the gates, 1 for tanh c'. An error of g enters
//                       c once and decays with it, like an error of x. An error of f would enter c at every step of a
//                       sequence; therefore σ never uses this instruction.
//
// A NaN in one pre-activation makes all σ of its cell NaN, but no σ of another sequence or unit.
template <bool kTanhUnit>
struct FastMaths {
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kMostExponent = 30.0f;  // the product of four such D is 2^120

  static __device__ __forceinline__ float denominator(float x, float scale = 1) {
    return 1.0f + exp2_approx(lesser_or_nan(-scale * kLog2E * x, kMostExponent));
  }

  // See cell.h.
  static __device__ __forceinline__ Gates<float> activate(const Gates<float>& a) {
    const float i = denominator(a.i), f = denominator(a.f), o = denominator(a.o);
    const float io = i * o, fo = f * o, fi = f * i;
    if constexpr (kTanhUnit) {
      const float r = reciprocal_approx(fi * o);
      return {r * fo, r * io, tanh_approx(a.g), r * fi};
    } else {
      const float g = denominator(a.g, 2);
      const float r = reciprocal_approx(fi * (g * o)), rg = r * g;
      return {rg * fo, rg * io, 2.0f * (r * (fi * o)) - 1.0f, rg * fi};
    }
  }
  static __device__ __forceinline__ float tanh(float x) {
    if constexpr (kTanhUnit) return tanh_approx(x);
    return 2.0f * reciprocal_approx(denominator(x, 2)) - 1.0f;
  }
};

// A value of two cells of a thread. The two are computed separately and share no operation, not even a reciprocal: they
// belong to different sequences, and no bit of a sequence may depend on the other sequences of the batch.
struct Two {
  float of[2];
};
__device__ __forceinline__ Two operator*(const Two& a, const Two& b) { return {a.of[0] * b.of[0], a.of[1] * b.of[1]}; }
__device__ __forceinline__ Two operator+(const Two& a, const Two& b) { return {a.of[0] + b.of[0], a.of[1] + b.of[1]}; }

template <typename Maths>
struct EachOfTwo {
  static __device__ __forceinline__ Gates<Two> activate(const Gates<Two>& a) {
    Gates<Two> y;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const Gates<float> one = activate_gates<Maths>(Gates<float>{a.i.of[n], a.f.of[n], a.g.of[n], a.o.of[n]});
      y.i.of[n] = one.i, y.f.of[n] = one.f, y.g.of[n] = one.g, y.o.of[n] = one.o;
    }
    return y;
  }
  static __device__ __forceinline__ Two tanh(const Two& x) { return {{Maths::tanh(x.of[0]), Maths::tanh(x.of[1])}}; }
};

// ForwardMathsOf is for the forward step, MathsOf for backward's slopes. The slopes do not use the tanh unit: where
// tanh is near 1, 1 - tanh² would amplify its error.
template <typename T>
using ForwardMathsOf =
    std::conditional_t<std::is_same_v<T, float>, gates::Maths, FastMaths<std::is_same_v<T, bfloat16>>>;
template <typename T>
using MathsOf = std::conditional_t<std::is_same_v<T, float>, gates::Maths, FastMaths<false>>;

// ---- Waiting --------------------------------------------------------------------------------------------------------

// Every wait for data of another block goes through this class. In a build with STACKED_LSTM_WATCHDOG no wait is
// endless: the first wait that takes too long leaves a record. All other threads see it, and from then on no thread
// waits for another block or sends anything. So the launch ends; its results are meaningless.
class Waiting {
 public:
#if defined(STACKED_LSTM_WATCHDOG)
  __device__ __forceinline__ Waiting(Watchdog* watchdog, const ThreadPlace& place)
      : watchdog_(watchdog), place_(place) {}

  __device__ __forceinline__ bool given_up() const { return given_up_; }

  // Call it behind a block barrier: if a thread of the block gave up before the barrier, all threads give up here.
  __device__ __forceinline__ void agree() { given_up_ |= load_relaxed<Scope::device>(&watchdog_->expired) != 0; }

  // Waits until there() is true. `step`: the lane's step number, for the record.
  template <typename There>
  __device__ __forceinline__ void until(There there, Watchdog::What what, int step, int for_lane, int for_block,
                                        int for_count) {
    const uint64_t start = clock_nanoseconds();
    for (uint64_t looks = 0; !given_up_ && !there(); ++looks) {
      pause();
      if (load_relaxed<Scope::device>(&watchdog_->expired) != 0) {
        given_up_ = true;
      } else if (passed(start, looks) > (watchdog_->limit > 0 ? watchdog_->limit : kWatchdogNanoseconds)) {
        given_up_ = true;
        if (atomic_exchange(&watchdog_->expired, 1) != 0) return;
        watchdog_->what = what;
        watchdog_->block = static_cast<int>(blockIdx.x), watchdog_->thread = place_.thread;
        watchdog_->copy = place_.copy, watchdog_->lane = place_.lane, watchdog_->rank = place_.rank;
        watchdog_->step = step;
        watchdog_->for_lane = for_lane, watchdog_->for_block = for_block, watchdog_->for_count = for_count;
      }
    }
  }

  // Waits until the bytes that other blocks push have ended the phase of an mbarrier; see mbarrier_wait.
  __device__ __forceinline__ void for_phase(uint32_t barrier, uint32_t parity, int step) {
    until([&] { return mbarrier_test(barrier, parity); }, Watchdog::exchange, step, place_.lane, -1, 0);
  }

 private:
  static __device__ __forceinline__ uint64_t passed([[maybe_unused]] uint64_t start, uint64_t looks) {
#if defined(__CUDACC__)
    return clock_nanoseconds() - start;
#else
    return looks;  // no time passes on the emulator
#endif
  }

  Watchdog* watchdog_;
  const ThreadPlace& place_;
  bool given_up_ = false;
#else
  __device__ __forceinline__ Waiting(Watchdog*, const ThreadPlace&) {}

  __device__ __forceinline__ bool given_up() const { return false; }

  __device__ __forceinline__ void agree() const {}

  template <typename There>
  __device__ __forceinline__ void until(There there, Watchdog::What, int, int, int, int) {
    while (!there()) pause();
  }

  __device__ __forceinline__ void for_phase(uint32_t barrier, uint32_t parity, int) { mbarrier_wait(barrier, parity); }
#endif
};

// Waits until block `rank` of another lane, in the same copy, has published `chunks` chunks.
//
// The acquire makes what that block wrote before it published them visible to this thread. The caller's barrier makes
// it visible to the other threads.
template <typename Arguments>
__device__ __forceinline__ void await_chunk(const Arguments& arguments, const ThreadPlace& place, Waiting& waiting,
                                            int lane, int rank, int chunks, int step) {
  const uint32_t* done = chunk_counter(arguments, place.copy, lane, rank);
  waiting.until(
      [&] {
        if (load_acquire<Scope::device>(done) >= static_cast<uint32_t>(chunks)) return true;
        nanosleep(20);
        return false;
      },
      Watchdog::hand_over, step, lane, rank, chunks);
}

// Waits until all blocks of lane `below` have. All threads call it, and each waits for some of the blocks; the caller's
// barrier then makes the chunks visible to all threads.
template <typename Arguments>
__device__ __forceinline__ void await_chunks(const Arguments& arguments, const ThreadPlace& place, Waiting& waiting,
                                             int below, int chunks, int step) {
  for (int rank = place.thread; rank < arguments.cut.blocks; rank += static_cast<int>(blockDim.x)) {
    await_chunk(arguments, place, waiting, below, rank, chunks, step);
  }
}

// Publishes that this block has written `chunks` chunks. One thread calls it, behind a block barrier: the release makes
// what all threads of the block wrote before that barrier visible to the thread that acquires the number.
template <typename Arguments>
__device__ __forceinline__ void publish_chunks(const Arguments& arguments, const ThreadPlace& place, int chunks) {
  store_release<Scope::device>(chunk_counter(arguments, place.copy, place.lane, place.rank),
                               static_cast<uint32_t>(chunks));
}

}  // namespace stacked_lstm::cuda::persistent
