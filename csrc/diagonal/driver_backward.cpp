// csrc/diagonal/driver_backward.cpp: the backward pass of the diagonal schedule. See driver.h.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <type_traits>

#include "../stack/state_layout.h"
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
  using Base::input_;
  using Base::kernels_;
  using Base::places_;
  using Base::plan_;
  using Base::residual_;
  using Base::rows_;
  using Base::run_shapes_;
  using Base::shape_;
  using Base::skip_;
  using Base::storage_;
  using typename Base::A;
  using typename Base::LaneProduct;
  using typename Base::Lanes;
  using typename Base::RunShape;

 public:
  Backward(const Call& call, const Kept& kept, const IncomingGradients& incoming, bool input_grad, bool weight_grad,
           DiagonalCounts& counts)
      : Base(call, counts),
        reserve_(kept.reserve.contiguous()),
        parts_(reserve_, call),
        top_(kept.output.contiguous()),
        grad_h_n_(contiguous(incoming.h_n)),
        h_0_(call.h_0.contiguous()),
        c_0_(call.c_0.contiguous()),
        incoming_(incoming),
        input_grad_(input_grad),
        weight_grad_(weight_grad),
        recompute_(call.saving == Saving::recompute) {
    const auto of_layers = [&](const std::vector<OptionalTensor>& gradients) {
      std::vector<Tensor> all(static_cast<size_t>(depth_));
      for (size_t k = 0; k < gradients.size(); ++k) all[k] = contiguous(gradients[k]);
      return all;
    };
    grad_outputs_ = of_layers(incoming.h);
    grad_output_ = contiguous(incoming.output);
    if (skip_) {
      std::fill(grad_outputs_.begin(), grad_outputs_.end(), grad_output_);
    } else if (Tensor& top = grad_outputs_.back(); residual_ && top.defined() && grad_output_.defined()) {
      top = top.add(grad_output_);
    } else if (!top.defined()) {
      top = grad_output_;
    }
    grad_cells_ = of_layers(incoming.c);
  }

  Gradients run() {
    allocate();
    prepare_inputs();
    for (int64_t stage = plan_.stages() - 1; stage >= 0; --stage) {
      const Lanes lanes = plan_.lanes(stage);
      const auto each_run = [&](const Lanes& some, auto&& visit) {
        for (Run& run : runs_) {
          const Lanes part = plan_.in_run(some, run.layers);
          if (part.count > 0) visit(run, part);
        }
      };
      each_run(lanes, [&](Run& run, const Lanes& part) { project(run, part, stage); });
      if (recompute_) each_run(lanes, [&](Run& run, const Lanes& part) { recompute_gates(run, part, stage); });
      if (directions_ == 2 && shape_.has_lengths()) {
        // All layers share the gate gradients' buffer. The run above may have written where this run has padding.
        each_run(lanes, [&](Run& run, const Lanes& part) {
          const bool begins = Base::layer_of(part.first) + 1 == run.layers.last_layer;
          if (run.over && begins && plan_.chunk_of(stage, part.first) + 1 == plan_.chunks()) run.all_grad_gates.zero_();
        });
      }
      for (int64_t s = plan_.length_of_stage(stage) - 1; s >= 0; --s) {
        each_run(plan_.lanes(stage, s), [&](Run& run, const Lanes& part) { step(run, part, stage, s); });
      }
      each_run(lanes, [&](Run& run, const Lanes& part) {
        for (int64_t lane = part.first; lane < part.first + part.count; ++lane) {
          if (plan_.chunk_of(stage, lane) > 0) continue;
          if (weight_grad_) finish(run, lane);
          if (input_grad_ && lane % directions_ == 0) finish_input(run, lane);
        }
      });
    }
    for (Run& run : runs_) run.recurrent_product.run(*this, 0, run.lanes, batch_);
    result_.h_0 = recurrent_.to(scalar_type<T>());
    result_.c_0 = grad_c_.to(scalar_type<T>());
    return std::move(result_);
  }

 private:
  // Buffers of a run. Sizes with "lanes" or "layers" mean those of the run.
  struct Run : RunShape {
    explicit Run(const RunShape& shape) : RunShape(shape) {}

    const Run* over = nullptr;  // the run above, if there is one
    int64_t h_0 = 0, c_0 = 0;   // where its first lane begins in the states of the call
    Tensor bias;                // (lanes, 4H), to recompute
    Tensor grad_c;              // (lanes, B, H): dL/dc of the state before the last step taken
    Tensor grad_gates;          // (lanes, B, 4H): of the last step taken
    Tensor all_grad_gates;      // (layers, rows, 4H), two directions: (1, rows, 2·4H): of all steps
    Tensor recurrent;           // (lanes, B, P or H): W_hhᵀ·grad_gates
    // W_ihᵀ·grad_gates of the layer above: (layers below the top, rows of a chunk, P or H), two directions: (1, rows, 2·(P or H)).
    Tensor above;
    Tensor upper_weights;                            // (layers - 1, 4H, P or H): W_ih of all layers but the first
    Tensor grad_h, all_grad_h, grad_cell_h, cell_h;  // with a projection; see gates.h
    Tensor input_part, recurrent_part;               // (lanes, rows of a chunk, 4H), to recompute
    Tensor previous;                                 // (lanes, rows, P or H): h(t-1)
    LaneProduct recurrent_product, projection_product;
  };

  void allocate() {
    const StateLayout states(shape_);
    runs_.reserve(run_shapes_.size());  // `over` points to an element
    for (const RunShape& run_shape : run_shapes_) {
      Run& run = runs_.emplace_back(run_shape);
      if (runs_.size() < run_shapes_.size()) run.over = &run + 1;
      run.h_0 = states.h(run.first), run.c_0 = states.c(run.first);
      if (recompute_) run.bias = Base::stacked_bias(run);
    }
    grad_c_ = incoming_.c_n ? at::empty(call_.c_0.sizes(), accumulator_).copy_(*incoming_.c_n)
                            : at::zeros(call_.c_0.sizes(), accumulator_);
    recurrent_ = at::empty(call_.h_0.sizes(), accumulator_);
    // Two directions: one layer runs at a time, so all layers share these buffers.
    Tensor all_grad_gates, above;
    const auto hands_up = [](const RunShape& run) { return run.below_top > 0 ? run.output_stride() : 0; };
    if (directions_ == 2) {
      const int64_t widest = Base::largest([](const RunShape& run) { return run.gates_stride(); });
      all_grad_gates = make_rows(shape_, {rows_ * widest}, storage_);
      if (depth_ > 1) above = at::empty({rows_ * Base::largest(hands_up)}, accumulator_);
    }
    for (Run& run : runs_) {
      run.grad_c = Base::part_of_states(grad_c_, run, run.c_0, run.hidden);
      run.recurrent = Base::part_of_states(recurrent_, run, run.h_0, run.output);
      // Zeros: a recurrent product may also take rows and lanes that have had no step yet. Nothing reads their results.
      run.grad_gates = at::zeros({run.lanes, batch_, 4 * run.hidden}, storage_);
      run.recurrent_product = LaneProduct(run.recurrent, run.grad_gates, Base::stacked(run, Weight::hh));
      if (directions_ == 2) {
        run.all_grad_gates = Base::beginning(all_grad_gates, {1, rows_, run.gates_stride()});
        if (run.below_top > 0) run.above = Base::beginning(above, {1, rows_, run.output_stride()});
      } else {
        run.all_grad_gates = make_rows(shape_, {run.lanes, rows_, 4 * run.hidden}, storage_);
        if (run.below_top > 0) run.above = at::empty({run.below_top, chunk_rows_, run.output}, accumulator_);
        if (run.lanes > 1) run.upper_weights = Base::stacked_below(run);
      }
      if (run.projection > 0) {
        run.grad_h = at::empty({run.lanes, batch_, run.projection}, storage_);
        run.all_grad_h = make_rows(shape_, {run.lanes, rows_, run.projection}, storage_);
        run.grad_cell_h = at::empty({run.lanes, batch_, run.hidden}, accumulator_);
        run.cell_h = make_rows(shape_, {run.lanes, rows_, run.hidden}, storage_);
        run.projection_product = LaneProduct(run.grad_cell_h, run.grad_h, Base::stacked(run, Weight::hr));
      }
      if (recompute_) {
        run.input_part = at::empty({run.lanes, chunk_rows_, 4 * run.hidden}, accumulator_);
        run.recurrent_part = at::empty({run.lanes, chunk_rows_, 4 * run.hidden}, accumulator_);
      }
    }
    if (weight_grad_) {
      for (const Tensor& w : call_.weights) result_.weights.push_back(at::empty(w.sizes(), storage_));
    }
    result_.input = at::empty(input_grad_ ? call_.input.sizes() : at::IntArrayRef{0}, storage_);
    if (input_grad_ && skip_ && !std::is_same_v<T, A>) grad_x_ = at::empty({rows_, input_.size(1)}, accumulator_);
    if (residual_ && depth_ > 2) sums_ = at::empty({rows_, runs_[0].output_stride()}, accumulator_);
  }

  // h of a layer, all rows: (rows, D·output), rows h_stride apart.
  const T* h_of(int64_t layer) const {
    const bool in_output = skip_ || (layer + 1 == depth_ && !residual_);
    return in_output ? const_data<T>(top_) + Base::column_of_layer(layer) : parts_.h(layer);
  }

  // Makes what the products over all steps read: h(t-1) of every lane, the inputs of layers 1 and up, masked by dropout, and
  // x without what is in its padding.
  void prepare_inputs() {
    if (!weight_grad_ && !recompute_) return;
    std::vector<gates::CopyCell<T>> copies;
    const auto flush = [&](size_t limit, const Run& run, int64_t width) {
      if (copies.size() <= limit) return;
      Base::launch(kernels_.copy, run, width, copies);
      copies.clear();
    };
    const auto adds = [&](const Run& run, int64_t width) {
      return [&, width](const gates::CopyCell<T>& cell) {
        copies.push_back(cell);
        flush(kCopiesALaunch - 1, run, width);
      };
    };
    for (Run& run : runs_) {
      run.previous = make_rows(shape_, {run.lanes, rows_, run.output}, storage_);
      for (int64_t n = 0; n < run.lanes; ++n) {
        const int64_t lane = run.first + n;
        copies_of_previous(shape_, lane, h_of(Base::layer_of(lane)) + run.column_of(lane),
                           const_data<T>(h_0_) + run.h_0 + n * batch_ * run.output,
                           data<T>(run.previous) + n * rows_ * run.output, adds(run, run.output), Base::resets_,
                           Base::h_stride(run));
      }
      flush(0, run, run.output);
    }

    if (shape_.has_lengths() && weight_grad_) {
      const int64_t width = input_.size(-1);
      const Tensor with_padding = std::exchange(input_, at::empty({rows_, width}, storage_));
      const Tensor none = at::zeros({batch_, width}, storage_);
      copies_without_padding(shape_, width, const_data<T>(with_padding), const_data<T>(none), data<T>(input_),
                             adds(runs_[0], width));
      flush(0, runs_[0], width);
    }

    int64_t elements = 0;
    const auto makes_masked = [&](int64_t layer) { return Base::mask(layer).seed && !Base::input_is_kept(layer + 1); };
    for (int64_t layer = 0; layer + 1 < depth_; ++layer) {
      if (makes_masked(layer)) elements += rows_ * directions_ * shape_.layers[static_cast<size_t>(layer)].output();
    }
    if (elements == 0) return;
    const Tensor masked = at::empty({elements}, storage_);
    masked_.resize(static_cast<size_t>(depth_ - 1));
    int64_t first = 0;
    for (const Run& run : runs_) {
      for (int64_t layer = run.layers.first_layer; layer < run.layers.first_layer + run.below_top; ++layer) {
        if (!makes_masked(layer)) continue;
        const int64_t width = run.output_stride();
        Tensor& mine = masked_[static_cast<size_t>(layer)];
        mine = masked.narrow(0, first, rows_ * width).view({rows_, width});
        first += rows_ * width;
        copies_of_masked(shape_, layer, Base::mask(layer), h_of(layer), data<T>(mine), adds(run, width),
                         Base::h_stride(run));
      }
      flush(0, run, run.output_stride());
    }
  }

  int64_t continued_rows(int64_t lane, int64_t t) const { return driver::continued_rows(shape_, lane, t); }
  // How many rows of step t continue in the step after. The other rows' sequences end at t.
  int64_t carried_rows(int64_t lane, int64_t t) const {
    if (lane % directions_ == 0) return t + 1 < shape_.steps ? shape_.active(t + 1) : 0;
    return t > 0 ? shape_.active(t) : 0;
  }

  // The input of a layer, all rows: (rows, input). With skip links, without x.
  Tensor input_of(int64_t layer) const {
    if (layer == 0) return input_;
    if (Base::input_is_kept(layer)) return parts_.input_rows(layer);
    if (Base::mask(layer - 1).seed) return masked_[static_cast<size_t>(layer - 1)];
    if (!skip_) return parts_.h_rows(layer - 1);
    const int64_t width = directions_ * shape_.layers[static_cast<size_t>(layer - 1)].output();
    return top_.view({-1, shape_.output_width()})
        .narrow(0, 0, rows_)
        .narrow(1, Base::column_of_layer(layer - 1), width);
  }

  // The gate gradients of a lane, of all steps: (rows, 4H), rows D·4H apart.
  Tensor grad_gates_of(const Run& run, int64_t lane) const {
    const int64_t width = 4 * run.hidden;
    return run.all_grad_gates.select(0, directions_ == 2 ? 0 : lane - run.first)
        .narrow(1, lane % directions_ * width, width);
  }

  // Computes the gradients that some layers of a run, which are all that it has in the stage, get from the layers above them.
  void project(Run& run, const Lanes& some, int64_t stage) {
    if (directions_ == 2) {
      const int64_t layer = Base::layer_of(some.first);
      if (layer + 1 == depth_ || plan_.chunk_of(stage, some.first) + 1 < plan_.chunks()) return;
      const Tensor weights = at::cat({Base::weight_below(some.first + 2), Base::weight_below(some.first + 3)});
      const Run& upper = run.has_layer(layer + 1) ? run : *run.over;
      Base::multiply(run.above, upper.all_grad_gates, single(weights));
      return;
    }
    const int64_t end = some.first + some.count, inside = std::min(end, run.first + run.lanes - 1);
    int64_t lane = some.first;
    const auto full = [&](int64_t k) {
      return !shape_.packed() && plan_.length(plan_.chunk_of(stage, k)) == plan_.chunk_steps;
    };
    // The layers whose upper neighbour is in the run.
    for (; lane < inside; ++lane) {
      const int64_t n = lane - run.first;
      const auto rows = Base::chunk_rows(lane, plan_.chunk_of(stage, lane));
      if (full(lane)) {
        // One strided view holds all layers: the next layer's rows lie one whole sequence on and one chunk back.
        const int64_t count = inside - lane, row = 4 * run.hidden;
        const Tensor grads = run.all_grad_gates.as_strided(
            {count, rows.count, row}, {(rows_ - rows.count) * row, row, 1}, ((n + 1) * rows_ + rows.first) * row);
        Base::multiply(run.above.narrow(0, n, count).narrow(1, 0, rows.count), grads,
                       run.upper_weights.narrow(0, n, count));
        lane = inside;
        break;
      }
      project_one(run, lane, rows, run.all_grad_gates.select(0, n + 1), run.upper_weights.select(0, n));
    }
    // The last layer of the run.
    if (lane < end && run.over) {
      project_one(run, lane, Base::chunk_rows(lane, plan_.chunk_of(stage, lane)), run.over->all_grad_gates.select(0, 0),
                  Base::weight_below(lane + 1));
    }
  }

  // One direction, one layer. `grad_gates`: of the layer above, all steps. `weights`: its W_ih.
  void project_one(Run& run, int64_t lane, const typename Base::Rows& rows, const Tensor& grad_gates,
                   const Tensor& weights) {
    Base::multiply(run.above.narrow(0, lane - run.first, 1).narrow(1, 0, rows.count),
                   single(grad_gates.narrow(0, rows.first, rows.count)), single(weights));
  }

  void recompute_gates(Run& run, const Lanes& some, int64_t stage) {
    for (int64_t lane = some.first; lane < some.first + some.count; ++lane) {
      const int64_t n = lane - run.first;
      const auto rows = Base::chunk_rows(lane, plan_.chunk_of(stage, lane));
      const Tensor input_part = run.input_part.narrow(0, n, 1).narrow(1, 0, rows.count);
      Base::multiply(input_part, single(input_of(Base::layer_of(lane)).narrow(0, rows.first, rows.count)),
                     single(Base::weight_below(lane).t()));
      if (Base::reads_x_too(Base::layer_of(lane))) {
        Base::multiply_and_add(input_part, single(input_.narrow(0, rows.first, rows.count)),
                               single(Base::weight_x(lane).t()));
      }
      Base::multiply(run.recurrent_part.narrow(0, n, 1).narrow(1, 0, rows.count),
                     run.previous.narrow(0, n, 1).narrow(1, rows.first, rows.count),
                     single(Base::weight(lane, Weight::hh).t()));
    }
  }

  // Takes step s of a stage, for some lanes of a run.
  void step(Run& run, const Lanes& some, int64_t stage, int64_t s) {
    const int64_t hidden = run.hidden, output = run.output, output_stride = run.output_stride();
    int64_t most = 0, carried = 0;
    cells_.clear();
    collects_.clear();
    for (int64_t lane = some.first; lane < some.first + some.count; ++lane) {
      const int64_t t = Base::time(lane, stage, s), row = shape_.first_row(t), rows = shape_.active(t);
      const int64_t layer = Base::layer_of(lane), n = lane - run.first;
      const int64_t chunk_row = Base::chunk_rows(lane, plan_.chunk_of(stage, lane)).first;

      gates::Incoming<T> incoming{};
      if (const Tensor& grad = grad_outputs_[static_cast<size_t>(layer)]; grad.defined()) {
        incoming.grad_output =
            const_data<T>(grad) + row * Base::h_stride(run) + Base::column_of_layer(layer) + run.column_of(lane);
      }
      if (residual_ && layer + 1 < depth_) {
        const int64_t at = row * output_stride + run.column_of(lane);
        if (layer + 2 < depth_) incoming.passed = const_data<A>(sums_) + at;
        if (layer + 2 == depth_ && grad_output_.defined()) incoming.passed_output = const_data<T>(grad_output_) + at;
        if (layer > 0) incoming.sum = data<A>(sums_) + at;
      }
      if (layer + 1 < depth_) {
        incoming.above = directions_ == 2 ? const_data<A>(run.above) + row * output_stride + run.column_of(lane)
                                          : const_data<A>(run.above) + (n * chunk_rows_ + row - chunk_row) * output;
      }
      incoming.recurrent = const_data<A>(run.recurrent) + n * batch_ * output;
      incoming.grad_last = grad_h_n_.defined() ? const_data<T>(grad_h_n_) + run.h_0 + n * batch_ * output : nullptr;
      incoming.carried = carried_rows(lane, t);
      incoming.element = Base::element(run, lane, t);
      most = std::max(most, rows);
      carried = std::max(carried, incoming.carried);

      gates::BackwardCell<T> cell{};
      if (run.projection > 0) {
        collects_.push_back({incoming, data<T>(run.grad_h) + n * batch_ * output,
                             data<T>(run.all_grad_h) + (n * rows_ + row) * output, rows});
        cell.incoming.recurrent = const_data<A>(run.grad_cell_h) + n * batch_ * hidden;
        cell.incoming.carried = rows;
        cell.cell_h = data<T>(run.cell_h) + (n * rows_ + row) * hidden;
      } else {
        cell.incoming = incoming;
      }
      if (recompute_) {
        const int64_t at = (n * chunk_rows_ + row - chunk_row) * 4 * hidden;
        cell.input_part = const_data<A>(run.input_part) + at;
        cell.recurrent_part = const_data<A>(run.recurrent_part) + at;
        cell.bias = run.bias.defined() ? const_data<A>(run.bias) + n * 4 * hidden : nullptr;
      } else {
        cell.gates = parts_.gates(lane) + 4 * row * run.padded;
      }
      const A* const c = parts_.c(lane);
      cell.c = c + row * run.padded;
      cell.continued = continued_rows(lane, t);
      if (cell.continued > 0) cell.c_before = c + shape_.first_row(lane % directions_ ? t + 1 : t - 1) * run.padded;
      cell.c_0 = const_data<T>(c_0_) + run.c_0 + n * batch_ * hidden;
      if (const Tensor& grad = grad_cells_[static_cast<size_t>(layer)]; grad.defined()) {
        cell.grad_cell = const_data<T>(grad) + (row * directions_ + lane % directions_) * hidden;
      }
      cell.grad_c = data<A>(run.grad_c) + n * batch_ * hidden;
      cell.grad_gates = data<T>(run.grad_gates) + n * batch_ * 4 * hidden;
      cell.all_grad_gates = data<T>(run.all_grad_gates) +
                            ((directions_ == 2 ? 0 : n) * rows_ + row) * run.gates_stride() +
                            lane % directions_ * 4 * hidden;
      cell.rows = rows;
      cell.resets = Base::resets(lane, t);
      cells_.push_back(cell);
    }
    const int64_t first = some.first - run.first;
    if (carried > 0) run.recurrent_product.run(*this, first, some.count, carried);
    if (run.projection > 0) {
      Base::launch(kernels_.collect, run, run.projection, collects_);
      run.projection_product.run(*this, first, some.count, most);
    }
    Base::launch(kernels_.backward, run, hidden, cells_);
  }

  // The weight gradients of a lane after its last step: each is one product over all rows.
  void finish(const Run& run, int64_t lane) {
    const auto grad = [&](Weight name) -> Tensor& { return result_.weights[places_.at(lane, name)]; };
    const int64_t n = lane - run.first;
    const Tensor gates = grad_gates_of(run, lane), gates_t = single(gates.t());
    const int64_t layer = Base::layer_of(lane);
    const auto grad_ih = [&](int64_t first, const Tensor& input) {
      Base::multiply_and_round(single(grad(Weight::ih).narrow(1, first, input.size(1))), gates_t, single(input));
    };
    const Tensor input = input_of(layer);
    grad_ih(0, input);
    if (Base::reads_x_too(layer)) grad_ih(input.size(1), input_);
    Base::multiply_and_round(single(grad(Weight::hh)), gates_t, run.previous.narrow(0, n, 1));
    if (call_.options.bias) {
      at::sum_out(grad(Weight::bias_ih), gates, at::IntArrayRef{0});
      grad(Weight::bias_hh).copy_(grad(Weight::bias_ih));
    }
    if (run.projection > 0) {
      Base::multiply_and_round(single(grad(Weight::hr)), single(run.all_grad_h.select(0, n).t()),
                               run.cell_h.narrow(0, n, 1));
    }
  }

  // The gradient of x: one product over all rows, of layer 0 or, with skip links, of each layer. `lane`: the first of a layer
  // that has taken its last step.
  void finish_input(const Run& run, int64_t lane) {
    const int64_t layer = Base::layer_of(lane);
    if (layer > 0 && !skip_) return;
    const auto weight = [&](int64_t n) { return Base::weight_x(n); };
    const Tensor weights = directions_ == 2 ? at::cat({weight(lane), weight(lane + 1)}) : weight(lane);
    const Tensor gates = run.all_grad_gates.narrow(0, directions_ == 2 ? 0 : lane - run.first, 1);
    const Tensor all = result_.input.view({-1, call_.input.size(-1)}), rows = all.narrow(0, 0, rows_);
    if (!skip_) {
      Base::multiply_and_round(single(rows), gates, single(weights));
    } else {
      const Tensor sum = grad_x_.defined() ? grad_x_ : rows;
      if (layer + 1 == depth_) {
        Base::multiply(single(sum), gates, single(weights));
      } else {
        Base::multiply_and_add(single(sum), gates, single(weights));
      }
      if (layer == 0 && grad_x_.defined()) Tensor(rows).copy_(sum);
    }
    // Behind the longest sequence.
    if (layer == 0 && all.size(0) > rows_) all.narrow(0, rows_, all.size(0) - rows_).zero_();
  }

  const Tensor reserve_;
  const GpuReserve<T> parts_;
  const Tensor top_, grad_h_n_, h_0_, c_0_;
  const IncomingGradients& incoming_;
  const bool input_grad_, weight_grad_, recompute_;
  Tensor grad_output_;                // of the output; undefined: none
  std::vector<Tensor> grad_outputs_;  // of each layer's h from the loss, (rows, D·output); undefined: none
  std::vector<Tensor> grad_cells_;    // likewise of c, (rows, D·H)
  Gradients result_;
  Tensor grad_c_, recurrent_;  // of all lanes, as the states of the call
  // With residual links: the gradient of what the layers above the one at hand have read, (rows, D·output). A row is that of
  // the lowest layer that has taken its step.
  Tensor sums_;
  Tensor grad_x_;               // with skip links, 16 bits: the sum over the layers, (rows, I)
  std::vector<Tensor> masked_;  // of each layer whose link has dropout: what the layer above has read, (rows, D·output)
  std::vector<Run> runs_;
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
