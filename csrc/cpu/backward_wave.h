// csrc/cpu/backward_wave.h: the reverse wavefront on the CPU: its memory, and what a worker does in a lane. The lane's
// backward is in backward.cpp, the weight gradients in weight_gradients.cpp.
//
// A worker takes its positions in turn, from the top layer down. In each position it takes the chunks from the last to
// the first:
//   1. wait for the chunk of the layer above, and copy dL/dh: the sum of that layer's input gradients over its
//      directions, through the link between the two layers, and the caller's gradient of h;
//   2. for each step, from the last to the first: compute dG(s+1)·W_hh and the cell's derivative, and hand dG(s) over
//      to the other unit slices (with a projection: hand dh over first, then compute dh·W_hr);
//   3. compute the gradient of the layer's input, dG·W_ih of the whole chunk, in one product; publish the chunk;
//   4. compute the weight gradients, dGᵀ·[x, h_prev], of the gradient blocks that are complete now. All workers of the
//      lane meet for this and share out the gate rows. Layers side by side lose no time by it: each layer pauses a
//      chunk after the layer above.
//
//     steps, from right to left          A gradient block is whole steps with at most kGradientRows rows together, or
//   ┄┄┬───────┬──────────┬┄┄┄┄┄┄┄┄┄┄     one step. These blocks depend on the call's shape alone. So do the bits of
//     │ chunk │ gradient │ gradient      the weight gradients, which add up their sums from the last one to the first.
//     │       │ block    │ blocks that   A ring holds the rows of dG (with a projection, of dh and o·tanh(c) too): as
//     │       │          │ are summed    many rows as a gradient block and a chunk have. If it can hold all rows of the
//   ┄┄┴───────┴──────────┴┄┄┄┄┄┄┄┄┄┄     call, the workers meet only at the end.
//
// Recomputation. A stretch is consecutive steps, which start after a kept c, or at step 0. When a worker comes to the last
// step of a stretch, it first recomputes what was not kept (reserve.h) of all steps of the stretch: the sums of the gates,
// by two products of x and h, and then gates and c by the cell, step after step forward. It waits for no other worker,
// because all x and h are known. The length of a stretch changes no bit: the gates of a row depend on no other row, and
// every kept c is used as it is.
//
// Hazards.
//   dG(s) overwrites the rows that are a ring's length back. The products of a gradient block's chunks and the sums
//   over the gradient block read its rows. Both are done once every worker of the lane has published the gradient block
//   (Progress::gradient_blocks), with one exception: the rows of its first step are read once more by the step before
//   it, which belongs to the next gradient block. So make_room() counts these rows as rows of the next one. (Unit
//   slices are never more than a step apart. Batch slices can be, and in a packed batch the rows of one batch slice
//   overwrite rows of another.)
//   A worker that waits for room waits neither for itself nor for a worker that waits for it. The ring holds a gradient
//   block and a chunk, so the gradient block that it waits for was complete at the end of an earlier chunk. This worker
//   has published it, and the other workers need no more of this worker than that earlier chunk to publish it too.
//   There are set_count_ sets of a ring, packed weights and states. The lane at position p uses the set of the lane at
//   position p - set_count_ again. It starts only when every worker is done with that lane (Progress::done).
//   The layers share one buffer of input gradients. A unit slice overwrites chunk c of the layer above only after all
//   unit slices have handed over all steps of the chunk. By then they have copied the old contents, and no other worker
//   reads them. Bidirectional layers alternate between two buffers a direction, because each direction reads all that
//   both directions of the layer above have left.
#pragma once

#include "../stack/state_layout.h"
#include "wave.h"

namespace stacked_lstm::cpu {

template <typename T>
class BackwardWave : Wave<T> {
  using Base = Wave<T>;
  using Base::shape_, Base::kernels_, Base::team_, Base::schedule_, Base::storage_;

  // A stretch has at most this many intervals between kept c's, because a worker that waits for one step of a stretch
  // waits until the whole stretch is recomputed.
  static constexpr int64_t kMostIntervals = 4;

 public:
  BackwardWave(const BackwardCall<T>& call, const Workers& workers, Platform& platform)
      : Base(call.shape, storage_of(call), workers, platform, true),
        call_(call),
        platform_(platform),
        reserve_(const_cast<T*>(call.reserve), call.shape, call.keeping),
        states_(call.shape),
        width_(recurrent_width(call.shape.batch)),
        recompute_(call.keeping.saving == Saving::recompute),
        stretch_rows_(recompute_ ? stretch_rows() : 0),
        product_rows_(std::max(this->chunk_rows_, stretch_rows_)),
        copied_rows_(std::max<int64_t>(product_rows_, kGradientRows<T>)) {
    widest_ = round_up(std::max({this->widest_input_, this->widest_output_, this->widest_hidden_}), kUnitPadding * 4);
    for (int64_t k = 1; k < shape_.depth(); ++k) widest_below_ = std::max(widest_below_, shape_.layers[k].input);
    const int64_t batch = std::max<int64_t>(shape_.batch, 1);
    const int64_t gradient_block_rows =
        shape_.packed() ? std::max(kGradientRows<T>, batch) : gradient_block_steps() * batch;
    ring_rows_ = std::min(std::max<int64_t>(shape_.rows(), 1), gradient_block_rows + this->chunk_rows_);
    int64_t layer_groups = 1;  // each works on one lane at a time
    for (int64_t p = 0; p < schedule_.phases; ++p) {
      layer_groups = std::max(layer_groups, schedule_.phase[p].layer_groups);
    }
    // Without recomputation there is one set more, for the lane that a layer group is just finishing: its first
    // worker can go on to the next lane. This costs memory and saves one wait per lane.
    set_count_ = std::min({this->workers_, this->lane_count_, recompute_ ? layer_groups : layer_groups + 1});
    memory_->lay_out([&] { take_memory(); });
  }

  Schedule run() {
    Base::run(platform_, [&](int64_t worker) {
      schedule_.for_each_position(shape_.directions, worker, [&](int64_t position, const WorkerPlace& place) {
        LaneRun(*this, position, place, scratch_[static_cast<size_t>(worker)]).run();
      });
    });
    return schedule_;
  }

 private:
  struct LaneBuffers {                        // what a lane works with
    void *weight_ih, *weight_hh, *weight_hr;  // packed for backward, by pack_columns
    void *gates_ih, *gates_hh;                // packed for forward, by pack_gates; only with recomputation
    T* bias;
    T* dc;      // [sequence][padded_hidden]
    T* c_0;     // likewise, padded with zeros
    T* dgates;  // a ring of rows
    T* dh;      // likewise, only with a projection: dL/dh
    T* hidden;  // likewise, only with a projection: its input
  };
  struct Scratch {
    T* copied;       // x or h of a chunk, or of a gradient block
    T* dy;           // of a chunk: dL/dh from above, and later dG·W_ih
    T* large;        // scratch of GradientProduct
    T* dh;           // of a step
    T *gates, *c;    // of a stretch, [row][4·padded_hidden] and [row][padded_hidden]; only with recomputation
    void* operands;  // of any product
    T* zeros;        // a state that was reset; only where sequences are
  };
  struct Rows {
    T* data;
    int64_t stride;
  };

  int64_t lane_of(int64_t position) const { return lane_at(position, this->lane_count_, true); }
  // Steps of a gradient block, if every step has the whole batch.
  int64_t gradient_block_steps() const {
    return std::max<int64_t>(kGradientRows<T> / std::max<int64_t>(shape_.batch, 1), 1);
  }
  bool ring_holds_all() const { return ring_rows_ >= shape_.rows(); }
  // The most rows of a stretch: enough for products at full rate and few enough to stay in a near cache, but at least
  // the rows of the whole batch from one kept c to the next.
  int64_t stretch_rows() const {
    constexpr int64_t kRows = 128;
    const int64_t least = kCheckpointSteps * shape_.batch;
    return std::min(std::max(kRows, least), std::min(kMostIntervals * least, shape_.rows()));
  }
  // Steps of a stretch with this many sequences.
  int64_t stretch_steps(int64_t sequences) const {
    const int64_t least = kCheckpointSteps * std::max<int64_t>(sequences, 1);
    return std::clamp<int64_t>(stretch_rows_ / least, 1, kMostIntervals) * kCheckpointSteps;
  }
  // Where the rows of time t begin in the ring. The rows of one step are consecutive. In a packed batch they may reach
  // past the ring's end, where take_set() leaves room for them. Steps that are in the ring at the same time never
  // overlap.
  int64_t ring_row_of(int64_t t) const { return shape_.first_row(t) % ring_rows_; }

  // Columns of dG·W_hh, padding included.
  static int64_t recurrent_columns(const LayerShape& layer) {
    return layer.projection > 0 ? layer.projection : layer.padded_hidden();
  }

  void take_memory() {
    sets_.clear();
    for (int64_t n = 0; n < set_count_; ++n) sets_.push_back(take_set());
    for (int64_t n = 0; n < std::min(shape_.depth() - 1, shape_.directions); ++n) {
      for (int64_t d = 0; d < shape_.directions; ++d) passing_[n][d] = memory_->take<T>(shape_.rows() * widest_below_);
    }
    scratch_.clear();
    for (int64_t worker = 0; worker < this->workers_; ++worker) {
      const int64_t ld = widest_ + kRowPadding;
      const int64_t cells = stretch_rows_ * this->widest_hidden_;
      scratch_.push_back(
          {memory_->take<T>(copied_rows_ * ld), memory_->take<T>(this->chunk_rows_ * ld),
           memory_->take<T>(call_.gradients.empty() ? 0 : kGradientScratch<T>), memory_->take<T>(shape_.batch * ld),
           memory_->take<T>(cells * 4), memory_->take<T>(cells),
           this->take_operands(memory_, product_rows_, std::max(4 * this->widest_hidden_, widest_), storage_),
           memory_->take<T>(call_.resets.empty() ? 0 : widest_)});
    }
  }

  // A set that is large enough for any lane.
  LaneBuffers take_set() {
    int64_t ih = 0, hh = 0, hr = 0, input = 0, output = 0;
    bool projects = false;
    for (const LayerShape& layer : shape_.layers) {
      const int64_t inner = 4 * layer.padded_hidden();
      const auto elements = [&](int64_t columns, int64_t rows) { return columns * stored_rows(storage_, rows); };
      ih = std::max(ih, elements(this->padded_columns(layer.input, kWidth), inner));
      hh = std::max(hh, elements(this->padded_columns(recurrent_columns(layer), width_), inner));
      hr = std::max(hr, elements(this->padded_columns(layer.padded_hidden(), kWidth), layer.projection));
      input = std::max(input, elements(inner, layer.input)), output = std::max(output, elements(inner, layer.output()));
      projects = projects || layer.projection > 0;
    }
    LaneBuffers buffers{};
    const auto panels = [&](int64_t elements) { return this->take_panels(memory_, elements, storage_); };
    buffers.weight_ih = panels(ih), buffers.weight_hh = panels(hh);
    if (projects) buffers.weight_hr = panels(hr);
    if (recompute_) {
      buffers.gates_ih = panels(input), buffers.gates_hh = panels(output);
      buffers.bias = memory_->take<T>(4 * this->widest_hidden_);
    }
    buffers.dc = memory_->take<T>(shape_.batch * this->widest_hidden_);
    buffers.c_0 = memory_->take<T>(shape_.batch * this->widest_hidden_);
    const int64_t rows = ring_rows_ + (shape_.packed() ? shape_.batch : 0);  // see ring_row_of
    buffers.dgates = memory_->take<T>(rows * (4 * this->widest_hidden_ + kRowPadding));
    if (projects) {
      buffers.dh = memory_->take<T>(rows * (this->widest_output_ + kRowPadding));
      buffers.hidden = memory_->take<T>(rows * this->widest_hidden_);
    }
    return buffers;
  }

  // h of a layer, as forward left it.
  LayerRows<const T> output_of(int64_t layer) const {
    const bool top = layer + 1 == shape_.depth();
    if (!call_.keeping.keep_top && (shape_.link == LinkKind::skip || (top && !adds_input(shape_, layer)))) {
      return {call_.output + output_column(shape_, layer), shape_.output_width(), true};
    }
    return {reserve_.h(layer), shape_.directions * shape_.layers[static_cast<size_t>(layer)].output()};
  }
  // What a layer read of the layer below.
  LayerRows<const T> below(int64_t layer) const {
    if (layer == 0) return {};
    if (!adds_input(shape_, layer - 1)) return output_of(layer - 1);
    return {reserve_.input(layer), shape_.layers[static_cast<size_t>(layer)].input};
  }
  // The caller's gradients of a layer's h or c of all steps; data is null if there are none.
  static Input<T> gradients_of(const std::vector<Input<T>>& layers, int64_t layer) {
    return layers.empty() ? Input<T>{} : layers[static_cast<size_t>(layer)];
  }
  // Where one direction of a layer writes the gradient of its input; of a layer above the lowest, of what it read of the layer
  // below.
  Rows input_gradient(int64_t layer, int64_t direction) const {
    if (layer == 0) return {call_.grad_input[direction], shape_.layers[0].input};
    return {passing_[(layer - 1) % shape_.directions][direction], widest_below_};
  }

  // One worker's part in one lane.
  class LaneRun {
   public:
    LaneRun(BackwardWave& wave, int64_t position, const WorkerPlace& place, const Scratch& scratch)
        : w_(wave),
          position_(position),
          place_(place),
          scratch_(scratch),
          index_(wave.lane_of(position)),
          layer_index_(index_ / wave.shape_.directions),
          direction_(index_ % wave.shape_.directions),
          layer_(wave.shape_.layers[layer_index_]),
          buffers_(wave.sets_[static_cast<size_t>(position % wave.set_count_)]),
          sequences_(wave.sequences(place)),
          hidden_(layer_.hidden),
          padded_(layer_.padded_hidden()),
          out_(layer_.output()),
          h_at_(wave.states_.h(index_)),
          c_at_(wave.states_.c(index_)),
          projects_(layer_.projection > 0),
          lddg_(4 * padded_ + kRowPadding),
          ld_(wave.widest_ + kRowPadding),
          unit_blocks_(wave.own_unit_blocks(position, place, padded_)),
          units_{std::min(unit_blocks_.first * vector_elements(), hidden_),
                 std::min(unit_blocks_.last * vector_elements(), hidden_)},
          dh_panels_(recurrent_panels()),
          columns_(projects_ ? wave.columns_of(dh_panels_, wave.width_, out_) : units_),
          padded_end_(projects_ ? columns_.last : unit_blocks_.last * vector_elements()),
          lddr_(out_ + kRowPadding),
          ldm_(padded_),
          progress_(wave.own(position, place)),
          stretch_{wave.shape_.steps, wave.shape_.steps},
          gradient_block_(gradient_block_before(wave.shape_.steps)),
          oldest_(gradient_block_) {}

    void run();

   private:
    int64_t vector_elements() const { return w_.kernels_.vector_elements; }
    int64_t time(int64_t s) const { return w_.shape_.time(index_, s); }
    int64_t rows_at(int64_t s) const { return w_.rows_at(index_, sequences_, s); }
    // First local row of step s, in the call and in the ring.
    int64_t row_at(int64_t s) const { return w_.shape_.first_row(time(s)) + sequences_.first; }
    int64_t ring_row_at(int64_t s) const { return w_.ring_row_of(time(s)) + sequences_.first; }
    // Local rows of steps first … last-1.
    int64_t rows_between(int64_t first, int64_t last) const {
      if (!w_.shape_.packed()) return (last - first) * sequences_.size();
      int64_t rows = 0;
      for (int64_t s = first; s < last; ++s) rows += rows_at(s);
      return rows;
    }
    int64_t active_at(int64_t s) const { return s < w_.shape_.steps ? w_.shape_.active(time(s)) : 0; }

    // Own panels of dG·W_hh. Its columns are the own units or, with a projection, an own share of the projected
    // columns.
    Range recurrent_panels() const {
      return projects_ ? w_.own_panels(position_, place_, out_, w_.width_) : unit_panels(w_.width_);
    }
    Range unit_panels(int64_t width) const {
      if (unit_blocks_.size() == 0) return {0, 0};  // a narrow layer may have no units for this worker
      return {unit_blocks_.first / width, (unit_blocks_.last + width - 1) / width};
    }

    void pack();

    // Sets dc of every sequence to the gradient of c_n, where backward starts the sequence; and copies c_0.
    void start();

    // Copies dL/dh of a chunk, own columns, from the loss or the layer above. Padding is zero.
    void copy_dy(const Range& steps);

    // The gates of step s, and c after it: from the reserve if they were kept, else from the stretch.
    const T* gates_of(int64_t s) const {
      if (const T* kept = w_.reserve_.gates(index_, s)) return kept + sequences_.first * 4 * padded_;
      return scratch_.gates + rows_between(stretch_.first, s) * 4 * padded_;
    }
    const T* c_after(int64_t s) const {
      if (const T* kept = w_.reserve_.c(index_, s)) return kept + sequences_.first * padded_;
      return scratch_.c + rows_between(stretch_.first, s) * padded_;
    }
    // Calls f(row, rows, c) for the rows of step s; c is their state before the step. Sequences that start at step s
    // have it from c_0.
    // Where a sequence is reset before step s, c is zero.
    template <typename F>
    void with_c_before(int64_t s, F&& f) const {
      const int64_t n = rows_at(s), before = std::min(rows_at(s - 1), n);
      const auto rows_from = [&](int64_t row, int64_t last, const T* c) {
        for (const int64_t b : resets_before(s).within(sequences_.first + row, sequences_.first + last)) {
          const int64_t reset = b - sequences_.first;
          if (row < reset) f(row, reset - row, c);
          f(reset, 1, static_cast<const T*>(scratch_.zeros));
          c += (reset + 1 - row) * padded_, row = reset + 1;
        }
        if (row < last) f(row, last - row, c);
      };
      if (before > 0) rows_from(0, before, c_after(s - 1));
      if (before < n) rows_from(before, n, buffers_.c_0 + (sequences_.first + before) * padded_);
    }

    // The sequences that are reset before step s.
    ResetLists::List resets_before(int64_t s) const {
      const int64_t all = w_.shape_.steps;
      return s < 0 || s >= all ? ResetLists::List{} : w_.call_.resets.at(boundary_before(w_.shape_, index_, time(s)));
    }
    ResetLists::List own_resets_before(int64_t s) const {
      return resets_before(s).within(sequences_.first, sequences_.last);
    }

    // Recomputes the stretch whose last step is s.
    void recompute(int64_t s);

    // Recomputes W_ih·x + W_hh·h + b of `steps`, the first steps of the stretch, from h of this layer and of the layer below.
    void recompute_sums(const Range& steps);

    int64_t copy_x(const Range& steps, T* out, int64_t ldo) const {
      return w_.copy_input(w_.call_.input, w_.call_.links, w_.below(layer_index_), index_, sequences_, steps, out, ldo);
    }
    // Copies, for each row of `steps`, h of the step before; h_0 where the sequence starts, zeros where it is reset.
    int64_t copy_h_before(const Range& sequences, const Range& steps, T* out, int64_t ldo) const {
      const StackShape& shape = w_.shape_;
      const LayerRows<const T> h = w_.output_of(layer_index_);
      const int64_t back = direction_ ? 1 : -1;
      return w_.copy_rows(
          index_, sequences, steps, out_,
          [&](int64_t t, int64_t b) {
            const int64_t before = t + back;
            if (w_.call_.resets.at(boundary_before(shape, index_, t)).has(b))
              return static_cast<const T*>(scratch_.zeros);
            const bool first = before < 0 || before >= shape.steps || b >= shape.active(before);
            return first ? w_.call_.h_0 + h_at_ + b * out_ : h.row(shape, before, b) + direction_ * out_;
          },
          out, ldo);
    }

    // Computes the gradient of h(s) that comes from step s+1, for the rows of step s+1, into scratch.dh. Rows that only
    // step s+1 has belong to sequences that start with step s+1: their dh and dc are the gradients of h_0 and c_0. Rows
    // that only step s has belong to sequences that end with step s: their dh is the gradient of h_n.
    void recurrent_gradient(int64_t s);

    // The number of hand-overs of all steps after s.
    int64_t hand_overs_before(int64_t s) const { return (w_.shape_.steps - 1 - s) * (projects_ ? 2 : 1); }

    // Adds the caller's gradient of c after step s to dc.
    void add_cell_gradient(int64_t s);

    void step(int64_t s, const Range& steps);

    // Goes back past step 0: what remains is the gradient of the initial state.
    void step_out() { recurrent_gradient(-1); }

    // dG·W_ih of a chunk, own columns, and what links add to it (stack/link.h).
    void input_gradient(const Range& steps);
    // Adds up, in a chunk's row of v(k), what flows past the layer above, or past the top layer's h.
    void add_gradient_past(T* row, int64_t t, int64_t b, const Range& columns) const;
    // With skip links: adds a row's columns of x to the gradient of x. The top layer, which comes first, stores them.
    void add_to_x(const T* row, int64_t t, int64_t b, const Range& columns) const;

    // ---- The ring, and the weight gradients of a gradient block: this worker's share of the gate rows.

    Range times_of(const Range& steps) const {
      const int64_t all = w_.shape_.steps;
      return direction_ ? Range{all - steps.last, all - steps.first} : steps;
    }
    // Rows of `steps`, whole batch.
    int64_t rows_of(const Range& steps) const {
      const Range times = times_of(steps);
      return w_.shape_.first_row(times.last) - w_.shape_.first_row(times.first);
    }

    // The gradient block that ends before step `last`: steps with at most kGradientRows rows together, or one step.
    // There is none before step 0: the result is then {-1, 0}.
    Range gradient_block_before(int64_t last) const {
      if (!w_.shape_.packed()) return {last > 0 ? std::max<int64_t>(last - w_.gradient_block_steps(), 0) : -1, last};
      int64_t first = last - 1;
      while (first > 0 && rows_of({first - 1, last}) <= kGradientRows<T>) --first;
      return {first, last};
    }

    // Waits until no worker reads the rows that step s overwrites any more: see Hazards.
    void make_room(int64_t s);

    // Sums over the gradient blocks that begin at `first_step` or later, once all workers of the lane have done
    // `chunks` chunks.
    void finish_gradient_blocks(int64_t first_step, int64_t chunks);

    // Calls f(row, rows, ring_row) for runs of rows of `sequences` that are consecutive both in the call, from `row`
    // on, and in the ring, from `ring_row` on. The runs come in rising time.
    template <typename F>
    void for_each_run(const Range& steps, const Range& sequences, F&& f) const {
      const Range times = times_of(steps);
      for (int64_t t = times.first; t < times.last;) {
        const int64_t row = w_.shape_.first_row(t), ring_row = w_.ring_row_of(t);
        int64_t rows = 0;
        do {
          rows += w_.local_rows(sequences, t++);
        } while (t < times.last && w_.shape_.first_row(t) == row + rows && w_.ring_row_of(t) == ring_row + rows);
        if (rows > 0) f(row + sequences.first, rows, ring_row + sequences.first);
      }
    }

    // The rows of a gradient block. In the ring they are one run or two; the second run begins with row number
    // `parting`.
    struct GradientBlockRows {
      int64_t rows = 0, parting = 0;
      int64_t ring_row[2] = {};
    };

    void weight_gradients();

    Range everyone() const { return {0, w_.shape_.batch}; }
    bool first_gradient_block() const { return gradient_block_.last == w_.shape_.steps; }

    // Adds dGᵀ·b over the gradient block's rows to c; the first one is not added but stored. The rows of b are
    // consecutive.
    void add_product(T* c, int64_t columns, const Range& units, const GradientBlockRows& gradient_block, const T* b,
                     int64_t ldb);

    void input_weight_gradient(const LaneGradients<T>& g, const Range& units, const GradientBlockRows& gradient_block);

    // b is h of the step before; h_0 where a sequence starts.
    void recurrent_weight_gradient(const LaneGradients<T>& g, const Range& units,
                                   const GradientBlockRows& gradient_block);

    void bias_gradient(const LaneGradients<T>& g, const Range& units, const GradientBlockRows& gradient_block);

    // dW_hr = dhᵀ·(o·tanh(c)).
    void projection_gradient(const LaneGradients<T>& g, const Range& own, const GradientBlockRows& gradient_block);

    // Copies all sequences of the gradient block, step by step in rising time, the order of dG's rows. copy(step, to,
    // ldo) copies one step.
    template <typename Copy>
    void copy_gradient_block(int64_t columns, Copy&& copy) const {
      const int64_t ldo = columns + kRowPadding;
      T* to = scratch_.copied;
      for (int64_t n = 0; n < gradient_block_.size(); ++n) {
        const int64_t s = direction_ ? gradient_block_.last - 1 - n : gradient_block_.first + n;
        to += copy(Range{s, s + 1}, to, ldo) * ldo;
      }
    }

    BackwardWave& w_;
    const int64_t position_;
    const WorkerPlace place_;
    const Scratch& scratch_;
    const int64_t index_, layer_index_, direction_;
    const LayerShape& layer_;
    const LaneBuffers& buffers_;
    const Range sequences_;
    const int64_t hidden_, padded_, out_;
    const int64_t h_at_, c_at_;  // where the lane's states are in h_0, c_0 and the like
    const bool projects_;
    const int64_t lddg_, ld_;
    const Range unit_blocks_, units_, dh_panels_, columns_;
    const int64_t padded_end_;  // the end of the own columns with their padding
    const int64_t lddr_, ldm_;
    Progress& progress_;
    Range stretch_;         // the steps of the current stretch; empty at first
    Range gradient_block_;  // the next gradient block to sum over, as steps in the lane's order
    int64_t finished_ = 0;  // how many came before gradient_block_
    Range oldest_;          // the first gradient block that a worker may still read, as far as this worker knows
    int64_t released_ = 0;  // how many came before oldest_
  };

  const BackwardCall<T>& call_;
  Platform& platform_;
  Workspace::Lease memory_;
  const CpuReserve<T> reserve_;
  const StateLayout states_;
  const int64_t width_;
  const bool recompute_;
  const int64_t stretch_rows_;  // at most
  const int64_t product_rows_;  // at most
  const int64_t copied_rows_;
  int64_t widest_ = 0, widest_below_ = 0;
  int64_t ring_rows_ = 0, set_count_ = 0;
  std::vector<LaneBuffers> sets_;
  std::vector<Scratch> scratch_;
  T* passing_[2][2] = {};  // gradients of layers' inputs: with two directions, layers alternate; else all share one
};

}  // namespace stacked_lstm::cpu
