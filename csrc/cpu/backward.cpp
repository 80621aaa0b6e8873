// csrc/cpu/backward.cpp: the reverse wavefront on the CPU.
//
// A worker takes its positions in turn, from the top layer down, and of each, chunk after chunk from the last to the
// first:
//   1. wait for the chunk of the layer above, and stage dL/dh of it: the sum over that layer's directions, through the
//      dropout between the two;
//   2. with recomputation, all gates of the chunk from x and h, two products;
//   3. step after step back: dG(s+1)·W_hh, the cell's derivative, dG(s) handed to the other unit slices (and, with a
//      projection, dh handed over first, then dh·W_hr);
//   4. the gradient of the layer's input, dG·W_ih of the whole chunk, one product; publish the chunk.
// After the first chunk: the weight gradients of the lane, dGᵀ·[x, h_prev], one large product each, gate rows shared
// out over all workers of the lane.
//
// Hazards.
//   dG has a row for every row of the call, so that a step overwrites nothing. The buffer is used again by the lane that
//   is `buffers` positions on; that one starts only when every worker is done with this one (Progress::done).
//   The layers share two buffers of input gradients. Layer k-2 writes chunk c over layer k's only after layer k-1 has
//   published chunk c, and layer k-1 does that after it has staged layer k's chunk c.
#include "wave.h"

namespace stacked_lstm::cpu {
namespace {

template <typename T>
class BackwardWave : Wave<T> {
  using Base = Wave<T>;
  using Base::shape_, Base::kernels_, Base::team_, Base::schedule_;

 public:
  BackwardWave(const BackwardCall<T>& call, const Workers& workers, Platform& platform)
      : Base(call.shape, workers, platform, true),
        call_(call),
        platform_(platform),
        size_(reserve_size(call.shape, call.saving, call.keep_top)),
        reserve_(const_cast<T*>(call.reserve), size_),
        width_(recurrent_width(call.shape.batch)),
        storage_(storage_of(call)),
        recompute_(call.saving == Saving::recompute),
        staged_rows_(std::max<int64_t>(this->chunk_rows_, kGradientRows<T>)) {
    for (int64_t n = 0; n < this->lane_count_; ++n) lanes_.push_back(make_lane(lane_of(n)));
    widest_ = round_up(std::max({this->widest_input_, this->widest_output_, this->widest_hidden_}), kUnitPadding * 4);
    const int64_t below = shape_.rows() * this->widest_input_;
    for (int64_t n = 0; n < std::min<int64_t>(shape_.depth() - 1, 2); ++n) {
      for (int64_t d = 0; d < shape_.directions; ++d) passing_[n][d] = memory_->take<T>(below);
    }
    buffers_ = std::min(this->workers_, this->lane_count_);
    for (int64_t n = 0; n < buffers_; ++n) {
      dgates_.push_back(memory_->take<T>(shape_.rows() * (4 * this->widest_hidden_ + kRowPadding)));
      dh_rows_.push_back(projects() ? memory_->take<T>(shape_.rows() * (this->widest_output_ + kRowPadding)) : nullptr);
      hidden_rows_.push_back(projects() ? memory_->take<T>(shape_.rows() * this->widest_hidden_) : nullptr);
    }
    for (int64_t worker = 0; worker < this->workers_; ++worker) {
      const int64_t ld = widest_ + kRowPadding;
      scratch_.push_back(
          {memory_->take<T>(staged_rows_ * ld), memory_->take<T>(this->chunk_rows_ * ld),
           recompute_ ? memory_->take<T>(this->chunk_rows_ * 4 * this->widest_hidden_) : nullptr,
           memory_->take<T>(shape_.batch * ld), memory_->take<T>(this->chunk_rows_ * ld),
           call.gradients.empty() ? nullptr : memory_->take<T>(kGradientScratch<T>),
           this->take_operands(memory_, this->chunk_rows_, std::max(4 * this->widest_hidden_, widest_), storage_)});
    }
  }

  Schedule run() {
    Base::run(platform_, [&](int64_t worker) {
      schedule_.for_each_position(shape_.directions, worker, [&](int64_t position, const Place& place) {
        LaneRun(*this, position, place, scratch_[static_cast<size_t>(worker)]).run();
      });
    });
    return schedule_;
  }

 private:
  struct Lane {
    void *weight_ih, *weight_hh, *weight_hr;  // packed for backward: columns as they stand
    void *gates_ih, *gates_hh;                // packed for forward: with recomputation
    T* bias;
    T* dc;   // [sequence][padded_hidden]
    T* c_0;  // likewise, padded with zeros
  };
  struct Scratch {
    T* staged;  // x or h of a chunk
    T* dy;      // dL/dh of a chunk, from above
    T* gates;   // with recomputation: those of a chunk
    T* dh;      // of a step
    T* dinput;  // dG·W_ih of a chunk
    T* gradient;
    void* operands;  // of any product
  };

  int64_t lane_of(int64_t position) const { return lane_at(position, this->lane_count_, true); }
  bool projects() const {
    return std::any_of(shape_.layers.begin(), shape_.layers.end(),
                       [](const LayerShape& layer) { return layer.projection > 0; });
  }

  // Columns of dG·W_hh, padding included.
  static int64_t recurrent_columns(const LayerShape& layer) {
    return layer.projection > 0 ? layer.projection : layer.padded_hidden();
  }

  Lane make_lane(int64_t index) {
    const LayerShape& layer = shape_.of_lane(index);
    const int64_t padded = layer.padded_hidden(), inner = 4 * padded;
    Lane lane{};
    const auto panels = [&](int64_t columns, int64_t rows) {
      return this->take_panels(memory_, columns, rows, storage_);
    };
    lane.weight_ih = panels(this->padded_columns(layer.input, kWidth), inner);
    lane.weight_hh = panels(this->padded_columns(recurrent_columns(layer), width_), inner);
    if (layer.projection > 0) lane.weight_hr = panels(this->padded_columns(padded, kWidth), layer.projection);
    if (recompute_) {
      lane.gates_ih = panels(inner, layer.input);
      lane.gates_hh = panels(inner, layer.output());
      lane.bias = memory_->take<T>(inner);
    }
    lane.dc = memory_->take<T>(shape_.batch * padded);
    lane.c_0 = memory_->take<T>(shape_.batch * padded);
    return lane;
  }

  // h of a layer, as forward left it.
  const T* output_of(int64_t layer) const {
    if (layer + 1 == shape_.depth() && !call_.keep_top) return call_.output;
    const T* h = reserve_.h;
    for (int64_t n = 0; n < layer; ++n) h += shape_.rows() * shape_.directions * shape_.layers[n].output();
    return h;
  }
  // Where one direction of a layer leaves the gradient of its input.
  T* input_gradient(int64_t layer, int64_t direction) const {
    return layer == 0 ? call_.grad_input[direction] : passing_[(layer - 1) % 2][direction];
  }

  // One worker's part in one lane.
  class LaneRun {
   public:
    LaneRun(BackwardWave& wave, int64_t position, const Place& place, const Scratch& scratch)
        : w_(wave),
          position_(position),
          place_(place),
          scratch_(scratch),
          index_(wave.lane_of(position)),
          layer_index_(index_ / wave.shape_.directions),
          direction_(index_ % wave.shape_.directions),
          layer_(wave.shape_.layers[layer_index_]),
          lane_(wave.lanes_[static_cast<size_t>(position)]),
          sequences_(wave.sequences(place)),
          hidden_(layer_.hidden),
          padded_(layer_.padded_hidden()),
          out_(layer_.output()),
          projects_(layer_.projection > 0),
          lddg_(4 * padded_ + kRowPadding),
          ld_(wave.widest_ + kRowPadding),
          blocks_(wave.own_blocks(position, place, padded_)),
          units_{std::min(blocks_.first * lanes(), hidden_), std::min(blocks_.last * lanes(), hidden_)},
          dh_panels_(recurrent_panels()),
          columns_(projects_ ? wave.columns_of(dh_panels_, wave.width_, out_) : units_),
          padded_end_(projects_ ? columns_.last : blocks_.last * lanes()),
          dgates_(wave.dgates_[static_cast<size_t>(position % wave.buffers_)]),
          dh_rows_(wave.dh_rows_[static_cast<size_t>(position % wave.buffers_)]),
          hidden_rows_(wave.hidden_rows_[static_cast<size_t>(position % wave.buffers_)]),
          lddr_(out_ + kRowPadding),
          ldm_(padded_),
          progress_(wave.own(position, place)) {}

    void run() {
      if (position_ >= w_.buffers_) w_.wait_everybody(position_ - w_.buffers_, &Progress::done, 1);
      pack();
      start();
      for (int64_t chunk = 0; chunk < w_.chunks(); ++chunk) {  // counted from the end of the sequence
        w_.wait_for_input(position_, place_, chunk);
        const Range steps = w_.steps_of(w_.chunks() - 1 - chunk);
        stage_dy(steps);
        const T* gates = recomputed_gates(steps);
        for (int64_t s = steps.last - 1; s >= steps.first; --s) step(s, steps, gates);
        input_gradient(steps);
        publish(progress_.chunks, chunk + 1);
      }
      step_out();
      if (!w_.call_.gradients.empty()) weight_gradients();
      publish(progress_.done, 1);
    }

   private:
    int64_t lanes() const { return w_.kernels_.lanes; }
    int64_t time(int64_t s) const { return w_.shape_.time(index_, s); }
    int64_t rows_at(int64_t s) const { return w_.rows_at(index_, sequences_, s); }
    // First local row of step s.
    int64_t row_at(int64_t s) const { return w_.shape_.first_row(time(s)) + sequences_.first; }
    int64_t active_at(int64_t s) const { return s < w_.shape_.steps ? w_.shape_.active(time(s)) : 0; }

    // Own panels of dG·W_hh. Its columns are the own units, or with a projection a share of its own.
    Range recurrent_panels() const {
      if (projects_) return w_.own_panels(position_, place_, out_, w_.width_);
      return {blocks_.first / w_.width_, (blocks_.last + w_.width_ - 1) / w_.width_};
    }
    Range unit_panels() const { return {blocks_.first / kWidth, (blocks_.last + kWidth - 1) / kWidth}; }

    void pack() {
      const LaneWeights<T>& weights = w_.call_.weights[static_cast<size_t>(index_)];
      const Kernels<T>& k = w_.kernels_;
      Range own = w_.share_packing(dh_panels_, place_);
      const Storage storage = w_.storage_;
      k.pack_columns(weights.weight_hh, out_, 4, hidden_, padded_, w_.width_, own.first, own.last, storage,
                     lane_.weight_hh);
      own = w_.share_packing(w_.own_panels(position_, place_, layer_.input, kWidth), place_);
      if (w_.input_gradient(layer_index_, direction_)) {
        k.pack_columns(weights.weight_ih, layer_.input, 4, hidden_, padded_, kWidth, own.first, own.last, storage,
                       lane_.weight_ih);
      }
      if (projects_) {
        own = w_.share_packing(unit_panels(), place_);
        k.pack_columns(weights.weight_hr, hidden_, 1, out_, out_, kWidth, own.first, own.last, storage,
                       lane_.weight_hr);
      }
      if (w_.recompute_) {
        own = w_.share_packing(blocks_, place_);
        const Range panels{own.first * 4 / kWidth, own.last * 4 / kWidth};
        k.pack_gates(weights.weight_ih, hidden_, layer_.input, kWidth, panels.first, panels.last, storage,
                     lane_.gates_ih);
        k.pack_gates(weights.weight_hh, hidden_, out_, kWidth, panels.first, panels.last, storage, lane_.gates_hh);
        k.pack_bias(weights.bias_ih, weights.bias_hh, hidden_, own.first, own.last, lane_.bias);
      }
      w_.packing_done(position_, place_);
    }

    // dc starts as the gradient of c_n, for every sequence: a sequence's first step back takes it from there.
    void start() {
      const int64_t batch = w_.shape_.batch;
      for (int64_t b = sequences_.first; b < sequences_.last; ++b) {
        T *dc = lane_.dc + b * padded_, *c_0 = lane_.c_0 + b * padded_;
        const int64_t at = (index_ * batch + b) * hidden_;
        std::fill(dc + blocks_.first * lanes(), dc + blocks_.last * lanes(), T(0));
        std::fill(c_0 + blocks_.first * lanes(), c_0 + blocks_.last * lanes(), T(0));
        if (w_.call_.grad_c_n) Base::copy_columns(w_.call_.grad_c_n + at, dc, units_);
        Base::copy_columns(w_.call_.c_0 + at, c_0, units_);
      }
    }

    // dL/dh of a chunk's own columns, from the loss or the layer above. Padding is zero.
    void stage_dy(const Range& steps) {
      const StackShape& shape = w_.shape_;
      const int64_t width = shape.directions * out_, offset = direction_ * out_;
      const bool top = layer_index_ + 1 == shape.depth();
      const bool drops = !top && w_.call_.dropout.active();
      T* out = scratch_.dy;
      for (int64_t s = steps.first; s < steps.last; ++s) {
        const int64_t n = rows_at(s), first = row_at(s);
        for (int64_t b = 0; b < n; ++b, out += ld_) {
          std::fill(out + columns_.first, out + padded_end_, T(0));
          const int64_t row = first + b;
          if (top) {
            if (w_.call_.grad_output) Base::copy_columns(w_.call_.grad_output + row * width + offset, out, columns_);
            continue;
          }
          // The mask goes by quadruples of features of the whole row; where this lane's columns start elsewhere than at
          // a multiple of four, the row is masked as a whole.
          T* sum = drops ? scratch_.staged : out - offset;
          const Range range = drops ? Range{0, width} : Range{offset + columns_.first, offset + columns_.last};
          Base::copy_columns(w_.input_gradient(layer_index_ + 1, 0) + row * width, sum, range);
          if (shape.directions == 2) {
            const T* other = w_.input_gradient(layer_index_ + 1, 1) + row * width;
            for (int64_t n2 = range.first; n2 < range.last; ++n2) sum[n2] += other[n2];
          }
          if (drops) {
            w_.call_.dropout.apply(sum, width, time(s) * shape.batch + sequences_.first + b, layer_index_);
            std::memcpy(out + columns_.first, sum + offset + columns_.first,
                        static_cast<size_t>(columns_.size()) * sizeof(T));
          }
        }
      }
    }

    // The gates of a chunk's first row: saved, or computed here from the saved h of this layer and the one below.
    const T* recomputed_gates(const Range& steps) {
      if (!w_.recompute_) return nullptr;
      const Range panels{blocks_.first * 4 / kWidth, blocks_.last * 4 / kWidth};
      int64_t lda = layer_.input + kRowPadding;
      const int64_t rows = stage_x(steps, scratch_.staged, lda);
      Product<T> product{
          .panels = {lane_.gates_ih, w_.storage_},
          .width = kWidth,
          .first_panel = panels.first,
          .last_panel = panels.last,
          .a = scratch_.staged,
          .lda = lda,
          .rows = rows,
          .unroll_rows = w_.shape_.rows(),
          .inner = layer_.input,
          .rounded = true,
          .operands = scratch_.operands,
          .init = lane_.bias,
          .c = scratch_.gates,
          .ldc = 4 * padded_,
      };
      w_.kernels_.product(product);
      lda = out_ + kRowPadding;
      stage_h_before(steps, scratch_.staged, lda);
      product.panels.data = lane_.gates_hh, product.lda = lda, product.inner = out_, product.rounded = false;
      product.init = scratch_.gates, product.init_step = 4 * padded_;
      w_.kernels_.product(product);
      w_.kernels_.activate(scratch_.gates, rows, padded_, blocks_.first, blocks_.last);
      return scratch_.gates;
    }

    int64_t stage_x(const Range& steps, T* out, int64_t ldo) const {
      return w_.stage_input(w_.call_.input, w_.call_.dropout, layer_index_ ? w_.output_of(layer_index_ - 1) : nullptr,
                            index_, sequences_, steps, out, ldo);
    }
    // h of the step before each row's own.
    int64_t stage_h_before(const Range& steps, T* out, int64_t ldo) const {
      const StackShape& shape = w_.shape_;
      const T* h = w_.output_of(layer_index_) + direction_ * out_;
      const int64_t ldh = shape.directions * out_, back = direction_ ? 1 : -1;
      return w_.stage(
          index_, sequences_, steps, out_,
          [&](int64_t t, int64_t b) {
            const int64_t before = t + back;
            const bool first = before < 0 || before >= shape.steps || b >= shape.active(before);
            return first ? w_.call_.h_0 + (index_ * shape.batch + b) * out_ : h + (shape.first_row(before) + b) * ldh;
          },
          out, ldo);
    }

    // The gradient of h(s) that comes from step s+1, for that step's rows, into scratch.dh. Rows that step s does not
    // have started with step s+1: theirs is the gradient of h_0. Rows that only step s has ended with it: theirs is the
    // gradient of h_n.
    void recurrent_gradient(int64_t s) {
      const StackShape& shape = w_.shape_;
      const int64_t later = rows_at(s + 1), n = rows_at(s);
      const int64_t at = (index_ * shape.batch + sequences_.first) * out_;
      w_.wait_slices(position_, place_.batch_slice, &Progress::steps, hand_overs_before(s));
      if (later > 0) {
        w_.kernels_.product({
            .panels = {lane_.weight_hh, w_.storage_},
            .width = w_.width_,
            .first_panel = dh_panels_.first,
            .last_panel = dh_panels_.last,
            .a = dgates_ + row_at(s + 1) * lddg_,
            .lda = lddg_,
            .rows = later,
            .unroll_rows = active_at(s + 1),
            .inner = 4 * padded_,
            .operands = scratch_.operands,
            .c = scratch_.dh,
            .ldc = ld_,
            .from_last = (s & 1) != 0,
        });
      }
      for (int64_t b = n; b < later; ++b) {
        Base::copy_columns(scratch_.dh + b * ld_, w_.call_.grad_h_0 + at + b * out_, columns_);
        const int64_t c = (index_ * shape.batch + sequences_.first + b) * hidden_;
        Base::copy_columns(lane_.dc + (sequences_.first + b) * padded_, w_.call_.grad_c_0 + c, units_);
      }
      for (int64_t b = later; b < n; ++b) {
        T* dh = scratch_.dh + b * ld_;
        std::fill(dh + columns_.first, dh + padded_end_, T(0));
        if (w_.call_.grad_h_n) Base::copy_columns(w_.call_.grad_h_n + at + b * out_, dh, columns_);
      }
    }

    // Hand-overs of the steps after s.
    int64_t hand_overs_before(int64_t s) const { return (w_.shape_.steps - 1 - s) * (projects_ ? 2 : 1); }

    void step(int64_t s, const Range& steps, const T* recomputed) {
      const StackShape& shape = w_.shape_;
      const int64_t n = rows_at(s), row = row_at(s);
      recurrent_gradient(s);
      int64_t local = 0;  // rows of the chunk before this step
      for (int64_t earlier = steps.first; earlier < s; ++earlier) local += rows_at(earlier);
      const T* dy = scratch_.dy + local * ld_;
      if (projects_) {
        T* projected = dh_rows_ + row * lddr_;
        for (int64_t b = 0; b < n; ++b) {
          for (int64_t j = columns_.first; j < columns_.last; ++j) {
            projected[b * lddr_ + j] = scratch_.dh[b * ld_ + j] + dy[b * ld_ + j];
          }
        }
        publish(progress_.steps, hand_overs_before(s) + 1);
        w_.wait_slices(position_, place_.batch_slice, &Progress::steps, hand_overs_before(s) + 1);
        const Range panels = unit_panels();
        w_.kernels_.product({
            .panels = {lane_.weight_hr, w_.storage_},
            .width = kWidth,
            .first_panel = panels.first,
            .last_panel = panels.last,
            .a = projected,
            .lda = lddr_,
            .rows = n,
            .unroll_rows = active_at(s),
            .inner = out_,
            .operands = scratch_.operands,
            .c = scratch_.dh,
            .ldc = ld_,
        });
        dy = nullptr;
      }
      const int64_t cells = index_ * shape.rows() + row;
      const T* gates = recomputed ? recomputed + local * 4 * padded_ : w_.reserve_.gates + cells * 4 * padded_;
      StepBackward<T> cell{
          .first_block = blocks_.first,
          .last_block = blocks_.last,
          .rows = n,
          .hidden = hidden_,
          .padded_hidden = padded_,
          .gates = gates,
          .dh = scratch_.dh,
          .lddh = ld_,
          .dy = dy,
          .lddy = ld_,
          .c_next = w_.reserve_.c + cells * padded_,
          .c = nullptr,
          .dc = lane_.dc + sequences_.first * padded_,
          .dgates = dgates_ + row * lddg_,
          .lddg = lddg_,
          .projected = projects_ ? hidden_rows_ + row * ldm_ : nullptr,
          .ldm = ldm_,
      };
      // The state before the step: sequences that start here have it from c_0.
      const int64_t before = std::min(s > 0 ? rows_at(s - 1) : 0, n);
      if (before > 0) {
        cell.rows = before;
        cell.c = w_.reserve_.c + (index_ * shape.rows() + row_at(s - 1)) * padded_;
        w_.kernels_.step_backward(cell);
      }
      if (before < n) {
        cell.rows = n - before;
        cell.gates += before * 4 * padded_;
        cell.dh += before * ld_;
        if (cell.dy) cell.dy += before * ld_;
        cell.c_next += before * padded_;
        cell.c = lane_.c_0 + (sequences_.first + before) * padded_;
        cell.dc += before * padded_;
        cell.dgates += before * lddg_;
        if (cell.projected) cell.projected += before * ldm_;
        w_.kernels_.step_backward(cell);
      }
      publish(progress_.steps, hand_overs_before(s - 1));
    }

    // Before the first step: what is left is the gradient of the initial state.
    void step_out() { recurrent_gradient(-1); }

    // dG·W_ih of a chunk, own columns.
    void input_gradient(const Range& steps) {
      T* to = w_.input_gradient(layer_index_, direction_);
      if (!to) return;
      const Range panels = w_.own_panels(position_, place_, layer_.input, kWidth);
      const Range columns = w_.columns_of(panels, kWidth, layer_.input);
      w_.wait_slices(position_, place_.batch_slice, &Progress::steps, hand_overs_before(steps.first - 1));
      // A batch slice's rows of one step stand together, those of several steps only where it has the whole batch.
      const bool whole = sequences_.size() == w_.shape_.batch && steps.size() > 0;
      int64_t s = steps.first;
      while (s < steps.last) {
        int64_t first = row_at(s), rows = rows_at(s);
        if (whole) {
          for (int64_t later = s + 1; later < steps.last; ++later) {
            rows += rows_at(later);
            first = std::min(first, row_at(later));  // a reverse lane's rows run down
          }
          s = steps.last;
        } else {
          ++s;
        }
        w_.kernels_.product({
            .panels = {lane_.weight_ih, w_.storage_},
            .width = kWidth,
            .first_panel = panels.first,
            .last_panel = panels.last,
            .a = dgates_ + first * lddg_,
            .lda = lddg_,
            .rows = rows,
            .unroll_rows = w_.shape_.rows(),
            .inner = 4 * padded_,
            .operands = scratch_.operands,
            .c = scratch_.dinput,
            .ldc = ld_,
        });
        for (int64_t r = 0; r < rows; ++r) {
          Base::copy_columns(scratch_.dinput + r * ld_, to + (first + r) * layer_.input, columns);
        }
      }
    }

    // ---- Weight gradients: this worker's share of the gate rows, over all rows of the call.

    void weight_gradients() {
      w_.wait_everybody(position_, &Progress::chunks, w_.chunks());
      const int64_t slices = w_.slices(position_), workers = slices * w_.schedule_.batch_slices;
      const int64_t part = place_.batch_slice * slices + place_.slice;
      const LaneGradients<T>& g = w_.call_.gradients[static_cast<size_t>(index_)];
      const Range units = share_of(hidden_, part, workers);
      if (units.size() > 0) {
        gate_gradients(g, units);
        if (g.bias_ih) {
          for (int64_t gate = 0; gate < 4; ++gate) {
            T* bias = g.bias_ih + gate * hidden_ + units.first;
            w_.kernels_.sum_rows(dgates_ + gate * padded_ + units.first, lddg_, w_.shape_.rows(), units.size(), bias);
            std::copy(bias, bias + units.size(), g.bias_hh + gate * hidden_ + units.first);
          }
        }
      }
      if (projects_) {
        const Range rows = share_of(out_, part, workers);
        if (rows.size() > 0) projection_gradient(g, rows);
      }
    }

    // Adds up dGᵀ·b over pieces of rows (that must not depend on the schedule: sums go piece by piece): `b` and `rows` of a piece, and the row of dG it starts at.
    void add_product(T* c, int64_t columns, const Range& units, int64_t first_row, const T* b, int64_t ldb,
                     int64_t rows, bool accumulate) {
      const T* a = dgates_ + first_row * lddg_;
      if (units.size() == hidden_ && padded_ == hidden_) {  // all gate rows in one product
        w_.kernels_.gradient({c, columns, a, lddg_, b, ldb, rows, 4 * hidden_, columns, accumulate, scratch_.gradient});
        return;
      }
      for (int64_t gate = 0; gate < 4; ++gate) {
        w_.kernels_.gradient({c + (gate * hidden_ + units.first) * columns, columns, a + gate * padded_ + units.first,
                              lddg_, b, ldb, rows, units.size(), columns, accumulate, scratch_.gradient});
      }
    }

    void gate_gradients(const LaneGradients<T>& g, const Range& units) {
      const StackShape& shape = w_.shape_;
      const int64_t rows = shape.rows(), batch = shape.batch;
      const Input<T>& x = w_.call_.input;
      // W_ih: x as it stands, where it is a matrix.
      const bool matrix = x.row_stride >= layer_.input && (shape.packed() || x.step_stride == batch * x.row_stride);
      if (layer_index_ == 0 && matrix) {
        add_product(g.weight_ih, layer_.input, units, 0, x.data, x.row_stride, rows, false);
      } else if (layer_index_ > 0 && !w_.call_.dropout.active()) {
        add_product(g.weight_ih, layer_.input, units, 0, w_.output_of(layer_index_ - 1), layer_.input, rows, false);
      } else {
        by_pieces([&](const Range& steps, T* out, int64_t ldo) { return stage_all(steps, out, ldo, true); },
                  g.weight_ih, layer_.input, units);
      }
      // W_hh: h one step before dG, and h_0 with the first step.
      if (!shape.packed()) {
        const int64_t ldh = shape.directions * out_, shifted = rows - batch;
        const T *h = w_.output_of(layer_index_) + direction_ * out_, *h_0 = w_.call_.h_0 + index_ * batch * out_;
        add_product(g.weight_hh, out_, units, direction_ ? shifted : 0, h_0, out_, batch, false);
        if (shifted > 0) {
          add_product(g.weight_hh, out_, units, direction_ ? 0 : batch, direction_ ? h + batch * ldh : h, ldh, shifted,
                      true);
        }
      } else {
        by_pieces([&](const Range& steps, T* out, int64_t ldo) { return stage_all(steps, out, ldo, false); },
                  g.weight_hh, out_, units);
      }
    }

    // Stages all sequences of some times, in rising time: dG's order of rows.
    int64_t stage_all(const Range& times, T* out, int64_t ldo, bool input) const {
      const StackShape& shape = w_.shape_;
      const Range all{0, shape.batch};
      const Range steps = direction_ ? Range{shape.steps - times.last, shape.steps - times.first} : times;
      int64_t rows = 0;
      for (int64_t n = 0; n < steps.size(); ++n) {
        const int64_t s = direction_ ? steps.last - 1 - n : steps.first + n;
        const Range one{s, s + 1};
        T* to = out + rows * ldo;
        rows += input
                    ? w_.stage_input(w_.call_.input, w_.call_.dropout,
                                     layer_index_ ? w_.output_of(layer_index_ - 1) : nullptr, index_, all, one, to, ldo)
                    : all_h_before(one, to, ldo);
      }
      return rows;
    }
    int64_t all_h_before(const Range& steps, T* out, int64_t ldo) const {
      LaneRun whole(*this);
      whole.sequences_ = {0, w_.shape_.batch};
      return whole.stage_h_before(steps, out, ldo);
    }

    template <typename Stage>
    void by_pieces(Stage&& stage, T* c, int64_t columns, const Range& units) {
      const StackShape& shape = w_.shape_;
      const int64_t ldo = columns + kRowPadding;
      int64_t row = 0;
      for (int64_t t = 0; t < shape.steps;) {
        int64_t last = t + 1;
        while (last < shape.steps && shape.first_row(last + 1) - shape.first_row(t) <= kGradientRows<T>) ++last;
        const int64_t rows = stage(Range{t, last}, scratch_.staged, ldo);
        add_product(c, columns, units, row, scratch_.staged, ldo, rows, row > 0);
        row += rows, t = last;
      }
    }

    // dW_hr = dhᵀ·(o·tanh(c)).
    void projection_gradient(const LaneGradients<T>& g, const Range& own) {
      w_.kernels_.gradient({g.weight_hr + own.first * hidden_, hidden_, dh_rows_ + own.first, lddr_, hidden_rows_, ldm_,
                            w_.shape_.rows(), own.size(), hidden_, false, scratch_.gradient});
    }

    BackwardWave& w_;
    const int64_t position_;
    const Place place_;
    const Scratch& scratch_;
    const int64_t index_, layer_index_, direction_;
    const LayerShape& layer_;
    const Lane& lane_;
    Range sequences_;
    const int64_t hidden_, padded_, out_;
    const bool projects_;
    const int64_t lddg_, ld_;
    const Range blocks_, units_, dh_panels_, columns_;
    const int64_t padded_end_;  // of own columns
    T* const dgates_;
    T* const dh_rows_;      // with a projection: dL/dh of every row …
    T* const hidden_rows_;  // … and what the projection was given
    const int64_t lddr_, ldm_;
    Progress& progress_;
  };

  const BackwardCall<T>& call_;
  Platform& platform_;
  Workspace::Lease memory_;
  const ReserveSize size_;
  const Reserve<T> reserve_;
  const int64_t width_;
  const Storage storage_;
  const bool recompute_;
  const int64_t staged_rows_;
  int64_t widest_ = 0, buffers_ = 0;
  std::vector<Lane> lanes_;
  std::vector<Scratch> scratch_;
  std::vector<T*> dgates_, dh_rows_, hidden_rows_;
  T* passing_[2][2] = {};
};

}  // namespace

template <typename T>
Schedule backward(const BackwardCall<T>& call, const Workers& workers, Platform& platform) {
  return BackwardWave<T>(call, workers, platform).run();
}
template Schedule backward(const BackwardCall<float>&, const Workers&, Platform&);
template Schedule backward(const BackwardCall<double>&, const Workers&, Platform&);

}  // namespace stacked_lstm::cpu
