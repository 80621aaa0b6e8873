// csrc/cuda/gates.cu: the kernels of gates.h on a GPU: every cell of a diagonal in one launch.
//
//   grid   x: rows of a cell, blockDim.y at a time    y: units, blockDim.x · V at a time    z: the cells
//
// A thread computes V neighbouring units of one row, all four gates of each: 16 bytes of float32 or float64 at a time,
// 8 bytes of 16-bit numbers. Threads share nothing, so no thread waits. If a width, a stride or a pointer is not a
// multiple of V elements, V is 1.
#include <algorithm>
#include <limits>

#include "gates.h"
#include "launch.cuh"
#include "primitives.cuh"

namespace stacked_lstm::gates {

// The arguments are passed by value, so there is no copy to the device that the host must wait for or keep alive.
template <typename CellArguments, int kCapacity>
struct Step {
  CellSizes sizes;
  CellArguments cell[kCapacity];
};

// The most cells of a launch, in two sizes. Most stacks fit the small size, whose arguments are some kilobytes smaller.
inline constexpr int kFewCells = 8, kManyCells = 64;
inline constexpr int kThreads = 128;

// The row and the first unit of a thread.
__device__ __forceinline__ int64_t row_of_thread() { return int64_t{blockIdx.x} * blockDim.y + threadIdx.y; }
template <int V>
__device__ __forceinline__ int64_t unit_of_thread() {
  return (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * V;
}

template <typename T, typename Cell, int V, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    gates_forward(const __grid_constant__ Step<ForwardCell<T>, kCapacity> step) {
  const ForwardCell<T>& cell = step.cell[blockIdx.z];
  const int64_t row = row_of_thread(), unit = unit_of_thread<V>();
  if (row >= cell.rows) return;
  if (unit >= step.sizes.width) return;
  forward_units<V, T, Cell>(step.sizes, cell, row, unit);
}

template <typename T, typename Cell, int V, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    gates_backward(const __grid_constant__ Step<BackwardCell<T>, kCapacity> step) {
  const BackwardCell<T>& cell = step.cell[blockIdx.z];
  const int64_t row = row_of_thread(), unit = unit_of_thread<V>();
  if (row >= cell.rows) return;
  if (unit >= step.sizes.width) return;
  backward_units<V, T, Cell>(step.sizes, cell, row, unit);
}

template <typename T, int V, int kCapacity>
__global__ void __launch_bounds__(kThreads) collect(const __grid_constant__ Step<CollectCell<T>, kCapacity> step) {
  const CollectCell<T>& cell = step.cell[blockIdx.z];
  const int64_t row = row_of_thread(), unit = unit_of_thread<V>();
  if (row >= cell.rows) return;
  if (unit >= step.sizes.width) return;
  collect_units<V>(step.sizes, cell, row, unit);
}

template <typename T, int V, int kCapacity>
__global__ void __launch_bounds__(kThreads) copy_rows(const __grid_constant__ Step<CopyCell<T>, kCapacity> step) {
  const CopyCell<T>& cell = step.cell[blockIdx.z];
  const int64_t row = row_of_thread(), unit = unit_of_thread<V>();
  if (row >= cell.rows) return;
  if (unit >= step.sizes.width) return;
  copy_units<V>(step.sizes, cell, row, unit);
}

// Numbers that are passed as arguments, within the 4 KB that every release of CUDA's driver accepts.
inline constexpr int kNumbers = 500;
struct Numbers {
  int64_t count, value[kNumbers];
  int64_t* target;
};

__global__ void __launch_bounds__(kThreads) write_numbers(const __grid_constant__ Numbers numbers) {
  for (int64_t n = threadIdx.x; n < numbers.count; n += kThreads) numbers.target[n] = numbers.value[n];
}

namespace {

// `Kernel` names the kernel: Kernel::template at<V, kCapacity>().
template <typename Kernel, int V, int kCapacity, typename CellArguments>
cuda::Status launch_cells(const CellSizes& sizes, const CellArguments* cells, int64_t count, void* stream) {
  Step<CellArguments, kCapacity> step;
  step.sizes = sizes;
  int64_t rows = 0;
  for (int64_t n = 0; n < count; ++n) {
    step.cell[n] = cells[n];
    rows = std::max(rows, cells[n].rows);
  }
  if (rows == 0 || sizes.width == 0) return {};
  // Along a row there are as many threads as the row has packs, rounded up to a power of two. The other threads of the
  // block take the next rows.
  const int64_t packs = (sizes.width + V - 1) / V;
  unsigned across = 1;
  while (across < packs && across < kThreads) across *= 2;
  const unsigned down = kThreads / across;
  const int64_t row_blocks = (rows + down - 1) / down, unit_blocks = (packs + across - 1) / across;
  if (row_blocks > std::numeric_limits<int32_t>::max() || unit_blocks > 65535) {
    return {1, "a step of " + std::to_string(rows) + " rows of " + std::to_string(sizes.width) +
                   " units is more than a grid holds"};
  }
  cuda::LaunchConfig config;
  config.grid =
      dim3(static_cast<unsigned>(row_blocks), static_cast<unsigned>(unit_blocks), static_cast<unsigned>(count));
  config.block = dim3(across, down, 1);
  config.stream = stream;
  return cuda::launch(config, Kernel::template at<V, kCapacity>(), step);
}

template <typename Kernel, int V, typename CellArguments>
std::string run_packs(const CellSizes& sizes, const CellArguments* cells, int64_t count, void* stream) {
  for (int64_t first = 0; first < count; first += kManyCells) {
    const int64_t some = std::min<int64_t>(count - first, kManyCells);
    const cuda::Status status = some <= kFewCells
                                    ? launch_cells<Kernel, V, kFewCells>(sizes, cells + first, some, stream)
                                    : launch_cells<Kernel, V, kManyCells>(sizes, cells + first, some, stream);
    if (!status.ok()) return status.text;
  }
  return "";
}

template <typename Kernel, typename T, template <typename> class CellArguments>
std::string run(const CellSizes& sizes, const CellArguments<T>* cells, int64_t count, void* stream) {
  return packs_fit<kPack<T>>(sizes, cells, count) ? run_packs<Kernel, kPack<T>>(sizes, cells, count, stream)
                                                  : run_packs<Kernel, 1>(sizes, cells, count, stream);
}

template <typename T, typename Cell>
struct Forward {
  template <int V, int kCapacity>
  static constexpr auto at() {
    return &gates_forward<T, Cell, V, kCapacity>;
  }
};
template <typename T, typename Cell>
struct Backward {
  template <int V, int kCapacity>
  static constexpr auto at() {
    return &gates_backward<T, Cell, V, kCapacity>;
  }
};
template <typename T>
struct Collect {
  template <int V, int kCapacity>
  static constexpr auto at() {
    return &collect<T, V, kCapacity>;
  }
};
template <typename T>
struct Copy {
  template <int V, int kCapacity>
  static constexpr auto at() {
    return &copy_rows<T, V, kCapacity>;
  }
};

std::string run_numbers(const int64_t* values, int64_t count, int64_t* target, void* stream) {
  cuda::LaunchConfig config;
  config.grid = dim3(1);
  config.block = dim3(kThreads);
  config.stream = stream;
  for (int64_t first = 0; first < count; first += kNumbers) {
    Numbers numbers{};
    numbers.count = std::min<int64_t>(count - first, kNumbers);
    numbers.target = target + first;
    std::copy_n(values + first, numbers.count, numbers.value);
    const cuda::Status status = cuda::launch(config, write_numbers, numbers);
    if (!status.ok()) return status.text;
  }
  return "";
}

template <typename T, typename Cell>
GateKernels<T> kernels() {
  return {run<Forward<T, Cell>, T, ForwardCell>, run<Backward<T, Cell>, T, BackwardCell>,
          run<Collect<T>, T, CollectCell>, run<Copy<T>, T, CopyCell>};
}

}  // namespace

const GateTable& cuda_gate_kernels() {
  static const GateTable table = {kernels<float, LstmCell>(), kernels<double, LstmCell>(),
                                  kernels<bfloat16, LstmCell>(), kernels<float16, LstmCell>(), run_numbers};
  return table;
}

}  // namespace stacked_lstm::gates
