// csrc/diagonal/driver_forward.cpp: the forward pass of the diagonal schedule. See driver.h.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "driver.h"

namespace stacked_lstm::diagonal {
namespace {

template <typename T>
class Forward : DiagonalDriver<T> {
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
  using Base::plan_;
  using Base::projection_;
  using Base::rows_;
  using Base::shape_;
  using Base::storage_;
  using typename Base::A;
  using typename Base::LaneProduct;

 public:
  Forward(const Call& call, DiagonalCounts& counts) : Base(call, counts) {}

  Results run() {
    allocate();
    for (int64_t stage = 0; stage < plan_.stages(); ++stage) {
      project(stage);
      const int64_t length = plan_.length_of_stage(stage);
      for (int64_t s = 0; s < length; ++s) step(stage, s);
    }
    return {output_all_, h_, c_.to(scalar_type<T>()), reserve_};
  }

 private:
  void allocate() {
    output_all_ = at::empty(call_.output_sizes(), storage_);
    const Saving saving = call_.saving;
    const int64_t kept = reserve_elements(shape_, saving, call_.states, sizeof(T), sizeof(A));
    // No kernel writes the padding. Zeros there make a reserve bitwise equal every time.
    reserve_ = hidden_ == padded_ ? at::empty({kept}, accumulator_) : at::zeros({kept}, accumulator_);
    parts_ = GpuReserve<T>(reserve_, call_);
    h_ = at::empty({lanes_, batch_, output_}, storage_).copy_(call_.h_0);
    c_ = at::empty({lanes_, batch_, hidden_}, accumulator_).copy_(call_.c_0);
    bias_ = Base::stacked_bias();

    const Tensor recurrent = at::empty({lanes_, batch_, 4 * hidden_}, accumulator_);
    recurrent_ = data<A>(recurrent);
    recurrent_product_ = LaneProduct(recurrent, h_, Base::stacked(Weight::hh).transpose(1, 2));
    if (projection_ > 0) {
      cell_h_ = at::empty({lanes_, batch_, hidden_}, storage_);
      projected_ = at::empty({lanes_, batch_, projection_}, storage_);
      projection_product_ = LaneProduct(projected_, cell_h_, Base::stacked(Weight::hr).transpose(1, 2));
    }
    const int64_t input_rows = shape_.first_row(std::min(plan_.input_chunks * plan_.chunk_steps, shape_.steps));
    first_input_ = at::empty({directions_, input_rows, 4 * hidden_}, accumulator_);
    if (depth_ > 1 && directions_ == 1) {
      above_ = at::empty({depth_ - 1, chunk_rows_, output_}, storage_);
      const Tensor input = at::empty({depth_ - 1, chunk_rows_, 4 * hidden_}, accumulator_);
      upper_input_ = data<A>(input);
      input_product_ = LaneProduct(input, above_, Base::stacked(Weight::ih, 1).transpose(1, 2));
    } else if (depth_ > 1) {
      above_ = at::empty({2, rows_, 2 * output_}, storage_);  // two layers: one is read while the other is written
    }
  }

  void project(int64_t stage) {
    const Diagonals::Lanes lanes = plan_.lanes(stage);
    // Lanes whose whole input exists already: one product computes several chunks.
    const int64_t direct = directions_ == 2 ? 2 : lanes.first == 0 ? 1 : 0;
    const int64_t chunk = plan_.chunk_of(stage, lanes.first);
    if (chunk % plan_.input_chunks == 0) {
      for (int64_t lane = lanes.first; lane < lanes.first + direct; ++lane) {
        const auto rows = Base::chunk_rows(lane, chunk, plan_.input_chunks);
        const int64_t direction = lane % directions_, layer = Base::layer_of(lane);
        const Tensor source = layer == 0 ? Base::input_ : above_.select(0, (layer - 1) % 2);
        Base::multiply(single(first_input_.select(0, direction).narrow(0, 0, rows.count)),
                       single(source.narrow(0, rows.first, rows.count)), single(Base::weight(lane, Weight::ih).t()));
        first_input_row_[direction] = rows.first;
      }
    }
    const int64_t first = std::max<int64_t>(lanes.first, 1), last = lanes.first + lanes.count;
    if (directions_ == 2 || first >= last) return;
    int64_t rows = 0;
    for (int64_t lane = first; lane < last; ++lane) {
      rows = std::max(rows, Base::chunk_rows(lane, plan_.chunk_of(stage, lane)).count);
    }
    input_product_.run(*this, first - 1, last - first, rows);
  }

  void step(int64_t stage, int64_t s) {
    const Diagonals::Lanes lanes = plan_.lanes(stage, s);
    int64_t most = 0;
    cells_.clear();
    copies_.clear();
    for (int64_t lane = lanes.first; lane < lanes.first + lanes.count; ++lane) {
      const int64_t t = Base::time(lane, stage, s), row = shape_.first_row(t), rows = shape_.active(t);
      const int64_t layer = Base::layer_of(lane), direction = lane % directions_;
      const int64_t chunk_row = Base::chunk_rows(lane, plan_.chunk_of(stage, lane)).first;
      most = std::max(most, rows);

      gates::ForwardCell<T> cell{};
      cell.input_part = directions_ == 2 || layer == 0
                            ? data<A>(first_input_) +
                                  (direction * first_input_.size(1) + row - first_input_row_[direction]) * 4 * hidden_
                            : upper_input_ + ((layer - 1) * chunk_rows_ + row - chunk_row) * 4 * hidden_;
      cell.recurrent_part = recurrent_ + lane * batch_ * 4 * hidden_;
      cell.bias = bias_.defined() ? data<A>(bias_) + lane * 4 * hidden_ : nullptr;
      cell.c = data<A>(c_) + lane * batch_ * hidden_;
      if (A* const c = parts_.c(lane)) cell.saved_c = c + row * padded_;
      if (A* const saved = parts_.gates(lane)) cell.saved_gates = saved + 4 * row * padded_;
      cell.rows = rows;
      cell.element = Base::element(lane, t);

      T* const h = data<T>(h_) + lane * batch_ * output_;
      T* const output = output_row(lane, row);
      T* const above = above_row(lane, row, chunk_row);
      if (projection_ > 0) {
        cell.h = data<T>(cell_h_) + lane * batch_ * hidden_;
        const T* const source = data<T>(projected_) + lane * batch_ * output_;
        const int64_t stride = directions_ * output_;
        copies_.push_back({source, output_, nullptr, h, output_, rows, rows, false, cell.element});
        if (output) copies_.push_back({source, output_, nullptr, output, stride, rows, rows, false, cell.element});
        if (above) {
          copies_.push_back(
              {source, output_, nullptr, above, stride, rows, rows, cell.element.mask.seed != nullptr, cell.element});
        }
      } else {
        cell.h = h;
        cell.output = output;
        cell.above = above;
      }
      cells_.push_back(cell);
    }
    recurrent_product_.run(*this, lanes.first, lanes.count, most);
    Base::launch(kernels_.forward, hidden_, cells_);
    if (projection_ > 0) {
      projection_product_.run(*this, lanes.first, lanes.count, most, true);
      Base::launch(kernels_.copy, output_, copies_);
    }
  }

  // Where h of a row is stored for the caller or for backward; null if neither needs it.
  T* output_row(int64_t lane, int64_t row) const {
    const int64_t layer = Base::layer_of(lane), stride = directions_ * output_;
    if (layer + 1 == depth_) return data<T>(output_all_) + row * stride + Base::column_of(lane);
    T* const h = parts_.h(layer);
    return h ? h + row * stride + Base::column_of(lane) : nullptr;
  }
  // Where h of a row is stored for the layer above: with one direction a chunk, with two directions all steps.
  T* above_row(int64_t lane, int64_t row, int64_t chunk_row) const {
    const int64_t layer = Base::layer_of(lane);
    if (layer + 1 == depth_) return nullptr;
    if (directions_ == 1) return data<T>(above_) + (layer * chunk_rows_ + row - chunk_row) * output_;
    return data<T>(above_) + (layer % 2 * rows_ + row) * 2 * output_ + Base::column_of(lane);
  }

  Tensor output_all_, reserve_;
  GpuReserve<T> parts_;
  Tensor h_;                  // (lanes, B, P or H): of the last step taken
  Tensor c_;                  // (lanes, B, H)
  Tensor bias_;               // (lanes, 4H)
  Tensor cell_h_;             // (lanes, B, H), with a projection: h before the projection
  Tensor projected_;          // (lanes, B, P): h after the projection
  Tensor first_input_;        // (D, rows, 4H): W_ih·x of the lanes whose whole input exists already
  Tensor above_;              // (L-1, rows of a chunk, H): what the layer above reads; two directions: (2, rows, 2·H)
  A* recurrent_ = nullptr;    // (lanes, B, 4H)
  A* upper_input_ = nullptr;  // (L-1, rows of a chunk, 4H): W_ih·h of the layer below
  int64_t first_input_row_[2] = {0, 0};
  LaneProduct recurrent_product_, projection_product_, input_product_;
  std::vector<gates::ForwardCell<T>> cells_;
  std::vector<gates::CopyCell<T>> copies_;
};

}  // namespace

Results forward(const Call& call, DiagonalCounts& counts) {
  const Guards guards(call.input.device());
  if (call.shape.batch == 0) {
    counts.schedule = plan(call.shape, call.input.scalar_type() == at::kDouble ? sizeof(double) : sizeof(float));
    const auto empty = [&](at::IntArrayRef sizes) { return at::empty(sizes, call.input.options()); };
    const auto type = call.input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    return {empty(call.output_sizes()), empty(call.h_0.sizes()), empty(call.c_0.sizes()),
            at::empty({0}, call.input.options().dtype(type))};
  }
  return with_storage(call.input.scalar_type(), [&](auto zero) { return Forward<decltype(zero)>(call, counts).run(); });
}

}  // namespace stacked_lstm::diagonal
