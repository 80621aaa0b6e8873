// csrc/persistent/backward.cuh: the gradients of the gates of a stack of LSTM lanes, all time steps, in one launch.
//
//   step number s  →   last-1 … s+1    s   s-1 … first        A block owns some units of one lane. Its part of W_hhᵀ, all
//   lane above          ■──────■──────■──────■──              units of dh by its own gate rows, sits in registers. Inside a
//   lane                       ■──────■──────■──────■──       lane, partial sums of dh go to the block that owns the unit
//                                                             (─): half the bytes of gathering the dgates themselves.
//
// A step s:   receive the partial sums of dh(s) that all blocks have sent, and add them up in the order of the blocks   →
//             cell_backward   →   dgates(s) to shared memory   →   barrier   →   times the block's part of W_hhᵀ   →   send
//             the partial sums of dh(s-1)   →   and only then dgates(s) to memory, and what step s-1 needs from there.
//
// dh from a lane above in the same launch: with the units that a block owns go the gate rows of the same units of the lane
// above. For a chunk of steps at a time, the block multiplies those dgates by its part of W_ihᵀ of the lane above, masked
// by dropout, and keeps these sums; the accumulators of dh(s-1) start from them. So one exchange adds up both, and a block
// waits for, and reads from, the one block of the same rank above it.
//
// A patch, 8 units by 8 columns of the batch, is what moves: the upper or lower half of a tile that a warp has multiplied.
// Rows r and r + 8 of a tile are the units 2r and 2r + 1: neighbours in memory, where weights are loaded.
#pragma once

#include <algorithm>
#include <string>

#include "../cuda/launch.cuh"
#include "block.cuh"
#include "products.cuh"

namespace stacked_lstm::cuda::persistent {

// ---- What the compiler knows of a cut -------------------------------------------------------------------------------

template <typename T_, Product kProduct_, Exchange kExchange_, int MTiles, int Pieces, int Tiles>
struct BackwardCut {
  using T = T_;
  static constexpr Product kProduct = kProduct_;
  static constexpr Exchange kExchange = kExchange_;
  static constexpr int kMTiles = MTiles, kPieces = Pieces, kTiles = Tiles;
  static constexpr int kGroups = Pieces * kPieceElements<T> / (4 * kGroupUnits);
  static_assert(kGroups * 4 * kGroupUnits == Pieces * kPieceElements<T>, "K is the gate rows of whole groups");
  static_assert(4 % Tiles == 0, "a thread's cells are of one batch column");
  static constexpr int kThreads = kMaxWarps * kWarpThreads;
  static constexpr int kColumns = kTileColumns * Tiles;
  static constexpr int kPatch = kGroupUnits * kTileColumns;  // cells
  static constexpr int kPatches = kGroups * Tiles;           // of a block
  static constexpr int kCells = kPatches * kPatch;           // of a block
  static constexpr int kThreadCells = (kCells + kThreads - 1) / kThreads;
  static constexpr int kThreadPatches = kThreads / kPatch;  // from a thread's cell to its next
  // Threads that share a cell: through L2 each waits for its part of the sums. (Shared memory needs no such help.)
  static constexpr int kShares = kExchange == Exchange::l2 && kCells <= kThreads / 2 ? kThreads / 2 / kCells * 2 : 1;
  static constexpr int kWarpCells = kWarpThreads / kShares;
  // Elements of a column of dgates in shared memory.
  static constexpr int kPitch = row_pieces(Pieces) * kPieceElements<T>;
  // Tiles of weights that are multiplied side by side: enough chains of products, few registers of sums. Fewer where a
  // thread keeps the dgates of several cells, beside words under way.
  static constexpr bool kFewRegisters = kExchange == Exchange::l2 && kThreadCells * sizeof(T) > 4;
  static constexpr int kMost = kProduct == Product::exact ? 1 : kFewRegisters ? 2 : 4;
  static constexpr int kAtOnce = MTiles <= kMost                ? MTiles
                                 : MTiles % kMost == 0          ? kMost
                                 : kMost > 3 && MTiles % 3 == 0 ? 3
                                                                : 2;
  static_assert(MTiles % kAtOnce == 0);
};

// ---- Who has which cell ---------------------------------------------------------------------------------------------
// K of a block: quarter q of a piece is gate q of kQuarter neighbouring units, as they lie in memory. A column's quarters
// stand in shared memory in an order of their own, so that neither the cells that write them, one gate of 8 units and 4
// columns at a time, nor the products that read them, all gates of 2 columns, meet in a bank.

template <class C>
__device__ __forceinline__ int quarter_place(int column, int quarter) {
  // Exact products read one quarter of all columns from one address each.
  return C::kProduct == Product::exact ? quarter : quarter ^ (column & 3);
}

// Offset, in elements, of a quarter of K in dgates.
template <class C>
__device__ __forceinline__ int quarter_at(int column, int piece, int quarter) {
  using T = typename C::T;
  return column * C::kPitch + piece * kPieceElements<T> + quarter_place<C>(column, quarter) * kQuarter<T>;
}

// A thread's cells: of one column of the batch, in every kThreadPatches-th patch.
template <class C>
struct CellPlace {
  int patch, spot;  // the first patch; and where in it: 8·column + unit
  int share;        // of the threads that share the cell
  int column;       // of the batch group
  int unit;         // of the lane: the first; the next ones kUnitStep further each
  bool first_share;

  static constexpr int kUnitStep = C::kThreadPatches / C::kTiles * kGroupUnits;

  explicit __device__ __forceinline__ CellPlace(const Place& place) {
    const int cell = place.warp * C::kWarpCells + place.warp_lane % C::kWarpCells;
    share = place.warp_lane / C::kWarpCells;
    first_share = C::kShares == 1 || share == 0;
    patch = cell / C::kPatch, spot = cell % C::kPatch;
    column = patch % C::kTiles * kTileColumns + spot / kGroupUnits;
    unit = (place.rank * C::kGroups + patch / C::kTiles) * kGroupUnits + spot % kGroupUnits;
  }

  // Has the thread an n-th cell? (Of the units' padding too: sums are sent for all of them.)
  __device__ __forceinline__ bool has(int n) const {
    return C::kCells % C::kThreads == 0 || patch + n * C::kThreadPatches < C::kPatches;
  }
  __device__ __forceinline__ int unit_of(int n) const { return unit + n * kUnitStep; }

  // Where the sums of a patch have this cell. A lane of a warp has units 2r, 2r + 1 and columns 2q, 2q + 1 of it.
  // In shared memory: the four of them together, and lanes of r and r + 2 turned, so that 4 columns are 32 banks.
  __device__ __forceinline__ int shared_spot() const {
    const int u = spot % kGroupUnits, c = spot / kGroupUnits;
    return (u / 2 * 4 + ((c / 2) ^ (u / 2 & 2))) * 4 + u % 2 * 2 + c % 2;
  }
  static __device__ __forceinline__ int shared_spot_of_lane(int half_lane) {  // of its first; the others follow
    const int r = half_lane / 4, q = half_lane % 4;
    return (r * 4 + (q ^ (r & 2))) * 4;
  }
  // Of words in L2: what lanes write, and what lanes read, at once, are whole sectors.
  __device__ __forceinline__ int word_spot() const {
    const int u = spot % kGroupUnits, c = spot / kGroupUnits;
    return c / 4 * 32 + (u % 2 * 2 + c % 2) * kWordElement + u / 2 * 2 + c / 2 % 2;
  }
  static constexpr int kWordElement = 8;  // from one of a lane's four to the next
  static __device__ __forceinline__ int word_spot_of_lane(int half_lane) {
    const int r = half_lane / 4, q = half_lane % 4;
    return q / 2 * 32 + r * 2 + q % 2;
  }
};

// ---- Exchange of partial sums inside a lane --------------------------------------------------------------------------
// A policy brings the partial sums of dh, which all blocks send, to the blocks that own the units, and adds them up there,
// always in the same order. Exchanges are counted: number 0 is the first of the launch.
//
//   start()                     once, by all threads
//   expect(n)                   by all threads, at the start of a step that will receive exchange n in the next
//   send(n, m, column tile, d)  by a warp: its tile m's sums of 16 units and 8 columns, as mma leaves them
//   receive(n, cells, sums)     by all threads: the sums of a thread's cells. (Those that share cells get the same.)
//   finish()                    once, by all threads

template <class C>
using CellSums = float[C::kThreadCells];

// To whom a lane's sums go: the patch that its half of the warp's tile m is, of the column tile n, belongs to the block
// owner + m·kOwnerStep, if there is one; to whom it is patch + n. So addresses are made once.
template <class C>
struct Target {
  static constexpr int kOwnerStep = 2 * kMaxWarps / C::kGroups;
  static_assert(kOwnerStep * C::kGroups == 2 * kMaxWarps, "a warp's tiles are the same part of their owners' units");
  int owner, patch;

  explicit __device__ __forceinline__ Target(const Place& place) {
    const int group = 2 * static_cast<int>(place.warp) + static_cast<int>(place.warp_lane) / 16;
    owner = group / C::kGroups;
    patch = group % C::kGroups * C::kTiles;
  }
};

// All blocks of a lane are one thread-block cluster: sums are pushed into the owner's shared memory, the own too, and an
// mbarrier there counts the bytes.
//
// Hazard: sums have two places, of even and odd exchanges. Exchange n+2 may land on what exchange n brought only when all
// threads of the block have read that. So it is: whoever sends n+2 has received n+1 from every block, and a block sends
// n+1 only behind the barrier of its step, to which its threads come when they have added up n. For the same reason no
// byte of n+2 is counted in n's phase, and no thread falls a phase behind.
//
// Hazard: nobody may exit with bytes under way. Every exchange that is sent is received: the caller sends none behind the
// last step unless somebody wants dh_0.
template <class C>
class ClusterSums {
  static constexpr uint32_t kBytes = C::kCells * sizeof(float);  // that one block sends another
  const Place& place_;
  Waiting& waiting_;
  const Target<C> target_;
  const int blocks_;
  const float* sums_;  // [source block][n mod 2][patch][64]
  uint32_t arrived_,
      to_;  // shared addresses: of two mbarriers; and where a lane's first sums go in their owner's memory

 public:
  static constexpr bool kCluster = true;

  __device__ __forceinline__ ClusterSums(const Cut& cut, const Place& place, Waiting& waiting, float* sums,
                                         uint64_t* arrived, uint64_t*)
      : place_(place),
        waiting_(waiting),
        target_(place),
        blocks_(cut.blocks),
        sums_(sums),
        arrived_(shared_address(arrived)),
        to_(shared_address(sums + place.rank * 2 * C::kCells + target_.patch * C::kPatch +
                           CellPlace<C>::shared_spot_of_lane(place.warp_lane % 16))) {}

  __device__ __forceinline__ void start() const {
    if (place_.thread == 0) {
      mbarrier_init(arrived_, 1);
      mbarrier_init(arrived_ + 8, 1);
    }
    // The initialised mbarriers are visible to the pushes of all peers, which begin after the barrier.
    mbarrier_init_fence();
    cluster_barrier();
  }

  __device__ __forceinline__ void expect(uint32_t n) const {
    if (place_.thread != 0 || waiting_.given_up()) return;
    // The bytes may come before this is said: the phase cannot end without this arrival.
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
    // Every block's push of this exchange into this block is visible to this thread's reads of it.
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

  // Every push has been received: none is under way to a block, or from one, that exits.
  __device__ __forceinline__ void finish() const { cluster_barrier(); }
};

// Through L2, for a lane of more blocks than a cluster has, and where there are no clusters. A sum and the number of its
// exchange travel in one word of 64 bits, which the memory model keeps whole: no flag and no fence.
//
//   n + 1 (32) | partial sum (32)
//
// Hazard: words have two places, of even and odd exchanges. n+2 may be written over n because its writer has received n+1
// from every block, and a block sends that behind the barrier of its step, to which its threads come when they have read
// the words of n. (Words are zero at the launch: no exchange's tag.)
//
// A lane of one block has no peers, and its sums stay in the block (see inside_block): in shared memory, behind a barrier.
//
// Hazard: they have one place. Exchange n+1 may be written over n because its writer has passed the barrier of the step
// between them, to which all threads come when they have read n.
template <class C>
class L2Sums {
  static constexpr bool kMayBeInside = may_be_inside_block(C::kMTiles, C::kPieces, sizeof(typename C::T));
  const Place& place_;
  Waiting& waiting_;
  const Target<C> target_;
  const int blocks_;
  float* sums_;              // inside a block: [patch][64]
  uint64_t* words_;          // [owner][source block][n mod 2][patch][64]
  uint32_t to_, per_owner_;  // in words: where a lane's first sums go; and from one owner to the next

 public:
  static constexpr bool kCluster = false;

  __device__ __forceinline__ L2Sums(const Cut& cut, const Place& place, Waiting& waiting, float* sums, uint64_t*,
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
                                CellPlace<C>::word_spot_of_lane(place.warp_lane % 16));
  }

  __device__ __forceinline__ void start() const {}
  __device__ __forceinline__ void expect(uint32_t) const {}

  __device__ __forceinline__ void send(uint32_t n, int m, int column_tile, const float (&d)[4]) const {
    const int owner = target_.owner + m * Target<C>::kOwnerStep;
    if (owner >= blocks_ || waiting_.given_up()) return;  // half of a tile may be past the last unit
    if (inside()) {
      const int at =
          (target_.patch + column_tile) * C::kPatch + CellPlace<C>::shared_spot_of_lane(place_.warp_lane % 16);
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
      block_barrier();  // the sums of all warps are visible to all threads
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
          // Until all are of this exchange. The tag comes with the sum: nothing else has to be ordered.
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
      // The threads that share a cell all get the same: a + b = b + a.
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

// ---- Weights --------------------------------------------------------------------------------------------------------

// Units in pairs: do two neighbours of a row lie in one access?
template <typename T>
__device__ __forceinline__ bool pairs_fit(const T* weight, int hidden) {
  return hidden % 2 == 0 && reinterpret_cast<uintptr_t>(weight) % (2 * sizeof(T)) == 0;
}

// A lane's part of a piece of one tile of Wᵀ: of `weight`, (4H, H), the columns of 16 units by the block's gate rows.
template <class C, typename T = typename C::T>
__device__ __forceinline__ Fragment load_transposed(const T* weight, int hidden, int first_unit, int tile, int piece,
                                                    int warp_lane, bool fits) {
  constexpr int kWordElements = 4 / static_cast<int>(sizeof(T));
  const int unit = tile * 16 + warp_lane / 4 * 2;          // of dh; and the one beside it
  const int gate_unit = first_unit + piece * kQuarter<T>;  // of dgates: kQuarter of them, of one gate
  const T* row = weight + (int64_t{warp_lane % 4} * hidden + gate_unit) * hidden + unit;
  const int rows = unit < hidden ? hidden - gate_unit : 0;  // that there are
  const bool second = unit + 1 < hidden;
  const auto bits = [](T x) {
    if constexpr (sizeof(T) == 4) {
      return number_detail::bits_of(x);
    } else {
      return static_cast<uint32_t>(x.bits);
    }
  };
  uint4 upper = {0, 0, 0, 0}, lower = upper;
  if (fits) {
    uint32_t words[2][4];
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      uint32_t pair[kWordElements][2];
#pragma unroll
      for (int part = 0; part < kWordElements; ++part) {
        const int k = word * kWordElements + part;
        pair[part][0] = pair[part][1] = 0;
        if (k >= rows) continue;
        const T* from = row + int64_t{k} * hidden;
        if constexpr (sizeof(T) == 4) {
          const uint2 two = load_readonly(reinterpret_cast<const uint2*>(from));
          pair[part][0] = two.x, pair[part][1] = two.y;
        } else {
          const uint32_t two = load_readonly(reinterpret_cast<const uint32_t*>(from));
          pair[part][0] = two & 0xFFFFu, pair[part][1] = two >> 16;
        }
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        words[n][word] = pair[0][n];
        if constexpr (kWordElements == 2) words[n][word] |= pair[1][n] << 16;
      }
    }
    upper = {words[0][0], words[0][1], words[0][2], words[0][3]};
    lower = {words[1][0], words[1][1], words[1][2], words[1][3]};
  } else {
    // A loop that stays one, which turns the words round: less code.
#pragma unroll 1
    for (int k = 0; k < kQuarter<T>; k += kWordElements) {
      uint32_t words[2] = {0, 0};
#pragma unroll
      for (int part = 0; part < kWordElements; ++part) {
        if (k + part >= rows) continue;
        const T* from = row + int64_t{k + part} * hidden;
        words[0] |= bits(load_readonly(from)) << 16 * part;
        if (second) words[1] |= bits(load_readonly(from + 1)) << 16 * part;
      }
      upper = {upper.y, upper.z, upper.w, words[0]};
      lower = {lower.y, lower.z, lower.w, words[1]};
    }
  }
  return {operands<T, C::kProduct>(upper), operands<T, C::kProduct>(lower)};
}

// Tile number `m` of a warp: the warps of a block take tiles in turn.
__device__ __forceinline__ int tile_of(int m, int warp) { return m * kMaxWarps + warp; }

// ---- Shared memory --------------------------------------------------------------------------------------------------

template <class C>
struct BackwardShared {
  using T = typename C::T;
  uint64_t* arrived;   // ClusterSums: two mbarriers
  float* sums;         // ClusterSums: [source block][exchange mod 2][patch][64]; inside a block: [patch][64]
  T* grad_gates;       // [s mod 2][column][K]: dgates(s), as operands
  T* above;            // [step of the chunk][column][K]: those of the same gate rows of the lane above, as operands
  float4* from_above;  // [step of the chunk][batch tile][m][thread]: what the accumulators start from
  uint4* weights;      // [m][piece][upper, lower][thread]: the part of W_ihᵀ of the lane above, where it lives here

  BackwardShared(const BackwardShared&) = delete;
  __device__ __forceinline__ BackwardShared(const Cut& cut, bool over) {
    const BackwardLayout<T> layout(cut, over);
    unsigned char* start = &dynamic_shared<unsigned char>();
    arrived = reinterpret_cast<uint64_t*>(start + layout.arrived);
    sums = reinterpret_cast<float*>(start + layout.sums);
    grad_gates = reinterpret_cast<T*>(start + layout.grad_gates);
    above = reinterpret_cast<T*>(start + layout.above);
    from_above = reinterpret_cast<float4*>(start + layout.from_above);
    weights = reinterpret_cast<uint4*>(start + layout.weights);
  }
};

// ---- The block's lane, as one thread sees it -------------------------------------------------------------------------

// What all parts of a step know.
template <class C>
struct BackwardBlock {
  using T = typename C::T;
  const BackwardArguments<T>& arguments;
  const Sizes& sizes;
  const BackwardLane<T>& lane;
  const Place& place;
  const Sequences sequences;
  const int first_unit;  // of the block
  const int tiles;       // of 16 units, of the lane

  __device__ __forceinline__ BackwardBlock(const BackwardArguments<T>& a, const Place& p)
      : arguments(a),
        sizes(a.sizes),
        lane(a.lane[p.lane]),
        place(p),
        sequences(a.sizes, p.copy),
        first_unit(p.rank * C::kGroups * kGroupUnits),
        tiles((a.cut.blocks * C::kGroups + 1) / 2) {}

  __device__ __forceinline__ bool packed() const { return sizes.first_row != nullptr; }
  __device__ __forceinline__ int time(int step) const { return time_of(sizes, lane.reverse, step); }
  // Sequences of the group that have this step of the lane; none beyond its ends.
  __device__ __forceinline__ int active(int step) const {
    return step < 0 || step >= sizes.steps ? 0 : sequences.active(time(step));
  }
};

// Dgates of step `step` of a lane, of this block's units, from memory to `to`, rows of K as products read them; zeros where
// there is no such row or unit. Later: not there before copy_async_wait, and a barrier.
template <bool kLater, class C, typename T = typename C::T>
__device__ __forceinline__ void stage(const BackwardBlock<C>& block, const T* grad_gates, int step, T* to) {
  constexpr int kItems = C::kColumns * C::kPieces * 4;
  const Sizes& sizes = block.sizes;
  const int active = block.active(step);
  const int64_t row = active > 0 ? block.sequences.row(block.time(step)) : 0;
  const bool fits = quarters_fit(grad_gates, sizes.gates_stride, sizes.hidden);
  for (int item = block.place.thread; item < kItems; item += C::kThreads) {
    const int quarter = item % 4, piece = item / 4 % C::kPieces, column = item / 4 / C::kPieces;
    const int unit = block.first_unit + piece * kQuarter<T>;
    const bool there = column < active && unit < sizes.hidden;
    const T* from = grad_gates + (there ? (row + column) * sizes.gates_stride + int64_t{quarter} * sizes.hidden : 0);
    T* at = to + quarter_at<C>(column, piece, quarter);
    if (kLater && fits) {
      if (there) {
        copy_async<16>(shared_address(at), from + unit);
      } else {
        copy_async<16>(shared_address(at), from, 0);  // zeros
      }
    } else {
      *reinterpret_cast<uint4*>(at) =
          operands<T, C::kProduct>(load_quarter<Memory::written>(from, unit, there ? sizes.hidden : 0, fits));
    }
  }
}

// What stage<true> has copied, as operands.
template <class C, typename T = typename C::T>
__device__ __forceinline__ void finish_staging(const BackwardBlock<C>& block, int steps, T* above) {
  copy_async_commit();
  copy_async_wait<0>();  // this thread's copies
  if constexpr (std::is_same_v<T, float> && C::kProduct == Product::tensor) {
    constexpr int kItems = C::kColumns * C::kPieces * 4;
    for (int step = 0; step < steps; ++step) {
      for (int item = block.place.thread; item < kItems; item += C::kThreads) {
        const int quarter = item % 4, piece = item / 4 % C::kPieces, column = item / 4 / C::kPieces;
        auto* at =
            reinterpret_cast<uint4*>(above + step * C::kColumns * C::kPitch + quarter_at<C>(column, piece, quarter));
        *at = operands<T, C::kProduct>(*at);
      }
    }
  }
}

// Where a lane's quarters of a batch tile begin.
template <class C, typename T = typename C::T>
__device__ __forceinline__ const T* first_quarter(const T* columns, int warp_lane) {
  // The column that mma gives the lane is the same in every tile, as far as the order of quarters goes.
  return columns + quarter_place<C>(warp_lane / 4, warp_lane % 4) * kQuarter<T>;
}

// Dropout's mask between this lane and the one above, of a tile's sums: the units 2r, 2r + 1 and columns 2q, 2q + 1 of a
// lane of the warp. Four neighbouring units of a row are one draw: two lanes' units, each of which draws for one column.
template <class C>
__device__ __forceinline__ void mask_tile(const BackwardBlock<C>& block, int time, int column, int unit,
                                          float (&x)[4]) {
  const Sizes& s = block.sizes;
  const gates::Mask& mask = block.arguments.mask;
  const int odd = block.place.warp_lane / 4 % 2;  // has the upper two units, and draws for the upper column
  const int64_t row = int64_t{time} * s.batch + block.sequences.first + column + odd;
  const auto draw = static_cast<uint64_t>(row * ((s.h_stride + 3) / 4) + (block.lane.h_column + unit) / 4);
  const auto seed = static_cast<uint64_t>(load_readonly(mask.seed));
  const Philox random = philox4x32_10(static_cast<uint32_t>(draw), static_cast<uint32_t>(draw >> 32),
                                      static_cast<uint32_t>(block.lane.layer), 0, static_cast<uint32_t>(seed),
                                      static_cast<uint32_t>(seed >> 32));
  uint32_t kept = 0;  // of the four units
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const uint32_t keeps = random.word[n] >= mask.threshold ? 1u : 0u;
    kept |= keeps << n;
  }
  const uint32_t others = shuffle_xor(kFullWarp, kept, 4);
  const uint32_t columns[2] = {(odd ? others : kept) >> 2 * odd, (odd ? kept : others) >> 2 * odd};
  const auto scale = static_cast<float>(mask.scale);
  // Products, so that a NaN is seen even where it is dropped.
#pragma unroll
  for (int n = 0; n < 4; ++n) x[n] *= (columns[n % 2] & (n < 2 ? 1u : 2u)) != 0 ? scale : 0.0f;
}

// The share of dh that comes from the lane above, of `steps` steps from `first` down: its dgates have been staged.
template <class C>
__device__ __forceinline__ void project(const BackwardBlock<C>& block, const BackwardShared<C>& shared, int first,
                                        int steps) {
  using T = typename C::T;
  const int warp_lane = block.place.warp_lane, thread = block.place.thread;
  const bool in_shared = block.arguments.cut.inputs_in_shared, masked = block.arguments.mask.seed != nullptr;
  const bool fits = pairs_fit(block.lane.weight_ih_above, block.sizes.hidden);
  // Beside the recurrent weights there are registers for two pieces: what these come to, the next two go on from.
  constexpr int kPieces = C::kPieces < 2 ? C::kPieces : 2, kPasses = C::kPieces / kPieces;
  static_assert(kPasses * kPieces == C::kPieces);
#pragma unroll 1
  for (int pass = 0; pass < C::kMTiles * kPasses; ++pass) {
    const int m = pass / kPasses, first_piece = pass % kPasses * kPieces, tile = tile_of(m, block.place.warp);
    if (tile >= block.tiles) break;
    Fragment weights[kPieces][1];
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (in_shared) {
        const uint4* from = shared.weights + (m * C::kPieces + first_piece + piece) * 2 * C::kThreads + thread;
        weights[piece][0] = {from[0], from[C::kThreads]};
      } else {
        weights[piece][0] = load_transposed<C>(block.lane.weight_ih_above, block.sizes.hidden, block.first_unit, tile,
                                               first_piece + piece, warp_lane, fits);
      }
    }
    const T* columns = first_quarter<C>(shared.above, warp_lane) + first_piece * kPieceElements<T>;
#pragma unroll 1
    for (int n = 0; n < steps * C::kTiles; ++n) {
      float4& sums = shared.from_above[(n * C::kMTiles + m) * C::kThreads + thread];
      float d[1][1][4] = {};
      float (&x)[4] = d[0][0];
      if (first_piece > 0) x[0] = sums.x, x[1] = sums.y, x[2] = sums.z, x[3] = sums.w;
      multiply<T, C::kProduct>(d, weights, columns + n * kTileColumns * C::kPitch, C::kPitch, warp_lane);
      if (masked && first_piece + kPieces == C::kPieces) {
        mask_tile(block, block.time(first - n / C::kTiles), n % C::kTiles * kTileColumns + warp_lane % 4 * 2,
                  tile * 16 + warp_lane / 4 * 2, x);
      }
      sums = make_float4(x[0], x[1], x[2], x[3]);
    }
  }
}

// ---- A thread's cells -----------------------------------------------------------------------------------------------

template <class C>
class BackwardCells {
  using T = typename C::T;
  static constexpr int kCells = C::kThreadCells;
  struct Packed {  // i, f, g, o in as few registers as they need
    static constexpr int kWord = 4 / static_cast<int>(sizeof(T));
    uint32_t word[4 / kWord];

    __device__ __forceinline__ void set(int gate, T x) {
      if constexpr (kWord == 1) {
        word[gate] = number_detail::bits_of(x);
      } else if (gate % 2 == 0) {
        word[gate / 2] = x.bits;
      } else {
        word[gate / 2] |= static_cast<uint32_t>(x.bits) << 16;
      }
    }
    __device__ __forceinline__ T get(int gate) const {
      if constexpr (kWord == 1) {
        return number_detail::float_of(word[gate]);
      } else {
        return {static_cast<uint16_t>(word[gate / 2] >> gate % 2 * 16)};
      }
    }
  };
  const BackwardBlock<C>& block_;
  const CellPlace<C>& cells_;

  // Of the next step, as it comes from memory.
  float y_[kCells][4];      // activations, or pre-activations without the bias
  float c_before_[kCells];  // c(s-1)
  T grad_output_[kCells];
  float grad_above_[kCells];
  // From the step before (s+1, in the order of the launch) …
  float c_[kCells], dc_[kCells];
  bool was_active_, active_;
  // … and of this one, known before dh is.
  CellSlopes<float> slope_[kCells];
  float incoming_[kCells];
  Packed grad_[kCells];  // dgates(s)

 public:
  __device__ __forceinline__ BackwardCells(const BackwardBlock<C>& block, const CellPlace<C>& cells)
      : block_(block), cells_(cells) {
    const Sizes& sizes = block.sizes;
    const BackwardLane<T>& lane = block.lane;
    const int last = sizes.last_step;
    was_active_ = cells.column < block.active(last);
    active_ = cells.column < block.active(last - 1);
    const int64_t row = active_ ? block.sequences.row(block.time(last - 1)) + cells.column : 0;
#pragma unroll
    for (int n = 0; n < kCells; ++n) {
      c_[n] = dc_[n] = 0;
      if (!exists(n)) continue;
      const int unit = cells.unit_of(n);
      if (active_) c_[n] = load_streaming(lane.c + row * sizes.saved_stride + unit);
      if (was_active_) dc_[n] = load_ordinary(lane.carried_c + state(n));
      // A sequence that had begun before the launch did: its gradients go on to the next launch, or to the caller.
      if (lane.reverse && !was_active_ && cells.column < block.sequences.count && last < sizes.steps &&
          cells.first_share) {
        settle(n, load_ordinary(lane.carried_h + state(n)), load_ordinary(lane.carried_c + state(n)));
      }
    }
  }

  // Asks for what step s needs.
  __device__ __forceinline__ void prefetch(int s) {
    const Sizes& sizes = block_.sizes;
    const BackwardLane<T>& lane = block_.lane;
    // Addresses are made here, from these, and do not lie in registers between the steps.
    const int column = kept(cells_.column), unit = kept(cells_.unit);
    active_ = column < block_.active(s);
    const bool begins = column >= block_.active(s - 1);
    const int64_t row = active_ ? block_.sequences.row(block_.time(s)) + column : 0;
    const int64_t before = begins ? 0 : block_.sequences.row(block_.time(s - 1)) + column;
    const int64_t stride = lane.gates ? sizes.saved_stride : sizes.hidden;
    const float* y = (lane.gates ? lane.gates : lane.preactivations) + 4 * row * stride + unit;
    const float* c = lane.c + before * sizes.saved_stride + unit;
#pragma unroll
    for (int n = 0; n < kCells; ++n) {
      c_before_[n] = grad_above_[n] = 0;
      grad_output_[n] = T{};
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) y_[n][gate] = 0;
      if (!exists(n)) continue;
      constexpr int kStep = CellPlace<C>::kUnitStep;
      if (!begins) {
        c_before_[n] = load_streaming(c + n * kStep);
      } else if (active_ && lane.c_0) {
        c_before_[n] = widen(load_streaming(lane.c_0 + state(n)));
      }
      if (!active_) continue;
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) y_[n][gate] = load_streaming(y + gate * stride + n * kStep);
      const int64_t at = row * sizes.h_stride + unit + n * kStep;
      if (lane.grad_output) grad_output_[n] = load_streaming(lane.grad_output + at);
      if (lane.grad_above) grad_above_[n] = load_streaming(lane.grad_above + at);
    }
  }

  // All of step s that can be computed before its dh has come.
  __device__ __forceinline__ void prepare(int s) {
    const BackwardLane<T>& lane = block_.lane;
    const bool ends = active_ && !was_active_;  // the first step that this sequence takes here is its last one
#pragma unroll
    for (int n = 0; n < kCells; ++n) {
      incoming_[n] = 0;
      slope_[n] = {};
      if (!active_ || !exists(n)) continue;
      const int unit = cells_.unit_of(n);
      Gates<float> y = {y_[n][0], y_[n][1], y_[n][2], y_[n][3]};
      if (!lane.gates) {
        add_bias(y, lane.bias_ih, unit);
        add_bias(y, lane.bias_hh, unit);
        y = activate<MathsOf<T>>(y);
      }
      slope_[n] = cell_slopes<MathsOf<T>>(y, c_before_[n], c_[n]);
      if (lane.grad_above) {
        if (block_.arguments.mask.seed) mask(block_.time(s), unit, grad_above_[n]);
        incoming_[n] = grad_above_[n];
      }
      if (lane.grad_output) incoming_[n] += widen(grad_output_[n]);
      if (ends && lane.grad_h_n) incoming_[n] += widen(load_ordinary(lane.grad_h_n + state(n)));
      if (ends) dc_[n] = lane.grad_c_n ? widen(load_ordinary(lane.grad_c_n + state(n))) : 0;
    }
  }

  // dh has come: dgates(s), to shared memory for the products, and kept for store().
  __device__ __forceinline__ void update(const CellSums<C>& sums, T* grad_gates) {
#pragma unroll
    for (int n = 0; n < kCells; ++n) {
      if (!cells_.has(n)) continue;
      // Zeros where the sequence has no such step, or where there is no such unit: then all slopes are.
      const Gates<float> d = cell_backward(slope_[n], incoming_[n] + sums[n], dc_[n]);
      const float all[4] = {d.i, d.f, d.g, d.o};
      const int unit = cells_.unit_of(n) - block_.first_unit;
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        const T grad = narrow<T>(all[gate]);
        grad_[n].set(gate, grad);
        if (cells_.first_share) {
          grad_gates[quarter_at<C>(cells_.column, unit / kQuarter<T>, gate) + unit % kQuarter<T>] =
              operand<C::kProduct>(grad);
        }
      }
    }
  }

  // A reverse lane's sequences have different first steps. Where step s+1 was one, dh and dc of the state before it are
  // these, for good. (update() leaves dc alone where the sequence has no such step only up to a factor of 0: hence first.)
  __device__ __forceinline__ void settle_begun(const CellSums<C>& sums) {
    if (active_ || !was_active_) return;
#pragma unroll
    for (int n = 0; n < kCells; ++n) {
      if (exists(n)) settle(n, sums[n], dc_[n]);
    }
  }

  // dgates(s) to memory, and on to the next step.
  __device__ __forceinline__ void store(int s) {
    const Sizes& sizes = block_.sizes;
    const int64_t row = active_ ? block_.sequences.row(block_.time(s)) + kept(cells_.column) : 0;
    T* to = block_.lane.grad_gates + row * sizes.gates_stride + kept(cells_.unit);
#pragma unroll
    for (int n = 0; n < kCells; ++n) {
      if (active_ && exists(n) && cells_.first_share) {
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          stored(to + (int64_t{gate} * sizes.hidden + n * CellPlace<C>::kUnitStep)) = grad_[n].get(gate);
        }
      }
      c_[n] = c_before_[n];
    }
    was_active_ = active_;
  }

  // The launch's last step is done. `sums`: dh of the state before it, where the caller wants that.
  __device__ __forceinline__ void finish(const CellSums<C>& sums) {
    const BackwardLane<T>& lane = block_.lane;
    if (!was_active_) return;
#pragma unroll
    for (int n = 0; n < kCells; ++n) {
      if (!exists(n)) continue;
      if (block_.sizes.first_step == 0) {
        settle(n, sums[n], dc_[n]);
      } else if (cells_.first_share) {
        stored(lane.carry_c + state(n)) = dc_[n];  // dh is multiplied again, from dgates, by the next launch
      }
    }
  }

 private:
  __device__ __forceinline__ bool exists(int n) const {
    return cells_.has(n) && cells_.unit_of(n) < block_.sizes.hidden;
  }
  // Index of the n-th cell in (B, H).
  __device__ __forceinline__ int64_t state(int n) const {
    return int64_t{block_.sequences.first + cells_.column} * block_.sizes.hidden + cells_.unit_of(n);
  }

  // Gradients of the state before a sequence's first step: to the caller, in the last launch, else to the next launch.
  __device__ __forceinline__ void settle(int n, float dh, float dc) const {
    const BackwardLane<T>& lane = block_.lane;
    if (!cells_.first_share) return;
    const int64_t at = state(n);
    if (block_.sizes.first_step > 0) {
      stored(lane.carry_h + at) = dh;
      stored(lane.carry_c + at) = dc;
    } else {
      if (lane.grad_h_0) stored(lane.grad_h_0 + at) = narrow<T>(dh);
      if (lane.grad_c_0) stored(lane.grad_c_0 + at) = narrow<T>(dc);
    }
  }

  __device__ __forceinline__ void add_bias(Gates<float>& y, const T* bias, int unit) const {
    if (!bias) return;
    const int hidden = block_.sizes.hidden;
    y.i += widen(load_readonly(bias + unit));
    y.f += widen(load_readonly(bias + hidden + unit));
    y.g += widen(load_readonly(bias + 2 * hidden + unit));
    y.o += widen(load_readonly(bias + 3 * hidden + unit));
  }

  __device__ __forceinline__ void mask(int time, int unit, float& x) const {
    const Sizes& s = block_.sizes;
    const gates::Sizes sizes = {s.hidden, s.h_stride, s.saved_stride, s.gates_stride, block_.arguments.mask};
    float one[1] = {x};
    gates::apply_mask(one, sizes, {int64_t{time} * s.batch, block_.lane.h_column, block_.lane.layer},
                      block_.sequences.first + cells_.column, unit);
    x = one[0];
  }
};

// ---- The kernel -----------------------------------------------------------------------------------------------------

// W_hhᵀ: the warp's fragments, for good.
template <class C>
struct BackwardWeights {
  Fragment fragment[C::kMTiles / C::kAtOnce][C::kPieces][C::kAtOnce];

  explicit __device__ __forceinline__ BackwardWeights(const BackwardBlock<C>& block) {
    const bool fits = pairs_fit(block.lane.weight_hh, block.sizes.hidden);
#pragma unroll
    for (int m = 0; m < C::kMTiles; ++m) {
#pragma unroll
      for (int piece = 0; piece < C::kPieces; ++piece) {
        fragment[m / C::kAtOnce][piece][m % C::kAtOnce] =
            load_transposed<C>(block.lane.weight_hh, block.sizes.hidden, block.first_unit, tile_of(m, block.place.warp),
                               piece, block.place.warp_lane, fits);
      }
    }
  }

  // Sends the block's partial sums of dh: of its dgates, on top of what comes `from_above` (null: nothing).
  template <class Exchanged>
  __device__ __forceinline__ void multiply_and_send(const BackwardBlock<C>& block, const typename C::T* grad_gates,
                                                    const float4* from_above, Exchanged& exchange,
                                                    uint32_t number) const {
    using T = typename C::T;
    const int warp_lane = block.place.warp_lane;
    const T* first = first_quarter<C>(grad_gates, warp_lane);
    // Of exact products a loop that stays one: else columns of the next tile would be loaded long before their turn.
#pragma unroll(C::kProduct == Product::exact ? 1 : C::kTiles)
    for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
      for (int part = 0; part < C::kMTiles / C::kAtOnce; ++part) {
        if (tile_of(part * C::kAtOnce, block.place.warp) >= block.tiles) break;
        float d[1][C::kAtOnce][4] = {};
        if (from_above) {
#pragma unroll
          for (int m = 0; m < C::kAtOnce; ++m) {
            const float4 v = from_above[(n * C::kMTiles + part * C::kAtOnce + m) * C::kThreads + block.place.thread];
            d[0][m][0] = v.x, d[0][m][1] = v.y, d[0][m][2] = v.z, d[0][m][3] = v.w;
          }
        }
        const T* columns = first + n * kTileColumns * C::kPitch;
        multiply<T, C::kProduct>(d, fragment[part], columns, C::kPitch, warp_lane);
#pragma unroll
        for (int m = 0; m < C::kAtOnce; ++m) {
          exchange.send(number, part * C::kAtOnce + m, n, d[0][m]);
        }
      }
    }
  }
};

template <typename T, Product product, Exchange exchange, int MTiles, int Pieces, int Tiles>
__global__ void __launch_bounds__(kMaxWarps* kWarpThreads, 1)
    backward(const __grid_constant__ BackwardArguments<T> arguments) {
  using C = BackwardCut<T, product, exchange, MTiles, Pieces, Tiles>;
  const Place place(arguments);
  const BackwardBlock<C> block(arguments, place);
  const Sizes& sizes = arguments.sizes;
  const BackwardLane<T>& lane = block.lane;
  const CellPlace<C> cell_place(place);
  const BackwardShared<C> shared(arguments.cut, lane.over >= 0);
  Waiting waiting(arguments.watchdog, place);
  const int64_t lane_words = int64_t{2} * arguments.cut.blocks * arguments.cut.blocks * C::kCells;
  SumsOf<C> sums_of(arguments.cut, place, waiting, shared.sums, shared.arrived,
                    arguments.words ? arguments.words + (place.copy * sizes.lanes + place.lane) * lane_words : nullptr);
  sums_of.start();

  const BackwardWeights<C> weights(block);
  BackwardCells<C> cells(block, cell_place);
  if (lane.over >= 0 && arguments.cut.inputs_in_shared) {
    const bool fits = pairs_fit(lane.weight_ih_above, sizes.hidden);
#pragma unroll 1
    for (int n = 0; n < MTiles * Pieces; ++n) {
      // Read by the thread that writes it: nobody has to wait.
      const Fragment f = load_transposed<C>(lane.weight_ih_above, sizes.hidden, block.first_unit,
                                            tile_of(n / Pieces, place.warp), n % Pieces, place.warp_lane, fits);
      shared.weights[2 * n * C::kThreads + place.thread] = f.upper;
      shared.weights[(2 * n + 1) * C::kThreads + place.thread] = f.lower;
    }
  }
  bool has_reader = false;  // a lane below, in this launch
  for (int n = 0; n < sizes.lanes; ++n) has_reader |= arguments.lane[n].over == place.lane;
  // Both in one register, from here on.
  enum Neighbours : int { kOver = 1, kReader = 2 };
  const int neighbours = in_register((lane.over >= 0 ? kOver : 0) | (has_reader ? kReader : 0));
  const auto over = [&] { return (neighbours & kOver) != 0; };
  const auto read = [&] { return (neighbours & kReader) != 0; };

  const int last = sizes.last_step, first = sizes.first_step, chunk_steps = arguments.cut.chunk_steps;
  constexpr int kStepGates = C::kColumns * C::kPitch;              // elements of dgates of a step
  constexpr int kStepSums = C::kTiles * C::kMTiles * C::kThreads;  // float4

  // What comes from above for chunk number `chunk` of this launch.
  const auto project_chunk = [&](int chunk, int step) {
    const int begin = last - 1 - chunk * chunk_steps,
              steps = begin - first + 1 < chunk_steps ? begin - first + 1 : chunk_steps;
    // With the number comes, by its acquire, what the block above had written before: to this lane of the warp …
    if (place.warp_lane == 0) await_chunk(arguments, place, waiting, lane.over, place.rank, chunk + 1, step);
    warp_barrier();  // … and to all others.
    // Hazard: copies land on the chunk before, which all warps have multiplied: a step's barrier has been since.
    for (int n = 0; n < steps; ++n) {
      stage<true>(block, arguments.lane[lane.over].grad_gates, begin - n, shared.above + n * kStepGates);
    }
    finish_staging(block, steps, shared.above);
    block_barrier();  // what each thread has staged is visible to all
    project(block, shared, begin, steps);
  };
  // What the accumulators of dh(s) start from.
  const auto from_above = [&](int s) -> const float4* {
    return over() ? shared.from_above + (last - 1 - s) % chunk_steps * kStepSums : nullptr;
  };

  // Step s-1 will send dh(s-2): does that begin a chunk of what comes from above? (It lies on the chunk before, all of which
  // has been sent.)
  const auto project_next = [&](int s) {
    const int done = last - 1 - (s - 2);  // steps that come before s-2
    if (s - 2 >= first && done % chunk_steps == 0) project_chunk(done / chunk_steps, s);
  };

  uint32_t number = 0;  // of the next exchange to be received
  // dh(last-1) has an exchange of its own, where anything comes from above or from a step that an earlier launch has done.
  // That one left dgates: their product is computed here, so that the sums are those of one launch, to the bit.
  const bool resumes = last < sizes.steps;
  if (over()) project_chunk(0, last);
  if (over() || resumes) {
    T* grad_gates = shared.grad_gates + last % 2 * kStepGates;
    stage<false>(block, lane.grad_gates, last, grad_gates);
    sums_of.expect(0);
    block_barrier();  // dgates(last), which each thread has staged some of, are visible to all
    waiting.agree();
    weights.multiply_and_send(block, grad_gates, from_above(last - 1), sums_of, 0);
    if (over()) project_next(last);
  }
  cells.prefetch(last - 1);

  for (int s = last - 1; s >= first; --s) {
    // Hazard: what is sent has to be received. dh(first-1) is sent only for grad_h_0.
    const bool receives = s + 1 < last || over() || resumes, sends = s > first || (s == 0 && lane.grad_h_0);
    CellSums<C> sums = {};
    if (sends) sums_of.expect(number + receives);
    cells.prepare(s);
    if (receives) sums_of.receive(number++, cell_place, sums, s);
    if (lane.reverse && block.packed()) cells.settle_begun(sums);
    T* grad_gates = shared.grad_gates + s % 2 * kStepGates;
    cells.update(sums, grad_gates);
    // dgates(s) of all threads are visible to all. And: all sums of dh(s) have been read, so that this block's sums of
    // dh(s-1) may tell its peers to write over them; dgates(s+1) are in memory, to be published.
    //
    // Hazard: dgates have two places. Those of step s-1 may be written by a thread that is past this barrier, while others
    // multiply these; those of s-2 come behind the next one, to which all warps come when they have multiplied these.
    block_barrier();
    waiting.agree();
    if (sends) {
      weights.multiply_and_send(block, grad_gates, s > first ? from_above(s - 1) : nullptr, sums_of, number);
    }
    cells.store(s);
    const int done = last - 1 - s;  // steps whose dgates all threads had written before the barrier
    // (By a thread of the last warp, which has the fewest tiles: a release takes its time.)
    if (read() && done > 0 && done % chunk_steps == 0 && place.thread == C::kThreads - 1) {
      publish_chunks(arguments, place, done / chunk_steps);
    }
    if (over()) project_next(s);
    if (s > first) cells.prefetch(s - 1);
  }

  CellSums<C> sums = {};
  if (first == 0 && lane.grad_h_0) sums_of.receive(number, cell_place, sums, -1);
  cells.finish(sums);
  if (read()) {
    block_barrier();  // all threads have written the last dgates, for the release
    if (place.thread == 0) publish_chunks(arguments, place, (last - first + chunk_steps - 1) / chunk_steps);
  }
  sums_of.finish();
}

// ---- Launch ---------------------------------------------------------------------------------------------------------

// What is wrong with these arguments for a kernel cut like this, or "".
template <class C>
std::string backward_misfit(const BackwardArguments<typename C::T>& arguments) {
  const Cut& cut = arguments.cut;
  const Sizes& s = arguments.sizes;
  const auto number = [](int64_t n) { return std::to_string(n); };
  const Instance instance = {C::kProduct, C::kExchange, C::kTiles, C::kPieces, C::kMTiles};
  if (!instance.runs(cut) || cut.groups != C::kGroups) return "it was compiled for another cut";
  if (s.lanes < 1 || s.lanes > kMaxLanes) return number(s.lanes) + " lanes: a launch takes 1 to " + number(kMaxLanes);
  if (s.first_step < 0 || s.first_step >= s.last_step || s.last_step > s.steps || cut.chunk_steps < 1) {
    return "steps " + number(s.first_step) + " to " + number(s.last_step) + " of " + number(s.steps) +
           ", in chunks of " + number(cut.chunk_steps);
  }
  if (std::string error = blocks_misfit(cut); !error.empty()) return error;
  const int most_units = kMaxWarps * C::kMTiles * 16;
  if (s.hidden < 1 || s.hidden > cut.units() || cut.units() > most_units) {
    return "hidden " + number(s.hidden) + ", units " + number(cut.units()) + ", rows of weights " + number(most_units) +
           " have to grow in this order";
  }
  if (s.copies < 1 || s.first_group < 0 || s.first_group + s.copies > s.batch_groups) {
    return "batch groups " + number(s.first_group) + " to " + number(int64_t{s.first_group} + s.copies) + " of " +
           number(s.batch_groups);
  }
  if (s.batch < s.batch_groups || (int64_t{s.batch} + s.batch_groups - 1) / s.batch_groups > C::kColumns) {
    return "batch " + number(s.batch) + " in " + number(s.batch_groups) + " groups of 1 to " + number(C::kColumns);
  }
  if (!arguments.chunks_done || (C::kExchange == Exchange::l2 && !arguments.words))
    return "no memory to exchange through";
#if defined(STACKED_LSTM_WATCHDOG)
  if (!arguments.watchdog) return "a build with STACKED_LSTM_WATCHDOG, and no record for it";
#endif
  const bool resumes = s.last_step < s.steps, pauses = s.first_step > 0;
  for (int n = 0; n < s.lanes; ++n) {
    const BackwardLane<typename C::T>& lane = arguments.lane[n];
    const std::string where = "lane " + number(n) + ": ";
    if (!lane.weight_hh || !lane.c || !lane.grad_gates || (!lane.gates && !lane.preactivations)) {
      return where + "weights, c, gates or their gradients are not there";
    }
    const bool keeps_h = lane.reverse && s.first_row;
    if (resumes && (!lane.carried_c || (keeps_h && !lane.carried_h)))
      return where + "nothing carried to step " + number(s.last_step);
    if (pauses && (!lane.carry_c || (keeps_h && !lane.carry_h)))
      return where + "nowhere to carry step " + number(s.first_step);
    if (lane.over < 0) continue;
    if (lane.over >= s.lanes || arguments.lane[lane.over].reverse != lane.reverse || !lane.weight_ih_above) {
      return where + "no such lane above it: " + number(lane.over);
    }
    if (lane.h_column % 4 != 0) return where + "begins at column " + number(lane.h_column) + ", no multiple of 4";
    int above = n;
    for (int steps = 0; steps < s.lanes && above >= 0 && above < s.lanes; ++steps) above = arguments.lane[above].over;
    if (above >= 0 && above < s.lanes) return where + "above itself";
  }
  return "";
}

// How such a launch looks, of `blocks` blocks.
template <class C>
LaunchConfig backward_config(const Cut& cut, int64_t blocks, bool over) {
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(blocks));
  config.block = dim3(C::kThreads);
  config.shared_bytes = BackwardLayout<typename C::T>(cut, over).bytes;
  if (SumsOf<C>::kCluster) config.cluster = static_cast<unsigned>(cut.blocks);
  config.co_resident = true;
  return config;
}

// Starts the kernel. Refused, before anything runs, when not all blocks fit on the device at once.
template <typename T, Product product, Exchange exchange, int MTiles, int Pieces, int Tiles>
Outcome launch_backward(const BackwardArguments<T>& arguments, void* stream) {
  using C = BackwardCut<T, product, exchange, MTiles, Pieces, Tiles>;
  const std::string error = backward_misfit<C>(arguments);
  if (!error.empty()) return {Outcome::failed, "the persistent kernel does not take this: " + error};
  const Sizes& sizes = arguments.sizes;
  bool over = false;
  for (int n = 0; n < sizes.lanes; ++n) over |= arguments.lane[n].over >= 0;
  LaunchConfig config =
      backward_config<C>(arguments.cut, int64_t{sizes.copies} * sizes.lanes * arguments.cut.blocks, over);
  config.stream = stream;
  return outcome_of(launch(config, &backward<T, product, exchange, MTiles, Pieces, Tiles>, arguments));
}

// How many blocks of such a launch the current device holds at once.
template <typename T, Product product, Exchange exchange, int MTiles, int Pieces, int Tiles>
int64_t backward_capacity(const Cut& cut, int /*hidden*/, bool over) {
  using C = BackwardCut<T, product, exchange, MTiles, Pieces, Tiles>;
  return static_cast<int64_t>(
      capacity(backward_config<C>(cut, cut.blocks, over), &backward<T, product, exchange, MTiles, Pieces, Tiles>));
}

}  // namespace stacked_lstm::cuda::persistent
