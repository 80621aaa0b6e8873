// csrc/torch/last_run.cpp: see last_run.h.
#include "last_run.h"

#include <utility>

namespace stacked_lstm {

std::optional<Run>& last_run() {
  thread_local std::optional<Run> run;
  return run;
}

void remember(decltype(Run::how) how, const Call& call, bool backward) {
  last_run() =
      Run{std::move(how), call.input.device().str(), backward, call.saving, call.shape, call.input.scalar_type()};
}

}  // namespace stacked_lstm
