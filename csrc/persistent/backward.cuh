// csrc/persistent/backward.cuh: the gradients of the gates of a stack of LSTM lanes, all time steps, in one launch.
//
//   step number s  →   last-1 … s+1    s   s-1 … first        A block owns some units of one lane. Its part of W_hhᵀ, all
//   lane above          ■──────■──────■──────■──              units of dh by its own gate rows, sits in registers. Inside a
//   lane                       ■──────■──────■──────■──       lane, partial sums of dh go to the block that owns the unit
//                                                             (─): half the bytes of gathering the dgates themselves.
//
// A step s:   receive the partial sums of dh(s) that all blocks have sent, and add them up in the order of the blocks   →
//             the cell's backward   →   dgates(s) to shared memory   →   barrier   →   times the block's part of W_hhᵀ   →   send
//             the partial sums of dh(s-1)   →   and only then write dgates(s) to memory, and load what step s-1 needs.
//
// dh from a lane above in the same launch: a block takes the gate rows of its own units in the lane above. For a chunk
// of steps at a time, it multiplies their dgates by its part of W_ihᵀ of the lane above, applies dropout's mask, and
// keeps these sums. The accumulators of dh(s-1) start from them. So one exchange adds up both, and a block waits for,
// and reads from, only the block of the same rank in the lane above.
//
// Where a sequence is reset before step s, its dgates(s) are zeros in shared memory, so that only the lane above adds to
// dh(s-1). Memory gets the true ones.
//
// Sums are sent in patches of 8 units by 8 columns of the batch: half of the units of a tile that a warp has
// multiplied. Rows r and r + 8 of a tile are the units 2r and 2r + 1, which are neighbours in the memory that weights
// are loaded from.
#pragma once

#include <algorithm>
#include <string>

#include "../cuda/launch.cuh"
#include "backward_lane.cuh"
#include "backward_sums.cuh"

namespace stacked_lstm::cuda::persistent {

// What a thread needs to know of its launch at every step, in one register.
enum Flags : int {
  kOver = 1,     // a lane of this launch is above this lane
  kReader = 2,   // a lane below in this launch reads this lane's dgates
  kUnusual = 4,  // settle_begun() or reset() has something to do
  kExtras = 8,   // prepare() has
  kReset = 16,   // the sequence of the thread's column is reset before this step
};

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

  // The next step's inputs, as they come from memory.
  float y_[kCells][4];      // activations, or pre-activations without the bias
  float c_before_[kCells];  // c(s-1)
  T grad_output_[kCells];
  float grad_above_[kCells];
  // From the step before in the order of the launch, s+1; active_ is of this step, s.
  float c_[kCells], dc_[kCells];
  bool was_active_, active_;
  // Of this step, known before dh is.
  Cell::Slopes<float> slope_[kCells];
  float incoming_[kCells];
  Packed grad_[kCells];  // dgates(s)

 public:
  __device__ __forceinline__ BackwardCells(const BackwardBlock<C>& block, const CellPlace<C>& cells)
      : block_(block), cells_(cells) {
    const LaunchSizes& sizes = block.sizes;
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
      // An earlier launch has done all steps of this sequence: its gradients go on to the next launch, or to the
      // caller.
      if (lane.reverse && !was_active_ && cells.column < block.sequences.count && last < sizes.steps &&
          cells.first_share) {
        settle(n, load_ordinary(lane.carried_h + state(n)), load_ordinary(lane.carried_c + state(n)));
      }
    }
  }

  // Starts to load what step s needs.
  __device__ __forceinline__ void prefetch(int s) {
    const LaunchSizes& sizes = block_.sizes;
    const BackwardLane<T>& lane = block_.lane;
    // Addresses are computed here, from these two, and take no registers between the steps.
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

  // Computes all of step s that does not need its dh. kExtras: if the bit is set, what few calls have is computed, too.
  __device__ __forceinline__ void prepare(int s, int flags) {
    const BackwardLane<T>& lane = block_.lane;
    const bool ends = active_ && !was_active_;  // step s is the sequence's last: it has no step s+1
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
        y = Cell::activate<MathsOf<T>>(y, c_before_[n], c_[n]);
      }
      slope_[n] = Cell::slopes<MathsOf<T>>(y, c_before_[n], c_[n]);
      if (lane.grad_above) {
        if (block_.lane.mask.seed) mask(block_.time(s), unit, grad_above_[n]);
        incoming_[n] = grad_above_[n];
      }
      if (lane.grad_output) incoming_[n] += widen(grad_output_[n]);
      if (ends && lane.grad_h_n) incoming_[n] += widen(load_ordinary(lane.grad_h_n + state(n)));
      if (ends) dc_[n] = lane.grad_c_n ? widen(load_ordinary(lane.grad_c_n + state(n))) : 0;
    }
    if (flags & kExtras) {
      if (lane.grad_cell) add_cell_gradients(s);
      if (flags & kReset) {
#pragma unroll
        for (int n = 0; n < kCells; ++n) slope_[n].f = 0;  // the step saw c(s-1) = 0
      }
    }
  }

  // When dh has come: computes dgates(s), writes them to shared memory for the products, and keeps them for store().
  __device__ __forceinline__ void update(const CellSums<C>& sums, T* grad_gates) {
#pragma unroll
    for (int n = 0; n < kCells; ++n) {
      if (!cells_.has(n)) continue;
      // If the sequence has no such step, or there is no such unit, all slopes are zero, and so are these gradients.
      const Gates<float> d = Cell::backward(slope_[n], incoming_[n] + sums[n], dc_[n]);
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

  // Call it after update(). If the sequence is reset before step s, zeroes what would go on to step s-1: dc, and dgates(s) in
  // shared memory, where only the lane's own product reads them. store() writes the true ones. Returns the flags with
  // kReset of step s-1: that is loaded here, long before prepare() needs it.
  __device__ __forceinline__ int reset(int s, T* grad_gates, int flags) {
    if (flags & kReset) {
#pragma unroll
      for (int n = 0; n < kCells; ++n) {
        if (!cells_.has(n)) continue;
        dc_[n] = 0;
        const int unit = cells_.unit_of(n) - block_.first_unit;
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          if (cells_.first_share)
            grad_gates[quarter_at<C>(cells_.column, unit / kQuarter<T>, gate) + unit % kQuarter<T>] = T{};
        }
      }
    }
    return s > 0 ? with_reset(s - 1, flags) : flags;
  }
  // The flags with kReset of step s.
  __device__ __forceinline__ int with_reset(int s, int flags) const {
    return block_.reset_before(s, cells_.column) ? flags | kReset : flags & ~kReset;
  }

  // A reverse lane's sequences have different first steps. If step s+1 was the sequence's first step, the current dh
  // and dc are the final gradients of its initial state. Call this before update(), which multiplies dc by 0 at a step
  // that the sequence does not have.
  __device__ __forceinline__ void settle_begun(const CellSums<C>& sums) {
    if (active_ || !was_active_) return;
#pragma unroll
    for (int n = 0; n < kCells; ++n) {
      if (exists(n)) settle(n, sums[n], dc_[n]);
    }
  }

  // Writes dgates(s) to memory, and goes on to the next step.
  __device__ __forceinline__ void store(int s) {
    const LaunchSizes& sizes = block_.sizes;
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

  // After the launch's last step. `sums`: dh of the state before it, if the caller wants that.
  __device__ __forceinline__ void finish(const CellSums<C>& sums) {
    const BackwardLane<T>& lane = block_.lane;
    if (!was_active_) return;
#pragma unroll
    for (int n = 0; n < kCells; ++n) {
      if (!exists(n)) continue;
      if (block_.sizes.first_step == 0) {
        settle(n, sums[n], dc_[n]);
      } else if (cells_.first_share) {
        stored(lane.carry_c + state(n)) = dc_[n];  // the next launch computes dh again, from dgates
      }
    }
  }

 private:
  __device__ __forceinline__ bool exists(int n) const {
    return cells_.has(n) && cells_.unit_of(n) < block_.sizes.hidden;
  }
  // Index of the n-th cell in (B, H), which takes no register between the steps.
  __device__ __forceinline__ int64_t state(int n) const {
    const int column = kept(cells_.column), unit = kept(cells_.unit);
    return int64_t{block_.sequences.first + column} * block_.sizes.hidden + unit + n * CellPlace<C>::kUnitStep;
  }

  // Writes the gradients of the state before a sequence's first step: in the last launch to the caller, in other
  // launches for the next launch.
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

  // Adds the caller's gradients of c after step s. They are loaded only here, and so take no registers between the steps: most
  // calls have none.
  __device__ __forceinline__ void add_cell_gradients(int s) {
    if (!active_) return;
    const int column = kept(cells_.column), unit = kept(cells_.unit);
    const int64_t row = block_.sequences.row(block_.time(s)) + column;
    const T* from = block_.lane.grad_cell + row * block_.sizes.h_stride + unit;
    T x[kCells];
#pragma unroll
    for (int n = 0; n < kCells; ++n) x[n] = exists(n) ? load_streaming(from + n * CellPlace<C>::kUnitStep) : T{};
#pragma unroll
    for (int n = 0; n < kCells; ++n) dc_[n] += widen(x[n]);
  }

  __device__ __forceinline__ void mask(int time, int unit, float& x) const {
    const LaunchSizes& s = block_.sizes;
    const gates::CellSizes sizes = {s.hidden, s.h_stride, s.saved_stride, s.gates_stride};
    float one[1] = {x};
    const gates::Element element = {int64_t{time} * s.batch, block_.lane.h_column, block_.lane.layer, block_.lane.mask};
    gates::apply_mask(one, sizes, element, block_.sequences.first + cells_.column, unit);
    x = one[0];
  }
};

// ---- The kernel -----------------------------------------------------------------------------------------------------

// The warp's fragments of W_hhᵀ, for the whole launch.
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

  // Sends the block's partial sums of dh: the sums of its dgates, which start from `from_above` (null: from zero).
  template <class SumsPolicy>
  __device__ __forceinline__ void multiply_and_send(const BackwardBlock<C>& block, const typename C::T* grad_gates,
                                                    const float4* from_above, SumsPolicy& sums, uint32_t number) const {
    using T = typename C::T;
    const int warp_lane = block.place.warp_lane;
    const T* first = first_quarter<C>(grad_gates, warp_lane);
    // For exact products the loop is not unrolled: otherwise the compiler would load columns of the next tile long
    // before they are needed.
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
          sums.send(number, part * C::kAtOnce + m, n, d[0][m]);
        }
      }
    }
  }
};

template <typename T, Product product, Exchange exchange, int MTiles, int Pieces, int Tiles>
__global__ void __launch_bounds__(kMaxWarps* kWarpThreads, 1)
    backward(const __grid_constant__ BackwardArguments<T> arguments) {
  using C = CompiledBackward<T, product, exchange, MTiles, Pieces, Tiles>;
  const ThreadPlace place(arguments);
  const BackwardBlock<C> block(arguments, place);
  const LaunchSizes& sizes = arguments.sizes;
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
      // Only the thread that writes this reads it: no barrier is needed.
      const Fragment f = load_transposed<C>(lane.weight_ih_above, sizes.hidden, block.first_unit,
                                            tile_of(n / Pieces, place.warp), n % Pieces, place.warp_lane, fits);
      shared.weights[2 * n * C::kThreads + place.thread] = f.upper;
      shared.weights[(2 * n + 1) * C::kThreads + place.thread] = f.lower;
    }
  }
  bool has_reader = false;  // a lane below in this launch reads this lane's dgates
  for (int n = 0; n < sizes.lanes; ++n) has_reader |= arguments.lane[n].over == place.lane;
  const bool begins_late = lane.reverse && block.ragged();  // some sequences do
  int flags =
      in_register((lane.over >= 0 ? kOver : 0) | (has_reader ? kReader : 0) |
                  (begins_late || sizes.resets ? kUnusual : 0) | (lane.grad_cell || sizes.resets ? kExtras : 0));
  const auto over = [&] { return (flags & kOver) != 0; };
  const auto read = [&] { return (flags & kReader) != 0; };

  const int last = sizes.last_step, first = sizes.first_step, chunk_steps = arguments.cut.chunk_steps;
  constexpr int kStepGates = C::kColumns * C::kPitch;              // elements of dgates of a step
  constexpr int kStepSums = C::kTiles * C::kMTiles * C::kThreads;  // float4

  // Computes the sums from the lane above for chunk number `chunk` of this launch.
  const auto project_chunk = [&](int chunk, int step) {
    const int begin = last - 1 - chunk * chunk_steps,
              steps = begin - first + 1 < chunk_steps ? begin - first + 1 : chunk_steps;
    // The acquire makes the dgates that the block above had written before visible to warp lane 0.
    if (place.warp_lane == 0) await_chunk(arguments, place, waiting, lane.over, place.rank, chunk + 1, step);
    warp_barrier();  // makes them visible to the other warp lanes, which copy them next
    // Hazard: the copies overwrite the previous chunk. All warps have multiplied it: a block barrier has passed since.
    for (int n = 0; n < steps; ++n) {
      copy_dgates<true>(block, arguments.lane[lane.over].grad_gates, begin - n, shared.above + n * kStepGates);
    }
    finish_copies(block, steps, shared.above);
    block_barrier();  // makes what each thread has copied visible to all
    project(block, shared, begin, steps);
  };
  // The values that the accumulators of dh(s) start from.
  const auto from_above = [&](int s) -> const float4* {
    return over() ? shared.from_above + (last - 1 - s) % chunk_steps * kStepSums : nullptr;
  };

  // Step s-1 will send dh(s-2). If step s-2 begins a chunk, computes the chunk's sums from above. They overwrite those
  // of the previous chunk, all of which have been sent.
  const auto project_next = [&](int s) {
    const int done = last - 1 - (s - 2);  // steps that this launch takes before s-2
    if (s - 2 >= first && done % chunk_steps == 0) project_chunk(done / chunk_steps, s);
  };

  uint32_t number = 0;  // of the next exchange to be received
  // dh(last-1) has an exchange of its own if anything comes from above, or from step `last` of an earlier launch. The
  // earlier launch stored the dgates of step `last`. This launch computes their product again, so that the sums are
  // bitwise equal to those of a single launch.
  const bool resumes = last < sizes.steps;
  if (over()) project_chunk(0, last);
  if (over() || resumes) {
    T* grad_gates = shared.grad_gates + last % 2 * kStepGates;
    copy_dgates<false>(block, lane.grad_gates, last, grad_gates);
    sums_of.expect(0);
    block_barrier();  // makes dgates(last), of which each thread has copied some, visible to all
    waiting.agree();
    weights.multiply_and_send(block, grad_gates, from_above(last - 1), sums_of, 0);
    if (over()) project_next(last);
  }
  cells.prefetch(last - 1);
  if (sizes.resets) flags = cells.with_reset(last - 1, flags);

  for (int s = last - 1; s >= first; --s) {
    // Hazard: every exchange that is sent has to be received. So dh(first-1) is sent only if grad_h_0 is wanted.
    const bool receives = s + 1 < last || over() || resumes, sends = s > first || (s == 0 && lane.grad_h_0);
    CellSums<C> sums = {};
    if (sends) sums_of.expect(number + receives);
    cells.prepare(s, flags);
    if (receives) sums_of.receive(number++, cell_place, sums, s);
    T* grad_gates = shared.grad_gates + s % 2 * kStepGates;
    // Two copies of update(), so that other calls have one branch here, and not two.
    if (flags & kUnusual) {
      if (lane.reverse && block.ragged()) cells.settle_begun(sums);
      cells.update(sums, grad_gates);
      if (sizes.resets) flags = cells.reset(s, grad_gates, flags);
    } else {
      cells.update(sums, grad_gates);
    }
    // Makes the dgates(s) that each thread has written to shared memory visible to all threads. Also: all threads have
    // read the sums of dh(s), so this block may send its sums of dh(s-1), after which its peers may write over those of
    // dh(s). And all threads have written dgates(s+1) to memory, which publish_chunks releases.
    //
    // Hazard: dgates have two places. A thread that is past this barrier may write dgates(s-1) while other warps
    // multiply dgates(s). dgates(s-2), which overwrite dgates(s), are written behind the next barrier, which all warps
    // reach after they have multiplied dgates(s).
    block_barrier();
    waiting.agree();
    if (sends) {
      weights.multiply_and_send(block, grad_gates, s > first ? from_above(s - 1) : nullptr, sums_of, number);
    }
    cells.store(s);
    const int done = last - 1 - s;  // steps whose dgates all threads had written before the barrier
    // A thread of the last warp publishes: a release takes time, and this warp has the fewest tiles.
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
    block_barrier();  // all threads have written the last dgates, which publish_chunks releases
    if (place.thread == 0) publish_chunks(arguments, place, (last - first + chunk_steps - 1) / chunk_steps);
  }
  sums_of.finish();
}

// ---- Launch ---------------------------------------------------------------------------------------------------------

// Says why a kernel with this cut cannot take these arguments, or returns "".
template <class C>
std::string backward_misfit(const BackwardArguments<typename C::T>& arguments) {
  const Cut& cut = arguments.cut;
  const LaunchSizes& s = arguments.sizes;
  const auto number = [](int64_t n) { return std::to_string(n); };
  const Instance instance = {C::kProduct, C::kExchange, C::kTiles, C::kPieces, C::kMTiles};
  if (!instance.runs(cut) || cut.groups != C::kGroups) return "it was compiled for another cut";
  if (s.lanes < 1 || s.lanes > kMaxLanes) return number(s.lanes) + " lanes: a launch takes 1 to " + number(kMaxLanes);
  if (s.first_step < 0 || s.first_step >= s.last_step || s.last_step > s.steps || cut.chunk_steps < 1) {
    return "steps " + number(s.first_step) + " to " + number(s.last_step) + " of " + number(s.steps) +
           ", in chunks of " + number(cut.chunk_steps);
  }
  if (s.packed && !s.rows_before) return "a packed batch without its rows";
  if (s.packed && s.resets) return "resets of a packed batch";
  if (std::string error = blocks_misfit(cut); !error.empty()) return error;
  const int most_units = kMaxWarps * C::kMTiles * 16;
  if (s.hidden < 1 || s.hidden > cut.units() || cut.units() > most_units) {
    return "hidden " + number(s.hidden) + ", units " + number(cut.units()) + ", rows of weights " + number(most_units) +
           " have to grow in this order";
  }
  if (s.copies < 1 || s.first_batch_group < 0 || s.first_batch_group + s.copies > s.batch_groups) {
    return "batch groups " + number(s.first_batch_group) + " to " + number(int64_t{s.first_batch_group} + s.copies) +
           " of " + number(s.batch_groups);
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
    const bool keeps_h = lane.reverse && s.rows_before;
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

// The configuration of such a launch of `blocks` blocks.
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

// Starts the kernel. The launch is refused, before anything runs, if not all of its blocks fit on the device at once.
template <typename T, Product product, Exchange exchange, int MTiles, int Pieces, int Tiles>
Outcome launch_backward(const BackwardArguments<T>& arguments, void* stream) {
  using C = CompiledBackward<T, product, exchange, MTiles, Pieces, Tiles>;
  const std::string error = backward_misfit<C>(arguments);
  if (!error.empty()) return {Outcome::failed, "the persistent kernel does not take this: " + error};
  const LaunchSizes& sizes = arguments.sizes;
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
  using C = CompiledBackward<T, product, exchange, MTiles, Pieces, Tiles>;
  return static_cast<int64_t>(
      capacity(backward_config<C>(cut, cut.blocks, over), &backward<T, product, exchange, MTiles, Pieces, Tiles>));
}

}  // namespace stacked_lstm::cuda::persistent
