// csrc/persistent/backward_lane.cuh: a block's part of a lane, backward: its weights, its shared memory, and what the
// lane above adds to its sums of dh.
#pragma once

#include <cstdint>

#include "backward_cut.cuh"
#include "backward_sums.cuh"

namespace stacked_lstm::cuda::persistent {

// ---- Weights --------------------------------------------------------------------------------------------------------

// Whether one access can load two neighbouring units of a row.
template <typename T>
__device__ __forceinline__ bool pairs_fit(const T* weight, int hidden) {
  return hidden % 2 == 0 && reinterpret_cast<uintptr_t>(weight) % (2 * sizeof(T)) == 0;
}

// A thread's part of a piece of one tile of Wᵀ: in `weight`, (4H, H), these are columns of 16 units in the block's gate
// rows.
template <class C, typename T = typename C::T>
__device__ __forceinline__ Fragment load_transposed(const T* weight, int hidden, int first_unit, int tile, int piece,
                                                    int warp_lane, bool fits) {
  constexpr int kWordElements = 4 / static_cast<int>(sizeof(T));
  const int unit = tile * 16 + warp_lane / 4 * 2;          // of dh: the first of two
  const int gate_unit = first_unit + piece * kQuarter<T>;  // of dgates: the first of kQuarter, of one gate
  const T* row = weight + (int64_t{warp_lane % 4} * hidden + gate_unit) * hidden + unit;
  const int rows = unit < hidden ? hidden - gate_unit : 0;  // how many of them exist
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
    // Not unrolled, each round moves the words on by one: less code.
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
  T* above;            // [step of the chunk][column][K]: dgates of the same gate rows of the lane above, as operands
  float4* from_above;  // [step of the chunk][batch tile][m][thread]: start values of the accumulators
  uint4* weights;      // [m][piece][upper, lower][thread]: the part of W_ihᵀ of the lane above, if it is kept here

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

// What all parts of a step need.
template <class C>
struct BackwardBlock {
  using T = typename C::T;
  const BackwardArguments<T>& arguments;
  const LaunchSizes& sizes;
  const BackwardLane<T>& lane;
  const ThreadPlace& place;
  const Sequences sequences;
  const int first_unit;  // of the block
  const int tiles;       // of 16 units, of the lane

  __device__ __forceinline__ BackwardBlock(const BackwardArguments<T>& a, const ThreadPlace& p)
      : arguments(a),
        sizes(a.sizes),
        lane(a.lane[p.lane]),
        place(p),
        sequences(a.sizes, p.copy),
        first_unit(p.rank * C::kGroups * kGroupUnits),
        tiles((a.cut.blocks * C::kGroups + 1) / 2) {}

  __device__ __forceinline__ bool ragged() const { return sizes.rows_before != nullptr; }
  __device__ __forceinline__ int time(int step) const { return time_of(sizes, lane.reverse, step); }
  // Whether the sequence of a column is reset before this step of the lane.
  __device__ __forceinline__ bool reset_before(int step, int column) const {
    return sizes.resets && sequences.reset_before(sizes, lane.reverse, step, column);
  }
  // How many sequences of the batch group have this step of the lane; 0 beyond its ends.
  __device__ __forceinline__ int active(int step) const {
    return step < 0 || step >= sizes.steps ? 0 : sequences.active(time(step));
  }
};

// Copies the dgates of step `step` of a lane, of this block's units, from memory to `to`, as the rows of K that
// products read; zeros if there is no such row or unit. kLater: they are not there before copy_async_wait and a
// barrier. Else they are for the lane's own recurrence: zeros also where the sequence is reset before this step.
template <bool kLater, class C, typename T = typename C::T>
__device__ __forceinline__ void copy_dgates(const BackwardBlock<C>& block, const T* grad_gates, int step, T* to) {
  constexpr int kItems = C::kColumns * C::kPieces * 4;
  const LaunchSizes& sizes = block.sizes;
  const int active = block.active(step);
  const int64_t row = active > 0 ? block.sequences.row(block.time(step)) : 0;
  const bool fits = quarters_fit(grad_gates, sizes.gates_stride, sizes.hidden);
  for (int item = block.place.thread; item < kItems; item += C::kThreads) {
    const int quarter = item % 4, piece = item / 4 % C::kPieces, column = item / 4 / C::kPieces;
    const int unit = block.first_unit + piece * kQuarter<T>;
    bool there = column < active && unit < sizes.hidden;
    if constexpr (!kLater) there = there && !block.reset_before(step, column);
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

// Waits for what copy_dgates<true> has copied, and makes operands of it.
template <class C, typename T = typename C::T>
__device__ __forceinline__ void finish_copies(const BackwardBlock<C>& block, int steps, T* above) {
  copy_async_commit();
  copy_async_wait<0>();  // makes this thread's copies visible to it; the caller's barrier makes them visible to all
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

// Where a thread's quarters of a batch tile begin.
template <class C, typename T = typename C::T>
__device__ __forceinline__ const T* first_quarter(const T* columns, int warp_lane) {
  // mma gives the thread another column in each tile, but the order of quarters is the same in all of them: it depends
  // on the column modulo 4.
  return columns + quarter_place<C>(warp_lane / 4, warp_lane % 4) * kQuarter<T>;
}

// Applies dropout's mask between this lane and the lane above to a tile's sums. Warp lane (r, q) has the units
// 2r, 2r + 1 and the columns 2q, 2q + 1. One draw serves four neighbouring units of a row, which two threads of the
// warp have. Each of the two draws for one of their two columns, and they exchange the results.
template <class C>
__device__ __forceinline__ void mask_tile(const BackwardBlock<C>& block, int time, int column, int unit,
                                          float (&x)[4]) {
  const LaunchSizes& s = block.sizes;
  const gates::Mask& mask = block.lane.mask;
  const int odd = block.place.warp_lane / 4 % 2;  // 1: the thread has the upper units, and draws for the upper column
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
  // Dropped elements are multiplied by 0, so that a NaN stays a NaN even if it is dropped.
#pragma unroll
  for (int n = 0; n < 4; ++n) x[n] *= (columns[n % 2] & (n < 2 ? 1u : 2u)) != 0 ? scale : 0.0f;
}

// Computes the share of dh that comes from the lane above, for `steps` steps from `first` down. The dgates of the lane
// above have been copied.
template <class C>
__device__ __forceinline__ void project(const BackwardBlock<C>& block, const BackwardShared<C>& shared, int first,
                                        int steps) {
  using T = typename C::T;
  const int warp_lane = block.place.warp_lane, thread = block.place.thread;
  const bool in_shared = block.arguments.cut.inputs_in_shared, masked = block.lane.mask.seed != nullptr;
  const bool fits = pairs_fit(block.lane.weight_ih_above, block.sizes.hidden);
  // Beside the recurrent weights there are registers for two pieces. Their sums are stored, and the next two pieces go
  // on from these.
  constexpr int kPieces = C::kPieces < 2 ? C::kPieces : 2, kPieceTurns = C::kPieces / kPieces;
  static_assert(kPieceTurns * kPieces == C::kPieces);
#pragma unroll 1
  for (int turn = 0; turn < C::kMTiles * kPieceTurns; ++turn) {
    const int m = turn / kPieceTurns, first_piece = turn % kPieceTurns * kPieces, tile = tile_of(m, block.place.warp);
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

}  // namespace stacked_lstm::cuda::persistent
