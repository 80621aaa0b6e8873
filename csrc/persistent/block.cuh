// csrc/persistent/block.cuh: what the persistent kernels have in common: who a thread is, which sequences its block has,
// arithmetic, and waiting. What a launch is given, and how it is cut, stands in kernels.h.
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

inline Outcome outcome_of(const Status& status) {
  constexpr int kCooperativeLaunchTooLarge = 720;  // of cudaError_t
  if (status.ok()) return {};
  return {status.code == kCooperativeLaunchTooLarge ? Outcome::refused : Outcome::failed, status.text};
}

// ---- Who a thread is ------------------------------------------------------------------------------------------------

struct Place {
  int thread, warp, warp_lane;
  int copy, lane, rank;  // of the block; `lane` is one of the stack

  template <typename Arguments>
  explicit __device__ __forceinline__ Place(const Arguments& arguments)
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

// A number that all lanes of the warp have, and want at once in every step: from a register. (Of a kernel's argument the
// compiler would rather load it again and again, which takes 30 cycles. From a shuffle there is no way back, unless it sees
// that all lanes bring the same.)
__device__ __forceinline__ int in_register(int value) {
  return shuffle(kFullWarp, threadIdx.x % kWarpThreads == 0 ? value : 0, 0);
}

// The counter of a block, in chunks_done.
template <typename Arguments>
__device__ __forceinline__ uint32_t* chunk_counter(const Arguments& arguments, int copy, int lane, int rank) {
  return arguments.chunks_done + (copy * arguments.sizes.lanes + lane) * arguments.cut.blocks + rank;
}

// Step number s of a lane, as a time; and the reverse.
__device__ __forceinline__ int time_of(const Sizes& sizes, bool reverse, int s) {
  return reverse ? sizes.steps - 1 - s : s;
}

// An address that has two values, for even and odd steps, in turn. It is carried from step to step: what can be computed
// from a step's number, the compiler computes anew in each, just when it is wanted.
struct InTurn {
  int at, to_other;

  __device__ __forceinline__ void next() { at += to_other, to_other = -to_other; }
};

// The sequences of a batch group: `count` of them, from `first` on. Column b of the block is sequence first + b.
struct Sequences {
  const int64_t* first_row;
  int batch, first, count;

  __device__ __forceinline__ Sequences(const Sizes& sizes, int copy)
      : first_row(sizes.first_row),
        batch(sizes.batch),
        first(sizes.first_sequence(sizes.first_group + copy)),
        count(sizes.first_sequence(sizes.first_group + copy + 1) - first) {}

  // Columns 0 … active(t) - 1 have a step t: none, where it is not above 0. (Sequences are sorted by length.)
  __device__ __forceinline__ int active(int t) const {
    if (!first_row) return count;
    const auto all = static_cast<int>(load_readonly(first_row + t + 1) - load_readonly(first_row + t));
    return all - first < count ? all - first : count;
  }
  // The row of column 0 at time t, where it is active.
  __device__ __forceinline__ int64_t row(int t) const {
    return (first_row ? load_readonly(first_row + t) : int64_t{t} * batch) + first;
  }
};

// ---- Arithmetic -----------------------------------------------------------------------------------------------------

// σ and tanh of 16 bits' kernels, from the special function unit, of whose instructions there are few: all σ of a cell share
// one reciprocal. With D = 1 + 2^(-x·log2 e) of each gate, σ = 1/D is 1/(D_i·D_f·…) times the others' D. That the product
// stays finite, no exponent is above 30: σ is never below 2⁻³⁰ (absolute error below 10⁻⁹), nor ever more than 4 units in
// the last place above 1.
//
//   kTanhUnit = false   g, as 2·σ(2x) - 1, shares the reciprocal, too: 5 special functions for the gates, 2 for tanh c'.
//                       Absolute errors below 2⁻²⁰: less than what rounding to 16 bits does, but for tanh of |x| < 2⁻⁹ or so,
//                       whose relative error grows.
//   kTanhUnit = true    tanh in one instruction, of relative error about 2⁻¹¹: a quarter of the largest error that rounding
//                       h to bfloat16 makes. 4 special functions for the gates, 1 for tanh c'. That of g enters c once and
//                       decays with it, like an error of x; one of f would do so at every step of a sequence: so never σ.
//
// A NaN in one pre-activation makes NaN of all σ of its cell: of that sequence, and that unit, alone.
template <bool kTanhUnit>
struct FastMaths {
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kMostExponent = 30.0f;  // four such D make 2^120

  static __device__ __forceinline__ float denominator(float x, float scale = 1) {
    return 1.0f + exp2_approx(lesser_or_nan(-scale * kLog2E * x, kMostExponent));
  }

  // See activate() of cell.h.
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

// Two cells of a thread, as one number. Each for itself: they are of different sequences, which share no operation, not even
// a reciprocal: no bit of a sequence may depend on what stands beside it in the batch.
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
      const Gates<float> one = stacked_lstm::activate<Maths>(Gates<float>{a.i.of[n], a.f.of[n], a.g.of[n], a.o.of[n]});
      y.i.of[n] = one.i, y.f.of[n] = one.f, y.g.of[n] = one.g, y.o.of[n] = one.o;
    }
    return y;
  }
  static __device__ __forceinline__ Two tanh(const Two& x) { return {{Maths::tanh(x.of[0]), Maths::tanh(x.of[1])}}; }
};

// Of the forward step. And of backward's slopes, in which 1 - tanh² would make much of the error of a tanh that is near 1.
template <typename T>
using ForwardMathsOf =
    std::conditional_t<std::is_same_v<T, float>, gates::Maths, FastMaths<std::is_same_v<T, bfloat16>>>;
template <typename T>
using MathsOf = std::conditional_t<std::is_same_v<T, float>, gates::Maths, FastMaths<false>>;

// ---- Waiting --------------------------------------------------------------------------------------------------------

// Through this, and nothing else, threads wait for other blocks. In a build with STACKED_LSTM_WATCHDOG no wait is endless:
// the first that takes too long leaves a record, which all others see, and from then on nobody waits for another block, or
// sends anything. So the launch ends, with numbers that mean nothing.
class Waiting {
 public:
#if defined(STACKED_LSTM_WATCHDOG)
  __device__ __forceinline__ Waiting(Watchdog* watchdog, const Place& place) : watchdog_(watchdog), place_(place) {}

  __device__ __forceinline__ bool given_up() const { return given_up_; }

  // Behind a barrier of the block: where one of its threads has given up, all have.
  __device__ __forceinline__ void agree() { given_up_ |= load_relaxed<Scope::device>(&watchdog_->expired) != 0; }

  // Until there() says so. `step`: the lane's, for the record.
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

  // Until the phase of an mbarrier has ended, which other blocks end; see mbarrier_wait.
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
  const Place& place_;
  bool given_up_ = false;
#else
  __device__ __forceinline__ Waiting(Watchdog*, const Place&) {}

  __device__ __forceinline__ bool given_up() const { return false; }

  __device__ __forceinline__ void agree() const {}

  template <typename There>
  __device__ __forceinline__ void until(There there, Watchdog::What, int, int, int, int) {
    while (!there()) pause();
  }

  __device__ __forceinline__ void for_phase(uint32_t barrier, uint32_t parity, int) { mbarrier_wait(barrier, parity); }
#endif
};

// Until the block of this rank of another lane (of the same copy) has handed on `chunks` chunks.
//
// With the number comes, by its acquire, what that block had written before: to this thread. The caller's barrier makes it
// visible to all others.
template <typename Arguments>
__device__ __forceinline__ void await_chunk(const Arguments& arguments, const Place& place, Waiting& waiting, int lane,
                                            int rank, int chunks, int step) {
  const uint32_t* done = chunk_counter(arguments, place.copy, lane, rank);
  waiting.until(
      [&] {
        if (load_acquire<Scope::device>(done) >= static_cast<uint32_t>(chunks)) return true;
        nanosleep(20);
        return false;
      },
      Watchdog::hand_over, step, lane, rank, chunks);
}

// Until all blocks of lane `below` have.
template <typename Arguments>
__device__ __forceinline__ void await_chunks(const Arguments& arguments, const Place& place, Waiting& waiting,
                                             int below, int chunks, int step) {
  for (int rank = place.thread; rank < arguments.cut.blocks; rank += static_cast<int>(blockDim.x)) {
    await_chunk(arguments, place, waiting, below, rank, chunks, step);
  }
}

// This block has handed on `chunks` chunks. By one thread, behind a barrier of the block: what all of its threads had
// written before is released.
template <typename Arguments>
__device__ __forceinline__ void publish_chunks(const Arguments& arguments, const Place& place, int chunks) {
  store_release<Scope::device>(chunk_counter(arguments, place.copy, place.lane, place.rank),
                               static_cast<uint32_t>(chunks));
}

}  // namespace stacked_lstm::cuda::persistent
