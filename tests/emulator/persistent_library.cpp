// tests/emulator/persistent_library.cpp: the kernels of csrc/persistent/table.cu, few of their instances and no float16, as a
// library for Python, which hands the table's address to stacked_lstm_ext._C._use_persistent_kernels. Launches are counted.
#include <utility>

#include "../../csrc/persistent/dispatch.cuh"
#include "core.h"

using namespace stacked_lstm;
using namespace stacked_lstm::persistent;

namespace {

int64_t launches = 0;

template <typename T, auto launch, typename Arguments>
Outcome counted(const Arguments& arguments, void* stream) {
  ++launches;
  return launch(arguments, stream);
}

template <typename T>
PersistentKernels<T> kernels() {
  using Forward = cuda::persistent::ForwardEntry<T>;
  using Backward = cuda::persistent::BackwardEntry<T>;
  const auto &forward = kForwardInstances<T>, &backward = kBackwardInstances<T>;
  return {forward.data(),
          static_cast<int>(forward.size()),
          backward.data(),
          static_cast<int>(backward.size()),
          counted<T, Forward::launch, ForwardArguments<T>>,
          counted<T, Backward::launch, BackwardArguments<T>>,
          Forward::capacity,
          Backward::capacity};
}

}  // namespace

// The blocks' order is drawn from the seed.
extern "C" const void* emulated_persistent_kernels(uint64_t seed) {
  static const PersistentTable table = {kernels<float>(), kernels<bfloat16>(), {}};
  emulator::options().order = emulator::Order::random;
  emulator::options().seed = seed;
  launches = 0;
  return &table;
}

// Since it was last asked.
extern "C" int64_t emulated_persistent_launches() { return std::exchange(launches, 0); }
