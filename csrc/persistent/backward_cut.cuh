// csrc/persistent/backward_cut.cuh: what the compiler knows of a cut of the backward kernel, and which thread has which
// cell.
#pragma once

#include <cstdint>

#include "block.cuh"
#include "products.cuh"

namespace stacked_lstm::cuda::persistent {

// ---- What the compiler knows of a cut -------------------------------------------------------------------------------

template <typename T_, Product kProduct_, Exchange kExchange_, int MTiles, int Pieces, int Tiles>
struct CompiledBackward {
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
  // How many threads share a cell. Through L2 each of them waits for its part of the sums. Sums in a cluster's shared
  // memory do not need this.
  static constexpr int kShares = kExchange == Exchange::l2 && kCells <= kThreads / 2 ? kThreads / 2 / kCells * 2 : 1;
  static constexpr int kWarpCells = kWarpThreads / kShares;
  // Elements from a column of dgates in shared memory to the next.
  static constexpr int kPitch = row_pieces(Pieces) * kPieceElements<T>;
  // How many tiles of weights are multiplied side by side: enough chains of products, and few registers of sums. There
  // are fewer if a thread keeps the dgates of several cells beside words that are under way.
  static constexpr bool kFewRegisters = kExchange == Exchange::l2 && kThreadCells * sizeof(T) > 4;
  static constexpr int kMost = kProduct == Product::exact ? 1 : kFewRegisters ? 2 : 4;
  static constexpr int kAtOnce = MTiles <= kMost                ? MTiles
                                 : MTiles % kMost == 0          ? kMost
                                 : kMost > 3 && MTiles % 3 == 0 ? 3
                                                                : 2;
  static_assert(MTiles % kAtOnce == 0);
};

// ---- Who has which cell ---------------------------------------------------------------------------------------------
// K of a block: quarter q of a piece is gate q of kQuarter neighbouring units, as they lie in memory. In shared memory
// the order of quarters depends on the column. This avoids bank conflicts when cells write one gate of 8 units and 4
// columns at a time, and when products read all gates of 2 columns at a time.

template <class C>
__device__ __forceinline__ int quarter_place(int column, int quarter) {
  // In exact products a thread reads its quarter of all columns at one offset: the order must not depend on the column.
  return C::kProduct == Product::exact ? quarter : quarter ^ (column & 3);
}

// Offset, in elements, of a quarter of K in dgates.
template <class C>
__device__ __forceinline__ int quarter_at(int column, int piece, int quarter) {
  using T = typename C::T;
  return column * C::kPitch + piece * kPieceElements<T> + quarter_place<C>(column, quarter) * kQuarter<T>;
}

// A thread's cells: they are of one column of the batch, one in every kThreadPatches-th patch.
template <class C>
struct CellPlace {
  int patch, spot;  // of the first cell: its patch, and its place there: 8·column + unit
  int share;        // this thread's number among those that share the cell
  int column;       // of the batch group
  int unit;         // of the first cell, counted in the lane; each next cell is kUnitStep further
  bool first_share;

  static constexpr int kUnitStep = C::kThreadPatches / C::kTiles * kGroupUnits;

  explicit __device__ __forceinline__ CellPlace(const ThreadPlace& place) {
    const int cell = place.warp * C::kWarpCells + place.warp_lane % C::kWarpCells;
    share = place.warp_lane / C::kWarpCells;
    first_share = C::kShares == 1 || share == 0;
    patch = cell / C::kPatch, spot = cell % C::kPatch;
    column = patch % C::kTiles * kTileColumns + spot / kGroupUnits;
    unit = (place.rank * C::kGroups + patch / C::kTiles) * kGroupUnits + spot % kGroupUnits;
  }

  // Whether the thread has an n-th cell. (Padding units have cells, too: sums are sent for all units.)
  __device__ __forceinline__ bool has(int n) const {
    return C::kCells % C::kThreads == 0 || patch + n * C::kThreadPatches < C::kPatches;
  }
  __device__ __forceinline__ int unit_of(int n) const { return unit + n * kUnitStep; }

  // The place of this cell in the sums of a patch. Warp lane (r, q) of a warp that sends them has units 2r, 2r + 1 and
  // columns 2q, 2q + 1. In shared memory a thread's four sums lie together, and a thread with r & 2 takes the place of
  // q ^ 2, so that 4 columns use all 32 banks.
  __device__ __forceinline__ int shared_spot() const {
    const int u = spot % kGroupUnits, c = spot / kGroupUnits;
    return (u / 2 * 4 + ((c / 2) ^ (u / 2 & 2))) * 4 + u % 2 * 2 + c % 2;
  }
  // Of the thread's first sum; the others follow.
  static __device__ __forceinline__ int shared_spot_of_warp_lane(int half_warp_lane) {
    const int r = half_warp_lane / 4, q = half_warp_lane % 4;
    return (r * 4 + (q ^ (r & 2))) * 4;
  }
  // The place in the words in L2: what warp lanes write together, and what they read together, are whole sectors.
  __device__ __forceinline__ int word_spot() const {
    const int u = spot % kGroupUnits, c = spot / kGroupUnits;
    return c / 4 * 32 + (u % 2 * 2 + c % 2) * kWordElement + u / 2 * 2 + c / 2 % 2;
  }
  static constexpr int kWordElement = 8;  // from one of a thread's four sums to the next
  static __device__ __forceinline__ int word_spot_of_warp_lane(int half_warp_lane) {
    const int r = half_warp_lane / 4, q = half_warp_lane % 4;
    return q / 2 * 32 + r * 2 + q % 2;
  }
};

}  // namespace stacked_lstm::cuda::persistent
