// csrc/torch/last_run.h: what a kernel ran last in this thread, for stacked_lstm_ext.last_run().
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <variant>

#include "../diagonal/diagonal.h"
#include "../driver/call.h"
#include "../persistent/persistent.h"
#include "../stack/stack.h"
#include "../stack/wavefront.h"

namespace stacked_lstm {

// A call of a kernel.
struct Run {
  std::variant<Schedule, diagonal::DiagonalCounts, persistent::PersistentCounts> how;
  std::string device;
  bool backward;
  Saving saving;
  StackShape shape;
  at::ScalarType type;
};

// The last run of this thread; nullopt: no kernel has run since the record was cleared.
std::optional<Run>& last_run();

void remember(decltype(Run::how) how, const Call& call, bool backward);

}  // namespace stacked_lstm
