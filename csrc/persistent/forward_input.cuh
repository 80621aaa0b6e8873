// csrc/persistent/forward_input.cuh: what a block of the forward kernel does before its recurrence: who each warp is, where
// things lie in shared memory, the weights, and the input's share of the gates, W_ih·x + b, for a few steps at a time. The
// kernel itself is in forward.cuh.
#pragma once

#include "block.cuh"
#include "products.cuh"

namespace stacked_lstm::cuda::persistent {

// ---- Who a warp is, and where things lie in shared memory ------------------------------------------------------------

// A warp's place in its group. Each group has a named barrier: a block has 15 of them besides its own barrier, and at
// most kMaxWarps groups.
struct GroupWarp {
  int group, split;
  int first_unit;  // of the group, counted in the lane
  int unit;        // of this thread
  int column;      // the thread's first of two, in every tile of 8 batch columns

  __device__ __forceinline__ GroupWarp(const Cut& cut, const ThreadPlace& place)
      // Neighbouring warps are on different schedulers. In this order the warps of split 0, which compute gates, are
      // neighbours.
      : group(place.warp % cut.groups),
        split(place.warp / cut.groups),
        first_unit((place.rank * cut.groups + group) * kGroupUnits),
        unit(first_unit + place.warp_lane / 4),
        column(place.warp_lane % 4 * 2) {}
};

// See ForwardLayout.
template <typename T>
struct ForwardShared {
  ForwardLayout<T> layout;
  unsigned char* bytes;

  explicit __device__ __forceinline__ ForwardShared(const ForwardLayout<T>& l)
      : layout(l), bytes(&dynamic_shared<unsigned char>()) {}

  __device__ __forceinline__ T* h() const { return reinterpret_cast<T*>(bytes); }
  __device__ __forceinline__ uint32_t* resets() const { return reinterpret_cast<uint32_t*>(bytes + layout.resets); }
  __device__ __forceinline__ float4* partial() const { return reinterpret_cast<float4*>(bytes + layout.partial); }
  __device__ __forceinline__ T* outgoing() const { return reinterpret_cast<T*>(bytes + layout.outgoing); }
  __device__ __forceinline__ float4* projected() const { return reinterpret_cast<float4*>(bytes + layout.projected); }
  __device__ __forceinline__ T* x() const { return reinterpret_cast<T*>(bytes + layout.x); }
  __device__ __forceinline__ uint4* weights() const { return reinterpret_cast<uint4*>(bytes + layout.weights); }
};

// ---- Weights --------------------------------------------------------------------------------------------------------

// The quarter from k on in the row of a unit and a gate of `weight`, (4·hidden, depth); zeros if there is no such unit.
template <typename T, Product product>
__device__ __forceinline__ uint4 gate_quarter(const T* weight, int hidden, int depth, int unit, int gate, int k,
                                              bool fits) {
  const T* row = weight + (int64_t{gate} * hidden + unit) * depth;
  return operands<T, product>(load_quarter<Memory::constant>(row, k, unit < hidden ? depth : 0, fits));
}

// A thread's part of a piece of both tiles of a group.
template <typename T, Product product>
__device__ __forceinline__ void load_gate_fragments(Fragment (&tile)[2], const T* weight, int hidden, int depth,
                                                    int unit, int piece, int warp_lane, bool fits) {
  const int k = piece * kPieceElements<T> + warp_lane % 4 * kQuarter<T>;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    tile[m].upper = gate_quarter<T, product>(weight, hidden, depth, unit, 2 * m, k, fits);
    tile[m].lower = gate_quarter<T, product>(weight, hidden, depth, unit, 2 * m + 1, k, fits);
  }
}

// Fills shared memory with h(-1), with zeros where there is no unit or no sequence (products read these too), and with
// W_ih if it is kept there.
template <typename T, Product product>
__device__ __forceinline__ void fill_shared(const ForwardArguments<T>& arguments, const ForwardLane<T>& lane,
                                            const ThreadPlace& place, const Sequences& sequences,
                                            const ForwardShared<T>& shared) {
  const Cut& cut = arguments.cut;
  const int threads = static_cast<int>(blockDim.x), hidden = arguments.sizes.hidden, pitch = shared.layout.h_pitch;
  for (int column = 0; column < cut.columns(); ++column) {
    T* first = shared.h() + column * pitch;
    T* second = first + cut.columns() * pitch;
    const bool reset = arguments.sizes.resets && sequences.reset_before(arguments.sizes, lane.reverse, 0, column);
    const bool initial = lane.h_0 && column < sequences.count && !reset;
    const T* h_0 = lane.h_0 + int64_t{sequences.first + column} * hidden;
    for (int unit = place.thread; unit < pitch; unit += threads) {
      first[unit] = initial && unit < hidden ? operand<product>(load_ordinary(h_0 + unit)) : T{0};
      second[unit] = T{0};
    }
  }
  if (cut.inputs_in_shared) {
    const bool fits = quarters_fit(lane.weight_ih, lane.inputs, lane.inputs);
    const int words = cut.groups * shared.layout.input_pieces * 4 * kWarpThreads;
    for (int n = place.thread; n < words; n += threads) {
      const int warp_lane = n % kWarpThreads, gate = n / kWarpThreads % 4, of_piece = n / (4 * kWarpThreads);
      const int piece = of_piece % shared.layout.input_pieces, group = of_piece / shared.layout.input_pieces;
      const int unit = (place.rank * cut.groups + group) * kGroupUnits + warp_lane / 4;
      const int k = piece * kPieceElements<T> + warp_lane % 4 * kQuarter<T>;
      shared.weights()[n] = gate_quarter<T, product>(lane.weight_ih, hidden, lane.inputs, unit, gate, k, fits);
    }
  }
}

// ---- The input's share ----------------------------------------------------------------------------------------------

// b_ih + b_hh of a thread's unit, for the gates i, f, g, o.
template <typename T>
__device__ __forceinline__ void load_bias(float (&bias)[4], const ForwardLane<T>& lane, int hidden, int unit) {
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) {
    bias[gate] = 0;
    if (unit >= hidden) continue;
    if (lane.bias_ih) bias[gate] += widen(load_readonly(lane.bias_ih + gate * hidden + unit));
    if (lane.bias_hh) bias[gate] += widen(load_readonly(lane.bias_hh + gate * hidden + unit));
  }
}

// Copies the pieces first_piece … first_piece + pieces - 1 of x of the steps s … s + steps - 1 to shared memory, as
// columns [step][sequence]; zeros if a sequence has no such step. A warp copies whole columns, four at a time.
template <typename T, Product product, int Tiles>
__device__ __forceinline__ void copy_x(const LaunchSizes& sizes, const ForwardLane<T>& lane, const ThreadPlace& place,
                                       const Sequences& sequences, const ForwardShared<T>& shared, int s, int steps,
                                       int first_piece, int pieces) {
  constexpr int kAtOnce = 4;
  const int warps = static_cast<int>(blockDim.x) / kWarpThreads, columns = steps * Tiles * kTileColumns;
  const int quarters = pieces * 4, k_0 = first_piece * kPieceElements<T>;
  // Rows are x_row_stride apart. In a batch that is not packed, steps are x_step_stride apart.
  const bool fits =
      quarters_fit(lane.x, lane.x_row_stride, lane.inputs) && (sizes.packed || lane.x_step_stride % kQuarter<T> == 0);
  for (int first = place.warp; first < columns; first += kAtOnce * warps) {
    const T* row[kAtOnce];
    int depth[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int at = first + n * warps, column = at % (Tiles * kTileColumns);
      row[n] = lane.x, depth[n] = 0;
      if (at >= columns) continue;
      const int t = time_of(sizes, lane.reverse, s + at / (Tiles * kTileColumns));
      if (column >= sequences.active(t)) continue;
      row[n] += sizes.packed ? (sequences.row(t) + column) * lane.x_row_stride
                             : t * lane.x_step_stride + (sequences.first + column) * lane.x_row_stride;
      depth[n] = lane.inputs;
    }
    for (int quarter = place.warp_lane; quarter < quarters; quarter += kWarpThreads) {
      uint4 value[kAtOnce];  // all under way together
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        value[n] = load_quarter<Memory::written>(row[n], k_0 + quarter * kQuarter<T>, depth[n], fits);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int at = first + n * warps;
        if (at >= columns) break;
        *reinterpret_cast<uint4*>(shared.x() + at * shared.layout.x_pitch + quarter * kQuarter<T>) =
            operands<T, product>(value[n]);
      }
    }
  }
}

// Adds W_ih·x of the copied pieces to the sums of N column tiles from `tile` on. The sums are in shared.projected; with
// the first pieces they start from `bias`. The warp takes every `splits`-th piece.
template <typename T, Product product, int N>
__device__ __forceinline__ void project_tiles(const ForwardArguments<T>& arguments, const ForwardLane<T>& lane,
                                              const ThreadPlace& place, const GroupWarp& warp,
                                              const ForwardShared<T>& shared, const float (&bias)[4], int tile,
                                              int first_piece, int pieces) {
  const Cut& cut = arguments.cut;
  float4* sums_of = shared.projected() + (place.warp * kProjectedTiles + tile) * 2 * kWarpThreads + place.warp_lane;
  Sums<T, product, 2> sums[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    float d[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float4 v = make_float4(bias[2 * m], bias[2 * m], bias[2 * m + 1], bias[2 * m + 1]);
      if (first_piece > 0) v = sums_of[(n * 2 + m) * kWarpThreads];
      d[m][0] = v.x, d[m][1] = v.y, d[m][2] = v.z, d[m][3] = v.w;
    }
    sums[n].start(d);
  }
  const bool fits = quarters_fit(lane.weight_ih, lane.inputs, lane.inputs);
  const T* x = shared.x() + tile * kTileColumns * shared.layout.x_pitch + place.warp_lane % 4 * kQuarter<T>;
#pragma unroll 1
  for (int piece = warp.split; piece < pieces; piece += cut.splits) {
    Fragment a[2];
    if (cut.inputs_in_shared) {
      const uint4* from = shared.weights() +
                          (warp.group * shared.layout.input_pieces + first_piece + piece) * 4 * kWarpThreads +
                          place.warp_lane;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        a[m].upper = from[2 * m * kWarpThreads];
        a[m].lower = from[(2 * m + 1) * kWarpThreads];
      }
    } else {
      load_gate_fragments<T, product>(a, lane.weight_ih, arguments.sizes.hidden, lane.inputs, warp.unit,
                                      first_piece + piece, place.warp_lane, fits);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      sums[n].add(a, place.warp_lane, [&](int column) {
        return *reinterpret_cast<const uint4*>(x + (n * kTileColumns + column) * shared.layout.x_pitch +
                                               piece * kPieceElements<T>);
      });
    }
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
    float d[2][4];
    sums[n].finish(d, place.warp_lane);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      sums_of[(n * 2 + m) * kWarpThreads] = make_float4(d[m][0], d[m][1], d[m][2], d[m][3]);
    }
  }
}

// Computes the input's share of the steps s … s + steps - 1, and finds the resets behind them. All threads call it behind a
// block barrier, after which no thread reads the x, or the resets, of the steps before. A thread itself writes the sums that
// it will start from, so they need no barrier.
template <typename T, Product product, int Tiles>
__device__ __forceinline__ void project(const ForwardArguments<T>& arguments, const ForwardLane<T>& lane,
                                        const ThreadPlace& place, const GroupWarp& warp, const Sequences& sequences,
                                        const ForwardShared<T>& shared, int s, int steps) {
  // The resets behind these steps: a warp has a thread for each projected column.
  static_assert(kProjectedTiles * kTileColumns == kWarpThreads);
  const bool finds_resets = arguments.sizes.resets && place.warp == 0;
  bool reset = false;
  if (finds_resets) {
    constexpr int kColumns = Tiles * kTileColumns;
    const int after = s + place.warp_lane / kColumns + 1;
    reset = place.warp_lane < steps * kColumns && after < arguments.sizes.steps &&
            sequences.reset_before(arguments.sizes, lane.reverse, after, place.warp_lane % kColumns);
  }
  float bias[4] = {};
  if (warp.split == 0) load_bias(bias, lane, arguments.sizes.hidden, warp.unit);
  const int all = shared.layout.input_pieces, tiles = steps * Tiles;
  for (int first_piece = 0; first_piece < all; first_piece += kCopiedPieces) {
    const int pieces = all - first_piece < kCopiedPieces ? all - first_piece : kCopiedPieces;
    if (first_piece > 0) block_barrier();  // all warps have read the previous pieces, which are overwritten next
    copy_x<T, product, Tiles>(arguments.sizes, lane, place, sequences, shared, s, steps, first_piece, pieces);
    if (finds_resets && first_piece == 0) {
      const uint32_t resets = ballot(kFullWarp, reset);
      if (place.warp_lane == 0) *shared.resets() = resets;
    }
    block_barrier();  // makes the x that each thread has copied, and the resets, visible to all warps
    if (product == Product::tensor && tiles == kProjectedTiles) {
      project_tiles<T, product, kProjectedTiles>(arguments, lane, place, warp, shared, bias, 0, first_piece, pieces);
    } else {
      for (int tile = 0; tile < tiles; ++tile) {
        project_tiles<T, product, 1>(arguments, lane, place, warp, shared, bias, tile, first_piece, pieces);
      }
    }
  }
}

}  // namespace stacked_lstm::cuda::persistent
