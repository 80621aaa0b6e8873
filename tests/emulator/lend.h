// tests/emulator/lend.h: what a program says before a launch: the memory that the kernel may touch.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include "../../csrc/stack/number.h"
#include "core.h"

namespace stacked_lstm::emulator {

// `count` elements, for the next launch; nothing where there are none. A new list begins with device_memory().clear().
template <typename T>
void lend(std::string name, const T* begin, int64_t count, Access access) {
  if (!begin || count <= 0) return;
  double (*number)(const void*) = nullptr;
  double epsilon = 0;
  if constexpr (!std::is_integral_v<T> && requires(T element) { widen(element); }) {
    number = [](const void* element) { return static_cast<double>(widen(*static_cast<const T*>(element))); };
    static const double of_type = [] {
      double e = 1;
      while (widen(narrow<T>(static_cast<Accumulator<T>>(1 + e / 2))) > 1) e /= 2;
      return e;
    }();
    epsilon = of_type;
  }
  device_memory().push_back(
      {begin, static_cast<size_t>(count) * sizeof(T), std::move(name), access, sizeof(T), number, epsilon});
}

}  // namespace stacked_lstm::emulator
