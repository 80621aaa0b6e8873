// csrc/cuda/architectures.h: can a GPU run kernels that were built for a list of architectures?
//
// Lists have the form of TORCH_CUDA_ARCH_LIST, like "8.0;9.0a;12.0+PTX". A binary for X.Y runs on X.Z with Z >= Y; a
// binary for X.Ya only on X.Y; a binary for X.Yf where one for X.Y does. CUDA's driver compiles PTX for every newer
// GPU.
#pragma once

#include <cctype>
#include <cstdio>
#include <string>
#include <vector>

namespace stacked_lstm {

// The lowest major compute capability that the kernels are written for (Ampere).
inline constexpr int kLeastMajor = 8;

inline std::vector<std::string> split_archs(const std::string& archs) {
  std::vector<std::string> all(1);
  for (const char letter : archs) {
    if (letter == ';' || letter == ' ' || letter == ',') {
      if (!all.back().empty()) all.emplace_back();
    } else {
      all.back() += letter;
    }
  }
  if (all.back().empty()) all.pop_back();
  return all;
}

// Empty if compute capability major.minor can run kernels built for `archs`; otherwise the reason.
inline std::string cuda_obstacle(const std::string& archs, int major, int minor) {
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  if (major < kLeastMajor) {
    return "compute capability " + capability + " is below " + std::to_string(kLeastMajor) + ".0, the least supported";
  }
  for (const std::string& arch : split_archs(archs)) {
    int x = 0, y = 0;
    char suffix = 0;
    if (std::sscanf(arch.c_str(), "%d.%d%c", &x, &y, &suffix) < 2) return "";  // a name like Hopper: CUDA checks it
    const bool ptx = arch.find("+PTX") != std::string::npos;
    const bool exact = suffix == 'a';
    if (exact ? x == major && y == minor : x == major && y <= minor) return "";
    if (ptx && !exact && (x < major || (x == major && y <= minor))) return "";
  }
  return "the kernels were built for " + archs + ", which does not cover compute capability " + capability +
         "; build again with TORCH_CUDA_ARCH_LIST=" + capability;
}

}  // namespace stacked_lstm
