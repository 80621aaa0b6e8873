// csrc/persistent/dispatch.cuh: finds the compiled instance for a Cut that is known at run time. Included by the
// sources that instantiate the kernels, one for each direction and element, and by table.cu, which makes the table.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "instances.h"
#include "kernels.h"

namespace stacked_lstm::cuda::persistent {

using namespace stacked_lstm::persistent;

// One direction of PersistentKernels<T>; each specialisation is defined in a source of its own.
template <typename T>
struct ForwardEntry {
  static Outcome launch(const ForwardArguments<T>& arguments, void* stream);
  static int64_t capacity(const Cut& cut, int most_inputs, int hidden);
};
template <typename T>
struct BackwardEntry {
  static Outcome launch(const BackwardArguments<T>& arguments, void* stream);
  static int64_t capacity(const Cut& cut, int hidden, bool over);
};

// Returns f(n) for the instance in `list` that runs `cut`, or `otherwise` if there is none; n is a compile-time
// constant, the instance's index.
template <const auto& list, typename Result, typename F>
Result with_instance(const Cut& cut, const Result& otherwise, F f) {
  Result result = otherwise;
  const auto try_each = [&]<size_t... N>(std::index_sequence<N...>) {
    (void)((list[N].runs(cut) ? (result = f(std::integral_constant<size_t, N>()), true) : false) || ...);
  };
  try_each(std::make_index_sequence<list.size()>());
  return result;
}

// The outcome of a launch with a cut for which no kernel is compiled.
inline Outcome no_instance(const char* direction, const char* element, const Cut& cut) {
  return {Outcome::failed, std::string("no ") + direction + " kernel for " + element + " is compiled for " +
                               (cut.product == Product::tensor ? "tensor" : "exact") + " products, " +
                               (cut.exchange == Exchange::cluster ? "cluster" : "L2") + " exchange, " +
                               std::to_string(cut.pieces) + " pieces, " + std::to_string(cut.unit_tiles) +
                               " tiles of weights and " + std::to_string(cut.batch_tiles) +
                               " of the batch: see csrc/persistent/instances.h"};
}

}  // namespace stacked_lstm::cuda::persistent
