// csrc/cpu/step.cpp: one time step of a stack.
//
// At B = 1 a step takes the time to read all weights once. Every worker owns a slice of the units of every layer. In
// each layer it does the following:
//   1. compute b + W_hh·h. This needs no result of this step: it is done while other workers finish the layer below;
//   2. wait for all slices of the layer below, add W_ih·x and run the cell;
//   3. with a projection: hand o·tanh(c) over, wait for all slices, and compute W_hr times it;
//   4. with residual or skip links: make its share of what the layer above reads.
//
// Before the first layer, each worker takes the fingerprint of its share of the sources (fingerprint.h). No worker
// waits for the sum of these fingerprints; it is compared when the step is done. So packed weights that are out of date
// cost a step, whose result is dropped.
//
// Hazard. Every layer has its own buffers, and each is written once. So no worker overwrites what a slower worker may
// still read.
#include "step.h"

#include <algorithm>
#include <new>

#include "../stack/link.h"
#include "../stack/state_layout.h"
#include "wave.h"

namespace stacked_lstm::cpu {
namespace {

constexpr double kWakeNs = 10000;  // time to wake a pool's thread that went to sleep after the step before

template <typename T>
class StackStep {
 public:
  StackStep(const StepCall<T>& call, int64_t workers, Platform& platform)
      : call_(call),
        shape_(call.shape),
        kernels_(kernels<T>()),
        platform_(platform),
        workers_(workers),
        team_(workers, platform.at_the_same_time()) {
    int64_t units = 0, columns = 0, widest = 0;
    links_ = shape_.link != LinkKind::plain;
    for (const LayerShape& layer : shape_.layers) {
      units = std::max(units, layer.padded_hidden());
      columns = std::max(columns,
                         std::max(round_up(layer.output(), kWidth * kernels_.vector_elements), layer.padded_hidden()));
      widest = std::max({widest, layer.input, layer.output(), layer.hidden});
    }
    const int64_t layers = shape_.depth();
    ldh_ = columns, ldc_ = units, ldu_ = round_up(widest, kUnitPadding);
    memory_->lay_out([&] {
      h_ = memory_->template take<T>(layers * shape_.batch * ldh_);
      c_ = memory_->template take<T>(layers * shape_.batch * ldc_);
      gates_ = memory_->template take<T>(layers * shape_.batch * 4 * ldc_);
      inputs_ = links_ ? memory_->template take<T>(layers * shape_.batch * ldu_) : nullptr;
      hidden_ = shape_.projects() ? memory_->template take<T>(layers * shape_.batch * ldc_) : nullptr;
      operand_bytes_ = operand_bytes(kernels_, call.weights.storage(), shape_.batch, widest);
      operands_ = memory_->template take<char>(workers_ * operand_bytes_);
      done_ = memory_->template take<Count>(workers_);
      shares_ = memory_->template take<Fingerprint>(workers_);
    });
    for (int64_t n = 0; n < workers_; ++n) new (done_ + n) Count;
  }

  // Returns the number of workers, or nothing if the weights are not those that were packed.
  std::optional<int64_t> run() {
    const std::vector<Bytes>& sources = call_.weights.sources();
    const auto member = [&](int64_t share) {
      team_.work(share, [&](int64_t rank, int64_t size) {
        if (call_.check) shares_[rank] = fingerprint(sources, rank, size);
        for (int64_t layer = 0; layer < shape_.depth(); ++layer) run_layer(layer, rank, size);
      });
    };
    if (workers_ == 1) {
      member(1);
    } else {
      platform_.parallel(workers_, member);
    }
    team_.rethrow();
    Fingerprint all;
    for (int64_t n = 0; call_.check && n < team_.size(); ++n) all += shares_[n];
    if (call_.check && !(all == call_.weights.fingerprint())) return {};
    return team_.size();
  }

 private:
  // A worker's count of hand-overs goes on from layer to layer. A layer without a projection skips its first.
  static constexpr int64_t kHandOvers = 2;  // a layer
  void hand_over(int64_t rank, int64_t count) { publish(done_[rank], count); }
  void wait_all(int64_t size, int64_t count) const {
    for (int64_t n = 0; n < size; ++n) team_.wait(done_[n], count);
  }

  void run_layer(int64_t index, int64_t rank, int64_t size) {
    const LayerShape& layer = shape_.layers[static_cast<size_t>(index)];
    const PackedLane<T>& weights = call_.weights.lanes()[static_cast<size_t>(index)];
    const Storage storage = call_.weights.storage();
    const int64_t batch = shape_.batch, hidden = layer.hidden, padded = layer.padded_hidden(), out = layer.output();
    const int64_t elements = kernels_.vector_elements, width = recurrent_width(batch);
    const bool projects = layer.projection > 0;
    const Range unit_blocks = share_of(padded / elements, rank, size);
    const Range units{std::min(unit_blocks.first * elements, hidden), std::min(unit_blocks.last * elements, hidden)};
    void* const operands = operands_ + rank * operand_bytes_;
    T* const gates = gates_ + index * batch * 4 * ldc_;
    T* const h = h_ + index * batch * ldh_;
    T* const c = c_ + index * batch * ldc_;
    const StateLayout states(shape_);
    const int64_t h_at = states.h(index), c_at = states.c(index);
    const T *const h_0 = call_.h_0 + h_at, *const c_0 = call_.c_0 + c_at;
    T *const h_n = call_.h_n + h_at, *const c_n = call_.c_n + c_at;

    kernels_.product({
        .panels = {weights.weight_hh, storage},
        .width = width,
        .first_panel = unit_blocks.first * 4 / width,
        .last_panel = unit_blocks.last * 4 / width,
        .a = h_0,
        .lda = out,
        .rows = batch,
        .unroll_rows = batch,
        .inner = out,
        .rounded = call_.bf16_activations,
        .operands = operands,
        .init = weights.bias,
        .c = gates,
        .ldc = 4 * padded,
    });
    for (int64_t b = 0; b < batch; ++b) {
      T* const row = c + b * padded;
      std::fill(row + std::max(units.last, unit_blocks.first * elements), row + unit_blocks.last * elements, T(0));
      copy(c_0 + b * hidden, row, units);
    }
    wait_all(size, index * kHandOvers);
    StepForward<T> step{
        .panels = {weights.weight_ih, storage},
        .width = kWidth,
        .first_unit_block = unit_blocks.first,
        .last_unit_block = unit_blocks.last,
        .h = index == 0 ? call_.input
             : links_   ? input_of(index)
                        : h_ + (index - 1) * batch * ldh_,
        .ldh = index == 0 ? call_.input_stride
               : links_   ? ldu_
                          : ldh_,
        .rows = batch,
        .unroll_rows = batch,
        .inner = layer.input,
        .rounded = true,
        .operands = operands,
        .projected = gates,
        .hidden = hidden,
        .padded_hidden = padded,
        .c = c,
        .h_next = h,
        .ldh_next = ldh_,
        .y = h_n,
        .ldy = out,
        .saved_c = nullptr,
        .saved_gates = nullptr,
    };
    Range columns = units;
    if (projects) step.h_next = hidden_ + index * batch * ldc_, step.ldh_next = ldc_, step.y = nullptr;
    kernels_.step_forward(step);
    if (projects) {
      hand_over(rank, index * kHandOvers + 1);
      wait_all(size, index * kHandOvers + 1);
      const Range panels = share_of(panels_of(out, kWidth, elements), rank, size);
      kernels_.product({
          .panels = {weights.weight_hr, storage},
          .width = kWidth,
          .first_panel = panels.first,
          .last_panel = panels.last,
          .a = step.h_next,
          .lda = ldc_,
          .rows = batch,
          .unroll_rows = batch,
          .inner = hidden,
          .rounded = call_.bf16_activations,
          .operands = operands,
          .c = h,
          .ldc = ldh_,
      });
      columns = {std::min(panels.first * kWidth * elements, out), std::min(panels.last * kWidth * elements, out)};
      for (int64_t b = 0; b < batch; ++b) copy(h + b * ldh_, h_n + b * out, columns);
    }
    if (links_) make_input(index + 1, h_n, columns, share_of(shape_.layers[0].input, rank, size));
    hand_over(rank, (index + 1) * kHandOvers);
    for (int64_t b = 0; b < batch; ++b) copy(c + b * padded, c_n + b * hidden, units);
    const bool top = index + 1 == shape_.depth();
    if (!top && shape_.link != LinkKind::skip) return;
    const int64_t stride = shape_.output_width();
    for (int64_t b = 0; b < batch; ++b) {
      T* const row = call_.output + output_column(shape_, index) + b * stride;
      copy(h_n + b * out, row, columns);
      if (adds_input(shape_, index)) add(input_of(index) + b * ldu_, row, columns);
    }
  }

  // Where links make the input of a layer above the lowest: rows of ldu_.
  T* input_of(int64_t layer) const { return inputs_ + layer * shape_.batch * ldu_; }

  // Makes a worker's columns of what a layer reads: of the h of the layer below, and of x. See stack/link.h.
  void make_input(int64_t layer, const T* below, const Range& columns, const Range& columns_of_x) const {
    if (layer == shape_.depth()) return;
    const int64_t width = columns_from_below(shape_, layer);
    for (int64_t b = 0; b < shape_.batch; ++b) {
      T* const row = input_of(layer) + b * ldu_;
      copy(below + b * width, row, columns);
      if (adds_input(shape_, layer - 1)) add(input_of(layer - 1) + b * ldu_, row, columns);
      if (shape_.link == LinkKind::skip) copy(call_.input + b * call_.input_stride, row + width, columns_of_x);
    }
  }

  static void copy(const T* from, T* to, const Range& columns) {
    std::copy(from + columns.first, from + columns.last, to + columns.first);
  }
  static void add(const T* from, T* to, const Range& columns) {
    for (int64_t n = columns.first; n < columns.last; ++n) to[n] += from[n];
  }

  const StepCall<T>& call_;
  const StackShape& shape_;
  const CpuKernels<T>& kernels_;
  Platform& platform_;
  const int64_t workers_;
  Team team_;
  Workspace::Lease memory_;
  bool links_;  // whether links do more than to pass h on
  int64_t ldh_, ldc_, ldu_;
  T *h_, *c_, *gates_;  // of each layer, [sequence][…], whole vectors
  T* inputs_;           // what the layers read; with links
  T* hidden_;           // o·tanh(c); with a projection
  int64_t operand_bytes_;
  char* operands_;  // of each worker's products
  Count* done_;     // of each worker
  Fingerprint* shares_;
};

}  // namespace

int64_t step_workers(const StackShape& shape, int64_t threads, int64_t element, Storage storage, int64_t source_bytes) {
  const CpuMachine& m = machine(element);
  double bytes = static_cast<double>(source_bytes), products = 0, cells = 0, hand_overs = 0;
  int64_t narrowest = shape.layers[0].padded_hidden();
  for (const LayerShape& layer : shape.layers) {
    const double weights = static_cast<double>(4 * layer.hidden * (layer.input + layer.output())) +
                           static_cast<double>(layer.projection * layer.hidden);
    bytes += weights * static_cast<double>(stored_bytes(storage, element));
    products += weights * static_cast<double>(shape.batch);
    cells += static_cast<double>(layer.hidden * shape.batch);
    hand_overs += layer.projection > 0 ? 2 : 1;
    narrowest = std::min(narrowest, layer.padded_hidden());
  }
  int64_t best = 1;
  double least = 0;
  for (int64_t workers = 1; workers <= std::min(threads, narrowest / kUnitPadding); ++workers) {
    const double share = 1 / static_cast<double>(workers);
    const double rate = bytes * share < m.l2_bytes ? m.near_rate : m.far_rate;
    double cost = share * (std::max(products / m.multiply_adds, bytes / rate) + cells * m.cell);
    if (workers > 1) cost = cost * m.imbalance + kWakeNs + hand_overs * m.hand_over;
    if (workers == 1 || cost < least) best = workers, least = cost;
  }
  return best;
}

template <typename T>
std::optional<Schedule> step(const StepCall<T>& call, int64_t workers, Platform& platform) {
  const std::optional<int64_t> size = StackStep<T>(call, workers, platform).run();
  if (!size) return {};
  Schedule schedule;
  schedule.phase[0] = {0, call.shape.depth(), 1, *size};
  return schedule;
}
template std::optional<Schedule> step(const StepCall<float>&, int64_t, Platform&);
template std::optional<Schedule> step(const StepCall<double>&, int64_t, Platform&);

}  // namespace stacked_lstm::cpu
