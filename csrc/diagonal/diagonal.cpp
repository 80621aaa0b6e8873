// csrc/diagonal/diagonal.cpp: the diagonal schedule: matrix products by ATen, the gates by the kernels of gates.h.
//
//             stage 0   stage 1   stage 2   stage 3      A stage begins with the input projections of its chunks, one
//   layer 0   ▪▪▪▪▪▪    ▪▪▪▪▪▪    ▪▪▪▪▪▪                 product for all layers. Then come its diagonals (▪): the
//   layer 1             ▪▪▪▪▪▪    ▪▪▪▪▪▪    ▪▪▪▪▪▪ …     recurrent product of all layers, and one launch for all of
//   layer 2                       ▪▪▪▪▪▪    ▪▪▪▪▪▪ …     their cells. wavefront.h says who is in a stage.
//
// Nothing here waits for the device or looks at a tensor's contents: the same calls are queued every time, so that a
// CUDA graph can hold them. The few buffers are allocated before the first stage. The same code runs on the CPU, where
// gates_host.cpp stands in for the CUDA kernels.
//
// Hazard: lanes of a packed batch have different numbers of rows at one diagonal, and a product takes as many as the
// largest has. The surplus rows of the others are old or never written; nothing reads what comes of them.
#include "diagonal.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "../driver/driver.h"
#include "../driver/gate_kernels.h"

namespace stacked_lstm::diagonal {
namespace {

using namespace driver;

thread_local std::optional<int64_t> forced_chunk;

// What forward and backward have in common.
template <typename T>
class Driver {
 protected:
  using A = Accumulator<T>;

  struct Rows {
    int64_t first, count;
  };

  Driver(const Call& call, Counts& counts)
      : call_(call),
        shape_(call.shape),
        plan_(plan(call.shape, sizeof(A))),
        kernels_(gate_kernels(call.input.device()).of<T>()),
        stream_(stream_for(call.input.device())),
        counts_(counts),
        products_(counts.products),
        storage_(call.input.options().dtype(scalar_type<T>())),
        accumulator_(call.input.options().dtype(scalar_type<A>())),
        directions_(call.shape.directions),
        depth_(call.shape.depth()),
        lanes_(call.shape.lanes()),
        batch_(call.shape.batch),
        rows_(call.shape.rows()),
        hidden_(call.shape.layers[0].hidden),
        projection_(call.shape.layers[0].projection),
        output_(call.shape.layers[0].output()),
        padded_(call.shape.layers[0].padded_hidden()) {
    counts_.schedule = plan_;
    // No chunk has more rows: an earlier step never has fewer sequences than a later one.
    chunk_rows_ = shape_.first_row(std::min(plan_.chunk_steps, shape_.steps));
    input_ = call.input.reshape({rows_, call.input.size(-1)}).contiguous();
    mask_ = mask_of(call);
  }

  gates::Sizes sizes(int64_t width) const {
    return {width, directions_ * output_, padded_, directions_ * 4 * hidden_, mask_};
  }

  const Tensor& weight(int64_t lane, int64_t which) const {
    return call_.weights[static_cast<size_t>(lane * call_.options.weights_a_lane() + which)];
  }
  const Tensor& weight_ih(int64_t lane) const { return weight(lane, 0); }

  // One kind of weight of the lanes from `first` on: (lanes, …).
  Tensor stacked(int64_t which, int64_t first = 0) const {
    std::vector<Tensor> all;
    for (int64_t lane = first; lane < lanes_; ++lane) all.push_back(weight(lane, which));
    return at::stack(all);
  }
  Tensor stacked_hr() const { return stacked(call_.options.weights_a_lane() - 1); }

  // b_ih + b_hh, (lanes, 4H), or undefined.
  Tensor stacked_bias() const {
    if (!call_.options.bias) return {};
    return stacked(2).to(scalar_type<A>()).add_(stacked(3));
  }

  int64_t time(int64_t lane, int64_t stage, int64_t s) const {
    return shape_.time(lane, plan_.chunk_of(stage, lane) * plan_.chunk_steps + s);
  }
  int64_t layer_of(int64_t lane) const { return lane / directions_; }
  int64_t column_of(int64_t lane) const { return lane % directions_ * output_; }

  // The rows of `chunks` chunks of a lane: neighbours, in whatever direction it takes them.
  Rows chunk_rows(int64_t lane, int64_t chunk, int64_t chunks = 1) const {
    const int64_t first = chunk * plan_.chunk_steps;
    const int64_t last = std::min(first + chunks * plan_.chunk_steps, shape_.steps) - 1;
    const int64_t one = shape_.time(lane, first), other = shape_.time(lane, last);
    const int64_t row = shape_.first_row(std::min(one, other));
    return {row, shape_.first_row(std::max(one, other) + 1) - row};
  }

  gates::Element element(int64_t lane, int64_t t) const { return {t * batch_, column_of(lane), layer_of(lane)}; }

  void multiply(const Tensor& result, const Tensor& a, const Tensor& b) { products_.multiply(result, a, b); }
  void multiply_and_round(const Tensor& result, const Tensor& a, const Tensor& b, bool wide = true) {
    products_.multiply_and_round(result, a, b, wide);
  }

  template <typename Cell>
  void launch(std::string (*kernel)(const gates::Sizes&, const Cell*, int64_t, void*), int64_t width,
              const std::vector<Cell>& cells) {
    ++counts_.launches;
    const std::string error = kernel(sizes(width), cells.data(), static_cast<int64_t>(cells.size()), stream_);
    TORCH_CHECK(error.empty(), "stacked_lstm_ext: a kernel could not be launched on ", call_.input.device(), ": ",
                error);
  }

  // A product over neighbouring lanes and the first rows of each. The views are made again only when these change.
  class LaneProduct {
   public:
    LaneProduct() = default;
    LaneProduct(Tensor result, Tensor a, Tensor b) : all_{std::move(result), std::move(a), std::move(b)} {}
    void run(Driver& driver, int64_t first, int64_t count, int64_t rows, bool round = false) {
      if (first != first_ || count != count_ || rows != rows_) {
        for (int n = 0; n < 3; ++n) {
          view_[n] = all_[n].narrow(0, first, count);
          if (n < 2) view_[n] = view_[n].narrow(1, 0, rows);
        }
        first_ = first, count_ = count, rows_ = rows;
      }
      if (round) {
        driver.multiply_and_round(view_[0], view_[1], view_[2], false);
      } else {
        driver.multiply(view_[0], view_[1], view_[2]);
      }
    }

   private:
    Tensor all_[3], view_[3];  // result (lanes, rows, N), a (lanes, rows, K), b (lanes, K, N)
    int64_t first_ = -1, count_ = -1, rows_ = -1;
  };

  const Call& call_;
  const StackShape& shape_;
  const Diagonals plan_;
  const gates::Kernels<T>& kernels_;
  void* stream_;
  Counts& counts_;
  const Products<T> products_;
  const at::TensorOptions storage_, accumulator_;
  const int64_t directions_, depth_, lanes_, batch_, rows_, hidden_, projection_, output_, padded_;
  int64_t chunk_rows_;
  Tensor input_;  // (rows, I)
  gates::Mask mask_;
};

// ---- Forward --------------------------------------------------------------------------------------------------------

template <typename T>
class Forward : Driver<T> {
  using Base = Driver<T>;
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
  Forward(const Call& call, Counts& counts) : Base(call, counts) {}

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
    const Saving saving = call_.options.saving;
    const int64_t kept = reserve_elements(shape_, saving, sizeof(T), sizeof(A));
    // Padding is written by nobody; zeros there make a reserve the same bits every time.
    reserve_ = hidden_ == padded_ ? at::empty({kept}, accumulator_) : at::zeros({kept}, accumulator_);
    h_ = at::empty({lanes_, batch_, output_}, storage_).copy_(call_.h_0);
    c_ = at::empty({lanes_, batch_, hidden_}, accumulator_).copy_(call_.c_0);
    bias_ = Base::stacked_bias();

    const Tensor recurrent = at::empty({lanes_, batch_, 4 * hidden_}, accumulator_);
    recurrent_ = data<A>(recurrent);
    recurrent_product_ = LaneProduct(recurrent, h_, Base::stacked(1).transpose(1, 2));
    if (projection_ > 0) {
      cell_h_ = at::empty({lanes_, batch_, hidden_}, storage_);
      projected_ = at::empty({lanes_, batch_, projection_}, storage_);
      projection_product_ = LaneProduct(projected_, cell_h_, Base::stacked_hr().transpose(1, 2));
    }
    const int64_t input_rows = shape_.first_row(std::min(plan_.input_chunks * plan_.chunk_steps, shape_.steps));
    first_input_ = at::empty({directions_, input_rows, 4 * hidden_}, accumulator_);
    if (depth_ > 1 && directions_ == 1) {
      above_ = at::empty({depth_ - 1, chunk_rows_, output_}, storage_);
      const Tensor input = at::empty({depth_ - 1, chunk_rows_, 4 * hidden_}, accumulator_);
      upper_input_ = data<A>(input);
      input_product_ = LaneProduct(input, above_, Base::stacked(0, 1).transpose(1, 2));
    } else if (depth_ > 1) {
      above_ = at::empty({2, rows_, 2 * output_}, storage_);  // one is read while the other is written
    }
  }

  void project(int64_t stage) {
    const Diagonals::Lanes lanes = plan_.lanes(stage);
    // Where the whole input is there: many chunks at once.
    const int64_t direct = directions_ == 2 ? 2 : lanes.first == 0 ? 1 : 0;
    const int64_t chunk = plan_.chunk_of(stage, lanes.first);
    if (chunk % plan_.input_chunks == 0) {
      for (int64_t lane = lanes.first; lane < lanes.first + direct; ++lane) {
        const auto rows = Base::chunk_rows(lane, chunk, plan_.input_chunks);
        const int64_t slot = lane % directions_, layer = Base::layer_of(lane);
        const Tensor source = layer == 0 ? Base::input_ : above_.select(0, (layer - 1) % 2);
        Base::multiply(single(first_input_.select(0, slot).narrow(0, 0, rows.count)),
                       single(source.narrow(0, rows.first, rows.count)), single(Base::weight_ih(lane).t()));
        first_input_row_[slot] = rows.first;
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
      const int64_t layer = Base::layer_of(lane), slot = lane % directions_;
      const int64_t chunk_row = Base::chunk_rows(lane, plan_.chunk_of(stage, lane)).first;
      most = std::max(most, rows);

      gates::ForwardCell<T> cell{};
      cell.input_part =
          directions_ == 2 || layer == 0
              ? data<A>(first_input_) + (slot * first_input_.size(1) + row - first_input_row_[slot]) * 4 * hidden_
              : upper_input_ + ((layer - 1) * chunk_rows_ + row - chunk_row) * 4 * hidden_;
      cell.recurrent_part = recurrent_ + lane * batch_ * 4 * hidden_;
      cell.bias = bias_.defined() ? data<A>(bias_) + lane * 4 * hidden_ : nullptr;
      cell.c = data<A>(c_) + lane * batch_ * hidden_;
      if (call_.options.saving != Saving::none) {
        A* const c = data<A>(reserve_);
        cell.saved_c = c + (lane * rows_ + row) * padded_;
        if (call_.options.saving == Saving::full) {
          cell.saved_gates = c + (lanes_ * rows_ + 4 * (lane * rows_ + row)) * padded_;
        }
      }
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
              {source, output_, nullptr, above, stride, rows, rows, Base::mask_.seed != nullptr, cell.element});
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

  // Where h of a row goes for the caller or for backward; null if neither wants it.
  T* output_row(int64_t lane, int64_t row) const {
    const int64_t layer = Base::layer_of(lane), stride = directions_ * output_;
    if (layer + 1 == depth_) return data<T>(output_all_) + row * stride + Base::column_of(lane);
    if (call_.options.saving == Saving::none) return nullptr;
    T* const h = const_cast<T*>(Parts<T>(reserve_, shape_, call_.options.saving).h);
    return h + (layer * rows_ + row) * stride + Base::column_of(lane);
  }
  // Where it goes for the layer above: a chunk of one direction, or all steps of two.
  T* above_row(int64_t lane, int64_t row, int64_t chunk_row) const {
    const int64_t layer = Base::layer_of(lane);
    if (layer + 1 == depth_) return nullptr;
    if (directions_ == 1) return data<T>(above_) + (layer * chunk_rows_ + row - chunk_row) * output_;
    return data<T>(above_) + (layer % 2 * rows_ + row) * 2 * output_ + Base::column_of(lane);
  }

  Tensor output_all_, reserve_;
  Tensor h_;                  // (lanes, B, P or H): of the last step taken
  Tensor c_;                  // (lanes, B, H)
  Tensor bias_;               // (lanes, 4H)
  Tensor cell_h_;             // (lanes, B, H), with a projection: h before it
  Tensor projected_;          // (lanes, B, P): and after it
  Tensor first_input_;        // (D, rows, 4H): W_ih·x of the lanes whose whole input is there
  Tensor above_;              // (L-1, rows of a chunk, H): what the layer above reads; two directions: (2, rows, 2·H)
  A* recurrent_ = nullptr;    // (lanes, B, 4H)
  A* upper_input_ = nullptr;  // (L-1, rows of a chunk, 4H): W_ih·h of the layer below
  int64_t first_input_row_[2] = {0, 0};
  LaneProduct recurrent_product_, projection_product_, input_product_;
  std::vector<gates::ForwardCell<T>> cells_;
  std::vector<gates::CopyCell<T>> copies_;
};

// ---- Backward -------------------------------------------------------------------------------------------------------

template <typename T>
class Backward : Driver<T> {
  using Base = Driver<T>;
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
  Backward(const Call& call, const Kept& kept, const IncomingGradients& incoming, bool input_grad, bool weight_grad,
           Counts& counts)
      : Base(call, counts),
        reserve_(kept.reserve.contiguous()),
        parts_(reserve_, call.shape, call.options.saving),
        top_(kept.output.contiguous()),
        grad_output_(contiguous(incoming.output)),
        grad_h_n_(contiguous(incoming.h_n)),
        h_0_(call.h_0.contiguous()),
        c_0_(call.c_0.contiguous()),
        incoming_(incoming),
        input_grad_(input_grad),
        weight_grad_(weight_grad),
        recompute_(call.options.saving == Saving::recompute) {}

  Gradients run() {
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
    // Zeros: the last product also takes rows and lanes that have had no step yet.
    grad_gates_ = at::zeros({lanes_, batch_, 4 * hidden_}, storage_);
    recurrent_ = at::empty({lanes_, batch_, output_}, accumulator_);
    recurrent_product_ = LaneProduct(recurrent_, grad_gates_, Base::stacked(1));
    // Two directions: the layers take turns, and so do their gradients.
    all_grad_gates_ = at::empty({directions_ == 2 ? 1 : depth_, rows_, directions_ * 4 * hidden_}, storage_);
    if (depth_ > 1) {
      above_ = directions_ == 2 ? at::empty({1, rows_, 2 * output_}, accumulator_)
                                : at::empty({depth_ - 1, chunk_rows_, output_}, accumulator_);
      if (directions_ == 1) upper_weights_ = Base::stacked(0, 1);
    }
    if (projection_ > 0) {
      grad_h_ = at::empty({lanes_, batch_, projection_}, storage_);
      all_grad_h_ = at::empty({lanes_, rows_, projection_}, storage_);
      grad_cell_h_ = at::empty({lanes_, batch_, hidden_}, accumulator_);
      cell_h_ = at::empty({lanes_, rows_, hidden_}, storage_);
      projection_product_ = LaneProduct(grad_cell_h_, grad_h_, Base::stacked_hr());
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
    return layer + 1 == depth_ ? const_data<T>(top_) : parts_.h + layer * rows_ * directions_ * output_;
  }

  // What the products over all steps read: h(t-1) of every lane, and the inputs of the layers above as dropout left
  // them.
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

    if (!Base::mask_.seed) return;
    const int64_t stride = directions_ * output_;
    masked_ = at::empty({depth_ - 1, rows_, stride}, storage_);
    for (int64_t layer = 0; layer + 1 < depth_; ++layer) {
      copies_of_masked(shape_, layer, h_of(layer), data<T>(masked_) + layer * rows_ * stride,
                       [&](const gates::CopyCell<T>& cell) {
                         copies.push_back(cell);
                         flush(kCopiesALaunch - 1, stride);
                       });
    }
    flush(0, stride);
  }

  int64_t continued_rows(int64_t lane, int64_t t) const { return driver::continued_rows(shape_, lane, t); }
  // Those that go on to the step after. The others end at t.
  int64_t carried_rows(int64_t lane, int64_t t) const {
    if (lane % directions_ == 0) return t + 1 < shape_.steps ? shape_.active(t + 1) : 0;
    return t > 0 ? shape_.active(t) : 0;
  }

  // The input of a layer, all rows: (rows, input).
  Tensor input_of(int64_t layer) const {
    if (layer == 0) return Base::input_;
    if (masked_.defined()) return masked_.select(0, layer - 1);
    return h_in_reserve<T>(reserve_, shape_, call_.options.saving, layer - 1);
  }

  // Gradients of all steps of a lane's gates: (rows, 4H), rows D·4H apart.
  Tensor grad_gates_of(int64_t lane) const {
    return all_grad_gates_.select(0, directions_ == 2 ? 0 : lane)
        .narrow(1, lane % directions_ * 4 * hidden_, 4 * hidden_);
  }

  // What the layers of a stage get from the layers above them.
  void project(int64_t stage) {
    const Diagonals::Lanes lanes = plan_.lanes(stage);
    if (directions_ == 2) {
      const int64_t layer = Base::layer_of(lanes.first);
      if (layer + 1 == depth_ || plan_.chunk_of(stage, lanes.first) + 1 < plan_.chunks()) return;
      const Tensor weights = at::cat({Base::weight_ih(lanes.first + 2), Base::weight_ih(lanes.first + 3)});
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
        // From layer to layer one whole sequence on and one chunk back.
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
                     single(Base::weight_ih(lane).t()));
      Base::multiply(recurrent_part_.narrow(0, lane, 1).narrow(1, 0, rows.count),
                     previous_.narrow(0, lane, 1).narrow(1, rows.first, rows.count), single(Base::weight(lane, 1).t()));
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
        cell.gates = parts_.gates + 4 * (lane * rows_ + row) * padded_;
      }
      const A* const c = parts_.c + lane * rows_ * padded_;
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

  // The weight gradients of a lane that has had its last step: each one product over all rows.
  void finish(int64_t lane) {
    Tensor* const grad = &result_.weights[static_cast<size_t>(lane * call_.options.weights_a_lane())];
    const Tensor gates = grad_gates_of(lane), gates_t = single(gates.t());
    Base::multiply_and_round(single(grad[0]), gates_t, single(input_of(Base::layer_of(lane))));
    Base::multiply_and_round(single(grad[1]), gates_t, previous_.narrow(0, lane, 1));
    if (call_.options.bias) {
      at::sum_out(grad[2], gates, at::IntArrayRef{0});
      grad[3].copy_(grad[2]);
    }
    if (projection_ > 0) {
      Base::multiply_and_round(single(grad[call_.options.weights_a_lane() - 1]),
                               single(all_grad_h_.select(0, lane).t()), cell_h_.narrow(0, lane, 1));
    }
  }

  void finish_input() {
    result_.input = at::empty(call_.input.sizes(), storage_);
    const Tensor weights = directions_ == 2 ? at::cat({Base::weight_ih(0), Base::weight_ih(1)}) : Base::weight_ih(0);
    Base::multiply_and_round(single(result_.input.view({rows_, call_.input.size(-1)})), all_grad_gates_.narrow(0, 0, 1),
                             single(weights));
  }

  const Tensor reserve_;
  const Parts<T> parts_;
  const Tensor top_, grad_output_, grad_h_n_, h_0_, c_0_;
  const IncomingGradients& incoming_;
  const bool input_grad_, weight_grad_, recompute_;
  Gradients result_;
  Tensor bias_;            // (lanes, 4H), to recompute
  Tensor grad_c_;          // (lanes, B, H): dL/dc before the last step taken
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

// Calls run<T>(…) for the storage type of a dtype.
template <typename Run>
auto with_storage(at::ScalarType type, Run&& run) {
  switch (type) {
    case at::kDouble:
      return run(double{});
    case at::kBFloat16:
      return run(bfloat16{});
    case at::kHalf:
      return run(float16{});
    default:
      return run(float{});
  }
}

}  // namespace

Diagonals plan(const StackShape& shape, int64_t accumulator_bytes) {
  Diagonals plan = plan_diagonals(shape, accumulator_bytes);
  if (forced_chunk) {
    plan.chunk_steps = std::min(*forced_chunk, shape.steps);
    plan.input_chunks = 1;
  }
  return plan;
}

void force_chunk(std::optional<int64_t> steps) { forced_chunk = steps; }

Counts predict(const StackShape& shape, const Options& options, int64_t accumulator_bytes, bool backward,
               bool weight_grad, bool input_grad) {
  const Diagonals schedule = plan(shape, accumulator_bytes);
  const int64_t lanes = shape.lanes(), projected = options.proj_size > 0 ? 1 : 0, two = shape.directions == 2 ? 1 : 0;
  Counts counts{schedule};
  if (shape.batch == 0) return counts;
  counts.launches = (1 + projected) * schedule.diagonals();
  counts.products = (1 + projected) * schedule.diagonals();
  for (int64_t stage = 0; stage < schedule.stages(); ++stage) {
    const Diagonals::Lanes some = schedule.lanes(stage);
    const int64_t chunk = schedule.chunk_of(stage, some.first);
    if (!backward) {
      if (two || some.first == 0) counts.products += chunk % schedule.input_chunks == 0 ? shape.directions : 0;
      if (!two && some.first + some.count > 1) ++counts.products;
      continue;
    }
    if (options.saving == Saving::recompute) counts.products += 2 * some.count;
    if (two) {
      if (some.first / 2 + 1 < shape.depth() && chunk + 1 == schedule.chunks()) ++counts.products;
      if (chunk + 1 == schedule.chunks()) --counts.products;  // nothing comes back to a layer's last step
    } else {
      const int64_t below = std::min(some.first + some.count, shape.depth() - 1) - some.first;
      const bool shorter = schedule.length(chunk) < schedule.chunk_steps;
      if (below > 0) counts.products += shorter && below > 1 ? 2 : 1;
      // Nor to a diagonal of which every lane is at its last step.
      if (some.count == 1 && chunk + 1 == schedule.chunks()) --counts.products;
    }
  }
  if (!backward) return counts;
  ++counts.products;  // what comes back to h_0
  const auto launches = [](int64_t cells) { return (cells + kCopiesALaunch - 1) / kCopiesALaunch; };
  if (weight_grad || options.saving == Saving::recompute) {
    counts.launches += launches(lanes * (shape.steps > 1 ? 2 : 1));
    if (options.dropout > 0) counts.launches += launches(shape.depth() - 1);
  }
  if (weight_grad) counts.products += (2 + projected) * lanes;
  if (input_grad) ++counts.products;
  return counts;
}

Results forward(const Call& call, Counts& counts) {
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

Gradients backward(const Call& call, const Kept& kept, const IncomingGradients& incoming, bool input_grad,
                   bool weight_grad, Counts& counts) {
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
