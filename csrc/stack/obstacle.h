// csrc/stack/obstacle.h: which options a path cannot run, and why: the only place for it. The operators, `auto`, plans and the
// table in docs/api.md all ask this function. (Whether the sizes of a call fit a device is the planner's to say, and comes after
// it: csrc/persistent/planner.cpp.)
#pragma once

#include <cstdint>
#include <string>

#include "options.h"

namespace stacked_lstm {

enum class Path : uint8_t { cpu, diagonal, persistent };

// The type of the tensors.
enum class ElementType : uint8_t { float32, float64, bfloat16, float16 };

// What a call may have beside its tensors and options.
struct CallParts {
  bool lengths = false, resets = false;
  bool states = false;  // every layer's h and c are results
  bool trains = false;  // a backward pass will follow
};

// One sentence about a call of a stack with these options, without the full stop; "" if the path can run it.
inline std::string obstacle(Path path, const StackOptions& options, ElementType type, const CallParts& parts = {}) {
  if (path != Path::persistent) return "";
  if (options.link != LinkKind::plain && options.num_layers > 1) {
    const std::string links = std::string(kLinkNames[static_cast<int>(options.link)]) + " links";
    if (options.link == LinkKind::skip) return "it has no " + links;
    if (parts.trains) return "its backward pass has no " + links;
    if (parts.states) return "it has no states of a stack with " + links;
  }
  if (type == ElementType::float64) return "it computes in float32, and these tensors are float64";
  for (int64_t k = 0; k < options.num_layers; ++k) {
    if (options.proj_size[k] == 0) continue;
    return "it exchanges h as it leaves the cell, and layer " + std::to_string(k) + " has a projection (proj_size " +
           std::to_string(options.proj_size[k]) + ")";
  }
  return "";
}

}  // namespace stacked_lstm
