// csrc/cpu/wave.h: what the forward and the backward wavefront share: ranges, progress, packing, copies of rows.
//
// Names. A worker has one place in the box of the schedule (wavefront.h). "Own" units, columns and panels are those of
// its unit slice; "local" rows are those of its batch slice.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "packed.h"
#include "stack_cpu.h"
#include "team.h"
#include "workspace.h"

namespace stacked_lstm::cpu {

struct Range {
  int64_t first, last;
  int64_t size() const { return last - first; }
};

inline Range share_of(int64_t total, int64_t part, int64_t parts) {
  return {total * part / parts, total * (part + 1) / parts};
}

// If the rows of a buffer are a power of two apart, they share one set of a cache. So every buffer that a product
// broadcasts from has padded rows.
inline constexpr int64_t kRowPadding = 16;

// How far each worker is with each position. Every count only rises.
struct Progress {
  Count packed;           // 1: own panels are ready for the other batch slices
  Count steps;            // hand-overs inside a lane, see the drivers
  Count chunks;           // chunks done: output of the lane's layer may be read
  Count gradient_blocks;  // in backward: gradient blocks done and not read any more (see Hazards in backward_wave.h)
  Count done;             // 1: this worker reads nothing of the lane any more
};

// How a call's packed weights are stored.
template <typename Call>
Storage storage_of(const Call& call) {
  return call.bf16_weights ? Storage::bf16 : Storage::same;
}

// Rows of all directions of a layer: its h, or its input.
template <typename T>
struct LayerRows {
  T* data = nullptr;     // null: there are none
  int64_t stride = 0;    // elements from row to row
  bool callers = false;  // whether they are in the caller's tensor (StackShape::caller_row)

  T* row(const StackShape& shape, int64_t t, int64_t b) const {
    return data + ((callers ? shape.caller_row(t) : shape.first_row(t)) + b) * stride;
  }
};

// The state that all workers of a call share, and the arithmetic of what each worker owns.
template <typename T>
class Wave {
 public:
  Wave(const StackShape& shape, Storage storage, const Workers& workers, const Platform& platform, bool backward)
      : shape_(shape),
        kernels_(kernels<T>()),
        lane_count_(shape.lanes()),
        storage_(storage),
        backward_(backward),
        schedule_(workers.forced ? *workers.forced : plan(shape, workers.threads, sizeof(T), storage, backward)),
        chunk_limit_(schedule_.chunk_steps),
        workers_(schedule_.workers()),
        team_(workers_, platform.at_the_same_time()),
        progress_(static_cast<size_t>(lane_count_ * workers_)),
        first_sequence_(share_batch(shape, schedule_.batch_slices).first),
        chunk_rows_(chunk_limit_ * shape.batch) {
    for (const LayerShape& layer : shape.layers) widest_input_ = std::max(widest_input_, layer.input);
    for (const LayerShape& layer : shape.layers) widest_output_ = std::max(widest_output_, layer.output());
    for (const LayerShape& layer : shape.layers) widest_hidden_ = std::max(widest_hidden_, layer.padded_hidden());
  }

 protected:
  // If fewer workers came than were asked for, makes the schedule for those that came. The buffers were sized for the
  // first schedule's chunks, so no chunk may be longer.
  void reschedule(int64_t size) {
    if (size == workers_) return;
    schedule_ = plan(shape_, size, sizeof(T), storage_, backward_);
    schedule_.chunk_steps = std::min(schedule_.chunk_steps, chunk_limit_);
    first_sequence_ = share_batch(shape_, schedule_.batch_slices).first;
    for (Progress& p : progress_) {
      p.packed.value = p.steps.value = p.chunks.value = p.gradient_blocks.value = p.done.value = 0;
    }
  }

  // Runs worker(rank) for every worker of the schedule.
  template <typename F>
  void run(Platform& platform, F&& worker) {
    Count scheduled;
    const auto member = [&](int64_t share) {
      team_.work(share, [&](int64_t rank, int64_t size) {
        if (rank == 0) reschedule(size), publish(scheduled, 1);
        team_.wait(scheduled, 1);
        if (rank < schedule_.workers()) worker(rank);
      });
    };
    if (workers_ == 1) {
      member(1);
    } else {
      platform.parallel(workers_, member);
    }
    team_.rethrow();
  }

  int64_t slices(int64_t position) const { return schedule_.phase_of(position, shape_.directions).unit_slices; }
  Progress& progress(int64_t position, int64_t batch_slice, int64_t slice) {
    return progress_[static_cast<size_t>((position * schedule_.batch_slices + batch_slice) * slices_limit() + slice)];
  }
  int64_t slices_limit() const {
    return std::max(schedule_.phase[0].unit_slices, schedule_.phases == 2 ? schedule_.phase[1].unit_slices : 1);
  }
  Progress& own(int64_t position, const WorkerPlace& place) {
    return progress(position, place.batch_slice, place.slice);
  }

  // Waits for all unit slices of a position, in one batch slice.
  void wait_slices(int64_t position, int64_t batch_slice, Count Progress::* count, int64_t value) {
    for (int64_t slice = 0; slice < slices(position); ++slice) {
      team_.wait(progress(position, batch_slice, slice).*count, value);
    }
  }
  // Likewise in all batch slices.
  void wait_everybody(int64_t position, Count Progress::* count, int64_t value) {
    for (int64_t b = 0; b < schedule_.batch_slices; ++b) wait_slices(position, b, count, value);
  }
  void wait_for_input(int64_t position, const WorkerPlace& place, int64_t chunk) {
    const Needs n = needs(schedule_, shape_.steps, shape_.directions, position, chunk);
    for (int64_t p = n.first_position; p < n.first_position + n.positions; ++p) {
      wait_slices(p, place.batch_slice, &Progress::chunks, n.chunks);
    }
  }

  Range sequences(const WorkerPlace& place) const {
    const int64_t* const first = &first_sequence_[static_cast<size_t>(place.batch_slice)];
    return {first[0], first[1]};
  }
  // Local rows of time t.
  int64_t local_rows(const Range& sequences, int64_t t) const {
    return std::max<int64_t>(std::min(shape_.active(t), sequences.last) - sequences.first, 0);
  }
  // Likewise at a lane's step s; 0 before the first step and after the last.
  int64_t rows_at(int64_t lane, const Range& sequences, int64_t s) const {
    return s < 0 || s >= shape_.steps ? 0 : local_rows(sequences, shape_.time(lane, s));
  }
  Range steps_of(int64_t chunk) const {
    return {chunk * schedule_.chunk_steps, std::min((chunk + 1) * schedule_.chunk_steps, shape_.steps)};
  }
  int64_t chunks() const { return schedule_.chunks(shape_.steps); }

  // Own panels of a product with `columns` columns.
  Range own_panels(int64_t position, const WorkerPlace& place, int64_t columns, int64_t width) const {
    return share_of(panels_of(columns, width, kernels_.vector_elements), place.slice, slices(position));
  }
  // Own unit blocks, padding included, so that all of a reserve is written. They fill whole panels of the widest kind,
  // so that no panel of a forward or backward product belongs to two slices.
  Range own_unit_blocks(int64_t position, const WorkerPlace& place, int64_t padded_hidden) const {
    const Range panels = own_panels(position, place, padded_hidden, 4);
    const int64_t unit_blocks = padded_hidden / kernels_.vector_elements;
    return {std::min(panels.first * 4, unit_blocks), std::min(panels.last * 4, unit_blocks)};
  }
  Range columns_of(const Range& panels, int64_t width, int64_t columns) const {
    const int64_t w = width * kernels_.vector_elements;
    return {std::min(panels.first * w, columns), std::min(panels.last * w, columns)};
  }
  // `columns`, rounded up to whole panels.
  int64_t padded_columns(int64_t columns, int64_t width) const {
    return panel_elements(columns, 1, width, kernels_.vector_elements);
  }

  static void* take_panels(Workspace::Lease& memory, int64_t elements, Storage storage) {
    if (storage == Storage::bf16) return memory->take<uint16_t>(elements);
    return memory->take<T>(elements);
  }
  // Memory for the operands of products with at most `rows` rows and inner dimension `inner`, one product after
  // another.
  void* take_operands(Workspace::Lease& memory, int64_t rows, int64_t inner, Storage storage) const {
    return memory->take<char>(operand_bytes(kernels_, storage, rows, inner));
  }

  // This batch slice's share of a packing job. Every batch slice needs all panels.
  Range share_packing(const Range& panels, const WorkerPlace& place) const {
    const Range part = share_of(panels.size(), place.batch_slice, schedule_.batch_slices);
    return {panels.first + part.first, panels.first + part.last};
  }
  void packing_done(int64_t position, const WorkerPlace& place) {
    publish(own(position, place).packed, 1);
    for (int64_t b = 0; b < schedule_.batch_slices; ++b) team_.wait(progress(position, b, place.slice).packed, 1);
  }

  // Copies the local rows of a lane's steps to `out`, in the lane's order. row_of(t, b) says where a row is. Returns
  // the number of rows.
  template <typename RowOf>
  int64_t copy_rows(int64_t lane, const Range& sequences, const Range& steps, int64_t columns, RowOf&& row_of, T* out,
                    int64_t ldo) const {
    int64_t row = 0;
    for (int64_t s = steps.first; s < steps.last; ++s) {
      const int64_t t = shape_.time(lane, s), rows = local_rows(sequences, t);
      for (int64_t b = 0; b < rows; ++b, ++row) {
        std::memcpy(out + row * ldo, row_of(t, sequences.first + b), static_cast<size_t>(columns) * sizeof(T));
      }
    }
    return row;
  }
  // Whether what a layer reads of the layer below has to pass the mask of their link first. (Where links add the input of the
  // layer below, that layer has done it.)
  bool masks_input(const Links& links, int64_t layer) const {
    return layer > 0 && !adds_input(shape_, layer - 1) && links[layer - 1].changes_h();
  }
  // Copies the input of a lane's layer: for layer 0 the caller's input, else what the link makes of `below`, h of the layer
  // below; if links add inputs, `below` is the sum.
  int64_t copy_input(const Input<T>& input, const Links& links, const LayerRows<const T>& below, int64_t lane,
                     const Range& sequences, const Range& steps, T* out, int64_t ldo) const {
    const int64_t layer = lane / shape_.directions;
    const auto of_caller = [&](int64_t t, int64_t b) { return input.row(shape_, t, b); };
    if (layer == 0) return copy_rows(lane, sequences, steps, shape_.layers[0].input, of_caller, out, ldo);
    const int64_t width = columns_from_below(shape_, layer);
    const int64_t rows = copy_rows(
        lane, sequences, steps, width, [&](int64_t t, int64_t b) { return below.row(shape_, t, b); }, out, ldo);
    if (shape_.link == LinkKind::skip) {
      copy_rows(lane, sequences, steps, shape_.layers[0].input, of_caller, out + width, ldo);
    }
    if (!masks_input(links, layer)) return rows;
    const Link link = links[layer - 1];
    for (int64_t s = steps.first; s < steps.last; ++s) {
      const int64_t t = shape_.time(lane, s), n = local_rows(sequences, t);
      for (int64_t b = 0; b < n; ++b, out += ldo) link.forward(out, width, t * shape_.batch + sequences.first + b);
    }
    return rows;
  }

  // Prefetches a row that other cores have just written: all its lines at once, not one by one as a product reaches
  // them.
  static void prefetch(const T* row, int64_t columns) {
    constexpr int64_t kLine = 64 / int64_t{sizeof(T)};
    for (int64_t n = 0; n < columns; n += kLine) __builtin_prefetch(row + n);
  }
  static void copy_columns(const T* from, T* to, const Range& columns) {
    if (columns.size() > 0) {
      std::memcpy(to + columns.first, from + columns.first, static_cast<size_t>(columns.size()) * sizeof(T));
    }
  }

  const StackShape& shape_;
  const CpuKernels<T>& kernels_;
  const int64_t lane_count_;
  const Storage storage_;
  const bool backward_;
  Schedule schedule_;
  const int64_t chunk_limit_;
  const int64_t workers_;
  Team team_;
  std::vector<Progress> progress_;
  std::vector<int64_t> first_sequence_;
  const int64_t chunk_rows_;
  int64_t widest_input_ = 0, widest_output_ = 0, widest_hidden_ = 0;
};

}  // namespace stacked_lstm::cpu
