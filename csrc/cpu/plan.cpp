// csrc/cpu/plan.cpp: the cost model's view of this machine.
#include <algorithm>

#if defined(__linux__)
#include <unistd.h>
#endif

#include "kernels.h"
#include "stack_cpu.h"

namespace stacked_lstm::cpu {
namespace {

CpuMachine measure(int64_t element) {
  CpuMachine m;
  const double lanes = static_cast<double>(element == 8 ? kernels<double>().lanes : kernels<float>().lanes);
  m.multiply_adds *= lanes / 16;
  m.cell *= 16 / lanes;
  m.unit_grain = std::max<int64_t>(static_cast<int64_t>(lanes) * 4, 1);
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
  const long l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (l2 > 0) m.l2_bytes = static_cast<double>(l2);
#endif
  return m;
}

}  // namespace

const CpuMachine& machine(int64_t element) {
  static const CpuMachine single = measure(4), twice = measure(8);
  return element == 8 ? twice : single;
}

Schedule plan(const StackShape& shape, int64_t threads, int64_t element, bool backward) {
  return plan_cpu(shape, std::max<int64_t>(threads, 1), machine(element), element, backward);
}

}  // namespace stacked_lstm::cpu
