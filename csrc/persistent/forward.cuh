// csrc/persistent/forward.cuh: a whole stack of LSTM layers, every time step, one launch.
//
//            t →   0    1    2    3    4    5         A block owns some units of one lane for the whole sequence: their
//   lane 0         ■────■────■────■────■────■         recurrent weights and c sit in registers. Inside a lane, h(t) goes to
//   lane 1                   ■────■────■────■──       every block that needs it (─), as persistent/exchange.cuh says.
//   lane 2                             ■────■────     Between lanes it goes through L2, a chunk of steps at a time.
//
//   a lane of the stack   `blocks` blocks; all of them hold h(t-1) of every unit in shared memory
//   └ a block             `groups` groups of 8 units
//     └ a group           32 gate rows, two tiles of mma, and `splits` warps, each over its part of K
//
//      tile 0   rows 0-7: gate i, rows 8-15: gate f      warp lane l has unit l/4 and two of every 8 batch columns:
//      tile 1   rows 0-7: gate g, rows 8-15: gate o      its accumulators are all four gates of its cells, beside c
//
// A step:   receive h(t-1)   →   W_hh·h(t-1), each warp its part of K   →   a group's warps meet; split 0 adds up, does the
//           gates, sends h(t)   →   and only then writes h(t), and what backward wants, to memory.
// Blocks wait for data, never for each other: a step has no block barrier (with L2Exchange: one) and no grid barrier.
//
// W_ih·x is computed for a few steps together. Each block reads the x of these steps once, into shared memory. Each
// group reads W_ih once, from shared memory or L2. A warp's recurrent sums start from the result.
//
// Where a sequence is reset behind step t, a block sends zeros in the place of h(t) and zeroes c when it has saved it: the
// peers that receive h(t) do nothing for a reset. All else, also what the lane above reads, is the true h(t).
//
// Between lanes: h of every step has its own place in memory, so that no block waits for readers. A block that has
// written a chunk writes the number of its chunks to its own counter; a block of the lane above waits for the counters
// of all blocks.
#pragma once

#include <algorithm>
#include <string>
#include <type_traits>

#include "../cuda/launch.cuh"
#include "exchange.cuh"
#include "forward_input.cuh"

namespace stacked_lstm::cuda::persistent {

// ---- Parts of a step ------------------------------------------------------------------------------------------------

// Accumulators of a warp: [batch tile][gate tile][element]: element 0, 1 are two columns of the tile's upper gate (i,
// g), 2, 3 the same columns of its lower one (f, o).
template <int Tiles>
using GateSums = float[Tiles][2][4];

// Loads the values that the recurrent sums of a step start from. Several tiles are projected together;
// the step's first one is tile `tile` of them.
template <typename T, int Tiles>
__device__ __forceinline__ void load_projected(GateSums<Tiles>& d, const ThreadPlace& place,
                                               const ForwardShared<T>& shared, int tile) {
  const float4* from = shared.projected() + (place.warp * kProjectedTiles + tile) * 2 * kWarpThreads + place.warp_lane;
#pragma unroll
  for (int n = 0; n < 2 * Tiles; ++n) {
    const float4 v = from[n * kWarpThreads];
    float (&sum)[4] = d[n / 2][n % 2];
    sum[0] = v.x, sum[1] = v.y, sum[2] = v.z, sum[3] = v.w;
  }
}

// The meeting of a group's warps: split 0 adds the other splits' sums to its own, always in the same order.
//
// Hazard: sums have two places. A warp overwrites the sums of step s in step s+2, after it has received h(s+1). The
// split 0 of its group sent its part of h(s+1) after the meeting of step s+1, and came to that meeting after it had
// read the sums of step s. For the same reason no warp comes twice to one meeting: before the next meeting it waits for
// an h, part of which its split 0 sends only after this meeting.
template <typename T, int Tiles>
class Meeting {
  static constexpr int kWords = Tiles * 2;
  unsigned char* bytes_;
  int id_, threads_, others_;
  bool gathers_;
  TwoAddresses sums_;  // offset in shared memory, in bytes, of the sums of split 1, or of this warp's own

 public:
  __device__ __forceinline__ Meeting(const Cut& cut, const ThreadPlace& place, const GroupWarp& warp,
                                     const ForwardShared<T>& shared)
      : bytes_(shared.bytes), id_(1 + warp.group), others_(in_register(cut.splits) - 1) {
    constexpr int kBytes = kWords * ForwardLayout<T>::kTileBytes;  // of a warp
    gathers_ = kept(static_cast<int>(warp.split == 0 && others_ > 0)) != 0;
    sums_ = {static_cast<int>(shared.layout.partial) + place.warp_lane * static_cast<int>(sizeof(float4)) +
                 (warp.group * others_ + (warp.split > 0 ? warp.split - 1 : 0)) * kBytes,
             cut.groups * others_ * kBytes};
    threads_ = in_register(cut.splits * kWarpThreads);
  }

  // Whether this warp adds up the sums: it is of split 0, and there are other splits.
  __device__ __forceinline__ bool gathers() const { return gathers_; }

  // After each step.
  __device__ __forceinline__ void next() { sums_.next(); }

  // Called by the warps of split 1 and up.
  __device__ __forceinline__ void give(const GateSums<Tiles>& d) const {
    auto* to = reinterpret_cast<float4*>(bytes_ + sums_.at);
#pragma unroll
    for (int n = 0; n < kWords; ++n) {
      const float (&v)[4] = d[n / 2][n % 2];
      to[n * kWarpThreads] = make_float4(v[0], v[1], v[2], v[3]);
    }
    // Makes these sums visible to split 0 behind its named_barrier_sync. This warp need not wait for anything but the
    // next h.
    named_barrier_arrive(id_, threads_);
  }

  // Called by the warp that gathers().
  __device__ __forceinline__ void gather(GateSums<Tiles>& d) const {
    // All warps of the group have read h(s-1). Makes their sums visible to this warp, which reads them next.
    named_barrier_sync(id_, threads_);
    const auto* from = reinterpret_cast<const float4*>(bytes_ + sums_.at);
    const auto add = [&](const float4(&v)[kWords]) {
#pragma unroll
      for (int n = 0; n < kWords; ++n) {
        float (&sum)[4] = d[n / 2][n % 2];
        sum[0] += v[n].x, sum[1] += v[n].y, sum[2] += v[n].z, sum[3] += v[n].w;
      }
    };
    // Sums are loaded one split ahead, so that the last ones are added without a branch after they have come.
    float4 ahead[kWords];
#pragma unroll
    for (int n = 0; n < kWords; ++n) ahead[n] = from[n * kWarpThreads];
#pragma unroll 1
    for (int left = others_; left > 1; --left) {
      from += kWords * kWarpThreads;
      float4 v[kWords];
#pragma unroll
      for (int n = 0; n < kWords; ++n) v[n] = ahead[n], ahead[n] = from[n * kWarpThreads];
      add(v);
    }
    add(ahead);
  }
};

// The outgoing h(s) of a group's cells, as [column][unit]. There are two places: h(s) is in one, h(s-1) in the other.
// These are the values that tensors hold; TF32 products get rounded ones.
template <typename T, int Tiles>
__device__ __forceinline__ T* outgoing_h(const Cut& cut, const GroupWarp& warp, const ForwardShared<T>& shared, int s) {
  return shared.outgoing() + ((s & 1) * cut.groups + warp.group) * kTileColumns * Tiles * kGroupUnits;
}

// What a lane writes besides h; kChunks: a lane above it in this launch reads its chunks.
// Further bits: kRagged, steps may have fewer sequences than the batch; kResets, sequences may be reset.
enum Saves : int { kC = 1, kGates = 2, kAbove = 4, kChunks = 8, kRagged = 16, kResets = 32 };

// The cells of a thread of split 0: [batch tile][0 or 1].
template <typename T, int Tiles>
struct Cells {
  float c[Tiles][2];
  T h[Tiles][2];
  Gates<Two> gates[Tiles];

  // Calls f(batch tile, 0 or 1, column) for those of the thread's cells whose column is one of the first `columns`.
  template <typename F>
  static __device__ __forceinline__ void for_each(const GroupWarp& warp, int columns, F f) {
#pragma unroll
    for (int n = 0; n < Tiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = n * kTileColumns + warp.column + j;
        if (column < columns) f(n, j, column);
      }
    }
  }

  // The index of the thread's first cell in outgoing_h.
  static __device__ __forceinline__ int place_of(const GroupWarp& warp) {
    return warp.column * kGroupUnits + warp.unit - warp.first_unit;
  }
  static __device__ __forceinline__ int offset(int n, int j) { return (n * kTileColumns + j) * kGroupUnits; }

  // Loads the states (B, hidden) before the first step: c, and h, which goes to `before` as the outgoing h(-1).
  __device__ __forceinline__ void load(const LaunchSizes& sizes, const ForwardLane<T>& lane, const GroupWarp& warp,
                                       const Sequences& sequences, int columns, T* before) {
    const int hidden = sizes.hidden;
#pragma unroll
    for (int n = 0; n < Tiles * 2; ++n) c[n / 2][n % 2] = 0, before[place_of(warp) + offset(n / 2, n % 2)] = T{0};
    for_each(warp, columns, [&](int n, int j, int column) {
      if (sizes.resets && sequences.reset_before(sizes, lane.reverse, 0, column)) return;
      const int64_t at = int64_t{sequences.first + column} * hidden + warp.unit;
      if (lane.h_0) before[place_of(warp) + offset(n, j)] = load_ordinary(lane.h_0 + at);
      if (lane.c_0) c[n][j] = widen(load_ordinary(lane.c_0 + at));
    });
  }

  // Reads back the outgoing h of the step before: columns that are not active keep it. A thread reads what it
  // wrote itself. (This way h takes no registers during the products.)
  __device__ __forceinline__ void recall(const GroupWarp& warp, const T* before) {
    before += place_of(warp);
#pragma unroll
    for (int n = 0; n < Tiles * 2; ++n) h[n / 2][n % 2] = before[offset(n / 2, n % 2)];
  }

  // Computes c and h of the first `active` columns from the pre-activations; all other columns keep theirs. h is also
  // written to `outgoing`.
  __device__ __forceinline__ void update(const GateSums<Tiles>& d, const GroupWarp& warp, int active, T* outgoing) {
    using Maths = EachOfTwo<ForwardMathsOf<T>>;
    outgoing += place_of(warp);
#pragma unroll
    for (int n = 0; n < Tiles; ++n) {
      const auto of = [&](int m, int first) { return Two{{d[n][m][first], d[n][m][first + 1]}}; };
      const Gates<Two> sums = {of(0, 0), of(0, 2), of(1, 0), of(1, 2)};
      Two next = {{c[n][0], c[n][1]}};
      const Two out = Cell::forward<Maths>(sums, next, gates[n]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const bool steps = n * kTileColumns + warp.column + j < active;
        c[n][j] = steps ? next.of[j] : c[n][j];
        h[n][j] = narrow<T>(steps ? out.of[j] : widen(h[n][j]));
        outgoing[offset(n, j)] = h[n][j];
      }
    }
  }

  // Writes h of a step, and what the lane saves, to memory: the first `active` columns, to the rows from `row` on.
  __device__ __forceinline__ void store(const LaunchSizes& sizes, const ForwardLane<T>& lane, const GroupWarp& warp,
                                        int64_t row, int active, int saves) const {
    T* to_h = lane.h + row * sizes.h_stride + warp.unit;
    const int64_t saved = row * sizes.saved_stride;
    for_each(warp, active, [&](int n, int j, int column) {
      stored(to_h + column * sizes.h_stride) = h[n][j];
      if (saves & kC) stored(lane.saved_c + (saved + column * sizes.saved_stride + warp.unit)) = c[n][j];
      if (saves & kGates) {
        float* to = lane.saved_gates + 4 * (saved + column * sizes.saved_stride) + warp.unit;
        stored(to) = gates[n].i.of[j];
        stored(to + sizes.saved_stride) = gates[n].f.of[j];
        stored(to + 2 * sizes.saved_stride) = gates[n].g.of[j];
        stored(to + 3 * sizes.saved_stride) = gates[n].o.of[j];
      }
    });
  }

  // Zeroes c of the columns that are reset behind this step.
  template <typename IsReset>
  __device__ __forceinline__ void reset(const GroupWarp& warp, IsReset is_reset) {
    for_each(warp, kTileColumns * Tiles, [&](int n, int j, int column) {
      if (is_reset(column)) c[n][j] = 0;
    });
  }

  // Writes the states after the last step, whose h is `outgoing`.
  __device__ __forceinline__ void store_last(const ForwardLane<T>& lane, const GroupWarp& warp,
                                             const Sequences& sequences, int columns, int hidden,
                                             const T* outgoing) const {
    for_each(warp, columns, [&](int n, int j, int column) {
      const int64_t at = int64_t{sequences.first + column} * hidden + warp.unit;
      if (lane.h_n) stored(lane.h_n + at) = outgoing[place_of(warp) + offset(n, j)];
      if (lane.c_n) stored(lane.c_n + at) = narrow<T>(c[n][j]);
    });
  }
};

// Writes h of the group's units as the lane above sees it. A thread takes neighbouring units of one column that share a
// quad of random words (philox.h). 8 units touch at most three quads.
template <typename T, int Tiles>
__device__ __forceinline__ void store_above(const ForwardArguments<T>& arguments, const ForwardLane<T>& lane,
                                            const ThreadPlace& place, const GroupWarp& warp, const Sequences& sequences,
                                            int64_t row, int t, int active, const T* outgoing) {
  const LaunchSizes& sizes = arguments.sizes;
  const int64_t first = lane.h_column + warp.first_unit;  // element of the layer's output
  const int before = static_cast<int>(first % 4);         // elements of the first quad that are before the group's
  for (int n = kept(place.warp_lane); n < kTileColumns * Tiles * 3; n += kWarpThreads) {
    const int column = n / 3, unit = n % 3 * 4 - before;  // the first of four units, counted in the group
    if (column >= active) break;
    float x[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (unit + i >= 0 && unit + i < kGroupUnits) x[i] = widen(outgoing[column * kGroupUnits + unit + i]);
    }
    if (lane.mask.seed) {
      const gates::CellSizes numbering = {sizes.hidden, sizes.h_stride, 0, 0};
      const gates::Element element = {int64_t{t} * sizes.batch, first + unit, lane.layer, lane.mask};
      gates::apply_mask(x, numbering, element, sequences.first + column, 0);
    }
    const int64_t at = (row + column) * sizes.h_stride + warp.first_unit + unit;
    const auto exists = [&](int i) {
      return unit + i >= 0 && unit + i < kGroupUnits && warp.first_unit + unit + i < sizes.hidden;
    };
    if (lane.residual) {
      // A lane below may have written it in this launch. It is part of x of this step, whose chunk the block has
      // acquired.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (exists(i)) x[i] += widen(load_l2(lane.residual + at + i));
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (exists(i)) stored(lane.above + at + i) = narrow<T>(x[i]);
    }
  }
}

// ---- The kernel -----------------------------------------------------------------------------------------------------

template <typename T, Product product, Exchange exchange, int Pieces, int Tiles>
__global__ void __launch_bounds__(kMaxWarps* kWarpThreads, 1)
    forward(const __grid_constant__ ForwardArguments<T> arguments) {
  static_assert(kProjectedTiles % Tiles == 0, "whole steps are projected together");
  const Cut& cut = arguments.cut;
  const LaunchSizes& sizes = arguments.sizes;
  const ThreadPlace place(arguments);
  const ForwardLane<T>& lane = arguments.lane[place.lane];
  const GroupWarp warp(cut, place);
  const Sequences sequences(sizes, place.copy);
  const ForwardShared<T> shared(ForwardLayout<T>(cut, lane.inputs));
  const int h_pitch = shared.layout.h_pitch;
  const int columns = warp.unit < sizes.hidden ? sequences.count : 0;  // in which the thread has cells
  Waiting waiting(arguments.watchdog, place);
  const ExchangeBase<T> base = {
      cut,     place,           waiting,         shared.h(),
      h_pitch, sequences.count, warp.first_unit, shared_address(shared.bytes + shared.layout.arrived)};
  const int64_t words = int64_t{2} * cut.columns() * forward_row_words<T>(cut);  // of a lane
  ExchangeOf<T, product, exchange, Pieces, Tiles> peers(
      base, arguments.words + (int64_t{place.copy} * sizes.lanes + place.lane) * words);
  bool has_reader = false;
  for (int n = 0; n < sizes.lanes; ++n) has_reader |= arguments.lane[n].below == place.lane;

  // The warp's part of W_hh, for the whole launch.
  Fragment weights[Pieces][2];
  const bool fits = quarters_fit(lane.weight_hh, sizes.hidden, sizes.hidden);
#pragma unroll
  for (int n = 0; n < Pieces; ++n) {
    load_gate_fragments<T, product>(weights[n], lane.weight_hh, sizes.hidden, sizes.hidden, warp.unit,
                                    warp.split * Pieces + n, place.warp_lane, fits);
  }
  Cells<T, Tiles> cells;
  if (warp.split == 0) {
    cells.load(sizes, lane, warp, sequences, columns, outgoing_h<T, Tiles>(cut, warp, shared, -1));
  }
  fill_shared<T, product>(arguments, lane, place, sequences, shared);
  peers.start();
  const int saves =
      in_register((lane.saved_c ? kC : 0) | (lane.saved_gates ? kGates : 0) | (lane.above ? kAbove : 0) |
                  (has_reader ? kChunks : 0) | (sizes.rows_before ? kRagged : 0) | (sizes.resets ? kResets : 0));
  // The row of column 0 at this step, and the distance to its row at the next step. In a ragged batch the row is computed
  // again every step; also in the one kernel whose weights leave no registers to keep it between the steps.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr bool kComputesRow = std::is_same_v<T, float16> && exchange == Exchange::l2 && Pieces == 8;
#else
  constexpr bool kComputesRow = false;
#endif
  int64_t row = sequences.row(time_of(sizes, lane.reverse, 0));
  const int row_step = kept(lane.reverse ? -sizes.batch : sizes.batch);
  Meeting<T, Tiles> meeting(cut, place, warp, shared);
  // Offsets in shared memory, in bytes: where the warp's part of h(s-1) begins for this thread (see multiply_own()),
  // and where the group's outgoing h(s) is.
  constexpr int kElement = static_cast<int>(sizeof(T));
  TwoAddresses h_at = {kElement * (own_column<product>(place.warp_lane) * h_pitch +
                                   warp.split * Pieces * kPieceElements<T> + place.warp_lane % 4 * kQuarter<T>),
                       kElement * kTileColumns * Tiles * h_pitch};
  constexpr int kOutgoing = kElement * kTileColumns * Tiles * kGroupUnits;
  TwoAddresses outgoing_at = {static_cast<int>(shared.layout.outgoing) + warp.group * kOutgoing,
                              cut.groups * kOutgoing};
  const int share = peers.share();

  int projected_from = 0, projected_to = 0;  // the steps that were projected last: the first, and one past the last
  for (int s = 0; s < sizes.steps; ++s, h_at.next(), outgoing_at.next(), meeting.next(), peers.next()) {
    if (s == projected_to) {
      const int in_chunk = s % cut.chunk_steps;
      // All threads of the block have written their h of the earlier steps, which publish_chunks releases next, and
      // have read the x that was projected before, which is overwritten next. At step 0: makes what each thread has
      // filled shared memory with visible to all threads.
      block_barrier();
      if (in_chunk == 0) {
        const int chunk = s / cut.chunk_steps;
        // The last warp publishes, since the first warp waits for the lane below.
        if ((saves & kChunks) && place.thread == static_cast<int>(blockDim.x) - 1)
          publish_chunks(arguments, place, chunk);
        if (lane.below >= 0) {
          await_chunks(arguments, place, waiting, lane.below, chunk + 1, s);
          block_barrier();  // makes the chunk of the lane below, which a few threads have acquired, visible to all
        }
      }
      int steps = kProjectedTiles / Tiles;
      if (steps > cut.chunk_steps - in_chunk) steps = cut.chunk_steps - in_chunk;
      if (steps > sizes.steps - s) steps = sizes.steps - s;
      project<T, product, Tiles>(arguments, lane, place, warp, sequences, shared, s, steps);
      projected_from = s, projected_to = s + steps;
    }

    const bool sends = s + 1 < sizes.steps;  // no block needs the last h: a push could meet a block that has exited
    if (sends) peers.expect(s);
    int active = columns, share_here = sends ? share : 0;
    // Bits of the resets behind this step, from bit 0 on. They are read from shared memory where they are needed, and so
    // take no registers: most calls have none.
    const auto resets = [&] {
      constexpr int kColumns = Tiles * kTileColumns;
      return *shared.resets() >> (s - projected_from) * kColumns & ~0u >> (32 - kColumns);
    };
    const auto is_reset = [&](int column) { return (resets() >> column & 1u) != 0; };
    if (saves & (kRagged | kResets)) {
      if (saves & kRagged) {
        const int t = time_of(sizes, lane.reverse, s);
        if constexpr (!kComputesRow) row = sequences.row(t);
        if (columns > 0) active = sequences.active(t);
      }
      if ((saves & kResets) && resets() != 0) share_here = ~share_here;
    }
    GateSums<Tiles> d;
    load_projected<T, Tiles>(d, place, shared, (s - projected_from) * Tiles);
    share_here = kept(share_here);
    peers.receive(s);
    multiply_own<T, product>(d, weights, reinterpret_cast<const T*>(shared.bytes + h_at.at), h_pitch, place.warp_lane);
    if (meeting.gathers()) {
      meeting.gather(d);
    } else if (warp.split > 0) {
      meeting.give(d);
      continue;
    }
    cells.recall(warp, reinterpret_cast<const T*>(shared.bytes + outgoing_at.at + outgoing_at.to_other));
    T* outgoing = reinterpret_cast<T*>(shared.bytes + outgoing_at.at);
    cells.update(d, warp, active, outgoing);
    // Makes the outgoing h(s) that each thread has written visible to all threads of the warp, which send it. With one
    // split there is no meeting: then this barrier also makes sure that all threads have read h(s-1) before the warp
    // sends h(s). h(s-2), over which h(s) is written, was read before the warp met here in the previous step.
    warp_barrier();
    peers.send(s, outgoing, share_here, is_reset);
    if constexpr (kComputesRow) row = sequences.row(time_of(sizes, lane.reverse, s));
    cells.store(sizes, lane, warp, row, active, saves);
    if (saves & (kAbove | kResets)) {
      if (saves & kAbove) {
        const int t = time_of(sizes, lane.reverse, s);
        store_above<T, Tiles>(arguments, lane, place, warp, sequences, row, t, sequences.active(t), outgoing);
      }
      if (saves & kResets) cells.reset(warp, is_reset);
    }
    // It is extended to 64 bits here, which takes no register between the steps.
    if constexpr (!kComputesRow) row += kept(row_step);
  }
  if (warp.split == 0) {
    cells.store_last(lane, warp, sequences, columns, sizes.hidden,
                     outgoing_h<T, Tiles>(cut, warp, shared, sizes.steps - 1));
  }
  block_barrier();  // all threads have written the last chunk's h, which publish_chunks releases
  if ((saves & kChunks) && place.thread == static_cast<int>(blockDim.x) - 1) {
    publish_chunks(arguments, place, (sizes.steps + cut.chunk_steps - 1) / cut.chunk_steps);
  }
  peers.finish();
}

// ---- Launch ---------------------------------------------------------------------------------------------------------

// Says why the kernel of this instance cannot take these arguments, or returns "".
template <typename T>
std::string forward_misfit(const ForwardArguments<T>& arguments, const Instance& instance) {
  const Cut& cut = arguments.cut;
  const LaunchSizes& s = arguments.sizes;
  const auto number = [](int64_t n) { return std::to_string(n); };
  if (!instance.runs(cut)) {
    return "it is compiled for " + number(instance.pieces) + " pieces and " + number(instance.batch_tiles) +
           " tiles, the cut has " + number(cut.pieces) + " and " + number(cut.batch_tiles) +
           ", or another product or exchange";
  }
  if (s.lanes < 1 || s.lanes > kMaxLanes) return number(s.lanes) + " lanes: a launch takes 1 to " + number(kMaxLanes);
  if (s.steps < 1 || cut.chunk_steps < 1) return "no steps, or chunks of none";
  if (s.packed && !s.rows_before) return "a packed batch without its rows";
  if (s.packed && s.resets) return "resets of a packed batch";
  if (s.batch < 1 || s.batch_groups < 1 || s.batch_groups > s.batch) {
    return number(s.batch_groups) + " groups of a batch of " + number(s.batch);
  }
  if (s.copies < 1 || s.first_batch_group < 0 || s.first_batch_group + s.copies > s.batch_groups) {
    return number(s.copies) + " batch groups from number " + number(s.first_batch_group) + " on, of " +
           number(s.batch_groups);
  }
  const int most = (s.batch + s.batch_groups - 1) / s.batch_groups;
  if (most > cut.columns()) return number(most) + " sequences of at most " + number(cut.columns());
  if (cut.groups < 1 || cut.splits < 1 || cut.groups * cut.splits > kMaxWarps) {
    return number(cut.groups) + " groups of " + number(cut.splits) + " warps: a block has at most " + number(kMaxWarps);
  }
  if (std::string error = blocks_misfit(cut); !error.empty()) return error;
  const int depth = cut.splits * cut.pieces * kPieceElements<T>;
  if (s.hidden < 1 || s.hidden > cut.units() || cut.units() > depth) {
    return "hidden " + number(s.hidden) + ", units " + number(cut.units()) + ", K " + number(depth) +
           " have to grow in this order";
  }
  if (cut.exchange == Exchange::l2 && !arguments.words) return "an exchange through L2 without words";
#if defined(STACKED_LSTM_WATCHDOG)
  if (!arguments.watchdog) return "a build with STACKED_LSTM_WATCHDOG, and no record for it";
#endif
  for (int n = 0; n < s.lanes; ++n) {
    const ForwardLane<T>& lane = arguments.lane[n];
    const std::string who = "lane " + number(n);
    if (lane.residual && !lane.above) return who + " adds its input to nothing";
    if (lane.inputs < 1) return who + " has " + number(lane.inputs) + " inputs";
    if (lane.below < -1 || lane.below >= n) {
      return who + " is above lane " + number(lane.below) + ": lanes stand in the order in which they feed each other";
    }
    if (lane.below < 0) continue;
    const ForwardLane<T>& below = arguments.lane[lane.below];
    if (!arguments.chunks_done) return who + " has to wait for another one, and there are no counters";
    if (lane.reverse != below.reverse) return who + " goes the other way round than the one below";
    const bool rows = lane.x_row_stride == s.h_stride && (s.packed || lane.x_step_stride == s.batch * s.h_stride);
    if (lane.x != (below.above ? below.above : below.h) || lane.inputs != s.hidden || !rows) {
      return who + "'s x is not what lane " + number(lane.below) + " writes";
    }
  }
  return "";
}

template <typename T>
LaunchConfig forward_config(const Cut& cut, int most_inputs, int blocks) {
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(blocks));
  config.block = dim3(static_cast<unsigned>(cut.groups * cut.splits * kWarpThreads));
  config.shared_bytes = forward_shared_bytes<T>(cut, most_inputs);
  if (cut.exchange == Exchange::cluster) config.cluster = static_cast<unsigned>(cut.blocks);
  config.co_resident = true;
  return config;
}

// Starts the kernel. All memory that the arguments point to must live until the stream has run it. The launch is
// refused, before anything runs, if not all of its blocks fit on the device at once.
template <typename T, Product product, Exchange exchange, int Pieces, int Tiles>
Outcome launch_forward(const ForwardArguments<T>& arguments, void* stream) {
  const std::string error = forward_misfit(arguments, {product, exchange, Tiles, Pieces, 0});
  if (!error.empty()) return {Outcome::failed, "the persistent forward kernel does not take this: " + error};
  const LaunchSizes& sizes = arguments.sizes;
  int most_inputs = 0;
  for (int n = 0; n < sizes.lanes; ++n) most_inputs = std::max(most_inputs, arguments.lane[n].inputs);
  LaunchConfig config =
      forward_config<T>(arguments.cut, most_inputs, sizes.copies * sizes.lanes * arguments.cut.blocks);
  config.stream = stream;
  return outcome_of(launch(config, &forward<T, product, exchange, Pieces, Tiles>, arguments));
}

// How many blocks of such a launch the current device holds at once; 0 if it cannot run the kernel at all.
template <typename T, Product product, Exchange exchange, int Pieces, int Tiles>
int64_t forward_capacity(const Cut& cut, int most_inputs, int /*hidden*/) {
  const LaunchConfig config = forward_config<T>(cut, most_inputs, cut.blocks);
  return static_cast<int64_t>(capacity(config, &forward<T, product, exchange, Pieces, Tiles>));
}

}  // namespace stacked_lstm::cuda::persistent
