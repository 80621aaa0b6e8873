// csrc/diagonal/driver.h: what forward and backward of the diagonal schedule share. Its matrix products are ATen's, its gates the
// kernels of gates.h.
//
//             stage 0   stage 1   stage 2   stage 3      A stage begins with the input projections of its chunks, one
//   layer 0   ▪▪▪▪▪▪    ▪▪▪▪▪▪    ▪▪▪▪▪▪                 product for all layers. Then come its diagonals (▪): the
//   layer 1             ▪▪▪▪▪▪    ▪▪▪▪▪▪    ▪▪▪▪▪▪ …     recurrent product of all layers, and one launch for all of
//   layer 2                       ▪▪▪▪▪▪    ▪▪▪▪▪▪ …     their cells. wavefront.h says which lanes are in a stage.
//
// That is so if all layers have the same width. Otherwise the layers form runs (wavefront.h): the layers of a run share
// their products, their launches and their buffers, and a diagonal has a product and a launch for each run that has a lane
// in it. The first layer of a run reads what the run below hands up, which has another width. So its input projection is a
// product of its own.
//
// Nothing here waits for the device or reads a tensor's contents. So the same calls are queued every time, and a CUDA
// graph can hold them. The few buffers are allocated before the first stage. The same code runs on the CPU, with
// gates_host.cpp in place of the CUDA kernels.
//
// Hazard: where sequences are of different lengths, lanes have different numbers of rows at one diagonal, and a product takes as
// many rows as the largest lane has. The surplus rows of the other lanes are stale or were never written. Nothing reads the
// results of these rows.
//
// A padded batch with lengths has B rows at each step, of which the first active(t) exist. Cells have only these. Input
// products take all rows, and what comes of padding is never read. Products for weight gradients sum over all rows. So
// gate gradients are zero in the padding, and so is what they are multiplied by.
#pragma once

#include <ATen/ops/stack.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "../driver/driver.h"
#include "../driver/gate_kernels.h"
#include "diagonal.h"

namespace stacked_lstm::diagonal {

using namespace driver;

// Calls run(T{}), where T is the storage type of a dtype.
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

// What forward and backward have in common.
template <typename T>
class DiagonalDriver {
 protected:
  using A = Accumulator<T>;

  using Lanes = Diagonals::Lanes;

  struct Rows {
    int64_t first, count;
  };

  // A run, and the sizes that its layers have in common.
  struct RunShape {
    LayerRun layers;
    int64_t directions;
    int64_t first, lanes;  // its first lane, and how many it has
    int64_t below_top;     // how many of its layers have a layer above
    int64_t hidden, projection, output, padded;

    // Elements of a row of a layer's output, and of a row of the gate gradients of a layer.
    int64_t output_stride() const { return directions * output; }
    int64_t gates_stride() const { return directions * 4 * hidden; }
    int64_t column_of(int64_t lane) const { return lane % directions * output; }
    bool has_layer(int64_t layer) const { return layer >= layers.first_layer && layer < layers.last_layer; }
  };

  DiagonalDriver(const Call& call, DiagonalCounts& counts)
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
        places_(call.shape, call.options.bias),
        resets_(resets_of(call)),
        residual_(call.shape.link == LinkKind::residual && call.shape.depth() > 1),
        skip_(call.shape.link == LinkKind::skip && call.shape.depth() > 1) {
    counts_.schedule = plan_;
    // No other chunk has more rows, since an earlier step never has fewer sequences than a later one.
    chunk_rows_ = shape_.first_row(std::min(plan_.chunk_steps, shape_.steps));
    input_ = input_rows(call);
    int64_t column = 0;
    for (int64_t k = 0; k < depth_; ++k) {
      masks_.push_back(mask_of(call, k));
      columns_.push_back(skip_ ? column : 0);
      column += directions_ * shape_.layers[static_cast<size_t>(k)].output();
    }
    for (const LayerRun& run : runs_of(shape_)) {
      const LayerShape& layer = shape_.layers[static_cast<size_t>(run.first_layer)];
      run_shapes_.push_back({run, directions_, run.first_layer * directions_, run.layers() * directions_,
                             std::min(run.last_layer, depth_ - 1) - run.first_layer, layer.hidden, layer.projection,
                             layer.output(), layer.padded_hidden()});
    }
  }

  const Tensor& weight(int64_t lane, Weight name) const { return call_.weights[places_.at(lane, name)]; }

  // The columns of a lane's W_ih that multiply what the layer below hands up (of layer 0: x), and, with skip links, those
  // that multiply x.
  Tensor weight_below(int64_t lane) const {
    const Tensor& all = weight(lane, Weight::ih);
    return reads_x_too(layer_of(lane)) ? all.narrow(1, 0, all.size(1) - input_.size(1)) : all;
  }
  Tensor weight_x(int64_t lane) const {
    const Tensor& all = weight(lane, Weight::ih);
    return all.narrow(1, all.size(1) - input_.size(1), input_.size(1));
  }
  // Whether a layer reads x beside what the layer below hands up.
  bool reads_x_too(int64_t layer) const { return skip_ && layer > 0; }
  // With residual links, the inputs of layers from 2 on are kept: stack/reserve.h.
  bool input_is_kept(int64_t layer) const { return residual_ && layer >= 2; }

  // Where a layer's h begins in a row of the output, and how long a row is that keeps it.
  int64_t column_of_layer(int64_t layer) const { return columns_[static_cast<size_t>(layer)]; }
  int64_t h_stride(const RunShape& run) const { return skip_ ? shape_.output_width() : run.output_stride(); }

  // W_ih of a run's lanes but the first, as weight_below() has it: (lanes - 1, 4H, P or H).
  Tensor stacked_below(const RunShape& run) const {
    const Tensor all = stacked(run, Weight::ih, 1);
    return skip_ ? all.narrow(2, 0, run.output) : all;
  }

  // One kind of weight of a run's lanes, without the first `skipped` of them: (lanes, …).
  Tensor stacked(const RunShape& run, Weight name, int64_t skipped = 0) const {
    std::vector<Tensor> all;
    for (int64_t n = skipped; n < run.lanes; ++n) all.push_back(weight(run.first + n, name));
    return at::stack(all);
  }

  // b_ih + b_hh of a run, (lanes, 4H), or undefined.
  Tensor stacked_bias(const RunShape& run) const {
    if (!call_.options.bias) return {};
    return stacked(run, Weight::bias_ih).to(scalar_type<A>()).add_(stacked(run, Weight::bias_hh));
  }

  // A run's part of a tensor of states, from element `first` on: (lanes, B, width).
  Tensor part_of_states(const Tensor& states, const RunShape& run, int64_t first, int64_t width) const {
    return states.view(-1).narrow(0, first, run.lanes * batch_ * width).view({run.lanes, batch_, width});
  }

  // The beginning of a buffer, which has one dimension, in this form.
  static Tensor beginning(const Tensor& buffer, at::IntArrayRef sizes) {
    return buffer.narrow(0, 0, c10::multiply_integers(sizes)).view(sizes);
  }
  // The largest of a size of the runs.
  template <typename SizeOf>
  int64_t largest(const SizeOf& size_of) const {
    int64_t most = 0;
    for (const RunShape& run : run_shapes_) most = std::max(most, size_of(run));
    return most;
  }

  int64_t time(int64_t lane, int64_t stage, int64_t s) const {
    return shape_.time(lane, plan_.chunk_of(stage, lane) * plan_.chunk_steps + s);
  }
  int64_t layer_of(int64_t lane) const { return lane / directions_; }
  const gates::Mask& mask(int64_t layer) const { return masks_[static_cast<size_t>(layer)]; }

  // The rows of `chunks` chunks of a lane. They are consecutive, whichever direction the lane has.
  Rows chunk_rows(int64_t lane, int64_t chunk, int64_t chunks = 1) const {
    const int64_t first = chunk * plan_.chunk_steps;
    const int64_t last = std::min(first + chunks * plan_.chunk_steps, shape_.steps) - 1;
    const int64_t one = shape_.time(lane, first), other = shape_.time(lane, last);
    const int64_t row = shape_.first_row(std::min(one, other));
    return {row, shape_.first_row(std::max(one, other) + 1) - row};
  }

  gates::RowResets resets(int64_t lane, int64_t t) const { return resets_before(shape_, resets_, lane, t); }

  gates::Element element(const RunShape& run, int64_t lane, int64_t t) const {
    return {t * batch_, run.column_of(lane), layer_of(lane), mask(layer_of(lane))};
  }

  void multiply(const Tensor& result, const Tensor& a, const Tensor& b) { products_.multiply(result, a, b); }
  void multiply_and_add(const Tensor& result, const Tensor& a, const Tensor& b) {
    products_.multiply_and_add(result, a, b);
  }
  void multiply_and_round(const Tensor& result, const Tensor& a, const Tensor& b, bool wide = true) {
    products_.multiply_and_round(result, a, b, wide);
  }

  template <typename Cell>
  void launch(std::string (*kernel)(const gates::CellSizes&, const Cell*, int64_t, void*), const RunShape& run,
              int64_t width, const std::vector<Cell>& cells) {
    ++counts_.launches;
    const gates::CellSizes sizes{width, run.output_stride(), run.padded, run.gates_stride(), h_stride(run)};
    const std::string error = kernel(sizes, cells.data(), static_cast<int64_t>(cells.size()), stream_);
    TORCH_CHECK(error.empty(), "stacked_lstm_ext: a kernel could not be launched on ", call_.input.device(), ": ",
                error);
  }

  // A product over consecutive lanes of a run, which are numbered in the run, and the first rows of each. Its views are
  // made again only when these change.
  class LaneProduct {
   public:
    LaneProduct() = default;
    LaneProduct(Tensor result, Tensor a, Tensor b) : all_{std::move(result), std::move(a), std::move(b)} {}
    void run(DiagonalDriver& driver, int64_t first, int64_t count, int64_t rows, bool to_storage = false) {
      if (first != first_ || count != count_ || rows != rows_) {
        for (int n = 0; n < 3; ++n) {
          view_[n] = all_[n].narrow(0, first, count);
          if (n < 2) view_[n] = view_[n].narrow(1, 0, rows);
        }
        first_ = first, count_ = count, rows_ = rows;
      }
      if (to_storage) {
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
  const gates::GateKernels<T>& kernels_;
  void* stream_;
  DiagonalCounts& counts_;
  const Products<T> products_;
  const at::TensorOptions storage_, accumulator_;
  const int64_t directions_, depth_, lanes_, batch_, rows_;
  int64_t chunk_rows_;
  Tensor input_;  // (rows, I)
  const WeightPlaces places_;
  const uint8_t* const resets_;  // null: none
  const bool residual_, skip_;   // with these links between at least two layers
  std::vector<int64_t> columns_;
  std::vector<gates::Mask> masks_;  // of the link from each layer
  std::vector<RunShape> run_shapes_;
};

}  // namespace stacked_lstm::diagonal
