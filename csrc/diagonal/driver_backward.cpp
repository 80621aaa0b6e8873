// csrc/diagonal/driver_backward.cpp: the backward pass of the diagonal schedule. See driver.h.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "driver.h"

namespace stacked_lstm::diagonal {
namespace {

template <typename T>
class Backward : DiagonalDriver<T> {
  using Base = DiagonalDriver<T>;
  using Base::accumulator_;
  using Base::batch_;
  using Base::call_;
  using Base::chunk_rows_;
  using Base::depth_;
  using Base::directions_;
  using Base::hidden_;
  using Base::kernels_;
  using Base::lanes_;
  using Base::output_;
  using Base::padded_;
  using Base::places_;
  using Base::plan_;
  using Base::projection_;
  using Base::rows_;
  using Base::shape_;
  using Base::storage_;
  using typename Base::A;
  using typename Base::LaneProduct;

 public:
  Backward(const Call& call, const Kept& kept, const IncomingGradients& incoming, bool input_grad, bool weight_grad,
           DiagonalCounts& counts)
      : Base(call, counts),
        reserve_(kept.reserve.contiguous()),
        parts_(reserve_, call),
        top_(kept.output.contiguous()),
        grad_output_(contiguous(incoming.output)),
        grad_h_n_(contiguous(incoming.h_n)),
        h_0_(call.h_0.contiguous()),
        c_0_(call.c_0.contiguous()),
        incoming_(incoming),
        input_grad_(input_grad),
        weight_grad_(weight_grad),
        recompute_(call.saving == Saving::recompute) {}

  Gradients run() {
    TORCH_CHECK(incoming_.h.empty() && incoming_.c.empty(), "the diagonal schedule takes no gradients of states");
    allocate();
    prepare_inputs();
    for (int64_t stage = plan_.stages() - 1; stage >= 0; --stage) {
      project(stage);
      if (recompute_) recompute_gates(stage);
      for (int64_t s = plan_.length_of_stage(stage) - 1; s >= 0; --s) step(stage, s);
      const Diagonals::Lanes lanes = plan_.lanes(stage);
      for (int64_t lane = lanes.first; lane < lanes.first + lanes.count; ++lane) {
        if (weight_grad_ && plan_.chunk_of(stage, lane) == 0) finish(lane);
      }
    }
    recurrent_product_.run(*this, 0, lanes_, batch_);
    if (input_grad_) finish_input();
    result_.h_0 = recurrent_.to(scalar_type<T>());
    result_.c_0 = grad_c_.to(scalar_type<T>());
    return std::move(result_);
  }

 private:
  void allocate() {
    bias_ = recompute_ ? Base::stacked_bias() : Tensor();
    grad_c_ = incoming_.c_n ? at::empty({lanes_, batch_, hidden_}, accumulator_).copy_(*incoming_.c_n)
                            : at::zeros({lanes_, batch_, hidden_}, accumulator_);
    // Zeros: a recurrent product may also take rows and lanes that have had no step yet. Nothing reads their results.
    grad_gates_ = at::zeros({lanes_, batch_, 4 * hidden_}, storage_);
    recurrent_ = at::empty({lanes_, batch_, output_}, accumulator_);
    recurrent_product_ = LaneProduct(recurrent_, grad_gates_, Base::stacked(Weight::hh));
    // Two directions: one layer runs at a time, so one buffer holds the gradients of each in turn.
    all_grad_gates_ = at::empty({directions_ == 2 ? 1 : depth_, rows_, directions_ * 4 * hidden_}, storage_);
    if (depth_ > 1) {
      above_ = directions_ == 2 ? at::empty({1, rows_, 2 * output_}, accumulator_)
                                : at::empty({depth_ - 1, chunk_rows_, output_}, accumulator_);
      if (directions_ == 1) upper_weights_ = Base::stacked(Weight::ih, 1);
    }
    if (projection_ > 0) {
      grad_h_ = at::empty({lanes_, batch_, projection_}, storage_);
      all_grad_h_ = at::empty({lanes_, rows_, projection_}, storage_);
      grad_cell_h_ = at::empty({lanes_, batch_, hidden_}, accumulator_);
      cell_h_ = at::empty({lanes_, rows_, hidden_}, storage_);
      projection_product_ = LaneProduct(grad_cell_h_, grad_h_, Base::stacked(Weight::hr));
    }
    if (recompute_) {
      input_part_ = at::empty({lanes_, chunk_rows_, 4 * hidden_}, accumulator_);
      recurrent_part_ = at::empty({lanes_, chunk_rows_, 4 * hidden_}, accumulator_);
    }
    if (weight_grad_) {
      for (const Tensor& w : call_.weights) result_.weights.push_back(at::empty(w.sizes(), storage_));
    }
    if (!input_grad_) result_.input = at::empty({0}, storage_);
  }

  // h of a layer, all rows: (rows, D·output).
  const T* h_of(int64_t layer) const {
    return layer + 1 == depth_ ? const_data<T>(top_) : parts_.h(layer);
  }

  // Makes what the products over all steps read: h(t-1) of every lane, and the inputs of layers 1 and up, masked by
  // dropout.
  void prepare_inputs() {
    if (!weight_grad_ && !recompute_) return;
    previous_ = at::empty({lanes_, rows_, output_}, storage_);
    std::vector<gates::CopyCell<T>> copies;
    const auto flush = [&](int64_t limit, int64_t width) {
      if (static_cast<int64_t>(copies.size()) <= limit) return;
      Base::launch(kernels_.copy, width, copies);
      copies.clear();
    };
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      copies_of_previous(shape_, lane, h_of(Base::layer_of(lane)) + Base::column_of(lane),
                         const_data<T>(h_0_) + lane * batch_ * output_, data<T>(previous_) + lane * rows_ * output_,
                         [&](const gates::CopyCell<T>& cell) {
                           copies.push_back(cell);
                           flush(kCopiesALaunch - 1, output_);
                         });
    }
    flush(0, output_);

    if (!call_.seed) return;
    const int64_t stride = directions_ * output_;
    masked_ = at::empty({depth_ - 1, rows_, stride}, storage_);
    for (int64_t layer = 0; layer + 1 < depth_; ++layer) {
      if (!Base::mask(layer).seed) continue;
      copies_of_masked(shape_, layer, Base::mask(layer), h_of(layer), data<T>(masked_) + layer * rows_ * stride,
                       [&](const gates::CopyCell<T>& cell) {
                         copies.push_back(cell);
                         flush(kCopiesALaunch - 1, stride);
                       });
    }
    flush(0, stride);
  }

  int64_t continued_rows(int64_t lane, int64_t t) const { return driver::continued_rows(shape_, lane, t); }
  // How many rows of step t continue in the step after. The other rows' sequences end at t.
  int64_t carried_rows(int64_t lane, int64_t t) const {
    if (lane % directions_ == 0) return t + 1 < shape_.steps ? shape_.active(t + 1) : 0;
    return t > 0 ? shape_.active(t) : 0;
  }

  // The input of a layer, all rows: (rows, input).
  Tensor input_of(int64_t layer) const {
    if (layer == 0) return Base::input_;
    if (Base::mask(layer - 1).seed) return masked_.select(0, layer - 1);
    return parts_.h_rows(layer - 1);
  }

  // The gate gradients of a lane, of all steps: (rows, 4H), rows D·4H apart.
  Tensor grad_gates_of(int64_t lane) const {
    return all_grad_gates_.select(0, directions_ == 2 ? 0 : lane)
        .narrow(1, lane % directions_ * 4 * hidden_, 4 * hidden_);
  }

  // Computes the gradients that the layers of a stage get from the layers above them.
  void project(int64_t stage) {
    const Diagonals::Lanes lanes = plan_.lanes(stage);
    if (directions_ == 2) {
      const int64_t layer = Base::layer_of(lanes.first);
      if (layer + 1 == depth_ || plan_.chunk_of(stage, lanes.first) + 1 < plan_.chunks()) return;
      const Tensor weights =
          at::cat({Base::weight(lanes.first + 2, Weight::ih), Base::weight(lanes.first + 3, Weight::ih)});
      Base::multiply(above_, all_grad_gates_, single(weights));
      return;
    }
    int64_t lane = lanes.first;
    const int64_t last = std::min(lanes.first + lanes.count, depth_ - 1);
    const auto full = [&](int64_t k) {
      return !shape_.packed() && plan_.length(plan_.chunk_of(stage, k)) == plan_.chunk_steps;
    };
    while (lane < last) {
      if (full(lane)) {
        // One strided view holds all layers: the next layer's rows lie one whole sequence on and one chunk back.
        const int64_t count = last - lane, row = 4 * hidden_;
        const auto from = Base::chunk_rows(lane, plan_.chunk_of(stage, lane));
        const Tensor grads = all_grad_gates_.as_strided({count, from.count, row}, {(rows_ - from.count) * row, row, 1},
                                                        ((lane + 1) * rows_ + from.first) * row);
        Base::multiply(above_.narrow(0, lane, count).narrow(1, 0, from.count), grads,
                       upper_weights_.narrow(0, lane, count));
        return;
      }
      const auto rows = Base::chunk_rows(lane, plan_.chunk_of(stage, lane));
      Base::multiply(above_.narrow(0, lane, 1).narrow(1, 0, rows.count),
                     all_grad_gates_.narrow(0, lane + 1, 1).narrow(1, rows.first, rows.count),
                     upper_weights_.narrow(0, lane, 1));
      ++lane;
    }
  }

  void recompute_gates(int64_t stage) {
    const Diagonals::Lanes lanes = plan_.lanes(stage);
    for (int64_t lane = lanes.first; lane < lanes.first + lanes.count; ++lane) {
      const auto rows = Base::chunk_rows(lane, plan_.chunk_of(stage, lane));
      Base::multiply(input_part_.narrow(0, lane, 1).narrow(1, 0, rows.count),
                     single(input_of(Base::layer_of(lane)).narrow(0, rows.first, rows.count)),
                     single(Base::weight(lane, Weight::ih).t()));
      Base::multiply(recurrent_part_.narrow(0, lane, 1).narrow(1, 0, rows.count),
                     previous_.narrow(0, lane, 1).narrow(1, rows.first, rows.count),
                     single(Base::weight(lane, Weight::hh).t()));
    }
  }

  void step(int64_t stage, int64_t s) {
    const Diagonals::Lanes lanes = plan_.lanes(stage, s);
    int64_t most = 0, carried = 0;
    cells_.clear();
    collects_.clear();
    for (int64_t lane = lanes.first; lane < lanes.first + lanes.count; ++lane) {
      const int64_t t = Base::time(lane, stage, s), row = shape_.first_row(t), rows = shape_.active(t);
      const int64_t layer = Base::layer_of(lane), stride = directions_ * output_;
      const int64_t chunk_row = Base::chunk_rows(lane, plan_.chunk_of(stage, lane)).first;

      gates::Incoming<T> incoming{};
      if (layer + 1 == depth_) {
        incoming.grad_output =
            grad_output_.defined() ? const_data<T>(grad_output_) + row * stride + Base::column_of(lane) : nullptr;
      } else {
        incoming.above = directions_ == 2 ? const_data<A>(above_) + row * stride + Base::column_of(lane)
                                          : const_data<A>(above_) + (layer * chunk_rows_ + row - chunk_row) * output_;
      }
      incoming.recurrent = const_data<A>(recurrent_) + lane * batch_ * output_;
      incoming.grad_last = grad_h_n_.defined() ? const_data<T>(grad_h_n_) + lane * batch_ * output_ : nullptr;
      incoming.carried = carried_rows(lane, t);
      incoming.element = Base::element(lane, t);
      most = std::max(most, rows);
      carried = std::max(carried, incoming.carried);

      gates::BackwardCell<T> cell{};
      if (projection_ > 0) {
        collects_.push_back({incoming, data<T>(grad_h_) + lane * batch_ * projection_,
                             data<T>(all_grad_h_) + (lane * rows_ + row) * projection_, rows});
        cell.incoming.recurrent = const_data<A>(grad_cell_h_) + lane * batch_ * hidden_;
        cell.incoming.carried = rows;
        cell.cell_h = data<T>(cell_h_) + (lane * rows_ + row) * hidden_;
      } else {
        cell.incoming = incoming;
      }
      if (recompute_) {
        const int64_t at = (lane * chunk_rows_ + row - chunk_row) * 4 * hidden_;
        cell.input_part = const_data<A>(input_part_) + at;
        cell.recurrent_part = const_data<A>(recurrent_part_) + at;
        cell.bias = bias_.defined() ? const_data<A>(bias_) + lane * 4 * hidden_ : nullptr;
      } else {
        cell.gates = parts_.gates(lane) + 4 * row * padded_;
      }
      const A* const c = parts_.c(lane);
      cell.c = c + row * padded_;
      cell.continued = continued_rows(lane, t);
      if (cell.continued > 0) cell.c_before = c + shape_.first_row(lane % directions_ ? t + 1 : t - 1) * padded_;
      cell.c_0 = const_data<T>(c_0_) + lane * batch_ * hidden_;
      cell.grad_c = data<A>(grad_c_) + lane * batch_ * hidden_;
      cell.grad_gates = data<T>(grad_gates_) + lane * batch_ * 4 * hidden_;
      cell.all_grad_gates = data<T>(all_grad_gates_) +
                            ((directions_ == 2 ? 0 : layer) * rows_ + row) * directions_ * 4 * hidden_ +
                            lane % directions_ * 4 * hidden_;
      cell.rows = rows;
      cells_.push_back(cell);
    }
    if (carried > 0) recurrent_product_.run(*this, lanes.first, lanes.count, carried);
    if (projection_ > 0) {
      Base::launch(kernels_.collect, projection_, collects_);
      projection_product_.run(*this, lanes.first, lanes.count, most);
    }
    Base::launch(kernels_.backward, hidden_, cells_);
  }

  // The weight gradients of a lane after its last step: each is one product over all rows.
  void finish(int64_t lane) {
    const auto grad = [&](Weight name) -> Tensor& { return result_.weights[places_.at(lane, name)]; };
    const Tensor gates = grad_gates_of(lane), gates_t = single(gates.t());
    Base::multiply_and_round(single(grad(Weight::ih)), gates_t, single(input_of(Base::layer_of(lane))));
    Base::multiply_and_round(single(grad(Weight::hh)), gates_t, previous_.narrow(0, lane, 1));
    if (call_.options.bias) {
      at::sum_out(grad(Weight::bias_ih), gates, at::IntArrayRef{0});
      grad(Weight::bias_hh).copy_(grad(Weight::bias_ih));
    }
    if (projection_ > 0) {
      Base::multiply_and_round(single(grad(Weight::hr)), single(all_grad_h_.select(0, lane).t()),
                               cell_h_.narrow(0, lane, 1));
    }
  }

  void finish_input() {
    result_.input = at::empty(call_.input.sizes(), storage_);
    const Tensor& first = Base::weight(0, Weight::ih);
    const Tensor weights = directions_ == 2 ? at::cat({first, Base::weight(1, Weight::ih)}) : first;
    Base::multiply_and_round(single(result_.input.view({rows_, call_.input.size(-1)})), all_grad_gates_.narrow(0, 0, 1),
                             single(weights));
  }

  const Tensor reserve_;
  const GpuReserve<T> parts_;
  const Tensor top_, grad_output_, grad_h_n_, h_0_, c_0_;
  const IncomingGradients& incoming_;
  const bool input_grad_, weight_grad_, recompute_;
  Gradients result_;
  Tensor bias_;            // (lanes, 4H), to recompute
  Tensor grad_c_;          // (lanes, B, H): dL/dc of the state before the last step taken
  Tensor grad_gates_;      // (lanes, B, 4H): of the last step taken
  Tensor all_grad_gates_;  // (L, rows, 4H), two directions: (1, rows, 2·4H): of all steps
  Tensor recurrent_;       // (lanes, B, P or H): W_hhᵀ·grad_gates
  Tensor above_;  // (L-1, rows of a chunk, H), two directions: (1, rows, 2·H): W_ihᵀ·grad_gates of the layer above
  Tensor upper_weights_;                               // (L-1, 4H, H): W_ih of layers 1 and up
  Tensor grad_h_, all_grad_h_, grad_cell_h_, cell_h_;  // with a projection; see gates.h
  Tensor input_part_, recurrent_part_;                 // (lanes, rows of a chunk, 4H), to recompute
  Tensor previous_;                                    // (lanes, rows, P or H): h(t-1)
  Tensor masked_;                                      // (L-1, rows, D·(P or H)): inputs of layers 1 and up
  LaneProduct recurrent_product_, projection_product_;
  std::vector<gates::BackwardCell<T>> cells_;
  std::vector<gates::CollectCell<T>> collects_;
};

}  // namespace

Gradients backward(const Call& call, const Kept& kept, const IncomingGradients& incoming, bool input_grad,
                   bool weight_grad, DiagonalCounts& counts) {
  const Guards guards(call.input.device());
  if (call.shape.batch == 0) {
    counts.schedule = plan(call.shape, call.input.scalar_type() == at::kDouble ? sizeof(double) : sizeof(float));
    const auto zeros = [&](at::IntArrayRef sizes) { return at::zeros(sizes, call.input.options()); };
    Gradients none{
        input_grad ? zeros(call.input.sizes()) : zeros({0}), zeros(call.h_0.sizes()), zeros(call.c_0.sizes()), {}};
    if (weight_grad) {
      for (const Tensor& w : call.weights) none.weights.push_back(zeros(w.sizes()));
    }
    return none;
  }
  return with_storage(call.input.scalar_type(), [&](auto zero) {
    return Backward<decltype(zero)>(call, kept, incoming, input_grad, weight_grad, counts).run();
  });
}

}  // namespace stacked_lstm::diagonal
