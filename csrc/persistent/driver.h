// csrc/persistent/driver.h: what forward and backward of the persistent kernels' driver share. The driver launches what
// a plan says, and computes the large products around the launches.
//
//   forward    pass 0 (layers 0 … 4)   →   pass 1 (layers 5 … 7)   → …        a launch each, or, where not all batch groups
//   backward   … ←  products of pass 0  ←  pass 0  ←  products of pass 1  ←  pass 1     find room, a round of them each
//
// All layers of a pass are equally wide; those of another pass may have another width. Between two passes, forward hands on
// h of the lower pass's top layer in memory; backward hands back W_ihᵀ·dgates, one product over all steps. Weight gradients are products over all steps, too, as soon as a pass has its gate gradients.
//
// Saving::recompute: the pre-activations of gates are computed again from h: W_ih·x + W_hh·h(t-1), two products over a
// segment of steps. A pass then runs in several launches, one a segment, from the last steps to the first, so that this
// buffer stays small compared with what is saved. dh and dc go from one launch to the next through memory.
//
// If a launch leaves SMs idle and the products are large, the plan makes backward run in segments, too. A segment's
// weight gradients are then computed on a second stream, while the next segment runs (Beside):
//
//   current stream   segment 2 → segment 1 → segment 0 → gradients of the input  ⤵
//   beside it                  ↘ products 2 → products 1 → products 0  →  →  →  → joined
//
// They are added up in one order, segment after segment: the bits are the same every time.
//
// The driver does not wait for the device (except in a build with a watchdog) and does not look at a tensor's contents.
// It queues the same calls every time, so that a CUDA graph can hold them.
#pragma once

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "../driver/driver.h"
#include "../driver/gate_kernels.h"
#include "../stack/state_layout.h"
#include "persistent.h"

namespace stacked_lstm::persistent {

using namespace driver;

// The kernels for a call's device. RuntimeError if there are none.
const PersistentTable& kernels_of(const Call& call);

// Whether the kernels of this device fill the record of a wait that took too long.
bool watchdog_on(const at::Device& device);

template <typename Run>
auto with_storage(at::ScalarType type, Run&& run) {
  if (type == at::kBFloat16) return run(bfloat16{});
  if (type == at::kHalf) return run(float16{});
  return run(float{});
}

// LaunchSizes::rows_before, on the device of `input`; undefined if every step has all sequences.
//
// Hazard: a copy from the host reads its source when the stream reaches the copy, and in a CUDA graph again at every
// replay. The source may be gone by then. So the numbers are passed as arguments of a kernel, which are read when the
// kernel is queued or captured.
inline Tensor rows_on_device(const StackShape& shape, const Tensor& input) {
  if (!shape.ragged()) return {};
  const at::Device device = input.device();
  std::vector<int64_t> before{0};
  for (int64_t t = 0; t < shape.steps; ++t) before.push_back(before.back() + shape.active(t));
  const auto count = static_cast<int64_t>(before.size());
  const Tensor rows = at::empty({count}, input.options().dtype(at::kLong));
  const std::string error = gate_kernels(device).numbers(before.data(), count, data<int64_t>(rows), stream_for(device));
  TORCH_CHECK(error.empty(), "stacked_lstm_ext: a kernel could not be launched on ", device, ": ", error);
  return rows;
}

template <typename T>
class PersistentDriver {
 protected:
  PersistentDriver(const Call& call, const Plan& plan, const PersistentTable& table, PersistentCounts& counts)
      : call_(call),
        shape_(call.shape),
        plan_(plan),
        kernels_(table.of<T>()),
        counts_(counts),
        products_(counts.products),
        storage_(call.input.options().dtype(scalar_type<T>())),
        floats_(call.input.options().dtype(at::kFloat)),
        directions_(call.shape.directions),
        depth_(call.shape.depth()),
        batch_(call.shape.batch),
        rows_(call.shape.rows()),
        states_(call.shape),
        places_(call.shape, call.options.bias),
        rows_before_(rows_on_device(call.shape, call.input)) {
    for (const Tensor& weight : call.weights) weights_.push_back(weight.contiguous());
    if (watchdog_on(call.input.device())) {
      watchdog_ = at::empty({static_cast<int64_t>(sizeof(Watchdog))}, call.input.options().dtype(at::kByte)).zero_();
    }
  }

  const Tensor& weight(int64_t lane, Weight name) const { return weights_[places_.at(lane, name)]; }
  // Null where the lane has no such weight.
  const T* weight_data(int64_t lane, Weight name) const {
    return places_.has(lane, name) ? const_data<T>(weight(lane, name)) : nullptr;
  }
  // H of a layer, and the width of its output.
  int64_t hidden_of(int64_t layer) const { return shape_.layers[static_cast<size_t>(layer)].hidden; }
  int64_t width_of(int64_t layer) const { return directions_ * hidden_of(layer); }
  // Where a lane's direction begins in a row of its layer's output.
  int64_t column_of(int64_t lane) const { return lane % directions_ * hidden_of(lane / directions_); }

  // The strides of a layer's tensors, for work on `width` units of them.
  gates::CellSizes sizes_of(int64_t layer, int64_t width) const {
    const int64_t padded = shape_.layers[static_cast<size_t>(layer)].padded_hidden();
    return {width, width_of(layer), padded, 4 * width_of(layer)};
  }

  // The rows of W_ih of both directions of a layer, one below the other: (D·4H, input).
  Tensor input_weights(int64_t layer) const {
    const int64_t lane = layer * directions_;
    return directions_ == 2 ? at::cat({weight(lane, Weight::ih), weight(lane + 1, Weight::ih)})
                            : weight(lane, Weight::ih);
  }

  // Sets the arguments that all launches of a pass share. Those of rounds and of lanes are set elsewhere.
  template <typename Arguments>
  void describe(Arguments& arguments, const Pass& pass) const {
    arguments.cut = pass.cut;
    LaunchSizes& s = arguments.sizes;
    s.steps = s.last_step = static_cast<int>(shape_.steps);
    s.first_step = 0;
    s.batch = static_cast<int>(batch_);
    s.lanes = static_cast<int>((pass.last_layer - pass.first_layer) * directions_);
    s.batch_groups = static_cast<int>(pass.batch_groups);
    const gates::CellSizes sizes = sizes_of(pass.first_layer, hidden_of(pass.first_layer));
    s.hidden = static_cast<int>(sizes.width);
    s.h_stride = sizes.output_stride;
    s.saved_stride = sizes.saved_stride;
    s.gates_stride = sizes.gates_stride;
    s.rows_before = const_data<int64_t>(rows_before_);
    s.packed = shape_.packed();
    if (call_.resets) s.resets = reinterpret_cast<const uint8_t*>(const_data<bool>(*call_.resets));
    arguments.watchdog = data<Watchdog>(watchdog_);
  }

  // Launches all rounds of a pass. One memset before each round clears its counters and words.
  template <typename Arguments>
  void launch_rounds(Arguments& arguments, const Pass& pass, Outcome (*kernel)(const Arguments&, void*),
                     int64_t (*words_of)(const Cut&, int, int)) {
    const auto workspace = [&](int copies) {
      const int64_t words = pass.cut.exchange == Exchange::l2 ? words_of(pass.cut, copies, arguments.sizes.lanes) : 0;
      const int64_t counters = int64_t{copies} * arguments.sizes.lanes * pass.cut.blocks;
      return std::pair<int64_t, int64_t>{words, (counters + 1) / 2};  // in 64-bit words
    };
    const auto [most_words, most_counters] = workspace(static_cast<int>(pass.copies));
    const Tensor space = at::empty({most_words + most_counters}, storage_.dtype(at::kLong));
    for (int64_t batch_group = 0; batch_group < pass.batch_groups; batch_group += pass.copies) {
      const auto copies = static_cast<int>(std::min(pass.copies, pass.batch_groups - batch_group));
      const auto [words, counters] = workspace(copies);
      space.narrow(0, 0, words + counters).zero_();
      arguments.sizes.first_batch_group = static_cast<int>(batch_group);
      arguments.sizes.copies = copies;
      arguments.words = words > 0 ? data<uint64_t>(space) : nullptr;
      arguments.chunks_done = reinterpret_cast<uint32_t*>(data<uint64_t>(space) + words);
      const Outcome outcome = kernel(arguments, stream_for(call_.input.device()));
      if (outcome.kind != Outcome::ok) fail(outcome);
      ++counts_.launches;
      if (watchdog_.defined()) read_watchdog();
    }
  }

  // Copies rows of a layer, in as few launches as possible. `width`: of a row.
  class Copies {
   public:
    Copies(const PersistentDriver& driver, int64_t layer, int64_t width)
        : driver_(driver), sizes_(driver.sizes_of(layer, width)) {}
    void add(const gates::CopyCell<T>& cell) {
      cells_.push_back(cell);
      if (static_cast<int64_t>(cells_.size()) == kCopiesALaunch) flush();
    }
    void flush() {
      if (cells_.empty()) return;
      const at::Device device = driver_.call_.input.device();
      const std::string error = gate_kernels(device).of<T>().copy(
          sizes_, cells_.data(), static_cast<int64_t>(cells_.size()), stream_for(device));
      TORCH_CHECK(error.empty(), "stacked_lstm_ext: a kernel could not be launched on ", device, ": ", error);
      cells_.clear();
    }

   private:
    const PersistentDriver& driver_;
    const gates::CellSizes sizes_;
    std::vector<gates::CopyCell<T>> cells_;
  };

  const Call& call_;
  const StackShape& shape_;
  const Plan& plan_;
  const PersistentKernels<T>& kernels_;
  PersistentCounts& counts_;
  const Products<T> products_;
  const at::TensorOptions storage_, floats_;
  const int64_t directions_, depth_, batch_, rows_;
  const StateLayout states_;
  const WeightPlaces places_;
  const Tensor rows_before_;
  std::vector<Tensor> weights_;
  Tensor watchdog_;

 private:
  [[noreturn]] void fail(const Outcome& outcome) const {
    const at::Device device = call_.input.device();
    TORCH_CHECK(outcome.kind != Outcome::refused, "stacked_lstm_ext: the persistent kernel was refused on ", device,
                ": ", outcome.text, ". All of its blocks have to be on the device at once, which it had room for when ",
                "the call was planned: something else is running there now, another process perhaps. ",
                "backend('diagonal') needs no such room");
    TORCH_CHECK(false, "stacked_lstm_ext: the persistent kernel could not be launched on ", device, ": ", outcome.text);
  }

  // Waits for every launch: a build with a watchdog is for finding errors.
  void read_watchdog() const {
    const Tensor here = watchdog_.cpu();
    Watchdog w;
    std::memcpy(&w, here.const_data_ptr(), sizeof(w));
    if (w.expired == 0) return;
    const std::string what = w.what == Watchdog::hand_over
                                 ? "chunk " + std::to_string(w.for_count - 1) + " of block " +
                                       std::to_string(w.for_block) + " of lane " + std::to_string(w.for_lane)
                             : w.what == Watchdog::exchange ? std::string("what its peers send for that step")
                                                            : std::string("something unknown");
    TORCH_CHECK(false, "stacked_lstm_ext: a wait of the persistent kernel on ", call_.input.device(),
                " took too long. Block ", w.block, " (copy ", w.copy, ", lane ", w.lane, ", block ", w.rank,
                " of the lane), thread ", w.thread, ", at step ", w.step, ", waited for ", what);
  }
};

}  // namespace stacked_lstm::persistent
