// csrc/cpu/weight_gradients.cpp: the gradients of a lane's weights, one gradient block after the other: each worker's
// share of the gate rows. See backward_wave.h.
#include "backward_wave.h"

namespace stacked_lstm::cpu {

template <typename T>
void BackwardWave<T>::LaneRun::make_room(int64_t s) {
  while (rows_of({s, std::min(oldest_.last + 1, w_.shape_.steps)}) > w_.ring_rows_) {
    w_.wait_everybody(position_, &Progress::gradient_blocks, ++released_);
    oldest_ = gradient_block_before(oldest_.first);
  }
}

template <typename T>
void BackwardWave<T>::LaneRun::finish_gradient_blocks(int64_t first_step, int64_t chunks) {
  if (gradient_block_.first < first_step) return;
  const bool wanted = !w_.call_.gradients.empty();
  if (wanted) w_.wait_everybody(position_, &Progress::chunks, chunks);
  for (; gradient_block_.first >= first_step; gradient_block_ = gradient_block_before(gradient_block_.first)) {
    if (wanted) weight_gradients();
    publish(progress_.gradient_blocks, ++finished_);
  }
}

template <typename T>
void BackwardWave<T>::LaneRun::weight_gradients() {
  const LaneGradients<T>& g = w_.call_.gradients[static_cast<size_t>(index_)];
  GradientBlockRows gradient_block;
  int64_t runs = 0;
  for_each_run(gradient_block_, everyone(), [&](int64_t, int64_t rows, int64_t ring_row) {
    if (runs == 0) gradient_block.parting = rows;
    gradient_block.ring_row[runs++] = ring_row, gradient_block.rows += rows;
  });
  const int64_t slices = w_.slices(position_), workers = slices * w_.schedule_.batch_slices;
  const int64_t part = place_.batch_slice * slices + place_.slice;
  const Range units = share_of(hidden_, part, workers);
  if (units.size() > 0) {
    input_weight_gradient(g, units, gradient_block);
    recurrent_weight_gradient(g, units, gradient_block);
    if (g.bias_ih) bias_gradient(g, units, gradient_block);
  }
  if (projects_) {
    const Range rows = share_of(out_, part, workers);
    if (rows.size() > 0) projection_gradient(g, rows, gradient_block);
  }
}

template <typename T>
void BackwardWave<T>::LaneRun::add_product(T* c, int64_t columns, const Range& units,
                                           const GradientBlockRows& gradient_block, const T* b, int64_t ldb) {
  GradientProduct<T> product{
      .c = c,
      .ldc = columns,
      .a = buffers_.dgates + gradient_block.ring_row[0] * lddg_,
      .a_rest = buffers_.dgates + gradient_block.ring_row[1] * lddg_,
      .lda = lddg_,
      .b = b,
      .b_rest = b + gradient_block.parting * ldb,
      .ldb = ldb,
      .rows = gradient_block.rows,
      .parting = gradient_block.parting,
      .m = 4 * hidden_,
      .n = columns,
      .accumulate = !first_gradient_block(),
      .rounded = w_.call_.bf16_activations,
      .scratch = scratch_.large,
  };
  if (units.size() == hidden_ && padded_ == hidden_) return w_.kernels_.gradient(product);  // all gates in one
  product.m = units.size();
  product.a += units.first, product.a_rest += units.first, product.c += units.first * columns;
  for (int64_t gate = 0; gate < 4; ++gate) {
    w_.kernels_.gradient(product);
    product.a += padded_, product.a_rest += padded_, product.c += hidden_ * columns;
  }
}

template <typename T>
void BackwardWave<T>::LaneRun::input_weight_gradient(const LaneGradients<T>& g, const Range& units,
                                                     const GradientBlockRows& gradient_block) {
  const StackShape& shape = w_.shape_;
  const Input<T>& x = w_.call_.input;
  const int64_t row = shape.first_row(times_of(gradient_block_).first), width = layer_.input;
  // If x is a matrix, it is read in place.
  const bool matrix =
      x.row_stride >= width && !shape.has_lengths() && (shape.packed() || x.step_stride == shape.batch * x.row_stride);
  const LayerRows<const T> below = w_.below(layer_index_);
  if (layer_index_ == 0 && matrix) {
    add_product(g.weight_ih, width, units, gradient_block, x.data + row * x.row_stride, x.row_stride);
  } else if (layer_index_ > 0 && shape.link != LinkKind::skip && !w_.masks_input(w_.call_.links, layer_index_)) {
    add_product(g.weight_ih, width, units, gradient_block, below.data + row * below.stride, below.stride);
  } else {
    copy_gradient_block(width, [&](const Range& step, T* to, int64_t ldo) {
      return w_.copy_input(w_.call_.input, w_.call_.links, below, index_, everyone(), step, to, ldo);
    });
    add_product(g.weight_ih, width, units, gradient_block, scratch_.copied, width + kRowPadding);
  }
}

template <typename T>
void BackwardWave<T>::LaneRun::recurrent_weight_gradient(const LaneGradients<T>& g, const Range& units,
                                                         const GradientBlockRows& gradient_block) {
  const StackShape& shape = w_.shape_;
  const Range times = times_of(gradient_block_);
  // Where a sequence is reset, h of the step before does not count.
  const bool reset = w_.call_.resets.any(times.first + direction_, times.last + direction_);
  if (!shape.packed() && gradient_block_.first > 0 && !reset) {
    const LayerRows<const T> h = w_.output_of(layer_index_);
    const T* const first = h.row(shape, times.first + (direction_ ? 1 : -1), 0) + direction_ * out_;
    add_product(g.weight_hh, out_, units, gradient_block, first, h.stride);
  } else {
    copy_gradient_block(
        out_, [&](const Range& step, T* to, int64_t ldo) { return copy_h_before(everyone(), step, to, ldo); });
    add_product(g.weight_hh, out_, units, gradient_block, scratch_.copied, out_ + kRowPadding);
  }
}

template <typename T>
void BackwardWave<T>::LaneRun::bias_gradient(const LaneGradients<T>& g, const Range& units,
                                             const GradientBlockRows& gradient_block) {
  for (int64_t gate = 0; gate < 4; ++gate) {
    const int64_t rest = gradient_block.rows - gradient_block.parting, column = gate * padded_ + units.first;
    T *sum = g.bias_ih + gate * hidden_ + units.first, *same = g.bias_hh + gate * hidden_ + units.first;
    const auto add = [&](int64_t ring_row, int64_t rows, bool accumulate) {
      w_.kernels_.sum_rows(buffers_.dgates + ring_row * lddg_ + column, lddg_, rows, units.size(), accumulate, sum);
    };
    add(gradient_block.ring_row[0], gradient_block.parting, !first_gradient_block());
    if (rest > 0) add(gradient_block.ring_row[1], rest, true);
    if (gradient_block_.first == 0) std::copy(sum, sum + units.size(), same);
  }
}

template <typename T>
void BackwardWave<T>::LaneRun::projection_gradient(const LaneGradients<T>& g, const Range& own,
                                                   const GradientBlockRows& gradient_block) {
  const auto [first, rest] = gradient_block.ring_row;
  w_.kernels_.gradient({
      .c = g.weight_hr + own.first * hidden_,
      .ldc = hidden_,
      .a = buffers_.dh + first * lddr_ + own.first,
      .a_rest = buffers_.dh + rest * lddr_ + own.first,
      .lda = lddr_,
      .b = buffers_.hidden + first * ldm_,
      .b_rest = buffers_.hidden + rest * ldm_,
      .ldb = ldm_,
      .rows = gradient_block.rows,
      .parting = gradient_block.parting,
      .m = own.size(),
      .n = hidden_,
      .accumulate = !first_gradient_block(),
      .rounded = w_.call_.bf16_activations,
      .scratch = scratch_.large,
  });
}

template void BackwardWave<float>::LaneRun::make_room(int64_t);
template void BackwardWave<float>::LaneRun::finish_gradient_blocks(int64_t, int64_t);
template void BackwardWave<double>::LaneRun::make_room(int64_t);
template void BackwardWave<double>::LaneRun::finish_gradient_blocks(int64_t, int64_t);

}  // namespace stacked_lstm::cpu
