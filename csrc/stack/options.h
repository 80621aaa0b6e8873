// csrc/stack/options.h: what a stack is, apart from its weights: sizes and options, each named once. No torch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "stack.h"

namespace stacked_lstm {

// An option that each layer, or each boundary between two layers, may have for itself.
template <typename T>
struct PerLayer {
  T every{};            // the value in all of them, if `each` is empty
  std::vector<T> each;  // one value for each of them

  PerLayer() = default;
  PerLayer(T value) : every(value) {}
  explicit PerLayer(std::vector<T> values) : each(std::move(values)) {}
  bool operator==(const PerLayer&) const = default;

  T operator[](int64_t k) const { return each.empty() ? every : each[static_cast<size_t>(k)]; }
  // Whether holds(value) is true for all values.
  template <typename Holds>
  bool all(Holds&& holds) const {
    return each.empty() ? holds(every) : std::all_of(each.begin(), each.end(), holds);
  }
  template <typename Holds>
  bool any(Holds&& holds) const {
    return !all([&](T value) { return !holds(value); });
  }
};

struct StackOptions {
  int64_t input_size = 0;
  PerLayer<int64_t> hidden_size;
  int64_t num_layers = 1;
  bool bias = true;
  bool bidirectional = false;
  PerLayer<int64_t> proj_size;  // 0: no projection
  PerLayer<double> dropout;     // [k]: between layers k and k + 1; in a call, the rates in effect
  bool recompute = false;       // a training step keeps less, and its backward pass computes more
  bool bf16_weights = false;    // products see the weights rounded to bfloat16
  LinkKind link = LinkKind::plain;

  bool operator==(const StackOptions&) const = default;

  int64_t directions() const { return bidirectional ? 2 : 1; }
  int64_t lanes() const { return num_layers * directions(); }
  bool projects() const {
    return proj_size.any([](int64_t size) { return size > 0; });
  }
  // Whether some layer reads masked values.
  bool drops() const {
    return num_layers > 1 && dropout.any([](double rate) { return rate != 0; });
  }
};

// The names of the kinds of link, in their order.
inline constexpr const char* kLinkNames[] = {"plain", "residual", "skip"};

// Calls visit(name, pointer to member) for every field. The Python class and the value that a node of the autograd graph
// keeps are made from this list, so a new field has to be added in no other place in C++.
template <typename Visit>
constexpr void for_each_option(Visit&& visit) {
  visit("input_size", &StackOptions::input_size);
  visit("hidden_size", &StackOptions::hidden_size);
  visit("num_layers", &StackOptions::num_layers);
  visit("bias", &StackOptions::bias);
  visit("bidirectional", &StackOptions::bidirectional);
  visit("proj_size", &StackOptions::proj_size);
  visit("dropout", &StackOptions::dropout);
  visit("recompute", &StackOptions::recompute);
  visit("bf16_weights", &StackOptions::bf16_weights);
  visit("link", &StackOptions::link);
}

// The layers of a stack, into a shape whose memory may be used again.
inline void set_layers(const StackOptions& options, StackShape& shape) {
  shape.directions = options.directions();
  shape.link = options.link;
  shape.layers.clear();
  const int64_t skipped = options.link == LinkKind::skip ? options.input_size : 0;
  int64_t input = options.input_size;
  for (int64_t k = 0; k < options.num_layers; ++k) {
    shape.layers.push_back({input, options.hidden_size[k], options.proj_size[k]});
    input = shape.directions * shape.layers.back().output() + skipped;
  }
}

}  // namespace stacked_lstm
