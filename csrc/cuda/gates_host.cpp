// csrc/cuda/gates_host.cpp: the kernels of gates.h as plain loops, for the diagonal schedule on the CPU.
//
// On the CPU this schedule is not for speed (csrc/cpu is). It proves the driver, and the CUDA kernels have to compute
// what these loops compute.
#include <algorithm>

#include "gates.h"

namespace stacked_lstm::gates {
namespace {

template <template <typename> class CellArguments, typename T,
          void (*one)(const CellSizes&, const CellArguments<T>&, int64_t row, int64_t unit)>
std::string run(const CellSizes& sizes, const CellArguments<T>* cells, int64_t count, void*) {
  for (const CellArguments<T>* cell = cells; cell < cells + count; ++cell) {
    for (int64_t row = 0; row < cell->rows; ++row) {
      for (int64_t unit = 0; unit < sizes.width; ++unit) one(sizes, *cell, row, unit);
    }
  }
  return "";
}

template <typename T, typename Cell>
constexpr GateKernels<T> kernels() {
  return {run<ForwardCell, T, forward_units<1, T, Cell>>, run<BackwardCell, T, backward_units<1, T, Cell>>,
          run<CollectCell, T, collect_units<1, T>>, run<CopyCell, T, copy_units<1, T>>};
}

}  // namespace

const GateTable& host_kernels() {
  static const GateTable table = {kernels<float, LstmCell>(), kernels<double, LstmCell>(),
                                  kernels<bfloat16, LstmCell>(), kernels<float16, LstmCell>(),
                                  [](const int64_t* values, int64_t count, int64_t* target, void*) {
                                    std::copy_n(values, count, target);
                                    return std::string();
                                  }};
  return table;
}

}  // namespace stacked_lstm::gates
