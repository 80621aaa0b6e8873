// tests/emulator/gates_library.cpp: the kernels of csrc/cuda/gates.cu as a library for Python, which hands the table's
// address to stacked_lstm_ext._C._use_gate_kernels. Calls of a kernel are counted.
#include <utility>

#include "../../csrc/cuda/gates.h"
#include "core.h"

using namespace stacked_lstm;

namespace {

int64_t calls = 0;

// `kernel` of the CUDA kernels for T, counted.
template <typename T, typename Cell, auto kernel>
std::string counted(const gates::CellSizes& sizes, const Cell* cells, int64_t count, void* stream) {
  ++calls;
  return (gates::cuda_gate_kernels().of<T>().*kernel)(sizes, cells, count, stream);
}

template <typename T>
gates::GateKernels<T> kernels() {
  using K = gates::GateKernels<T>;
  return {counted<T, gates::ForwardCell<T>, &K::forward>, counted<T, gates::BackwardCell<T>, &K::backward>,
          counted<T, gates::CollectCell<T>, &K::collect>, counted<T, gates::CopyCell<T>, &K::copy>};
}

}  // namespace

extern "C" const void* emulated_gate_kernels() {
  static const gates::GateTable table = {kernels<float>(), kernels<double>(), kernels<bfloat16>(), kernels<float16>(),
                                         gates::cuda_gate_kernels().numbers};
  emulator::options().order = emulator::Order::random;
  return &table;
}

// Since it was last asked.
extern "C" int64_t emulated_gate_calls() { return std::exchange(calls, 0); }
