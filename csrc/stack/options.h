// csrc/stack/options.h: what a stack is, apart from its weights: sizes and options, each named once. No torch.
#pragma once

#include <cstdint>

#include "stack.h"

namespace stacked_lstm {

struct StackOptions {
  int64_t input_size = 0;
  int64_t hidden_size = 0;
  int64_t num_layers = 1;
  bool bias = true;
  bool bidirectional = false;
  int64_t proj_size = 0;      // 0: no projection
  double dropout = 0;         // between layers; in a call, the rate in effect
  bool recompute = false;     // a training step keeps less, and its backward pass computes more
  bool bf16_weights = false;  // products see the weights rounded to bfloat16

  bool operator==(const StackOptions&) const = default;

  int64_t directions() const { return bidirectional ? 2 : 1; }
  int64_t lanes() const { return num_layers * directions(); }
  int64_t output_size() const { return proj_size > 0 ? proj_size : hidden_size; }  // of one direction
  LayerShape layer(int64_t k) const {
    return {k == 0 ? input_size : directions() * output_size(), hidden_size, proj_size};
  }
};

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
}

// The layers of a stack, into a shape whose memory may be used again.
inline void set_layers(const StackOptions& options, StackShape& shape) {
  shape.directions = options.directions();
  shape.layers.clear();
  for (int64_t k = 0; k < options.num_layers; ++k) shape.layers.push_back(options.layer(k));
}

}  // namespace stacked_lstm
