// csrc/cpu/dispatch.cpp: which instruction set the kernels run with.
#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace stacked_lstm::cpu {
namespace {

enum class Isa { standard, avx2, avx512, avx512_bf16 };

bool runs_here(Isa isa) {
  if (isa == Isa::standard) return true;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return avx512 && (isa == Isa::avx512 || __builtin_cpu_supports("avx512bf16"));
#else
  return false;
#endif
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "default";
  }
}

constexpr Isa kBestFirst[] = {Isa::avx512_bf16, Isa::avx512, Isa::avx2, Isa::standard};

Isa choose() {
  const char* wanted = std::getenv("STACKED_LSTM_EXT_ISA");
  if (!wanted || !*wanted) return *std::find_if(std::begin(kBestFirst), std::end(kBestFirst), runs_here);
  for (const Isa isa : kBestFirst) {
    if (std::string(wanted) != name_of(isa)) continue;
    if (!runs_here(isa)) {
      throw std::runtime_error(std::string("STACKED_LSTM_EXT_ISA=") + wanted + ": this processor does not have it");
    }
    return isa;
  }
  throw std::runtime_error(
      std::string("STACKED_LSTM_EXT_ISA should be one of default, avx2, avx512, avx512_bf16, got: ") + wanted);
}

Isa chosen() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace

const char* isa() { return name_of(chosen()); }

template <typename T>
const CpuKernels<T>& kernels() {
  switch (chosen()) {
    case Isa::avx512_bf16:
      return *kernels_avx512_bf16<T>();
    case Isa::avx512:
      return *kernels_avx512<T>();
    case Isa::avx2:
      return *kernels_avx2<T>();
    default:
      return *kernels_default<T>();
  }
}
template const CpuKernels<float>& kernels();
template const CpuKernels<double>& kernels();

}  // namespace stacked_lstm::cpu
