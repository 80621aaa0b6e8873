// csrc/cpu/plan.cpp: the cost model's view of this machine.
#include <algorithm>
#include <fstream>
#include <string>

#if defined(__linux__)
#include <unistd.h>
#endif

#include "kernels.h"
#include "stack_cpu.h"

namespace stacked_lstm::cpu {
namespace {

// Bytes of the first core's cache of level `wanted`, as the operating system reports them; 0 if it does not. (sysconf
// adds up the third-level caches of a whole machine, and in a virtual machine it may return a number without meaning.)
double cache_bytes([[maybe_unused]] int wanted) {
#if defined(__linux__)
  for (int n = 0; n < 8; ++n) {
    const std::string cache = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(n) + "/";
    int level = 0;
    double size = 0;
    char unit = 'K';
    std::ifstream(cache + "level") >> level;
    if (level == wanted && std::ifstream(cache + "size") >> size >> unit) {
      return size * (unit == 'M' ? 1 << 20 : 1 << 10);
    }
  }
#if defined(_SC_LEVEL2_CACHE_SIZE)
  if (wanted == 2) return static_cast<double>(std::max(sysconf(_SC_LEVEL2_CACHE_SIZE), 0L));
#endif
#endif
  return 0;
}

CpuMachine measure(int64_t element) {
  CpuMachine m;
  const double elements =
      static_cast<double>(element == 8 ? kernels<double>().vector_elements : kernels<float>().vector_elements);
  m.multiply_adds *= elements / 16;
  m.cell *= 16 / elements;
  m.unit_grain = std::max<int64_t>(static_cast<int64_t>(elements) * 4, 1);
  if (const double l2 = cache_bytes(2); l2 > 0) m.l2_bytes = l2;
  if (const double l3 = cache_bytes(3); l3 > 0) m.l3_bytes = l3;
  return m;
}

}  // namespace

const CpuMachine& machine(int64_t element) {
  static const CpuMachine single = measure(4), twice = measure(8);
  return element == 8 ? twice : single;
}

Schedule plan(const StackShape& shape, int64_t threads, int64_t element, Storage storage, bool backward) {
  return plan_cpu(shape, std::max<int64_t>(threads, 1), machine(element), element, stored_bytes(storage, element),
                  backward);
}

}  // namespace stacked_lstm::cpu
