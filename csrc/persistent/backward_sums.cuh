// csrc/persistent/backward_sums.cuh: how partial sums of dh come from the blocks of a lane, each of which has some of
// its gate rows, to the block that owns the unit.
//
// A policy brings the partial sums of dh, which all blocks send, to the blocks that own the units, and adds them up
// there, always in the same order. Exchanges are counted: number 0 is the first of the launch.
//
//   start()                     once, by all threads
//   expect(n)                   by all threads, at the start of the step before the one that receives exchange n
//   send(n, m, column tile, d)  by a warp: its tile m's sums of 16 units and 8 columns, as mma leaves them
//   receive(n, cells, sums)     by all threads: the sums of a thread's cells. (Threads that share cells get the same.)
//   finish()                    once, by all threads
#pragma once

#include <cstdint>
#include <type_traits>

#include "backward_cut.cuh"

namespace stacked_lstm::cuda::persistent {

template <class C>
using CellSums = float[C::kThreadCells];

// Where a thread's sums go. The thread's half of the warp's tile m, in column tile n, is one patch. The
// patch belongs to block owner + m·kOwnerStep, if there is such a block, and is the block's patch number patch + n. So
// addresses are computed once.
template <class C>
struct Target {
  static constexpr int kOwnerStep = 2 * kMaxWarps / C::kGroups;
  static_assert(kOwnerStep * C::kGroups == 2 * kMaxWarps, "a warp's tiles are the same part of their owners' units");
  int owner, patch;

  explicit __device__ __forceinline__ Target(const ThreadPlace& place) {
    const int group = 2 * static_cast<int>(place.warp) + static_cast<int>(place.warp_lane) / 16;
    owner = group / C::kGroups;
    patch = group % C::kGroups * C::kTiles;
  }
};

// All blocks of a lane are one thread-block cluster. A block pushes sums into their owner's shared memory, also into
// its own, and an mbarrier there counts the bytes.
//
// Hazard: sums have two places, for even and odd exchanges. Exchange n+2 may overwrite the sums of exchange n in a
// block only after all threads of the block have read them. This holds: a block sends n+2 only after it has received
// n+1 from every block, and a block sends n+1 only behind the barrier of its step, which its threads reach after they
// have added up n. For the same reason no byte of n+2 is counted in n's phase, and no thread falls a phase behind.
//
// Hazard: no block may exit while bytes are under way to it or from it. Every exchange that is sent is received: behind
// the last step the caller sends only if dh_0 is wanted, and then it receives that exchange.
template <class C>
class ClusterSums {
  static constexpr uint32_t kBytes = C::kCells * sizeof(float);  // that one block sends another
  const ThreadPlace& place_;
  Waiting& waiting_;
  const Target<C> target_;
  const int blocks_;
  const float* sums_;  // [source block][n mod 2][patch][64]
  uint32_t arrived_,
      to_;  // shared addresses: of two mbarriers; and where a thread's first sums go in their owner's memory

 public:
  static constexpr bool kCluster = true;

  __device__ __forceinline__ ClusterSums(const Cut& cut, const ThreadPlace& place, Waiting& waiting, float* sums,
                                         uint64_t* arrived, uint64_t*)
      : place_(place),
        waiting_(waiting),
        target_(place),
        blocks_(cut.blocks),
        sums_(sums),
        arrived_(shared_address(arrived)),
        to_(shared_address(sums + place.rank * 2 * C::kCells + target_.patch * C::kPatch +
                           CellPlace<C>::shared_spot_of_warp_lane(place.warp_lane % 16))) {}

  __device__ __forceinline__ void start() const {
    if (place_.thread == 0) {
      mbarrier_init(arrived_, 1);
      mbarrier_init(arrived_ + 8, 1);
    }
    // The fence and the barrier make the initialised mbarriers visible to all peers' pushes, which begin after the
    // barrier.
    mbarrier_init_fence();
    cluster_barrier();
  }

  __device__ __forceinline__ void expect(uint32_t n) const {
    if (place_.thread != 0 || waiting_.given_up()) return;
    // The bytes may come before this call: the phase cannot end without this arrival.
    mbarrier_arrive_expect(arrived_ + n % 2 * 8, static_cast<uint32_t>(blocks_) * kBytes);
  }

  __device__ __forceinline__ void send(uint32_t n, int m, int column_tile, const float (&d)[4]) const {
    const int owner = target_.owner + m * Target<C>::kOwnerStep;
    if (owner >= blocks_ || waiting_.given_up()) return;  // half of a tile may be past the last unit
    const uint4 word = {number_detail::bits_of(d[0]), number_detail::bits_of(d[1]), number_detail::bits_of(d[2]),
                        number_detail::bits_of(d[3])};
    const uint32_t at = n % 2 * kBytes + static_cast<uint32_t>(column_tile) * C::kPatch * sizeof(float);
    store_async(peer_address(to_ + at, static_cast<uint32_t>(owner)), word,
                peer_address(arrived_ + n % 2 * 8, static_cast<uint32_t>(owner)));
  }

  __device__ __forceinline__ void receive(uint32_t n, const CellPlace<C>& cells, CellSums<C>& sums, int step) {
    constexpr int kAtOnce = C::kThreadCells > 1 ? 4 : 8;  // loads under way together, of a cell
    // Makes every block's push of this exchange into this block visible to this thread's reads of it.
    if (cells.has(0)) waiting_.for_phase(arrived_ + n % 2 * 8, n / 2 % 2, step);
    const float* from = sums_ + n % 2 * C::kCells + cells.patch * C::kPatch + cells.shared_spot();
#pragma unroll
    for (int k = 0; k < C::kThreadCells; ++k) sums[k] = 0;
    if (!cells.has(0) || waiting_.given_up()) return;
#pragma unroll 1
    for (int first = 0; first < blocks_; first += kAtOnce) {
#pragma unroll
      for (int k = 0; k < C::kThreadCells; ++k) {
        float part[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          part[i] = cells.has(k) && first + i < blocks_ ? from[(first + i) * 2 * C::kCells + k * C::kThreads] : 0.0f;
        }
#pragma unroll
        for (int n = 1; n < kAtOnce; n *= 2) {
#pragma unroll
          for (int i = 0; i + n < kAtOnce; i += 2 * n) part[i] += part[i + n];
        }
        sums[k] += part[0];
      }
    }
  }

  // Behind the barrier every push has been received: none is under way to or from a block that exits.
  __device__ __forceinline__ void finish() const { cluster_barrier(); }
};

// Through L2, for lanes of more blocks than a cluster has, and for GPUs without clusters. A sum and the number of its
// exchange travel in one word of 64 bits, which the memory model keeps whole. So there is no flag and no fence.
//
//   n + 1 (32) | partial sum (32)
//
// Hazard: words have two places, for even and odd exchanges. A block may write n+2 over n: it has received n+1 from
// every block, and each block sends n+1 behind the barrier of its step, which its threads reach after they have read
// the words of n. (Words are zero at the launch, which is no exchange's tag.)
//
// A lane of one block has no peers, and its sums stay in the block (see inside_block): in shared memory, behind a
// barrier.
//
// Hazard: these sums have one place. A warp may write exchange n+1 over n: it has passed the barrier of the step
// between them, which all threads reach after they have read n.
template <class C>
class L2Sums {
  static constexpr bool kMayBeInside = may_be_inside_block(C::kMTiles, C::kPieces, sizeof(typename C::T));
  const ThreadPlace& place_;
  Waiting& waiting_;
  const Target<C> target_;
  const int blocks_;
  float* sums_;              // inside a block: [patch][64]
  uint64_t* words_;          // [owner][source block][n mod 2][patch][64]
  uint32_t to_, per_owner_;  // in words: where a thread's first sums go; and from one owner to the next

 public:
  static constexpr bool kCluster = false;

  __device__ __forceinline__ L2Sums(const Cut& cut, const ThreadPlace& place, Waiting& waiting, float* sums, uint64_t*,
                                    uint64_t* words)
      : place_(place),
        waiting_(waiting),
        target_(place),
        blocks_(cut.blocks),
        sums_(sums),
        words_(words),
        per_owner_(static_cast<uint32_t>(cut.blocks * 2 * C::kCells)) {
    to_ = static_cast<uint32_t>(target_.owner) * per_owner_ +
          static_cast<uint32_t>(place.rank * 2 * C::kCells + target_.patch * C::kPatch +
                                CellPlace<C>::word_spot_of_warp_lane(place.warp_lane % 16));
  }

  __device__ __forceinline__ void start() const {}
  __device__ __forceinline__ void expect(uint32_t) const {}

  __device__ __forceinline__ void send(uint32_t n, int m, int column_tile, const float (&d)[4]) const {
    const int owner = target_.owner + m * Target<C>::kOwnerStep;
    if (owner >= blocks_ || waiting_.given_up()) return;  // half of a tile may be past the last unit
    if (inside()) {
      const int at =
          (target_.patch + column_tile) * C::kPatch + CellPlace<C>::shared_spot_of_warp_lane(place_.warp_lane % 16);
      *reinterpret_cast<float4*>(sums_ + at) = {d[0], d[1], d[2], d[3]};
      return;
    }
    uint64_t* to = words_ + (kept(to_) + static_cast<uint32_t>(m * Target<C>::kOwnerStep) * per_owner_) +
                   (n % 2 * C::kCells + static_cast<uint32_t>(column_tile) * C::kPatch);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      store_relaxed<Scope::device>(to + k * CellPlace<C>::kWordElement,
                                   static_cast<uint64_t>(n + 1) << 32 | number_detail::bits_of(d[k]));
    }
  }

  __device__ __forceinline__ void receive(uint32_t n, const CellPlace<C>& cells, CellSums<C>& sums, int step) {
    constexpr bool kFew = C::kThreadCells > 1 || C::kProduct == Product::exact;
    constexpr int kAtOnce = C::kFewRegisters ? 2 : kFew ? 4 : 8;  // words of a cell under way together
    if (inside()) {
      block_barrier();  // makes the sums of all warps visible to all threads
#pragma unroll
      for (int k = 0; k < C::kThreadCells; ++k) {
        sums[k] = cells.has(k) ? sums_[cells.patch * C::kPatch + cells.shared_spot() + k * C::kThreads] : 0.0f;
      }
      return;
    }
    const uint64_t* from = words_ + (static_cast<uint32_t>(place_.rank) * per_owner_ + n % 2 * C::kCells +
                                     static_cast<uint32_t>(cells.patch * C::kPatch + cells.word_spot()));
#pragma unroll
    for (int k = 0; k < C::kThreadCells; ++k) {
      sums[k] = 0;
      if (cells.has(k)) {
#pragma unroll 1
        for (int first = cells.share; first < blocks_; first += kAtOnce * C::kShares) {
          uint64_t word[kAtOnce];
          // Waits until all words are of this exchange. A word's tag and sum arrive together: nothing else has to be
          // ordered.
          waiting_.until(
              [&] {
                bool there = true;
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                  const int source = first + i * C::kShares;
                  if (source < blocks_) {
                    word[i] = load_relaxed<Scope::device>(from + source * 2 * C::kCells + k * C::kThreads);
                  }
                }
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                  if (first + i * C::kShares < blocks_) there &= static_cast<uint32_t>(word[i] >> 32) == n + 1;
                }
                return there;
              },
              Watchdog::exchange, step, place_.lane, first, 0);
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            if (first + i * C::kShares < blocks_ && !waiting_.given_up())
              sums[k] += number_detail::float_of(static_cast<uint32_t>(word[i]));
          }
        }
      }
      // All threads that share a cell get the same sum: a + b = b + a.
#pragma unroll
      for (int apart = C::kWarpCells; apart < kWarpThreads; apart *= 2) {
        sums[k] += shuffle_xor(kFullWarp, sums[k], apart);
      }
    }
  }

  __device__ __forceinline__ void finish() const {}

 private:
  __device__ __forceinline__ bool inside() const { return kMayBeInside && blocks_ == 1; }
};

template <class C>
using SumsOf = std::conditional_t<C::kExchange == Exchange::cluster, ClusterSums<C>, L2Sums<C>>;

}  // namespace stacked_lstm::cuda::persistent
