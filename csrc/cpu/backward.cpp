// csrc/cpu/backward.cpp: one worker's backward pass through one lane: it recomputes the gates that were not kept, then
// computes the gradients of the gates step by step, and the gradient of the lane's input. See backward_wave.h.
#include "backward_wave.h"

namespace stacked_lstm::cpu {

template <typename T>
void BackwardWave<T>::LaneRun::run() {
  if (position_ >= w_.set_count_) w_.wait_everybody(position_ - w_.set_count_, &Progress::done, 1);
  pack();
  start();
  if (!w_.call_.resets.empty()) std::fill_n(scratch_.zeros, w_.widest_, T(0));
  for (int64_t chunk = 0; chunk < w_.chunks(); ++chunk) {  // counted from the end of the sequence
    w_.wait_for_input(position_, place_, chunk);
    const Range steps = w_.steps_of(w_.chunks() - 1 - chunk);
    copy_dy(steps);
    for (int64_t s = steps.last - 1; s >= steps.first; --s) {
      if (w_.recompute_ && s < stretch_.first) recompute(s);
      step(s, steps);
    }
    input_gradient(steps);
    publish(progress_.chunks, chunk + 1);
    if (!w_.ring_holds_all()) finish_gradient_blocks(steps.first, chunk + 1);
  }
  step_out();
  finish_gradient_blocks(0, w_.chunks());
  publish(progress_.done, 1);
}

template <typename T>
void BackwardWave<T>::LaneRun::pack() {
  const LaneWeights<T>& weights = w_.call_.weights[static_cast<size_t>(index_)];
  const CpuKernels<T>& k = w_.kernels_;
  Range own = w_.share_packing(dh_panels_, place_);
  const Storage storage = w_.storage_;
  k.pack_columns(weights.weight_hh, out_, 4, hidden_, padded_, w_.width_, own.first, own.last, storage,
                 buffers_.weight_hh);
  own = w_.share_packing(w_.own_panels(position_, place_, layer_.input, kWidth), place_);
  if (w_.input_gradient(layer_index_, direction_).data) {
    k.pack_columns(weights.weight_ih, layer_.input, 4, hidden_, padded_, kWidth, own.first, own.last, storage,
                   buffers_.weight_ih);
  }
  if (projects_) {
    own = w_.share_packing(unit_panels(kWidth), place_);
    k.pack_columns(weights.weight_hr, hidden_, 1, out_, out_, kWidth, own.first, own.last, storage, buffers_.weight_hr);
  }
  if (w_.recompute_) {
    own = w_.share_packing(unit_blocks_, place_);
    const Range panels{own.first * 4 / kWidth, own.last * 4 / kWidth};
    k.pack_gates(weights.weight_ih, hidden_, layer_.input, kWidth, panels.first, panels.last, storage,
                 buffers_.gates_ih);
    k.pack_gates(weights.weight_hh, hidden_, out_, kWidth, panels.first, panels.last, storage, buffers_.gates_hh);
    k.pack_bias(weights.bias_ih, weights.bias_hh, hidden_, own.first, own.last, buffers_.bias);
  }
  w_.packing_done(position_, place_);
}

template <typename T>
void BackwardWave<T>::LaneRun::start() {
  for (int64_t b = sequences_.first; b < sequences_.last; ++b) {
    T *dc = buffers_.dc + b * padded_, *c_0 = buffers_.c_0 + b * padded_;
    const int64_t at = c_at_ + b * hidden_;
    std::fill(dc + unit_blocks_.first * vector_elements(), dc + unit_blocks_.last * vector_elements(), T(0));
    std::fill(c_0 + unit_blocks_.first * vector_elements(), c_0 + unit_blocks_.last * vector_elements(), T(0));
    if (w_.call_.grad_c_n) Base::copy_columns(w_.call_.grad_c_n + at, dc, units_);
    Base::copy_columns(w_.call_.c_0 + at, c_0, units_);
  }
}

template <typename T>
void BackwardWave<T>::LaneRun::copy_dy(const Range& steps) {
  const StackShape& shape = w_.shape_;
  const int64_t width = shape.directions * out_, offset = direction_ * out_;
  const bool top = layer_index_ + 1 == shape.depth();
  const Link link = top ? Link{} : w_.call_.links[layer_index_];
  const bool whole_row = link.changes_h();
  const Input<T> grad_h = w_.gradients_of(w_.call_.grad_h, layer_index_);
  T* out = scratch_.dy;
  for (int64_t s = steps.first; s < steps.last; ++s) {
    const int64_t n = rows_at(s), first = row_at(s);
    for (int64_t b = 0; b < n; ++b, out += ld_) {
      std::fill(out + columns_.first, out + padded_end_, T(0));
      const int64_t row = first + b;
      const T* given = grad_h.data ? grad_h.row(shape, time(s), sequences_.first + b) + offset : nullptr;
      if (top) {
        if (given) Base::copy_columns(given, out, columns_);
        continue;
      }
      // The mask is drawn for quads of features of a whole row, and this lane's columns may start inside a quad. So,
      // with dropout, the whole row is copied and masked.
      T* sum = whole_row ? scratch_.copied : out - offset;
      const Range range = whole_row ? Range{0, width} : Range{offset + columns_.first, offset + columns_.last};
      const Rows above = w_.input_gradient(layer_index_ + 1, 0);
      Base::copy_columns(above.data + row * above.stride, sum, range);
      if (shape.directions == 2) {
        const T* other = w_.input_gradient(layer_index_ + 1, 1).data + row * above.stride;
        for (int64_t n2 = range.first; n2 < range.last; ++n2) sum[n2] += other[n2];
      }
      if (whole_row) {
        link.backward(sum, width, time(s) * shape.batch + sequences_.first + b);
        std::memcpy(out + columns_.first, sum + offset + columns_.first,
                    static_cast<size_t>(columns_.size()) * sizeof(T));
      }
      for (int64_t n2 = columns_.first; given && n2 < columns_.last; ++n2) out[n2] += given[n2];
    }
  }
}

template <typename T>
void BackwardWave<T>::LaneRun::recompute(int64_t s) {
  const int64_t steps = w_.stretch_steps(sequences_.size());
  stretch_ = {s / steps * steps, s + 1};
  int64_t kept_from = stretch_.last;
  while (kept_from > stretch_.first && w_.reserve_.gates(index_, kept_from - 1)) --kept_from;
  if (kept_from > stretch_.first) recompute_sums({stretch_.first, kept_from});
  for (int64_t step = stretch_.first; step < stretch_.last; ++step) {
    const int64_t before = rows_between(stretch_.first, step);
    const bool sums = step < kept_from, keeps_c = w_.reserve_.c(index_, step) != nullptr;
    if (!sums && keeps_c) continue;
    T* c_next = scratch_.c + before * padded_;
    with_c_before(step, [&](int64_t row, int64_t rows, const T* c) {
      w_.kernels_.replay({
          .first_unit_block = unit_blocks_.first,
          .last_unit_block = unit_blocks_.last,
          .rows = rows,
          .padded_hidden = padded_,
          .gates = sums ? nullptr : gates_of(step) + row * 4 * padded_,
          .sums = sums ? scratch_.gates + (before + row) * 4 * padded_ : nullptr,
          .c = c,
          .c_next = keeps_c ? nullptr : c_next + row * padded_,
      });
    });
  }
}

template <typename T>
void BackwardWave<T>::LaneRun::recompute_sums(const Range& steps) {
  const Range panels{unit_blocks_.first * 4 / kWidth, unit_blocks_.last * 4 / kWidth};
  int64_t lda = layer_.input + kRowPadding;
  const int64_t rows = copy_x(steps, scratch_.copied, lda);
  Product<T> product{
      .panels = {buffers_.gates_ih, w_.storage_},
      .width = kWidth,
      .first_panel = panels.first,
      .last_panel = panels.last,
      .a = scratch_.copied,
      .lda = lda,
      .rows = rows,
      .unroll_rows = w_.shape_.rows(),
      .inner = layer_.input,
      .rounded = true,
      .operands = scratch_.operands,
      .init = buffers_.bias,
      .c = scratch_.gates,
      .ldc = 4 * padded_,
  };
  w_.kernels_.product(product);
  lda = out_ + kRowPadding;
  copy_h_before(sequences_, steps, scratch_.copied, lda);
  product.panels.data = buffers_.gates_hh, product.lda = lda, product.inner = out_;
  product.rounded = w_.call_.bf16_activations;
  product.init = scratch_.gates, product.init_step = 4 * padded_;
  w_.kernels_.product(product);
}

template <typename T>
void BackwardWave<T>::LaneRun::recurrent_gradient(int64_t s) {
  const int64_t later = rows_at(s + 1), n = rows_at(s);
  const int64_t at = h_at_ + sequences_.first * out_;
  w_.wait_slices(position_, place_.batch_slice, &Progress::steps, hand_overs_before(s));
  if (w_.slices(position_) > 1) {
    for (int64_t b = 0; b < later; ++b) Base::prefetch(buffers_.dgates + (ring_row_at(s + 1) + b) * lddg_, 4 * padded_);
  }
  if (later > 0) {
    w_.kernels_.product({
        .panels = {buffers_.weight_hh, w_.storage_},
        .width = w_.width_,
        .first_panel = dh_panels_.first,
        .last_panel = dh_panels_.last,
        .a = buffers_.dgates + ring_row_at(s + 1) * lddg_,
        .lda = lddg_,
        .rows = later,
        .unroll_rows = active_at(s + 1),
        .inner = 4 * padded_,
        .rounded = w_.call_.bf16_activations,
        .operands = scratch_.operands,
        .c = scratch_.dh,
        .ldc = ld_,
        .from_last = (s & 1) != 0,
    });
  }
  for (const int64_t b : own_resets_before(s + 1)) {  // no gradient crosses a reset
    T* dh = scratch_.dh + (b - sequences_.first) * ld_;
    std::fill(dh + columns_.first, dh + padded_end_, T(0));
  }
  for (int64_t b = n; b < later; ++b) {
    Base::copy_columns(scratch_.dh + b * ld_, w_.call_.grad_h_0 + at + b * out_, columns_);
    const int64_t c = c_at_ + (sequences_.first + b) * hidden_;
    Base::copy_columns(buffers_.dc + (sequences_.first + b) * padded_, w_.call_.grad_c_0 + c, units_);
  }
  for (int64_t b = later; b < n; ++b) {
    T* dh = scratch_.dh + b * ld_;
    std::fill(dh + columns_.first, dh + padded_end_, T(0));
    if (w_.call_.grad_h_n) Base::copy_columns(w_.call_.grad_h_n + at + b * out_, dh, columns_);
  }
}

template <typename T>
void BackwardWave<T>::LaneRun::add_cell_gradient(int64_t s) {
  const Input<T> grad_c = w_.gradients_of(w_.call_.grad_c, layer_index_);
  if (!grad_c.data) return;
  for (int64_t b = 0; b < rows_at(s); ++b) {
    const T* given = grad_c.row(w_.shape_, time(s), sequences_.first + b) + direction_ * hidden_;
    T* dc = buffers_.dc + (sequences_.first + b) * padded_;
    for (int64_t n = units_.first; n < units_.last; ++n) dc[n] += given[n];
  }
}

template <typename T>
void BackwardWave<T>::LaneRun::step(int64_t s, const Range& steps) {
  const int64_t n = rows_at(s), ring_row = ring_row_at(s);
  make_room(s);
  recurrent_gradient(s);
  const T* dy = scratch_.dy + rows_between(steps.first, s) * ld_;
  if (projects_) {
    T* projected = buffers_.dh + ring_row * lddr_;
    for (int64_t b = 0; b < n; ++b) {
      for (int64_t j = columns_.first; j < columns_.last; ++j) {
        projected[b * lddr_ + j] = scratch_.dh[b * ld_ + j] + dy[b * ld_ + j];
      }
    }
    publish(progress_.steps, hand_overs_before(s) + 1);
    w_.wait_slices(position_, place_.batch_slice, &Progress::steps, hand_overs_before(s) + 1);
    const Range panels = unit_panels(kWidth);
    w_.kernels_.product({
        .panels = {buffers_.weight_hr, w_.storage_},
        .width = kWidth,
        .first_panel = panels.first,
        .last_panel = panels.last,
        .a = projected,
        .lda = lddr_,
        .rows = n,
        .unroll_rows = active_at(s),
        .inner = out_,
        .rounded = w_.call_.bf16_activations,
        .operands = scratch_.operands,
        .c = scratch_.dh,
        .ldc = ld_,
    });
    dy = nullptr;
  }
  add_cell_gradient(s);
  const T *gates = gates_of(s), *c_next = c_after(s);
  with_c_before(s, [&](int64_t row, int64_t rows, const T* c) {
    w_.kernels_.step_backward({
        .first_unit_block = unit_blocks_.first,
        .last_unit_block = unit_blocks_.last,
        .rows = rows,
        .hidden = hidden_,
        .padded_hidden = padded_,
        .gates = gates + row * 4 * padded_,
        .dh = scratch_.dh + row * ld_,
        .lddh = ld_,
        .dy = dy ? dy + row * ld_ : nullptr,
        .lddy = ld_,
        .c_next = c_next + row * padded_,
        .c = c,
        .dc = buffers_.dc + (sequences_.first + row) * padded_,
        .dgates = buffers_.dgates + (ring_row + row) * lddg_,
        .lddg = lddg_,
        .projected = projects_ ? buffers_.hidden + (ring_row + row) * ldm_ : nullptr,
        .ldm = ldm_,
    });
  });
  for (const int64_t b : own_resets_before(s)) {
    T* dc = buffers_.dc + b * padded_;
    std::fill(dc + units_.first, dc + units_.last, T(0));
  }
  publish(progress_.steps, hand_overs_before(s - 1));
}

template <typename T>
void BackwardWave<T>::LaneRun::input_gradient(const Range& steps) {
  const Rows to = w_.input_gradient(layer_index_, direction_);
  const StackShape& shape = w_.shape_;
  const bool skips = shape.link == LinkKind::skip && layer_index_ > 0;
  if (!to.data) return;
  const Range panels = w_.own_panels(position_, place_, layer_.input, kWidth);
  const Range columns = w_.columns_of(panels, kWidth, layer_.input);
  w_.wait_slices(position_, place_.batch_slice, &Progress::steps, hand_overs_before(steps.first - 1));
  for_each_run(steps, sequences_, [&](int64_t first, int64_t rows, int64_t ring_row) {
    w_.kernels_.product({
        .panels = {buffers_.weight_ih, w_.storage_},
        .width = kWidth,
        .first_panel = panels.first,
        .last_panel = panels.last,
        .a = buffers_.dgates + ring_row * lddg_,
        .lda = lddg_,
        .rows = rows,
        .unroll_rows = w_.shape_.rows(),
        .inner = 4 * padded_,
        .rounded = w_.call_.bf16_activations,
        .operands = scratch_.operands,
        .c = scratch_.dy,
        .ldc = ld_,
    });
    if (shape.link == LinkKind::plain && !shape.has_lengths()) {
      for (int64_t r = 0; r < rows; ++r) {
        Base::copy_columns(scratch_.dy + r * ld_, to.data + (first + r) * to.stride, columns);
      }
      return;
    }
    int64_t t = times_of(steps).first;
    for (int64_t r = 0; r < rows; ++r) {
      while (first + r >= shape.first_row(t + 1)) ++t;
      const int64_t b = first + r - shape.first_row(t);
      T* const row = scratch_.dy + r * ld_;
      if (layer_index_ > 0) {
        const int64_t below = columns_from_below(shape, layer_index_);
        const Range part{std::min(columns.first, below), std::min(columns.last, below)};
        if (adds_input(shape, layer_index_) && direction_ == 0) add_gradient_past(row, t, b, part);
        Base::copy_columns(row, to.data + (first + r) * to.stride, part);
        if (skips) add_to_x(row, t, b, {std::max(columns.first, below), std::max(columns.last, below)});
      } else if (shape.link == LinkKind::skip && shape.depth() > 1) {
        add_to_x(row, t, b, columns);
      } else {
        Base::copy_columns(row, to.data + (shape.caller_row(t) + b) * to.stride, columns);
      }
    }
  });
}

template <typename T>
void BackwardWave<T>::LaneRun::add_gradient_past(T* row, int64_t t, int64_t b, const Range& columns) const {
  const auto add = [&](const T* given) {
    for (int64_t j = columns.first; j < columns.last; ++j) row[j] += given[j];
  };
  if (layer_index_ + 1 == w_.shape_.depth()) {
    if (w_.call_.grad_output.data) add(w_.call_.grad_output.row(w_.shape_, t, b));
    return;
  }
  for (int64_t d = 0; d < w_.shape_.directions; ++d) {
    const Rows above = w_.input_gradient(layer_index_ + 1, d);
    add(above.data + (w_.shape_.first_row(t) + b) * above.stride);
  }
}

template <typename T>
void BackwardWave<T>::LaneRun::add_to_x(const T* row, int64_t t, int64_t b, const Range& columns) const {
  const Rows x = w_.input_gradient(0, direction_);
  if (!x.data || columns.size() <= 0) return;
  const int64_t before = layer_.input - w_.shape_.layers[0].input;  // columns of the layer below
  T* const to = x.data + (w_.shape_.caller_row(t) + b) * x.stride - before;
  if (layer_index_ + 1 == w_.shape_.depth()) return Base::copy_columns(row, to, columns);
  for (int64_t j = columns.first; j < columns.last; ++j) to[j] += row[j];
}

template <typename T>
Schedule backward(const BackwardCall<T>& call, const Workers& workers, Platform& platform) {
  return BackwardWave<T>(call, workers, platform).run();
}
template Schedule backward(const BackwardCall<float>&, const Workers&, Platform&);
template Schedule backward(const BackwardCall<double>&, const Workers&, Platform&);

}  // namespace stacked_lstm::cpu
