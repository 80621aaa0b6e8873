// csrc/persistent/driver_backward.cpp: the backward pass of the persistent kernels' driver. See driver.h.
#include <ATen/ops/arange.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <map>
#include <mutex>

#include "driver.h"

#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

namespace stacked_lstm::persistent {
namespace {

// Runs work on a second stream, beside what is queued on the current stream after it. On a device without streams the
// work runs at once.
//
// Hazard: a tensor that was allocated for the current stream and is used here goes back to torch's allocator when its
// last reference goes. The allocator may then give its memory to the next work on the current stream, which does not
// wait for this stream. So keep() holds the tensor until join(). A tensor that is allocated inside run() belongs to
// this stream, and may be freed at any time.
class Beside {
 public:
  explicit Beside(const at::Device& device) : device_(device) {}
  Beside(const Beside&) = delete;
  // Joins also when an exception is thrown: what is freed then must not be in use.
  ~Beside() {
    try {
      join();
    } catch (...) {  // the device is lost: its next call reports that
    }
  }

  void keep(const Tensor& tensor) { kept_.push_back(tensor); }

  // Runs `work` after what has been queued on the current stream so far.
  template <typename Work>
  void run(Work&& work) {
    if (!device_.is_cuda()) return work();
    const c10::impl::VirtualGuardImpl streams(device_.type());
    if (!stream_) stream_ = other_than(streams.getStream(device_));
    order(streams.getStream(device_), *stream_);
    const c10::StreamGuard guard(*stream_);
    work();
  }

  // What is queued on the current stream from now on runs after all of this work.
  void join() {
    if (stream_) order(*stream_, c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
    stream_.reset();
    kept_.clear();
  }

 private:
  static void order(const c10::Stream& first, const c10::Stream& then) {
    c10::Event event(first.device_type());
    event.record(first);
    event.block(then);
  }

  // The second stream. Every call on a device gets the same one, since torch's allocator keeps memory for each stream
  // that has ever asked for some. While a graph is captured, a call gets a stream for itself: other work on a shared
  // stream would be captured with it.
  static c10::Stream other_than(const c10::Stream& current) {
    const c10::impl::VirtualGuardImpl streams(current.device_type());
    const auto another = [&](const c10::Stream& taken) {
      c10::Stream found = streams.getStreamFromGlobalPool(current.device());
      while (found == taken || found == current) found = streams.getStreamFromGlobalPool(current.device());
      return found;
    };
    static std::mutex guard;
    static std::map<c10::DeviceIndex, c10::Stream> usual;
    const std::lock_guard<std::mutex> lock(guard);
    auto known = usual.find(current.device_index());
    if (known == usual.end()) known = usual.emplace(current.device_index(), another(current)).first;
    bool captured = false;
#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
    captured = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
#endif
    return captured || known->second == current ? another(known->second) : known->second;
  }

  const at::Device device_;
  std::optional<c10::Stream> stream_;  // while there is something to join
  std::vector<Tensor> kept_;
};

template <typename T>
class Backward : PersistentDriver<T> {
  using Base = PersistentDriver<T>;
  using Base::batch_;
  using Base::call_;
  using Base::depth_;
  using Base::directions_;
  using Base::floats_;
  using Base::hidden_of;
  using Base::kernels_;
  using Base::places_;
  using Base::plan_;
  using Base::products_;
  using Base::rows_;
  using Base::rows_before_;
  using Base::shape_;
  using Base::states_;
  using Base::storage_;
  using Base::width_of;
  using typename Base::Copies;

 public:
  Backward(const Call& call, const Plan& plan, const PersistentTable& table, PersistentCounts& counts, const Kept& kept,
           const IncomingGradients& incoming, bool input_grad, bool weight_grad)
      : Base(call, plan, table, counts),
        reserve_(kept.reserve.contiguous()),
        parts_(reserve_, call),
        top_(kept.output.contiguous()),
        grad_output_(contiguous(incoming.output)),
        grad_h_n_(contiguous(incoming.h_n)),
        grad_c_n_(contiguous(incoming.c_n)),
        grad_hidden_(of_layers(incoming.h)),
        grad_cell_(of_layers(incoming.c)),
        h_0_(call.h_0.contiguous()),
        c_0_(call.c_0.contiguous()),
        input_grad_(input_grad),
        weight_grad_(weight_grad),
        recompute_(call.saving == Saving::recompute),
        beside_(call.input.device()) {
    if (shape_.has_lengths()) {
      const Tensor exist = rows_before_.narrow(0, 1, shape_.steps).sub(rows_before_.narrow(0, 0, shape_.steps));
      padding_ = at::arange(batch_, rows_before_.options()).ge(exist.unsqueeze(1)).unsqueeze(2);
    }
  }

  Gradients run() {
    result_.h_0 = at::empty(call_.h_0.sizes(), storage_);
    result_.c_0 = at::empty(call_.c_0.sizes(), storage_);
    if (!input_grad_) result_.input = at::empty({0}, storage_);
    if (weight_grad_) {
      for (const Tensor& w : call_.weights) result_.weights.push_back(at::empty(w.sizes(), storage_));
    }
    for (auto pass = plan_.passes.rbegin(); pass != plan_.passes.rend(); ++pass) run(*pass);
    beside_.join();
    return std::move(result_);
  }

 private:
  void run(const Pass& pass) {
    const int64_t layers = pass.last_layer - pass.first_layer, lanes = layers * directions_;
    first_layer_ = pass.first_layer;
    const int64_t hidden = hidden_of(first_layer_);  // of all layers of the pass
    grad_gates_ = at::empty({layers, rows_, directions_ * 4 * hidden}, storage_);
    if (shape_.has_lengths()) grad_gates_.zero_();  // products read all rows, and no launch writes those of the padding
    const bool segments = pass.segment_steps < shape_.steps;
    Tensor carried = segments ? at::empty({2, lanes, batch_, hidden}, floats_) : Tensor();
    // What the products read: inputs_ of the pass's layers, previous_ of its lanes.
    inputs_.assign(static_cast<size_t>(layers), Tensor());
    previous_.assign(static_cast<size_t>(lanes), Tensor());
    if (recompute_) {
      make_operands(pass);
      const int64_t most_rows = shape_.first_row(std::min(pass.segment_steps, shape_.steps));
      preactivations_ = at::empty({lanes, most_rows, 4 * hidden}, floats_);
      recurrent_part_ = at::empty({1, most_rows, 4 * hidden}, floats_);
    }
    const bool beside = weight_grad_ && pass.products_beside;
    if (beside) {
      beside_.keep(grad_gates_);
      if (!recompute_) beside_.run([&] { make_operands(pass); });
      if (recompute_) {
        for (const Tensor& operand : inputs_) beside_.keep(operand);
        for (const Tensor& operand : previous_) beside_.keep(operand);
      }
    }

    const int64_t last_segment = (shape_.steps - 1) / pass.segment_steps;
    for (int64_t segment = last_segment; segment >= 0; --segment) {
      BackwardArguments<T> arguments{};
      Base::describe(arguments, pass);
      const int64_t first_step = segment * pass.segment_steps;
      const int64_t last_step = std::min(first_step + pass.segment_steps, shape_.steps);
      arguments.sizes.first_step = static_cast<int>(first_step);
      arguments.sizes.last_step = static_cast<int>(last_step);
      for (int64_t n = 0; n < lanes; ++n) {
        // From the top layer down, so that no lane waits for a later one.
        const int64_t layer = pass.last_layer - 1 - n / directions_, lane = layer * directions_ + n % directions_;
        BackwardLane<T>& l = arguments.lane[n];
        describe_lane(l, lane);
        if (layer + 1 < pass.last_layer) {
          l.over = static_cast<int>(n - 1);
          l.weight_ih_above = Base::weight_data(lane + directions_, Weight::ih);
        } else if (layer + 1 < depth_) {
          l.grad_above = const_data<float>(grad_above_) + l.h_column;
        }
        const int64_t number = lane - first_layer_ * directions_;  // in the pass, from its lowest layer up
        if (recompute_) {
          l.preactivations = make_preactivations(lane, number, first_step, last_step);
        }
        float* const state = segments ? data<float>(carried) + number * batch_ * hidden : nullptr;
        const int64_t half = lanes * batch_ * hidden;
        if (last_step < shape_.steps) l.carried_h = state, l.carried_c = state + half;
        if (first_step > 0) l.carry_h = state, l.carry_c = state + half;
        if (first_step == 0) {
          l.grad_h_0 = data<T>(result_.h_0) + states_.h(lane);
          l.grad_c_0 = data<T>(result_.c_0) + states_.c(lane);
        }
      }
      Base::launch_rounds(arguments, pass, kernels_.backward, &backward_words<T>);
      if (beside) {
        beside_.run([&] {
          for (int64_t n = 0; n < lanes; ++n) add_gradients(first_layer_ * directions_ + n, first_step, last_step);
        });
      }
    }
    preactivations_ = recurrent_part_ = Tensor();

    const Tensor lowest = single(grad_gates_.select(0, 0));
    if (first_layer_ > 0) {
      grad_above_ = at::empty({1, rows_, width_of(first_layer_ - 1)}, floats_);
      products_.multiply(grad_above_, lowest, single(Base::input_weights(first_layer_)));
    } else if (input_grad_) {
      result_.input = at::empty(call_.input.sizes(), storage_);
      const Tensor rows = callers_rows(result_.input);
      products_.multiply_and_round(single(rows), lowest, single(Base::input_weights(0)));
      if (shape_.has_lengths()) {
        clear_padding(rows);  // a weight may be infinite: then the product has NaN there
        result_.input.narrow(0, shape_.steps, shape_.padded_steps - shape_.steps).zero_();
      }
    }
    if (!weight_grad_ || beside) return;
    for (int64_t lane = first_layer_ * directions_; lane < first_layer_ * directions_ + lanes; ++lane) {
      const auto layer = static_cast<size_t>(lane / directions_ - first_layer_);
      if (!inputs_[layer].defined()) inputs_[layer] = input_of(lane / directions_);
      Tensor& previous = previous_[static_cast<size_t>(lane - first_layer_ * directions_)];
      if (!previous.defined()) previous = previous_of(lane);
      add_gradients(lane, 0, shape_.steps);
      previous = Tensor();  // the next lane needs neither this nor the inputs of layers below its own
      if (layer > 0) inputs_[layer - 1] = Tensor();
    }
  }

  // The rows of one of the caller's sequences of vectors, which has no gaps, up to the last step that a sequence has.
  Tensor callers_rows(const Tensor& sequences) const {
    return sequences.view({shape_.all_rows(), sequences.size(-1)}).narrow(0, 0, rows_);
  }

  // With lengths, zeroes the rows of the padding: products over all rows read them, and 0 · NaN is NaN.
  void clear_padding(const Tensor& rows) const {
    if (shape_.has_lengths()) rows.view({shape_.steps, batch_, rows.size(-1)}).masked_fill_(padding_, 0);
  }

  // The tensors that are given, one for each layer; undefined where none is given.
  std::vector<Tensor> of_layers(const std::vector<OptionalTensor>& given) const {
    std::vector<Tensor> all(static_cast<size_t>(depth_));
    for (size_t k = 0; k < given.size(); ++k) all[k] = contiguous(given[k]);
    return all;
  }

  void make_operands(const Pass& pass) {
    for (size_t n = 0; n < inputs_.size(); ++n) inputs_[n] = input_of(pass.first_layer + static_cast<int64_t>(n));
    for (size_t n = 0; n < previous_.size(); ++n) {
      previous_[n] = previous_of(pass.first_layer * directions_ + static_cast<int64_t>(n));
    }
  }

  void describe_lane(BackwardLane<T>& l, int64_t lane) const {
    const int64_t layer = lane / directions_;
    const auto of_layer = [&](const Tensor& rows) {
      return rows.defined() ? const_data<T>(rows) + l.h_column : nullptr;
    };
    l.weight_hh = Base::weight_data(lane, Weight::hh);
    l.h_column = Base::column_of(lane);
    l.grad_output = of_layer(layer + 1 == depth_ ? grad_output_ : grad_hidden_[static_cast<size_t>(layer)]);
    l.grad_cell = of_layer(grad_cell_[static_cast<size_t>(layer)]);
    l.gates = parts_.gates(lane);
    l.c = parts_.c(lane);
    if (recompute_) {
      l.bias_ih = Base::weight_data(lane, Weight::bias_ih);
      l.bias_hh = Base::weight_data(lane, Weight::bias_hh);
    }
    l.c_0 = const_data<T>(c_0_) + states_.c(lane);
    if (grad_h_n_.defined()) l.grad_h_n = const_data<T>(grad_h_n_) + states_.h(lane);
    if (grad_c_n_.defined()) l.grad_c_n = const_data<T>(grad_c_n_) + states_.c(lane);
    l.grad_gates = data<T>(grad_gates_of(lane));
    l.over = -1;
    l.reverse = static_cast<int>(lane % directions_);
    l.layer = static_cast<int>(layer);
    l.mask = mask_of(call_, layer);
  }

  struct Rows {
    int64_t first, count;
    Tensor of(const Tensor& all) const { return all.narrow(0, first, count); }
  };
  // The rows of a lane's steps first_step … last_step - 1.
  Rows rows_of(int64_t lane, int64_t first_step, int64_t last_step) const {
    const int64_t one = shape_.time(lane, first_step), other = shape_.time(lane, last_step - 1);
    const int64_t first = shape_.first_row(std::min(one, other));
    return {first, shape_.first_row(std::max(one, other) + 1) - first};
  }
  const Tensor& input_at(int64_t lane) const { return inputs_[static_cast<size_t>(lane / directions_ - first_layer_)]; }
  const Tensor& previous_at(int64_t lane) const {
    return previous_[static_cast<size_t>(lane - first_layer_ * directions_)];
  }

  // Computes the pre-activations of one lane for the steps of a segment. Returns where row 0 would be.
  const float* make_preactivations(int64_t lane, int64_t number, int64_t first_step, int64_t last_step) {
    const Rows rows = rows_of(lane, first_step, last_step);
    const Tensor sum = preactivations_.narrow(0, number, 1).narrow(1, 0, rows.count);
    const Tensor recurrent = recurrent_part_.narrow(1, 0, rows.count);
    products_.multiply(sum, single(rows.of(input_at(lane))), single(Base::weight(lane, Weight::ih).t()));
    products_.multiply(recurrent, single(rows.of(previous_at(lane))), single(Base::weight(lane, Weight::hh).t()));
    sum.add_(recurrent);
    return const_data<float>(sum) - rows.first * 4 * hidden_of(lane / directions_);
  }

  // h of a layer, all rows: (rows, D·H).
  Tensor h_of(int64_t layer) const {
    if (layer + 1 == depth_) return callers_rows(top_);
    return parts_.h_rows(layer);
  }

  // h(t-1) of every row of a lane, zero where the sequence is reset: (rows, H).
  Tensor previous_of(int64_t lane) const {
    const int64_t layer = lane / directions_, hidden = hidden_of(layer);
    const Tensor previous = at::empty({rows_, hidden}, storage_);
    Copies copies(*this, layer, hidden);
    copies_of_previous(shape_, lane, const_data<T>(h_of(layer)) + Base::column_of(lane),
                       const_data<T>(h_0_) + states_.h(lane), data<T>(previous),
                       [&](const gates::CopyCell<T>& cell) { copies.add(cell); });
    copies.flush();
    if (shape_.packed()) return previous;
    const int64_t later = shape_.steps - 1;  // steps behind the first
    const Tensor steps = previous.view({shape_.steps, batch_, hidden});
    const bool reverse = lane % directions_ != 0;
    if (shape_.has_lengths() && reverse) {
      // A reverse lane begins a sequence at the sequence's own last step, behind which there is padding.
      const Tensor some = steps.narrow(0, 0, later);
      const Tensor initial = h_0_.flatten().narrow(0, states_.h(lane), batch_ * hidden).view({1, batch_, hidden});
      some.copy_(at::where(padding_.narrow(0, 1, later), initial, some));
    }
    if (call_.resets) {  // see stack/resets.h
      const Tensor resets = call_.resets->narrow(0, reverse ? 1 : 0, reverse ? later : shape_.steps).unsqueeze(2);
      const bool ends = reverse && shape_.has_lengths();  // an entry behind a sequence's end is no reset
      steps.narrow(0, 0, resets.size(0))
          .masked_fill_(ends ? resets.logical_and(padding_.narrow(0, 1, later).logical_not()) : resets, 0);
    }
    clear_padding(previous);
    return previous;
  }

  // What a layer reads, all rows: (rows, input).
  Tensor input_of(int64_t layer) const {
    if (layer == 0) {
      const int64_t width = call_.input.size(-1);
      if (!shape_.has_lengths()) return call_.input.reshape({rows_, width}).contiguous();
      // What is in the padding may be NaN: the products get a copy without it.
      return call_.input.narrow(0, 0, shape_.steps).masked_fill(padding_, 0).reshape({rows_, width}).contiguous();
    }
    const Tensor h = h_of(layer - 1);
    const gates::Mask mask = mask_of(call_, layer - 1);
    if (!mask.seed) return h;
    const int64_t width = width_of(layer - 1);
    const Tensor masked = at::empty({rows_, width}, storage_);
    Copies copies(*this, layer - 1, width);
    copies_of_masked(shape_, layer - 1, mask, const_data<T>(h), data<T>(masked),
                     [&](const gates::CopyCell<T>& cell) { copies.add(cell); });
    copies.flush();
    return masked;
  }

  // Gradients of all steps of a lane's gates: (rows, 4H), rows D·4H apart.
  Tensor grad_gates_of(int64_t lane) const {
    const int64_t layer = lane / directions_, gate_rows = 4 * hidden_of(layer);
    return grad_gates_.select(0, layer - first_layer_).narrow(1, lane % directions_ * gate_rows, gate_rows);
  }

  // Adds what the steps of a segment, or all steps, contribute to a lane's weight gradients: one product a matrix.
  // Segments come from the last to the first. Their sums are float32 until all segments are done.
  void add_gradients(int64_t lane, int64_t first_step, int64_t last_step) {
    const Rows rows = rows_of(lane, first_step, last_step);
    const Tensor gates = rows.of(grad_gates_of(lane)), gates_t = single(gates.t());
    constexpr Weight kProducts[] = {Weight::ih, Weight::hh};
    const ByWeight<Tensor> operands{{rows.of(input_at(lane)), rows.of(previous_at(lane))}};
    const bool begins = last_step == shape_.steps, ends = first_step == 0;
    const auto at = [&](std::vector<Tensor>& list, Weight name) -> Tensor& { return list[places_.at(lane, name)]; };
    const auto grad = [&](Weight name) -> Tensor& { return at(result_.weights, name); };
    if (begins && ends) {
      for (const Weight name : kProducts) {
        products_.multiply_and_round(single(grad(name)), gates_t, single(operands[name]));
      }
      if (call_.options.bias) at::sum_out(grad(Weight::bias_ih), gates, at::IntArrayRef{0});
    } else {
      sums_.resize(result_.weights.size());
      const auto add = [&](Weight name, const Tensor& part) {
        Tensor& sum = at(sums_, name);
        sum = begins ? part : sum.add_(part);
        if (ends) grad(name).copy_(sum), sum = Tensor();
      };
      for (const Weight name : kProducts) {
        const Tensor part = at::empty(grad(name).sizes(), floats_);
        products_.multiply(single(part), gates_t, single(operands[name]));
        add(name, part);
      }
      if (call_.options.bias) {
        add(Weight::bias_ih, at::sum(gates, at::IntArrayRef{0}, /*keepdim=*/false, at::kFloat));
      }
      if (!ends) return;
    }
    if (call_.options.bias) grad(Weight::bias_hh).copy_(grad(Weight::bias_ih));
  }

  const Tensor reserve_;
  const GpuReserve<T> parts_;
  const Tensor top_, grad_output_, grad_h_n_, grad_c_n_;
  const std::vector<Tensor> grad_hidden_,
      grad_cell_;  // of each layer: the caller's gradients of its h and c, all steps
  const Tensor h_0_, c_0_;
  const bool input_grad_, weight_grad_, recompute_;
  Tensor padding_;  // with lengths: which rows no sequence has, (steps, B, 1)
  Gradients result_;
  int64_t first_layer_ = 0;                // of the pass
  Tensor grad_gates_;                      // (layers of the pass, rows, D·4H)
  Tensor grad_above_;                      // (1, rows, D·H of the pass below it): W_ihᵀ·dgates of the pass above
  Tensor preactivations_;                  // (lanes of the pass, rows of a segment, 4H), to recompute
  Tensor recurrent_part_;                  // (1, rows of a segment, 4H)
  std::vector<Tensor> inputs_, previous_;  // of the pass's layers, (rows, input), and lanes, (rows, H): h(t-1)
  std::vector<Tensor> sums_;               // of weight gradients, while only some segments are done
  Beside beside_;                          // the last member: it has to be joined before any other is freed
};

}  // namespace

Gradients backward(const Call& call, const Kept& kept, const IncomingGradients& incoming, bool input_grad,
                   bool weight_grad, std::shared_ptr<const Decision> decision, PersistentCounts& counts) {
  const Guards guards(call.input.device());
  counts.decision = std::move(decision);
  return with_storage(call.input.scalar_type(), [&](auto zero) {
    return Backward<decltype(zero)>(call, counts.decision->choice.backward, kernels_of(call), counts, kept, incoming,
                                    input_grad, weight_grad)
        .run();
  });
}

}  // namespace stacked_lstm::persistent
