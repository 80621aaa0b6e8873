// csrc/stack/stack.h: the sizes of a call, for a stack of LSTM layers. Plain data, no torch.
//
// Rows. Time-major: the sequences of step t (B of them, or fewer in a packed batch) are consecutive rows, from row
// first_row(t) on. A packed batch is sorted by length, so step t holds the sequences 0 … active(t) - 1, and active(t)
// never grows with t. Every kernel runs on this form, with or without lengths, so no padding is ever computed.
//
// Lengths. In a padded batch whose sequences have lengths, sorted like a packed one, every step has B rows, and only the first
// active(t) of them exist. What is in the other rows is never read: it may be NaN. The call ends with the longest sequence:
// `steps` is its length, and the caller's tensors have `padded_steps` steps.
//
// Lanes. A lane is one direction of one layer; lane = layer·D + direction. A reverse lane takes steps from T-1 down.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace stacked_lstm {

// What a training step keeps for its backward.
enum class Saving {
  none,       // nothing: inference
  full,       // h, c and the four gate activations of every cell
  recompute,  // h and c; backward recomputes the gates, by large products. The CPU keeps part of both: see cpu/reserve.h
};

// What a layer reads of the layers below, and what the stack's output is: stack/link.h.
enum class LinkKind : uint8_t { plain, residual, skip };

// Reserves and workspaces pad units to a multiple of this, so that every vector is complete.
inline constexpr int64_t kUnitPadding = 16;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct LayerShape {
  int64_t input;       // K of the input projection: I, or D·(P or H) of the layer below; with skip links, I more
  int64_t hidden;      // H
  int64_t projection;  // P, 0 for none

  int64_t output() const { return projection > 0 ? projection : hidden; }  // of one direction
  int64_t padded_hidden() const { return round_up(hidden, kUnitPadding); }
};

struct StackShape {
  int64_t steps = 0;  // T
  int64_t batch = 0;  // B
  int64_t directions = 1;
  LinkKind link = LinkKind::plain;
  std::vector<LayerShape> layers;
  std::vector<int64_t>
      packed_rows;              // of a packed batch: first row of each step, then the number of rows: T + 1; else empty
  std::vector<int64_t> counts;  // of a padded batch with lengths: active(t) of each step; else empty
  int64_t padded_steps = 0;     // with lengths: T of the caller's tensors, at least `steps`; else 0

  int64_t depth() const { return static_cast<int64_t>(layers.size()); }
  int64_t lanes() const { return depth() * directions; }
  bool packed() const { return !packed_rows.empty(); }
  int64_t first_row(int64_t t) const { return packed() ? packed_rows[static_cast<size_t>(t)] : t * batch; }
  int64_t rows() const { return first_row(steps); }
  int64_t active(int64_t t) const {
    return counts.empty() ? first_row(t + 1) - first_row(t) : counts[static_cast<size_t>(t)];
  }
  bool has_lengths() const { return padded_steps > 0; }
  // Whether sequences may be of different lengths.
  bool ragged() const { return packed() || has_lengths(); }
  // Steps and rows of the caller's tensors and of a reserve: those of the padding, too.
  int64_t all_steps() const { return has_lengths() ? padded_steps : steps; }
  int64_t all_rows() const { return has_lengths() ? padded_steps * batch : rows(); }
  // The first row of step t in the caller's tensors.
  int64_t caller_row(int64_t t) const { return has_lengths() ? t * batch : first_row(t); }
  const LayerShape& of_lane(int64_t lane) const { return layers[lane / directions]; }
  // Columns of the stack's output: those of the top layer's h, or, with skip links, of the h of all layers.
  int64_t output_width() const {
    int64_t width = 0;
    for (const LayerShape& layer : layers) width = (link == LinkKind::skip ? width : 0) + directions * layer.output();
    return width;
  }
  // The time of a lane's step s. A lane numbers its steps in the order in which it takes them.
  int64_t time(int64_t lane, int64_t s) const { return lane % directions ? steps - 1 - s : s; }
  // Whether two layers are equally wide: then their recurrent products can be one.
  bool alike(int64_t one, int64_t other) const {
    const LayerShape &a = layers[one], &b = layers[other];
    return a.hidden == b.hidden && a.projection == b.projection;
  }
  // Whether all layers have the same H, or the same output.
  bool same_hidden() const {
    return std::all_of(layers.begin(), layers.end(), [&](const auto& l) { return l.hidden == layers[0].hidden; });
  }
  bool same_output() const {
    return std::all_of(layers.begin(), layers.end(), [&](const auto& l) { return l.output() == layers[0].output(); });
  }
  bool projects() const {
    return std::any_of(layers.begin(), layers.end(), [](const LayerShape& layer) { return layer.projection > 0; });
  }
};

}  // namespace stacked_lstm
