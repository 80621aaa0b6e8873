// csrc/cpu/forward.cpp: the forward wavefront on the CPU.
//
// A worker takes its positions in turn (wavefront.h). In each position it takes the chunks from the first to the last:
//   1. wait for the chunk of the layer below;
//   2. compute the input projection of the whole chunk, in one product;
//   3. for each step: compute h·W_hh and the cell, and hand h over to the other unit slices (with a projection: hand
//      o·tanh(c) over first, then compute W_hr times it, which is h);
//   4. publish the chunk.
//
// Hazards.
//   h has two buffers a lane. A worker writes h(s) over h(s-2) only after every slice has handed over h(s-1), and a
//   slice does that only after it has read h(s-2).
//   In inference the layers share two buffers of y. Layer k+2 writes chunk c over layer k's only after layer k+1 has
//   published chunk c, and layer k+1 does that after it has copied layer k's chunk c. (A bidirectional layer waits for
//   all chunks.) So a chunk has to be in the same place in both layers, whatever their widths: all rows of a buffer are as
//   long as those of the widest layer.
#include "../stack/state_layout.h"
#include "wave.h"

namespace stacked_lstm::cpu {
namespace {

template <typename T>
class ForwardWave : Wave<T> {
  using Base = Wave<T>;
  using Base::shape_, Base::kernels_, Base::team_, Base::schedule_, Base::storage_;

 public:
  ForwardWave(const ForwardCall<T>& call, const Workers& workers, Platform& platform, PackedStack<T>* packed,
              bool check)
      : Base(call.shape, storage_of(call), workers, platform, false),
        call_(call),
        platform_(platform),
        reserve_(call.reserve, call.shape, call.keeping),
        packed_(packed),
        shares_(packed && packed->ready() && check ? static_cast<size_t>(this->workers_) : 0),
        width_(recurrent_width(call.shape.batch)) {
    // All memory is taken before anything is written to the caller's memory.
    memory_->lay_out([&] { take_memory(); });
  }

  std::optional<Schedule> run() {
    bool current = true;
    Base::run(platform_, [&](int64_t worker) {
      const bool found = weights_are_current(worker);
      if (worker == 0) current = found;
      if (!found) return;
      schedule_.for_each_position(shape_.directions, worker, [&](int64_t position, const WorkerPlace& place) {
        run_lane(position, place, scratch_[static_cast<size_t>(worker)]);
      });
    });
    if (!current) return {};
    if (packed_ && !packed_->ready()) packed_->set_ready();
    return schedule_;
  }

 private:
  void take_memory() {
    weights_ =
        packed_ ? packed_->lanes() : lay_out<T>(shape_, storage_, [&](int64_t n) { return memory_->take<char>(n); });
    buffers_.clear();
    for (int64_t lane = 0; lane < this->lane_count_; ++lane) buffers_.push_back(take_buffers(lane));
    const bool passes_h = !call_.keeping.anything() && shape_.link != LinkKind::skip;
    const bool passes_sums = call_.keeping.saving == Saving::none && shape_.link == LinkKind::residual;
    if ((passes_h || passes_sums) && shape_.depth() > 1) {
      const int64_t elements = shape_.rows() * shape_.directions * this->widest_output_;
      for (int64_t n = 0; n < std::min<int64_t>(shape_.depth() - 1, 2); ++n) passing_[n] = memory_->take<T>(elements);
    }
    scratch_.clear();
    const int64_t widest = std::max(this->widest_input_, std::max(this->widest_output_, this->widest_hidden_));
    for (int64_t worker = 0; worker < this->workers_; ++worker) {
      scratch_.push_back({memory_->take<T>(this->chunk_rows_ * (this->widest_input_ + kRowPadding)),
                          memory_->take<T>(this->chunk_rows_ * 4 * this->widest_hidden_),
                          this->take_operands(memory_, this->chunk_rows_, widest, storage_)});
    }
  }

  struct LaneBuffers {
    T* h[2];  // [sequence][ldh]
    int64_t ldh;
    T* c;       // [sequence][padded_hidden]
    T* hidden;  // o·tanh(c), [sequence][ldm]; with a projection
    int64_t ldm;
  };
  struct Scratch {
    T* copied;       // a chunk's input
    T* projected;    // a chunk's W_ih·x + b
    void* operands;  // of any product
  };

  struct Share {  // a worker's share of the sources
    Count done;
    Fingerprint fingerprint;
  };

  LaneBuffers take_buffers(int64_t index) {
    const LayerShape& layer = shape_.of_lane(index);
    const int64_t units = layer.padded_hidden();
    const int64_t columns = std::max(round_up(layer.output(), kWidth * kernels_.vector_elements), units);
    LaneBuffers buffers{};
    buffers.ldh = columns + kRowPadding;
    for (T*& h : buffers.h) h = memory_->take<T>(shape_.batch * buffers.ldh);
    buffers.c = memory_->take<T>(shape_.batch * layer.padded_hidden());
    if (layer.projection > 0) {
      buffers.ldm = layer.padded_hidden() + kRowPadding;
      buffers.hidden = memory_->take<T>(shape_.batch * buffers.ldm);
    }
    return buffers;
  }

  // The rows of a buffer that the layer two above uses again. The layers that share it have one stride there: see Hazards.
  LayerRows<T> passing(int64_t layer) const { return {passing_[layer % 2], shape_.directions * this->widest_output_}; }
  LayerRows<T> of_output(int64_t layer) const {
    return {call_.output + output_column(shape_, layer), shape_.output_width(), true};
  }
  // Where a layer's h goes, all directions: to the caller's output, the reserve, or the layer above; null if only the link
  // behind the layer reads it.
  LayerRows<T> output_of(int64_t layer) const {
    const bool top = layer + 1 == shape_.depth();
    if (shape_.link == LinkKind::skip || (top && !adds_input(shape_, layer))) return of_output(layer);
    if (call_.keeping.anything()) return {reserve_.h(layer), shape_.directions * shape_.layers[layer].output()};
    return adds_input(shape_, layer) ? LayerRows<T>{} : passing(layer);
  }
  // Where the sum of a layer's h and its input goes, if the link behind the layer adds them: to the caller's output, or to the
  // layer above, and with gradients to the reserve.
  LayerRows<T> sum_of(int64_t layer) const {
    if (!adds_input(shape_, layer)) return {};
    if (layer + 1 == shape_.depth()) return of_output(layer);
    if (call_.keeping.saving == Saving::none) return passing(layer);
    return {reserve_.input(layer + 1), shape_.layers[layer + 1].input};
  }
  // What a layer reads of the layer below.
  LayerRows<const T> below(int64_t layer) const {
    if (layer == 0) return {};
    const LayerRows<T> rows = adds_input(shape_, layer - 1) ? sum_of(layer - 1) : output_of(layer - 1);
    return {rows.data, rows.stride, rows.callers};
  }

  // Whether the packed weights are those of the sources as they are now. Every worker reads a share of the sources, and
  // all workers get the same answer.
  bool weights_are_current(int64_t worker) {
    if (shares_.empty()) return true;
    const int64_t workers = schedule_.workers();
    Share& own = shares_[static_cast<size_t>(worker)];
    own.fingerprint = fingerprint(packed_->sources(), worker, workers);
    publish(own.done, 1);
    Fingerprint all;
    for (int64_t n = 0; n < workers; ++n) {
      const Share& share = shares_[static_cast<size_t>(n)];
      team_.wait(share.done, 1);
      all += share.fingerprint;
    }
    return all == packed_->fingerprint();
  }

  void pack(int64_t position, const WorkerPlace& place, const LayerShape& layer, const Range& unit_blocks) {
    if (packed_ && packed_->ready()) return;
    const PackedLane<T>& packed = weights_[static_cast<size_t>(position)];
    const LaneWeights<T>& w = call_.weights[static_cast<size_t>(position)];
    const Range own = this->share_packing(unit_blocks, place);
    const auto panels = [&](int64_t width) { return Range{own.first * 4 / width, own.last * 4 / width}; };
    kernels_.pack_gates(w.weight_ih, layer.hidden, layer.input, kWidth, panels(kWidth).first, panels(kWidth).last,
                        storage_, packed.weight_ih);
    kernels_.pack_gates(w.weight_hh, layer.hidden, layer.output(), width_, panels(width_).first, panels(width_).last,
                        storage_, packed.weight_hh);
    kernels_.pack_bias(w.bias_ih, w.bias_hh, layer.hidden, own.first, own.last, packed.bias);
    if (layer.projection > 0) {
      const Range columns = this->share_packing(this->own_panels(position, place, layer.projection, kWidth), place);
      kernels_.pack_rows(w.weight_hr, layer.projection, layer.hidden, kWidth, columns.first, columns.last, storage_,
                         packed.weight_hr);
    }
    this->packing_done(position, place);
  }

  void run_lane(int64_t position, const WorkerPlace& place, const Scratch& scratch) {
    const int64_t index = position, layer_index = index / shape_.directions, direction = index % shape_.directions;
    const LayerShape& layer = shape_.layers[layer_index];
    const LaneBuffers& buffers = buffers_[static_cast<size_t>(index)];
    const PackedLane<T>& weights = weights_[static_cast<size_t>(index)];
    const Range sequences = this->sequences(place);
    const int64_t count = sequences.size(), first = sequences.first;
    const int64_t hidden = layer.hidden, padded = layer.padded_hidden(), out = layer.output();
    const Range unit_blocks = this->own_unit_blocks(position, place, padded);
    const Range units{std::min(unit_blocks.first * kernels_.vector_elements, hidden),
                      std::min(unit_blocks.last * kernels_.vector_elements, hidden)};
    const bool projects = layer.projection > 0;
    const Range columns =
        projects ? this->columns_of(this->own_panels(position, place, out, kWidth), kWidth, out) : units;
    const int64_t hand_overs = projects ? 2 : 1;  // a step; before them, the lane's initial state is one more
    const int64_t slices = this->slices(position);
    Count& steps_done = this->own(position, place).steps;

    pack(position, place, layer, unit_blocks);

    T* h[2] = {buffers.h[0] + first * buffers.ldh, buffers.h[1] + first * buffers.ldh};
    T* c = buffers.c + first * padded;
    const LayerRows<T> output = output_of(layer_index), sum = sum_of(layer_index);
    const int64_t offset = direction * out;  // the lane's first column in a row of all directions
    // What is stored after a step's hand-over, so that no worker of this lane waits for it.
    const bool stores_late = output.data && (projects || slices > 1);
    // Puts zeros in the place of what the step at time t reads of the sequences that are reset before it.
    const auto reset = [&](int64_t t, T* h_before) {
      for (const int64_t b : call_.resets.at(boundary_before(shape_, index, t)).within(first, first + count)) {
        T *row = h_before + (b - first) * buffers.ldh, *cell = c + (b - first) * padded;
        std::fill(row + columns.first, row + columns.last, T(0));
        std::fill(cell + units.first, cell + units.last, T(0));
      }
    };
    const StateLayout states(shape_);
    const int64_t h_at = states.h(index) + first * out, c_at = states.c(index) + first * hidden;
    const T *h_0 = call_.h_0 + h_at, *c_0 = call_.c_0 + c_at;
    T *h_n = call_.h_n + h_at, *c_n = call_.c_n + c_at;
    if (place.batch_slice == 0) {
      reserve_.clear_rest(index, unit_blocks.first * kernels_.vector_elements,
                          unit_blocks.last * kernels_.vector_elements);
      if (place.slice == 0 && direction == 0) reserve_.clear_padding(layer_index);
    }

    // Copies h_0 of sequences [from, to), which start with the step that reads buffer h[parity].
    const auto start = [&](int64_t from, int64_t to, int64_t parity) {
      for (int64_t b = from; b < to; ++b) Base::copy_columns(h_0 + b * out, h[parity] + b * buffers.ldh, columns);
    };
    for (int64_t b = 0; b < count; ++b) {
      std::fill(c + b * padded + units.first, c + b * padded + unit_blocks.last * kernels_.vector_elements, T(0));
      Base::copy_columns(c_0 + b * hidden, c + b * padded, units);
    }
    start(0, this->rows_at(index, sequences, 0), 0);
    if (shape_.steps > 0) reset(shape_.time(index, 0), h[0]);
    publish(steps_done, 1);

    for (int64_t chunk = 0; chunk < this->chunks(); ++chunk) {
      const Range steps = this->steps_of(chunk);
      this->wait_for_input(position, place, chunk);
      const int64_t lda = layer.input + kRowPadding;
      const int64_t rows =
          this->copy_input(call_.input, call_.links, below(layer_index), index, sequences, steps, scratch.copied, lda);
      kernels_.product({
          .panels = {weights.weight_ih, storage_},
          .width = kWidth,
          .first_panel = unit_blocks.first * 4 / kWidth,
          .last_panel = unit_blocks.last * 4 / kWidth,
          .a = scratch.copied,
          .lda = lda,
          .rows = rows,
          .unroll_rows = shape_.rows(),
          .inner = layer.input,
          .rounded = true,
          .operands = scratch.operands,
          .init = weights.bias,
          .c = scratch.projected,
          .ldc = 4 * padded,
      });
      const T *projected = scratch.projected, *copied = scratch.copied;
      for (int64_t s = steps.first; s < steps.last; ++s) {
        const int64_t t = shape_.time(index, s), n = this->local_rows(sequences, t);
        T *from = h[s & 1], *to = h[(s + 1) & 1];
        T *saved_c = reserve_.c(index, s), *saved_gates = reserve_.gates(index, s);
        this->wait_slices(position, place.batch_slice, &Progress::steps, s * hand_overs + 1);
        if (slices > 1) {
          for (int64_t b = 0; b < n; ++b) Base::prefetch(from + b * buffers.ldh, out);
        }
        StepForward<T> step{
            .panels = {weights.weight_hh, storage_},
            .width = width_,
            .first_unit_block = unit_blocks.first,
            .last_unit_block = unit_blocks.last,
            .h = from,
            .ldh = buffers.ldh,
            .rows = n,
            .unroll_rows = shape_.active(t),
            .inner = out,
            .rounded = call_.bf16_activations,
            .operands = scratch.operands,
            .projected = projected,
            .hidden = hidden,
            .padded_hidden = padded,
            .c = c,
            .h_next = to,
            .ldh_next = buffers.ldh,
            .y = output.data && !stores_late ? output.row(shape_, t, first) + offset : nullptr,
            .ldy = output.stride,
            .saved_c = saved_c ? saved_c + first * padded : nullptr,
            .saved_gates = saved_gates ? saved_gates + first * padded * 4 : nullptr,
            .from_last = (s & 1) != 0,
        };
        if (projects) step.h_next = buffers.hidden + first * buffers.ldm, step.ldh_next = buffers.ldm;
        kernels_.step_forward(step);
        if (projects) {
          publish(steps_done, s * hand_overs + 2);
          this->wait_slices(position, place.batch_slice, &Progress::steps, s * hand_overs + 2);
          const Range panels = this->own_panels(position, place, out, kWidth);
          kernels_.product({
              .panels = {weights.weight_hr, storage_},
              .width = kWidth,
              .first_panel = panels.first,
              .last_panel = panels.last,
              .a = step.h_next,
              .lda = buffers.ldm,
              .rows = n,
              .unroll_rows = shape_.active(t),
              .inner = hidden,
              .rounded = call_.bf16_activations,
              .operands = scratch.operands,
              .c = to,
              .ldc = buffers.ldh,
          });
        }
        projected += n * 4 * padded;
        const int64_t next = this->rows_at(index, sequences, s + 1);
        for (int64_t b = next; b < n; ++b) {  // sequences that end here
          Base::copy_columns(to + b * buffers.ldh, h_n + b * out, columns);
          Base::copy_columns(c + b * padded, c_n + b * hidden, units);
        }
        start(n, next, (s + 1) & 1);
        const auto store = [&] {
          for (int64_t b = 0; stores_late && b < n; ++b) {
            Base::copy_columns(to + b * buffers.ldh, output.row(shape_, t, first + b) + offset, columns);
          }
          if (!sum.data) return;
          const bool top = layer_index + 1 == shape_.depth();
          const Link link = top ? Link{} : call_.links[layer_index];
          for (int64_t b = 0; b < n; ++b) {
            T* const row = sum.row(shape_, t, first + b);
            const T* const input = copied + b * lda + offset;
            Base::copy_columns(to + b * buffers.ldh, row + offset, columns);
            link.forward(row, offset + columns.first, offset + columns.last, layer.input, t * shape_.batch + first + b);
            for (int64_t j = columns.first; j < columns.last; ++j) row[offset + j] += input[j];
          }
        };
        // The next step reads zeros where it is reset. What this one has left is stored before that.
        const bool resets =
            s + 1 < shape_.steps && !call_.resets.at(boundary_before(shape_, index, shape_.time(index, s + 1))).empty();
        if (resets) store(), reset(shape_.time(index, s + 1), to);
        publish(steps_done, (s + 1) * hand_overs + 1);
        if (!resets) store();
        copied += n * lda;
      }
      publish(this->own(position, place).chunks, chunk + 1);
    }
  }

  const ForwardCall<T>& call_;
  Platform& platform_;
  Workspace::Lease memory_;
  const CpuReserve<T> reserve_;
  PackedStack<T>* const packed_;
  std::vector<Share> shares_;  // one per worker; empty if nothing is to be checked
  const int64_t width_;
  std::vector<PackedLane<T>> weights_;
  std::vector<LaneBuffers> buffers_;
  std::vector<Scratch> scratch_;
  T* passing_[2] = {};
};

}  // namespace

template <typename T>
std::optional<Schedule> forward(const ForwardCall<T>& call, const Workers& workers, Platform& platform,
                                PackedStack<T>* packed, bool check) {
  return ForwardWave<T>(call, workers, platform, packed, check).run();
}
template std::optional<Schedule> forward(const ForwardCall<float>&, const Workers&, Platform&, PackedStack<float>*,
                                         bool);
template std::optional<Schedule> forward(const ForwardCall<double>&, const Workers&, Platform&, PackedStack<double>*,
                                         bool);

}  // namespace stacked_lstm::cpu
