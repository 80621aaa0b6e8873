// csrc/stack/weights.h: the weights of a stack by name: which of them a layer has, their sizes, and their places in a call's list.
//
// A call's list has the lanes in order. For each lane it has the weights that the layer has, in the order of the enumeration.
// That is the order of the parameters of torch.nn.LSTM.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "stack.h"

namespace stacked_lstm {

enum class Weight : uint8_t { ih, hh, bias_ih, bias_hh, hr };

inline constexpr Weight kWeights[] = {Weight::ih, Weight::hh, Weight::bias_ih, Weight::bias_hh, Weight::hr};
inline constexpr int64_t kWeightKinds = static_cast<int64_t>(sizeof(kWeights) / sizeof(Weight));

constexpr const char* name_of(Weight weight) {
  constexpr const char* kNames[kWeightKinds] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"};
  return kNames[static_cast<size_t>(weight)];
}

constexpr bool is_bias(Weight weight) { return weight == Weight::bias_ih || weight == Weight::bias_hh; }

constexpr bool has_weight(const LayerShape& layer, bool bias, Weight weight) {
  if (is_bias(weight)) return bias;
  return weight != Weight::hr || layer.projection > 0;
}

struct WeightSizes {
  int64_t rows;
  int64_t columns;  // -1: the weight is a vector. (A matrix without columns is one: the input may have no features.)

  bool vector() const { return columns < 0; }
};

constexpr WeightSizes sizes_of(const LayerShape& layer, Weight weight) {
  switch (weight) {
    case Weight::ih:
      return {4 * layer.hidden, layer.input};
    case Weight::hh:
      return {4 * layer.hidden, layer.output()};
    case Weight::hr:
      return {layer.projection, layer.hidden};
    default:
      return {4 * layer.hidden, -1};
  }
}

// The place of a weight among those of its lane, which has it.
constexpr int64_t place_in_lane(const LayerShape& layer, bool bias, Weight weight) {
  int64_t place = 0;
  for (const Weight other : kWeights) {
    if (other == weight) break;
    place += has_weight(layer, bias, other);
  }
  return place;
}
constexpr int64_t weights_of_lane(const LayerShape& layer, bool bias) {
  int64_t count = 0;
  for (const Weight weight : kWeights) count += has_weight(layer, bias, weight);
  return count;
}

// Calls visit(lane, weight, place in the list) for every weight of a stack, in the order of the list, while it returns true.
// `layer_of_lane(lane)` is a lane's LayerShape. Returns whether every call returned true.
template <typename LayerOf, typename Visit>
bool all_weights(int64_t lanes, bool bias, const LayerOf& layer_of_lane, Visit&& visit) {
  int64_t place = 0;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const LayerShape& layer = layer_of_lane(lane);
    for (const Weight weight : kWeights) {
      if (has_weight(layer, bias, weight) && !visit(lane, weight, place++)) return false;
    }
  }
  return true;
}

// Places in a call's list, for callers that ask for one weight at a time.
class WeightPlaces {
 public:
  WeightPlaces(const StackShape& shape, bool bias) {
    places_.resize(static_cast<size_t>(shape.lanes() * kWeightKinds), -1);
    all_weights(
        shape.lanes(), bias, [&](int64_t lane) -> const LayerShape& { return shape.of_lane(lane); },
        [&](int64_t lane, Weight weight, int64_t place) {
          places_[index(lane, weight)] = place;
          count_ = place + 1;
          return true;
        });
  }

  bool has(int64_t lane, Weight weight) const { return places_[index(lane, weight)] >= 0; }
  // Of a weight that the lane has.
  size_t at(int64_t lane, Weight weight) const { return static_cast<size_t>(places_[index(lane, weight)]); }
  int64_t count() const { return count_; }

 private:
  static size_t index(int64_t lane, Weight weight) {
    return static_cast<size_t>(lane * kWeightKinds + static_cast<int64_t>(weight));
  }

  std::vector<int64_t> places_;  // [lane][weight]; -1: the lane has no such weight
  int64_t count_ = 0;
};

// A T for each weight of a lane, by name: pointers to a lane's weights, or to their gradients.
template <typename T>
struct ByWeight {
  T value[kWeightKinds] = {};

  T& operator[](Weight weight) { return value[static_cast<size_t>(weight)]; }
  const T& operator[](Weight weight) const { return value[static_cast<size_t>(weight)]; }
};

}  // namespace stacked_lstm
