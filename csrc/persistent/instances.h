// csrc/persistent/instances.h: which instances of the persistent kernels are compiled. The sources that instantiate
// them, the planner and `make cuda-check` share this list. No CUDA, no torch.
//
//   forward    weights of a thread: 16 · pieces registers, of at most 255. `splits` warps, 1 … 8, share K = hidden:
//              hidden ≤ 8 · pieces · kPieceElements
//   backward   weights of a thread: 8 · pieces · unit_tiles registers; hidden ≤ 128 · unit_tiles. `pieces` also says
//              how many units a block owns: 8 a piece in 16 bits, 4 in 32. So there is a cluster only if 16 such blocks
//              own as many units as unit_tiles is for; wider lanes go through L2.
//
// STACKED_LSTM_FEW_INSTANCES: a short list, for builds that run under the emulator or a sanitizer.
#pragma once

#include <array>
#include <cstddef>
#include <type_traits>

#include "kernels.h"

namespace stacked_lstm::persistent {

namespace instances_detail {

struct Registers {  // how weights lie in registers: see Cut
  int pieces, unit_tiles;
};

// All combinations of `products` × `exchanges` × `registers` × `batch_tiles`; the first changes slowest.
template <size_t P, size_t E, size_t R, size_t N>
constexpr auto all_of(const Product (&products)[P], const Exchange (&exchanges)[E], const Registers (&registers)[R],
                      const int (&batch_tiles)[N]) {
  std::array<Instance, P * E * R * N> all{};
  size_t n = 0;
  for (const Product product : products) {
    for (const Exchange exchange : exchanges) {
      for (const Registers& r : registers) {
        for (const int t : batch_tiles) all[n++] = {product, exchange, t, r.pieces, r.unit_tiles};
      }
    }
  }
  return all;
}

// The lists, one after the other.
template <size_t... N>
constexpr auto joined(const std::array<Instance, N>&... lists) {
  std::array<Instance, (N + ...)> all{};
  size_t n = 0;
  const auto append = [&](const auto& list) {
    for (const Instance& instance : list) all[n++] = instance;
  };
  (append(lists), ...);
  return all;
}

inline constexpr Product kTensor[] = {Product::tensor}, kExact[] = {Product::exact},
                         kBothProducts[] = {Product::tensor, Product::exact};
inline constexpr Exchange kBothExchanges[] = {Exchange::cluster, Exchange::l2}, kCluster[] = {Exchange::cluster},
                          kThroughL2[] = {Exchange::l2};

#if defined(STACKED_LSTM_FEW_INSTANCES)

inline constexpr Registers kForward[] = {{2, 0}}, kBackward[] = {{4, 1}};
inline constexpr int kTiles[] = {1, 2}, kOneTile[] = {1};

template <typename T>
constexpr auto few(const Registers (&registers)[1]) {
  if constexpr (std::is_same_v<T, float>) {
    return joined(all_of(kTensor, kBothExchanges, registers, kTiles),
                  all_of(kExact, kBothExchanges, registers, kOneTile));
  } else {
    return all_of(kTensor, kBothExchanges, registers, kTiles);
  }
}

template <typename T>
constexpr auto forward() {
  return few<T>(kForward);
}
template <typename T>
constexpr auto backward() {
  return few<T>(kBackward);
}

#else

// 6 pieces would serve no width that 4 or 8 do not serve with other splits. 8 pieces leave no registers for 4 batch
// tiles. Through L2 a thread also holds words that are under way, which leaves fewer registers. Therefore exact
// products through L2 have at most 6 pieces in forward (hidden ≤ 768), and in backward not the widest instances (hidden
// ≤ 512). 16-bit backward through L2 does not have the most weights together with the most batch tiles (kMost16).
inline constexpr Registers kForward[] = {{2, 0}, {4, 0}}, kForwardMost[] = {{8, 0}},
                           kForward32[] = {{2, 0}, {4, 0}, {8, 0}}, kForwardExact[] = {{2, 0}, {4, 0}, {6, 0}};
inline constexpr Registers kNarrow16[] = {{4, 1}, {4, 2}, {4, 4}}, kLess16[] = {{4, 1}, {4, 2}, {2, 6}, {2, 8}},
                           kMost16[] = {{4, 4}};
inline constexpr Registers kNarrow32[] = {{4, 1}, {4, 2}, {8, 2}}, kLess32[] = {{4, 1}, {4, 2}, {4, 4}},
                           kMost32[] = {{8, 2}, {2, 8}};
inline constexpr int kTiles16[] = {1, 2, 4}, kTiles32[] = {1, 2};

template <typename T>
constexpr auto forward() {
  if constexpr (std::is_same_v<T, float>) {
    return joined(all_of(kTensor, kBothExchanges, kForward32, kTiles32), all_of(kExact, kCluster, kForward32, kTiles32),
                  all_of(kExact, kThroughL2, kForwardExact, kTiles32));
  } else {
    return joined(all_of(kTensor, kBothExchanges, kForward, kTiles16),
                  all_of(kTensor, kBothExchanges, kForwardMost, kTiles32));
  }
}

template <typename T>
constexpr auto backward() {
  if constexpr (std::is_same_v<T, float>) {
    return joined(all_of(kBothProducts, kCluster, kNarrow32, kTiles32),
                  all_of(kBothProducts, kThroughL2, kLess32, kTiles32), all_of(kTensor, kThroughL2, kMost32, kTiles32));
  } else {
    return joined(all_of(kTensor, kCluster, kNarrow16, kTiles16), all_of(kTensor, kThroughL2, kLess16, kTiles16),
                  all_of(kTensor, kThroughL2, kMost16, kTiles32));
  }
}

#endif

}  // namespace instances_detail

template <typename T>
inline constexpr auto kForwardInstances = instances_detail::forward<T>();
template <typename T>
inline constexpr auto kBackwardInstances = instances_detail::backward<T>();

}  // namespace stacked_lstm::persistent
