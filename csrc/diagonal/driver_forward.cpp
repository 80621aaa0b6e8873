// csrc/diagonal/driver_forward.cpp: the forward pass of the diagonal schedule. See driver.h.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include "../stack/state_layout.h"
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
  using Base::input_;
  using Base::kernels_;
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
  Forward(const Call& call, DiagonalCounts& counts) : Base(call, counts) {}

  Results run() {
    allocate();
    for (int64_t stage = 0; stage < plan_.stages(); ++stage) {
      const Lanes lanes = plan_.lanes(stage);
      for (Run& run : runs_) {
        const Lanes some = plan_.in_run(lanes, run.layers);
        if (some.count > 0) project(run, some, stage);
      }
      const int64_t length = plan_.length_of_stage(stage);
      for (int64_t s = 0; s < length; ++s) {
        const Lanes diagonal = plan_.lanes(stage, s);
        for (Run& run : runs_) {
          const Lanes some = plan_.in_run(diagonal, run.layers);
          if (some.count > 0) step(run, some, stage, s);
        }
      }
    }
    return {output_all_, h_, c_.to(scalar_type<T>()), reserve_};
  }

 private:
  // Buffers of a run. Sizes with "lanes" or "layers" mean those of the run.
  struct Run : RunShape {
    explicit Run(const RunShape& shape) : RunShape(shape) {}

    const Run* below = nullptr;  // the run below, if there is one
    Tensor h;                    // (lanes, B, P or H): of the last step taken
    Tensor c;                    // (lanes, B, H)
    Tensor bias;                 // (lanes, 4H)
    Tensor cell_h;               // (lanes, B, H), with a projection: h before the projection
    Tensor projected;            // (lanes, B, P): h after the projection
    // W_ih·x: of the first lane, a chunk; of layer 0 and, with two directions, of both lanes of the layer at hand, the rows of
    // input_chunks chunks: (1 or 2, rows, 4H).
    Tensor first_input;
    int64_t first_input_row[2] = {0, 0};  // the row of the call that is its first one
    // What the layer above reads: (layers below the top, rows of a chunk, P or H). Two directions: see handed_up().
    Tensor above;
    A* recurrent = nullptr;  // (lanes, B, 4H)
    Tensor upper_input;      // (layers - 1, rows of a chunk, 4H): W_ih·u of all layers but the first
    LaneProduct recurrent_product, projection_product, input_product;
  };

  void allocate() {
    output_all_ = make_rows(shape_, call_.output_sizes(), storage_);
    reserve_ = make_reserve<T>(call_);
    parts_ = GpuReserve<T>(reserve_, call_);
    h_ = at::empty(call_.h_0.sizes(), storage_).copy_(call_.h_0);
    c_ = at::empty(call_.c_0.sizes(), accumulator_).copy_(call_.c_0);

    const int64_t input_rows = shape_.first_row(std::min(plan_.input_chunks * plan_.chunk_steps, shape_.steps));
    // Two directions: one layer runs at a time, so all layers share these buffers.
    Tensor first_input;
    const auto hands_up = [](const RunShape& run) { return run.below_top > 0 ? run.output_stride() : 0; };
    if (directions_ == 2) {
      first_input =
          at::empty({2 * input_rows * 4 * Base::largest([](const RunShape& r) { return r.hidden; })}, accumulator_);
      if (depth_ > 1) above_ = at::empty({2, rows_ * Base::largest(hands_up)}, storage_);
    }
    const StateLayout states(shape_);
    runs_.reserve(run_shapes_.size());  // `below` points to an element
    for (const RunShape& run_shape : run_shapes_) {
      Run& run = runs_.emplace_back(run_shape);
      if (runs_.size() > 1) run.below = &run - 1;
      run.h = Base::part_of_states(h_, run, states.h(run.first), run.output);
      run.c = Base::part_of_states(c_, run, states.c(run.first), run.hidden);
      run.bias = Base::stacked_bias(run);
      const Tensor recurrent = at::empty({run.lanes, batch_, 4 * run.hidden}, accumulator_);
      run.recurrent = data<A>(recurrent);
      run.recurrent_product = LaneProduct(recurrent, run.h, Base::stacked(run, Weight::hh).transpose(1, 2));
      if (run.projection > 0) {
        run.cell_h = at::empty({run.lanes, batch_, run.hidden}, storage_);
        run.projected = at::empty({run.lanes, batch_, run.projection}, storage_);
        run.projection_product = LaneProduct(run.projected, run.cell_h, Base::stacked(run, Weight::hr).transpose(1, 2));
      }
      if (directions_ == 2) {
        run.first_input = Base::beginning(first_input, {2, input_rows, 4 * run.hidden});
        continue;
      }
      run.first_input = at::empty({1, run.below ? chunk_rows_ : input_rows, 4 * run.hidden}, accumulator_);
      if (run.below_top > 0) run.above = at::empty({run.below_top, chunk_rows_, run.output}, storage_);
      if (run.lanes > 1) {
        run.upper_input = at::empty({run.lanes - 1, chunk_rows_, 4 * run.hidden}, accumulator_);
        run.input_product = LaneProduct(run.upper_input, run.above, Base::stacked_below(run).transpose(1, 2));
      }
    }
  }

  // Two directions: what a layer hands up, all rows: (rows, 2·(P or H)). One layer's is read while the next one's is written.
  Tensor handed_up(int64_t layer) const {
    return Base::beginning(above_.select(0, layer % 2),
                           {rows_, 2 * shape_.layers[static_cast<size_t>(layer)].output()});
  }

  // Computes the input projections of some lanes of a run, which are all that it has in the stage.
  void project(Run& run, const Lanes& some, int64_t stage) {
    const int64_t chunk = plan_.chunk_of(stage, some.first);
    if (directions_ == 2 || some.first == 0) {
      // The whole input of these lanes exists already: one product computes several chunks.
      if (chunk % plan_.input_chunks == 0) {
        const int64_t layer = Base::layer_of(some.first);
        const Tensor source = layer == 0 ? input_ : handed_up(layer - 1);
        for (int64_t lane = some.first; lane < some.first + directions_; ++lane) {
          const auto rows = Base::chunk_rows(lane, chunk, plan_.input_chunks);
          project_first(run, lane, source.narrow(0, rows.first, rows.count), rows.first);
        }
      }
    } else if (some.first == run.first) {
      const auto rows = Base::chunk_rows(some.first, chunk);
      project_first(run, some.first, run.below->above.select(0, run.below->below_top - 1).narrow(0, 0, rows.count),
                    rows.first);
    }
    const int64_t first = std::max(some.first, run.first + 1), last = some.first + some.count;
    if (directions_ == 2 || first >= last) return;
    int64_t rows = 0;
    for (int64_t lane = first; lane < last; ++lane) {
      rows = std::max(rows, Base::chunk_rows(lane, plan_.chunk_of(stage, lane)).count);
    }
    run.input_product.run(*this, first - 1 - run.first, last - first, rows);
    if (!skip_) return;
    for (int64_t lane = first; lane < last; ++lane) {
      const auto mine = Base::chunk_rows(lane, plan_.chunk_of(stage, lane));
      add_x(run.upper_input.select(0, lane - 1 - run.first), lane, mine.first, mine.count);
    }
  }

  // With skip links, adds W_ih·x to the input projection of a lane.
  void add_x(const Tensor& projection, int64_t lane, int64_t first_row, int64_t rows) {
    Base::multiply_and_add(single(projection.narrow(0, 0, rows)), single(input_.narrow(0, first_row, rows)),
                           single(Base::weight_x(lane).t()));
  }

  // The product of one lane, whose rows `source` begin with row `first_row` of the call.
  void project_first(Run& run, int64_t lane, const Tensor& source, int64_t first_row) {
    const int64_t direction = lane % directions_;
    const Tensor projection = run.first_input.select(0, direction).narrow(0, 0, source.size(0));
    Base::multiply(single(projection), single(source), single(Base::weight_below(lane).t()));
    if (Base::reads_x_too(Base::layer_of(lane))) add_x(projection, lane, first_row, source.size(0));
    run.first_input_row[direction] = first_row;
  }

  // Takes step s of a stage, for some lanes of a run.
  void step(Run& run, const Lanes& some, int64_t stage, int64_t s) {
    const int64_t hidden = run.hidden, output_stride = run.output_stride();
    int64_t most = 0;
    cells_.clear();
    copies_.clear();
    for (int64_t lane = some.first; lane < some.first + some.count; ++lane) {
      const int64_t t = Base::time(lane, stage, s), row = shape_.first_row(t), rows = shape_.active(t);
      const int64_t n = lane - run.first, direction = lane % directions_;
      const int64_t chunk_row = Base::chunk_rows(lane, plan_.chunk_of(stage, lane)).first;
      most = std::max(most, rows);

      gates::ForwardCell<T> cell{};
      cell.input_part =
          directions_ == 2 || n == 0
              ? data<A>(run.first_input) +
                    (direction * run.first_input.size(1) + row - run.first_input_row[direction]) * 4 * hidden
              : data<A>(run.upper_input) + ((n - 1) * chunk_rows_ + row - chunk_row) * 4 * hidden;
      cell.recurrent_part = run.recurrent + n * batch_ * 4 * hidden;
      cell.bias = run.bias.defined() ? data<A>(run.bias) + n * 4 * hidden : nullptr;
      cell.c = data<A>(run.c) + n * batch_ * hidden;
      if (A* const c = parts_.c(lane)) cell.saved_c = c + row * run.padded;
      if (A* const saved = parts_.gates(lane)) cell.saved_gates = saved + 4 * row * run.padded;
      cell.rows = rows;
      cell.element = Base::element(run, lane, t);
      cell.resets = Base::resets(lane, t);

      T* const h = data<T>(run.h) + n * batch_ * run.output;
      T* const output = output_row(run, lane, row);
      T* const above = above_row(run, lane, row, chunk_row);
      const T* const below = residual_ && Base::layer_of(lane) > 0 ? input_row(run, lane, 0, row) : nullptr;
      T* const sum = residual_ && Base::layer_of(lane) + 1 < depth_ ? input_row(run, lane, 1, row) : nullptr;
      if (run.projection > 0) {
        cell.h = data<T>(run.cell_h) + n * batch_ * hidden;
        const T* const source = data<T>(run.projected) + n * batch_ * run.output;
        const auto copy = [&](T* target, int64_t stride) {
          copies_.push_back({source, run.output, nullptr, target, stride, rows, rows, false, cell.element});
        };
        copy(h, run.output);
        if (output) copy(output, Base::h_stride(run));
        if (above) {
          copy(above, output_stride);
          copies_.back().masked = cell.element.mask.seed != nullptr;
          copies_.back().below = below, copies_.back().sum = sum;
        }
      } else {
        cell.h = h;
        cell.output = output;
        cell.above = above;
        cell.below = below, cell.sum = sum;
      }
      cells_.push_back(cell);
    }
    const int64_t first = some.first - run.first;
    run.recurrent_product.run(*this, first, some.count, most);
    Base::launch(kernels_.forward, run, hidden, cells_);
    if (run.projection > 0) {
      run.projection_product.run(*this, first, some.count, most, true);
      Base::launch(kernels_.copy, run, run.output, copies_);
    }
  }

  // Where h of a row is stored for the caller or for backward; null if neither needs it.
  T* output_row(const Run& run, int64_t lane, int64_t row) const {
    const int64_t layer = Base::layer_of(lane);
    const int64_t at = row * Base::h_stride(run) + Base::column_of_layer(layer) + run.column_of(lane);
    if (skip_ || (layer + 1 == depth_ && !residual_)) return data<T>(output_all_) + at;
    T* const h = parts_.h(layer);
    return h ? h + at : nullptr;
  }
  // With residual links: a row of what a layer reads, or the layer `up` above it. A reserve keeps it from layer 2 on, for
  // backward. The others are in the output: the sum of what all layers so far have handed up, which becomes the output.
  T* input_row(const Run& run, int64_t lane, int64_t up, int64_t row) const {
    const int64_t layer = Base::layer_of(lane) + up, at = row * run.output_stride() + run.column_of(lane);
    const bool kept = Base::input_is_kept(layer) && call_.saving != Saving::none;
    return (kept ? parts_.input(layer) : data<T>(output_all_)) + at;
  }
  // Where what the layer above reads of a row is stored: with one direction a chunk, with two directions all steps. With
  // residual links, the top layer hands the output up.
  T* above_row(const Run& run, int64_t lane, int64_t row, int64_t chunk_row) const {
    const int64_t layer = Base::layer_of(lane);
    if (layer + 1 == depth_) {
      return residual_ ? data<T>(output_all_) + row * run.output_stride() + run.column_of(lane) : nullptr;
    }
    if (directions_ == 1) {
      return data<T>(run.above) + ((lane - run.first) * chunk_rows_ + row - chunk_row) * run.output;
    }
    return data<T>(above_) + layer % 2 * above_.size(1) + row * run.output_stride() + run.column_of(lane);
  }

  Tensor output_all_, reserve_;
  GpuReserve<T> parts_;
  Tensor h_;  // of all lanes, as the states of the call; so is c_
  Tensor c_;
  Tensor above_;  // two directions: (2, elements that the widest layer below the top hands up)
  std::vector<Run> runs_;
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
