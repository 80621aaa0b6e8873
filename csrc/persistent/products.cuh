// csrc/persistent/products.cuh: the products of a warp of the persistent kernels: tiles of 16 rows of weights by tiles
// of 8 columns of the batch, over K in pieces of 64 bytes of a row.
//
//   K of a piece      quarter 0    quarter 1    quarter 2    quarter 3        warp lane l has
//   row of weights    ■■■■■■■■     ■■■■■■■■     ■■■■■■■■     ■■■■■■■■         quarter l % 4 of rows l/4 and l/4 + 8
//   column of h       ■■■■■■■■     ■■■■■■■■     ■■■■■■■■     ■■■■■■■■         quarter l % 4 of column l/4
//                     16 bytes
//
// mma adds over K, and any order of K will do if both operands have the same. So a warp lane passes its quarter as it
// lies in memory: the first half in one k-step, the second half in the next. Weights need no packing, and a quarter is
// one load. This holds for 16 bits (m16n8k16) and for TF32 (m16n8k8). Exact float32 uses fused multiply-adds instead: a
// warp lane multiplies its quarters of the weights by the same quarter of all 8 columns. At the end the four warp lanes
// of a row add up their sums, in the layout that mma leaves:
//
//   d[tile][0], [1]   row l/4 of the tile, columns 2·(l % 4) and + 1          d[tile][2], [3]   row l/4 + 8
#pragma once

#include <cstdint>
#include <type_traits>

#include "../cuda/primitives.cuh"
#include "../stack/number.h"
#include "kernels.h"

namespace stacked_lstm::cuda::persistent {

using namespace stacked_lstm::persistent;

// Elements of a quarter.
template <typename T>
inline constexpr int kQuarter = 16 / static_cast<int>(sizeof(T));

// A thread's part of a piece of one tile of weights.
struct Fragment {
  uint4 upper, lower;  // rows warp_lane / 4 and warp_lane / 4 + 8
};

// ---- Operands -------------------------------------------------------------------------------------------------------

// x as the product takes it: for TF32 products, the nearest TF32 number.
template <Product product, typename T>
__device__ __forceinline__ T operand(T x) {
  if constexpr (std::is_same_v<T, float> && product == Product::tensor) return nearest_tf32(x);
  return x;
}
template <typename T, Product product>
__device__ __forceinline__ uint4 operands(uint4 quarter) {
  if constexpr (std::is_same_v<T, float> && product == Product::tensor) {
    const auto nearest = [](unsigned bits) {
      return number_detail::bits_of(nearest_tf32(number_detail::float_of(bits)));
    };
    return {nearest(quarter.x), nearest(quarter.y), nearest(quarter.z), nearest(quarter.w)};
  }
  return quarter;
}

// Whether the rows can be read in quarters: each begins and ends at a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ bool quarters_fit(const T* first_row, int64_t row_stride, int depth) {
  return reinterpret_cast<uintptr_t>(first_row) % 16 == 0 && row_stride % kQuarter<T> == 0 && depth % kQuarter<T> == 0;
}

enum class Memory {
  constant,  // no thread writes it during the launch
  written,   // another block may have written it before the release that this thread has acquired: read past the L1
};

// Elements k … k + kQuarter - 1 of a row of `depth` elements in global memory; zeros past its end. (No row: depth 0.)
template <Memory memory, typename T>
__device__ __forceinline__ uint4 load_quarter(const T* row, int k, int depth, bool fits) {
  const auto load = [](const auto* from) {
    if constexpr (memory == Memory::constant) return load_readonly(from);
    if constexpr (memory == Memory::written) return load_l2(from);
  };
  uint4 quarter = {0, 0, 0, 0};
  if (fits) {
    if (k < depth) quarter = load(reinterpret_cast<const uint4*>(row + k));
  } else {
    // Not unrolled, each round moves the words on by one: this takes few registers, and the weights leave few.
#pragma unroll 1
    for (int n = k; n < k + kQuarter<T>; n += 4 / static_cast<int>(sizeof(T))) {
      uint32_t word = 0;
      if constexpr (sizeof(T) == 4) {
        if (n < depth) word = number_detail::bits_of(load(row + n));
      } else {
        if (n < depth) word = load(row + n).bits;
        if (n + 1 < depth) word |= static_cast<uint32_t>(load(row + n + 1).bits) << 16;
      }
      quarter = {quarter.y, quarter.z, quarter.w, word};
    }
  }
  return quarter;
}

// ---- Products -------------------------------------------------------------------------------------------------------

// d += a·b for half of a piece: 16 x K by K x 8.
template <typename T>
__device__ __forceinline__ void multiply_half(float (&d)[4], uint32_t upper_0, uint32_t lower_0, uint32_t upper_1,
                                              uint32_t lower_1, uint32_t b_0, uint32_t b_1) {
  const uint32_t a[4] = {upper_0, lower_0, upper_1, lower_1}, b[2] = {b_0, b_1};
  if constexpr (std::is_same_v<T, bfloat16>) {
    mma_bf16(d, a, b);
  } else if constexpr (std::is_same_v<T, float16>) {
    mma_f16(d, a, b);
  } else {
    mma_tf32(d, a, b);
  }
}

// Running sums of MTiles tiles of weights by one tile of the batch: start(), add() for each piece, finish().
// kTwoChains: two chains of dependent products a tile, one for each half of a piece, if there are so few tiles that
// with one chain each the tensor core would wait.
template <typename T, Product product, int MTiles, bool kTwoChains = false>
class Sums {
  static_assert(product == Product::tensor || std::is_same_v<T, float>);
  float d_[MTiles][4], second_[kTwoChains ? MTiles : 1][4];

 public:
  __device__ __forceinline__ void start(const float (&d)[MTiles][4]) {
#pragma unroll
    for (int n = 0; n < MTiles * 4; ++n) {
      d_[n / 4][n % 4] = d[n / 4][n % 4];
      if constexpr (kTwoChains) second_[n / 4][n % 4] = 0;
    }
  }

  // column(n): the thread's quarter of column n of the batch tile, as operands() returns it.
  template <typename Column>
  __device__ __forceinline__ void add(const Fragment (&a)[MTiles], int warp_lane, Column column) {
    const uint4 b = column(warp_lane / 4);
#pragma unroll
    for (int m = 0; m < MTiles; ++m) {
      const uint4 &u = a[m].upper, &l = a[m].lower;
      multiply_half<T>(d_[m], u.x, l.x, u.y, l.y, b.x, b.y);
      if constexpr (kTwoChains) multiply_half<T>(second_[m], u.z, l.z, u.w, l.w, b.z, b.w);
    }
    if constexpr (!kTwoChains) {
#pragma unroll
      for (int m = 0; m < MTiles; ++m) {
        const uint4 &u = a[m].upper, &l = a[m].lower;
        multiply_half<T>(d_[m], u.z, l.z, u.w, l.w, b.z, b.w);
      }
    }
  }

  __device__ __forceinline__ void finish(float (&d)[MTiles][4], int /*warp_lane*/) {
#pragma unroll
    for (int n = 0; n < MTiles * 4; ++n) {
      d[n / 4][n % 4] = d_[n / 4][n % 4];
      if constexpr (kTwoChains) d[n / 4][n % 4] += second_[n / 4][n % 4];
    }
  }
};

// Exact float32: sums of a thread's rows (upper and lower of each of MTiles tiles) with `Count` columns, over its
// quarters of K.
template <int MTiles, int Count>
class ThreadSums {
  static_assert(Count % 4 == 0);
  float sum_[2 * MTiles][Count] = {};

 public:
  // column(n), n < Count: the thread's quarter of that column.
  template <typename Column>
  __device__ __forceinline__ void add(const Fragment (&a)[MTiles], Column column) {
#pragma unroll
    for (int n = 0; n < Count; ++n) {
      const uint4 b = column(n);
#pragma unroll
      for (int m = 0; m < MTiles; ++m) {
        multiply_add(sum_[2 * m][n], a[m].upper, b);
        multiply_add(sum_[2 * m + 1][n], a[m].lower, b);
      }
    }
  }

  // A row's sums over all of K for Count/4 columns, from column Count/4 · (warp_lane % 4) on.
  __device__ __forceinline__ void total(float (&sum)[Count / 4], int row, int warp_lane) const {
    const bool right = warp_lane & 2, odd = warp_lane & 1;
    const float (&s)[Count] = sum_[row];
    // In two rounds, first with the warp lane two away, then with its neighbour, a thread adds half of the columns and
    // gives the other half to its partner. The sum does not depend on which of the two adds: a + b is b + a.
    float half[Count / 2];
#pragma unroll
    for (int n = 0; n < Count / 2; ++n) {
      half[n] = (right ? s[Count / 2 + n] : s[n]) + shuffle_xor(kFullWarp, right ? s[n] : s[Count / 2 + n], 2);
    }
#pragma unroll
    for (int n = 0; n < Count / 4; ++n) {
      sum[n] = (odd ? half[Count / 4 + n] : half[n]) + shuffle_xor(kFullWarp, odd ? half[n] : half[Count / 4 + n], 1);
    }
  }

 private:
  static __device__ __forceinline__ void multiply_add(float& sum, const uint4& a, const uint4& b) {
    using number_detail::float_of;
    sum = __fmaf_rn(float_of(a.x), float_of(b.x), sum);
    sum = __fmaf_rn(float_of(a.y), float_of(b.y), sum);
    sum = __fmaf_rn(float_of(a.z), float_of(b.z), sum);
    sum = __fmaf_rn(float_of(a.w), float_of(b.w), sum);
  }
};

template <int MTiles, bool kTwoChains>
class Sums<float, Product::exact, MTiles, kTwoChains> {
  float start_[MTiles][4];
  ThreadSums<MTiles, kTileColumns> sums_;

 public:
  __device__ __forceinline__ void start(const float (&d)[MTiles][4]) {
#pragma unroll
    for (int n = 0; n < MTiles * 4; ++n) start_[n / 4][n % 4] = d[n / 4][n % 4];
    sums_ = {};
  }

  template <typename Column>
  __device__ __forceinline__ void add(const Fragment (&a)[MTiles], int /*warp_lane*/, Column column) {
    sums_.add(a, column);
  }

  __device__ __forceinline__ void finish(float (&d)[MTiles][4], int warp_lane) {
#pragma unroll
    for (int row = 0; row < 2 * MTiles; ++row) {
      float sum[2];
      sums_.total(sum, row, warp_lane);
#pragma unroll
      for (int n = 0; n < 2; ++n) d[row / 2][row % 2 * 2 + n] = start_[row / 2][row % 2 * 2 + n] + sum[n];
    }
  }
};

// The column of a batch tile that a thread reads for products on tensor cores. Exact products read all, from the first
// on.
template <Product product>
__device__ __forceinline__ int own_column(int warp_lane) {
  return product == Product::exact ? 0 : warp_lane / 4;
}

// d += weights, `Pieces` pieces in registers, by Tiles batch tiles in shared memory. `own` points to quarter warp_lane
// % 4 of the first piece of own_column(); `pitch`: elements from a column to the next.
template <typename T, Product product, int Pieces, int MTiles, int Tiles>
__device__ __forceinline__ void multiply_own(float (&d)[Tiles][MTiles][4], const Fragment (&weights)[Pieces][MTiles],
                                             const T* own, int pitch, int warp_lane) {
  const auto quarter = [&](int tile, int n, int piece) {
    return *reinterpret_cast<const uint4*>(own + (tile * kTileColumns + n) * pitch + piece * kPieceElements<T>);
  };
  if constexpr (product == Product::exact) {
    // Four columns at a time, so that there are few sums beside the weights: first those that are the threads' first in
    // d, then the threads' second ones. The loop is not unrolled, and each round swaps the two sums in d: otherwise the
    // compiler would load columns long before they are needed.
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        ThreadSums<MTiles, kTileColumns / 2> sums;
#pragma unroll
        for (int piece = 0; piece < Pieces; ++piece) {
          sums.add(weights[piece], [&](int n) { return quarter(tile, 2 * n + half, piece); });
        }
#pragma unroll
        for (int row = 0; row < 2 * MTiles; ++row) {
          float sum[1];
          sums.total(sum, row, warp_lane);
          float &first = d[tile][row / 2][row % 2 * 2], &second = d[tile][row / 2][row % 2 * 2 + 1];
          const float done = first + sum[0];
          first = second, second = done;
        }
      }
    }
  } else {
    Sums<T, product, MTiles, (Tiles * MTiles <= 2)> sums[Tiles];
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) sums[tile].start(d[tile]);
#pragma unroll
    for (int piece = 0; piece < Pieces; ++piece) {
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
        sums[tile].add(weights[piece], warp_lane, [&](int) { return quarter(tile, 0, piece); });
      }
    }
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) sums[tile].finish(d[tile], warp_lane);
  }
}

// The same, where `first` points to quarter warp_lane % 4 of the first piece of column 0.
template <typename T, Product product, int Pieces, int MTiles, int Tiles>
__device__ __forceinline__ void multiply(float (&d)[Tiles][MTiles][4], const Fragment (&weights)[Pieces][MTiles],
                                         const T* first, int pitch, int warp_lane) {
  multiply_own<T, product>(d, weights, first + own_column<product>(warp_lane) * pitch, pitch, warp_lane);
}

}  // namespace stacked_lstm::cuda::persistent
