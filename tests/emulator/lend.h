// tests/emulator/lend.h: what a program says before a launch: the memory that the kernel may touch.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include "../../csrc/number.h"
#include "core.h"

namespace stacked_lstm::emulator {

// `count` elements, for the next launch; nothing where there are none. A new list begins with device_memory().clear().
template <typename T>
void lend(std::string name, const T* begin, int64_t count, Access access) {
  if (!begin || count <= 0) return;
  bool (*is_nan)(const void*) = nullptr;
  if constexpr (!std::is_integral_v<T> && requires(T element) { widen(element); }) {
    is_nan = [](const void* element) {
      const auto value = widen(*static_cast<const T*>(element));
      return value != value;
    };
  }
  device_memory().push_back({begin, static_cast<size_t>(count) * sizeof(T), std::move(name), access, sizeof(T), is_nan});
}

}  // namespace stacked_lstm::emulator
