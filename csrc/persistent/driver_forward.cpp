// csrc/persistent/driver_forward.cpp: the forward pass of the persistent kernels' driver. See driver.h.
#include "driver.h"

namespace stacked_lstm::persistent {
namespace {

template <typename T>
class Forward : PersistentDriver<T> {
  using Base = PersistentDriver<T>;
  using Base::batch_;
  using Base::call_;
  using Base::depth_;
  using Base::directions_;
  using Base::kernels_;
  using Base::plan_;
  using Base::rows_;
  using Base::shape_;
  using Base::states_;
  using Base::storage_;
  using Base::width_of;

 public:
  Forward(const Call& call, const Plan& plan, const PersistentTable& table, PersistentCounts& counts)
      : Base(call, plan, table, counts) {}

  Results run() {
    result_.output = at::empty(call_.output_sizes(), storage_);
    if (shape_.has_lengths()) result_.output.zero_();  // no launch writes the padding
    result_.h_n = at::empty(call_.h_0.sizes(), storage_);
    result_.c_n = at::empty(call_.c_0.sizes(), storage_);
    result_.reserve = make_reserve<T>(call_);
    parts_ = GpuReserve<T>(result_.reserve, call_);
    // The input is read where it is if its rows have no gaps; otherwise it is copied.
    input_ = call_.input.stride(-1) == 1 || call_.input.size(-1) == 1 ? call_.input : call_.input.contiguous();
    h_0_ = call_.h_0.contiguous();
    c_0_ = call_.c_0.contiguous();
    for (const Pass& pass : plan_.passes) run(pass);
    return std::move(result_);
  }

 private:
  struct Source {
    const T* x;
    int64_t step_stride, row_stride;
  };

  void run(const Pass& pass) {
    ForwardArguments<T> arguments{};
    Base::describe(arguments, pass);
    const int64_t width = width_of(pass.first_layer);
    Source source = stack_input();
    if (below_.defined()) source = rows_of(below_, width_of(pass.first_layer - 1));
    std::vector<Tensor> kept;  // until the launches are queued; then later work of the stream may write over them
    Tensor above;              // what the layer above reads
    for (int64_t layer = pass.first_layer; layer < pass.last_layer; ++layer) {
      const Tensor h = h_of(layer);
      above = h;
      const gates::Mask mask = mask_of(call_, layer);
      const bool residual = shape_.link == LinkKind::residual && layer > 0;
      if (residual && layer + 1 == depth_) {
        above = result_.output;
      } else if (residual || mask.seed) {
        above = at::empty({rows_, width}, storage_);
      }
      for (int64_t direction = 0; direction < directions_; ++direction) {
        const int64_t lane = layer * directions_ + direction, number = lane - pass.first_layer * directions_;
        ForwardLane<T>& l = arguments.lane[number];
        l.weight_ih = Base::weight_data(lane, Weight::ih);
        l.weight_hh = Base::weight_data(lane, Weight::hh);
        l.bias_ih = Base::weight_data(lane, Weight::bias_ih);
        l.bias_hh = Base::weight_data(lane, Weight::bias_hh);
        l.x = source.x;
        l.x_step_stride = source.step_stride;
        l.x_row_stride = source.row_stride;
        l.h_column = Base::column_of(lane);
        l.h = data<T>(h) + l.h_column;
        l.above = above.is_same(h) ? nullptr : data<T>(above) + l.h_column;
        if (residual) l.residual = source.x + l.h_column;
        l.h_0 = const_data<T>(h_0_) + states_.h(lane);
        l.c_0 = const_data<T>(c_0_) + states_.c(lane);
        l.h_n = data<T>(result_.h_n) + states_.h(lane);
        l.c_n = data<T>(result_.c_n) + states_.c(lane);
        l.saved_c = parts_.c(lane);
        l.saved_gates = parts_.gates(lane);
        l.inputs = static_cast<int>(shape_.layers[static_cast<size_t>(layer)].input);
        l.below = layer > pass.first_layer ? static_cast<int>(number - 1) : -1;
        l.reverse = static_cast<int>(direction);
        l.layer = static_cast<int>(layer);
        l.mask = mask;
      }
      kept.push_back(h);
      kept.push_back(above);
      source = rows_of(above, width);
    }
    Base::launch_rounds(arguments, pass, kernels_.forward, &forward_words<T>);
    below_ = above;
  }

  Source stack_input() const {
    if (call_.packed) return {const_data<T>(input_), 0, input_.stride(0)};
    return {const_data<T>(input_), input_.stride(0), input_.stride(1)};
  }

  Source rows_of(const Tensor& all, int64_t width) const { return {const_data<T>(all), batch_ * width, width}; }

  // Where h of a layer goes: to the caller, to the reserve for backward, or only to the layer above.
  Tensor h_of(int64_t layer) const {
    if (layer + 1 == depth_ && (shape_.link == LinkKind::plain || depth_ == 1)) return result_.output;
    return call_.keeps_states() ? parts_.h_rows(layer) : at::empty({rows_, width_of(layer)}, storage_);
  }

  Results result_;
  GpuReserve<T> parts_;
  Tensor input_, h_0_, c_0_;
  Tensor below_;  // (rows, D·H of the pass below): what the next pass begins with; undefined before the first
};

}  // namespace

Results forward(const Call& call, std::shared_ptr<const Decision> decision, PersistentCounts& counts) {
  const Guards guards(call.input.device());
  counts.decision = std::move(decision);
  return with_storage(call.input.scalar_type(), [&](auto zero) {
    return Forward<decltype(zero)>(call, counts.decision->choice.forward, kernels_of(call), counts).run();
  });
}

}  // namespace stacked_lstm::persistent
