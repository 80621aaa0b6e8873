// csrc/persistent/exchange.cuh: how the blocks of a lane exchange h of a step. Each block computes h of its own units
// and needs h of all units. A policy brings h(s), which the groups of all blocks send, to the shared memory of each
// block:
//
//   start()                   once, by all threads, after they have filled both buffers of h; nothing arrives in them
//                             before
//   expect(s)                 by all warps, at the start of a step that will send
//   receive(s)                by all warps; then this thread may read h(s-1) of the whole lane in h[s mod 2]. h(-1) is
//                             there from the start
//   send(s, outgoing, share, is_reset)
//                             by a group's warp of split 0, after all of its threads have written their h(s) to
//                             `outgoing`. `share` is this thread's share(), or 0 at the last step, whose h no
//                             block needs. If some sequences are reset behind this step, `share` is ~share() in all
//                             threads of the warp: then zeros are sent for the columns for which is_reset(column) is
//                             true. So a step without resets executes no instruction for them: it compares the same
//                             numbers
//   next()                    by all threads, after each step
//   finish()                  once, by all threads
//
// Columns without a sequence are neither sent nor awaited: they stay zeros.
#pragma once

#include <cstdint>

#include "block.cuh"
#include "kernels.h"
#include "products.cuh"

namespace stacked_lstm::cuda::persistent {

// What both policies know of their block.
template <typename T>
struct ExchangeBase {
  const Cut& cut;
  const ThreadPlace& place;
  Waiting& waiting;
  T* h;              // in shared memory: [s mod 2][column][pitch], h(s-1) for step s
  int pitch;         // elements
  int columns;       // columns with a sequence
  int unit;          // the first of the warp's group, counted in the lane
  uint32_t arrived;  // shared address: 2 mbarriers, for the two h
};

// All blocks of a lane are one thread-block cluster. A group pushes its h into the shared memory of every block, also
// its own, and an mbarrier there counts the bytes.
//
// Hazard: h has two buffers. h(s+1) may overwrite h(s-1) in a block only after all warps of the block have read h(s-1).
// This holds: a group sends h(s+1) only after it has received h(s) from every group of that block, and a group sends
// h(s) only after its warps have met, at the end of their products with h(s-1). For the same reason no warp falls a
// phase of an mbarrier behind.
template <typename T, Product product, int Tiles>
class ClusterExchange : ExchangeBase<T> {
  // A group's units of a column are one word of 16 bytes, or two. A thread takes a word and sends it to some of the
  // peers.
  static constexpr int kColumnWords = kGroupUnits * static_cast<int>(sizeof(T)) / 16;
  static constexpr int kWords = kTileColumns * Tiles * kColumnWords;
  static constexpr int kShare = kWords < kWarpThreads ? kWords : kWarpThreads;
  static constexpr int kSenders = kWarpThreads / kShare;  // threads that send the same word
  static constexpr int kMostPushes = kMaxCluster / kSenders;
  int column_, first_peer_;  // of the thread's first word
  int pushes_;               // of each of the thread's words
  TwoAddresses to_;          // shared address to which the thread's first word goes in every block
  using ExchangeBase<T>::cut, ExchangeBase<T>::place, ExchangeBase<T>::waiting, ExchangeBase<T>::h,
      ExchangeBase<T>::arrived;

 public:
  static constexpr bool kCluster = true;

  explicit __device__ __forceinline__ ClusterExchange(const ExchangeBase<T>& base, uint64_t*)
      : ExchangeBase<T>(base),
        column_(place.warp_lane % kShare / kColumnWords),
        first_peer_(place.warp_lane / kShare),
        pushes_((cut.blocks - first_peer_ + kSenders - 1) / kSenders) {
    const int unit = this->unit + place.warp_lane % kColumnWords * kQuarter<T>;
    const int bytes = kTileColumns * Tiles * this->pitch * static_cast<int>(sizeof(T));          // of an h
    to_ = {static_cast<int>(shared_address(h + column_ * this->pitch + unit)) + bytes, -bytes};  // h(0) goes to h[1]
  }

  // How many times this thread pushes each of its words. With one word a thread: 0 if no sequence has its column.
  __device__ __forceinline__ int share() const {
    return kWords <= kWarpThreads && column_ >= this->columns ? 0 : pushes_;
  }

  __device__ __forceinline__ void start() const {
    if (place.thread == 0) {
      mbarrier_init(arrived, 1);
      mbarrier_init(arrived + 8, 1);
      mbarrier_arrive(arrived);  // ends the first phase: that of h(-1), which is here
    }
    // The fence and the barrier make the initialised mbarriers visible to all peers' pushes, which begin after the
    // barrier.
    mbarrier_init_fence();
    // The barrier also orders the zeros that all threads of this block have written to h[1] before any peer's push
    // there.
    cluster_barrier();
  }

  __device__ __forceinline__ void expect(int s) const {
    if (place.thread != 0 || waiting.given_up()) return;
    // The bytes of h(s) may come before this call: the phase cannot end without this arrival.
    const auto bytes = static_cast<uint32_t>(this->columns * cut.units()) * static_cast<uint32_t>(sizeof(T));
    mbarrier_arrive_expect(barrier_of(s + 1), bytes);
  }

  __device__ __forceinline__ void receive(int s) const {
    // Makes every group's push of h(s-1) into this block visible to this thread's reads of h(s-1).
    waiting.for_phase(barrier_of(s), static_cast<uint32_t>(s) / 2 % 2, s);
  }

  template <typename IsReset>
  __device__ __forceinline__ void send(int s, const T* outgoing, int share, IsReset is_reset) const {
    if (waiting.given_up()) return;
    const uint32_t barrier = barrier_of(s + 1);
    auto to = static_cast<uint32_t>(to_.at);
#pragma unroll
    for (int first = 0; first < kWords; first += kShare) {
      if (kWords > kWarpThreads && column_ + first / kColumnWords >= this->columns) break;
      if (first > 0) to += static_cast<uint32_t>(kShare / kColumnWords * this->pitch * static_cast<int>(sizeof(T)));
      const uint4 value =
          operands<T, product>(reinterpret_cast<const uint4*>(outgoing)[first + place.warp_lane % kShare]);
      const auto push = [&](int n, const uint4& value) {
        const auto rank = static_cast<uint32_t>(first_peer_ + n * kSenders);
        store_async(peer_address(to, rank), value, peer_address(barrier, rank));
      };
      // The usual numbers of blocks take no branch for each peer.
      if (share == kMostPushes) {
#pragma unroll
        for (int n = 0; n < kMostPushes; ++n) push(n, value);
      } else if (share == kMostPushes / 2) {
#pragma unroll
        for (int n = 0; n < kMostPushes / 2; ++n) push(n, value);
      } else {
        const bool zeros = share < 0 && is_reset(column_ + first / kColumnWords);
        const uint4 sent = zeros ? uint4{0, 0, 0, 0} : value;
        const int pushes = share < 0 ? ~share : share;
#pragma unroll 1
        for (int n = 0; n < pushes; ++n) push(n, sent);
      }
    }
  }

  __device__ __forceinline__ void next() { to_.next(); }

  // Behind the barrier every block has received the last h that was sent. So no push is under way to or from a block
  // that exits.
  __device__ __forceinline__ void finish() const { cluster_barrier(); }

 private:
  // The mbarrier of h(s-1), for which step s waits.
  __device__ __forceinline__ uint32_t barrier_of(int s) const { return arrived + static_cast<uint32_t>(s) % 2 * 8; }
};

// Through L2, for lanes of more blocks than a cluster has, and for GPUs without clusters. 4 bytes of a column of h and
// the number of the step travel in one word of 64 bits, which the memory model keeps whole. So there is no flag and no
// fence, and a step takes one crossing of L2.
//
//   s + 1 (32) | h of unit 2u + 1 (16) | h of unit 2u (16)          or, of float:          s + 1 (32) | h of unit u (32)
//
// Hazard: words have two places, for even and odd steps. A block may write h(s+1) over h(s-1): it has read all words of
// h(s), and each block sends its words of h(s) only after all of its threads have read the words of h(s-1) and have met
// at the barrier in receive().
//
// A lane of one block has no peers, and its h stays in the block (see inside_block): the groups write h(s) directly to
// shared memory, and the barrier in receive() replaces the words.
//
// Hazard: h has two buffers there, too. A warp may write h(s) over h(s-2): it has passed the barrier of step s, and
// every warp reaches that barrier only after it has multiplied h(s-2), in step s-1.
template <typename T, Product product, int Pieces, int Tiles>
class L2Exchange : ExchangeBase<T> {
  static constexpr int kElements = 4 / static_cast<int>(sizeof(T));  // of a word
  static constexpr int kGroupWords = kGroupUnits / kElements;        // of a column
  using ExchangeBase<T>::cut, ExchangeBase<T>::place, ExchangeBase<T>::waiting, ExchangeBase<T>::columns,
      ExchangeBase<T>::pitch;

  static_assert(kWarpThreads % kGroupWords == 0, "a thread has the same word of several columns");

  static constexpr bool kMayBeInside = may_be_inside_block(0, Pieces, sizeof(T));

  uint64_t* words_;  // [s mod 2][column][word]
  uint64_t* to_;     // the first word that this thread sends in a step
  int to_other_;     // from there to the first word of the next step

 public:
  static constexpr bool kCluster = false;

  __device__ __forceinline__ L2Exchange(const ExchangeBase<T>& base, uint64_t* words)
      : ExchangeBase<T>(base), words_(words), to_other_(kTileColumns * Tiles * forward_row_words<T>(cut)) {
    const int column = place.warp_lane / kGroupWords, word = place.warp_lane % kGroupWords;
    to_ = words + column * forward_row_words<T>(cut) + this->unit / kElements + word;
  }

  __device__ __forceinline__ void start() const {}  // words are 0, which is no step's tag: an early reader waits

  __device__ __forceinline__ void expect(int) const {}

  // A warp reads whole columns.
  __device__ __forceinline__ void receive(int s) const {
    if (s == 0) return;
    constexpr int kAtOnce = 8;  // words of a thread under way together
    const int row_words = forward_row_words<T>(cut), warps = static_cast<int>(blockDim.x) / kWarpThreads;
    for (int column = inside() ? columns : place.warp; column < columns; column += warps) {
      const uint64_t* from = words_ + ((s + 1) % 2 * kTileColumns * Tiles + column) * row_words;
      T* to = this->h + (s % 2 * kTileColumns * Tiles + column) * pitch;
      for (int first = place.warp_lane; first < row_words; first += kAtOnce * kWarpThreads) {
        uint64_t value[kAtOnce];
        // Waits until all words are of step s - 1. A word's tag and value arrive together: nothing else has to be
        // ordered.
        waiting.until(
            [&] {
              bool there = true;
#pragma unroll
              for (int n = 0; n < kAtOnce; ++n) {
                const int at = first + n * kWarpThreads;
                value[n] = at < row_words ? load_relaxed<Scope::device>(from + at) : static_cast<uint64_t>(s) << 32;
              }
#pragma unroll
              for (int n = 0; n < kAtOnce; ++n) there &= value[n] >> 32 == static_cast<uint64_t>(s);
              return there;
            },
            Watchdog::exchange, s, place.lane, first / (kGroupWords * cut.groups), 0);
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          const int at = first + n * kWarpThreads;
          const auto elements = static_cast<uint32_t>(value[n]);
          // This overwrites h(s-3), which all warps had read before the block barrier of step s-1.
          if (at < row_words) *reinterpret_cast<uint32_t*>(to + at * kElements) = elements;
        }
      }
    }
    // Makes each thread's part of h(s-1) in shared memory visible to all threads. Also, all words of h(s-1) have been
    // read, so the block may send h(s), after which its peers may write over those words. Inside a block: all warps
    // have multiplied h(s-2), so h(s) may be written over it.
    block_barrier();
  }

  // This thread sends its words of all columns that a sequence has.
  __device__ __forceinline__ int share() const { return columns; }

  template <typename IsReset>
  __device__ __forceinline__ void send(int s, const T* outgoing, int share, IsReset is_reset) const {
    send_columns(s, outgoing, share, [](int) { return false; });
    if (share < 0) send_resets(s, outgoing, ~share, is_reset);
  }

  __device__ __forceinline__ void next() { to_ += to_other_, to_other_ = -to_other_; }

  __device__ __forceinline__ void finish() const {}

 private:
  __device__ __forceinline__ bool inside() const { return kMayBeInside && cut.blocks == 1; }

  // At a step behind which some sequences are reset. (tests/cuda_check tells its instructions by this name: a step without
  // resets passes them by.)
  template <typename IsReset>
  __device__ __forceinline__ void send_resets(int s, const T* outgoing, int share, IsReset is_reset) const {
    send_columns(s, outgoing, share, is_reset);
  }

  // Sends this thread's words of the first `share` columns.
  template <typename IsReset>
  __device__ __forceinline__ void send_columns(int s, const T* outgoing, int share, IsReset is_reset) const {
    if (waiting.given_up()) return;  // its h means nothing
    uint64_t* to = to_;
#pragma unroll
    for (int n = 0; n < kTileColumns * Tiles * kGroupWords; n += kWarpThreads) {
      const int word = n + place.warp_lane;
      if (word / kGroupWords >= share) break;
      if (n > 0) to += kWarpThreads / kGroupWords * forward_row_words<T>(cut);
      const T* mine = outgoing + word * kElements;
      uint32_t value;
      if constexpr (sizeof(T) == 4) {
        value = number_detail::bits_of(operand<product>(*mine));
      } else {
        value = *reinterpret_cast<const uint32_t*>(mine);
      }
      if (is_reset(word / kGroupWords)) value = 0;
      if (inside()) {
        const int column = (s + 1) % 2 * kTileColumns * Tiles + word / kGroupWords;
        *reinterpret_cast<uint32_t*>(this->h + column * pitch + this->unit + word % kGroupWords * kElements) = value;
      } else {
        store_relaxed<Scope::device>(to, static_cast<uint64_t>(s + 1) << 32 | value);
      }
    }
  }
};

template <typename T, Product product, Exchange exchange, int Pieces, int Tiles>
using ExchangeOf = std::conditional_t<exchange == Exchange::cluster, ClusterExchange<T, product, Tiles>,
                                      L2Exchange<T, product, Pieces, Tiles>>;

}  // namespace stacked_lstm::cuda::persistent
