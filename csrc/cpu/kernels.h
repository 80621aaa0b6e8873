// csrc/cpu/kernels.h: what the drivers ask of an instruction set: packing, products and cells, as a table of functions.
//
// kernels_default.cpp, kernels_avx2.cpp, kernels_avx512.cpp and kernels_avx512_bf16.cpp each compile kernels.inc.h for
// their instructions and fill such a table; dispatch.cpp picks one at run time.
//
// Panels. A packed matrix with N columns and inner dimension K is stored as panels of `width · vector_elements`
// columns, each [K][width · vector_elements]: the order in which a product reads it. Two column orders:
//   gates:  the 4H gate rows of W, `vector_elements` units at a time: [unit block][gate i, f, g, o][element]
//   plain:  the columns in their own order
// A panel may store its weights in half the bytes (Storage::bf16), rounded once, when they are packed. Two weights
// share a 32-bit word. Each instruction set's table defines which two it pairs:
//
//                        high half            low half
//   kernels_avx512_bf16  w[k + 1][vector v]   w[k][vector v]    k even: what a dot product of pairs takes. K rows are
//                                                               rounded up to an even number, with a row of zeros.
//   the others           w[k][vector 2v + 1]  w[k][vector 2v]   a shift gives one vector and a mask the other; the sums
//                                                               are bitwise those of the same weights stored in T.
//
// Operands. Units that multiply bfloat16 take the activations as bfloat16, too. So a product splits each activation
// once: x = high + low, both bfloat16. It stores the words of its rows in memory that its caller provides, and computes
// two dot products a vector of weights. high + low differs from x by less than 2^-17 of x (or by less than 2^-126), and
// that is all that the product loses against activations in float32. Where the caller allows `rounded` activations, the
// product takes high alone: this is half the work, and x is off by up to 2^-8 of itself. If x is infinite or rounds to
// infinity, its low part is zero. A NaN stays a NaN. Most products with an infinite weight are NaN, because high and
// low may have different signs, and because infinity times a low part of zero is NaN.
//
// Gates. The activations of the gates (`gates` buffers, saved or not) have the gate order, too:
// [row][unit block][gate][element], 4·padded_hidden numbers a row. The gradients of the pre-activations have torch's
// order: [row][gate][padded_hidden].
//
// Bits. The order of every sum depends on sizes of the whole call alone, never on how rows or columns are shared out.
// `unroll_rows` tells a product how many rows the whole call has at this point; this picks the number of partial sums.
//
// Alternating panel order. Every step reads all recurrent weights. If they are slightly larger than the cache, reading
// them in the same order at each step evicts every line before it is used again. So odd steps read the panels in
// reverse: the lines that were read last are read first, while they are still cached.
#pragma once

#include <cstdint>

namespace stacked_lstm::cpu {

enum class Storage {
  same,  // T
  bf16,  // T is float; 16 bits, rounded to nearest, ties to even
};

constexpr int64_t stored_bytes(Storage storage, int64_t element) { return storage == Storage::bf16 ? 2 : element; }

// Rows for which a panel of K rows has memory.
constexpr int64_t stored_rows(Storage storage, int64_t inner) {
  return storage == Storage::bf16 ? (inner + 1) / 2 * 2 : inner;
}

// A packed matrix.
struct Panels {
  const void* data = nullptr;
  Storage storage = Storage::same;
};

// c[rows][columns of panels first … last-1] = init + a · panels.
template <typename T>
struct Product {
  Panels panels;
  int64_t width;  // vectors a panel: 2 or 4
  int64_t first_panel, last_panel;
  const T* a;
  int64_t lda;
  int64_t rows;
  int64_t unroll_rows;
  int64_t inner;             // K
  bool rounded = false;      // see "Operands"; ignored where a product has none
  void* operands = nullptr;  // memory of operand_bytes(…) bytes
  const T* init = nullptr;   // null: zero
  int64_t init_step = 0;     // from row to row; 0 adds the same row (a bias) to all
  T* c;
  int64_t ldc;
  bool from_last = false;  // see "Alternating panel order"
};

// One step of a lane for unit blocks first … last-1: gates = init + h·W_hh, then the cell.
template <typename T>
struct StepForward {
  Panels panels;  // W_hh, gate order
  int64_t width;
  int64_t first_unit_block, last_unit_block;
  const T* h;  // h of the step before
  int64_t ldh;
  int64_t rows;
  int64_t unroll_rows;
  int64_t inner;
  bool rounded = false;  // as in Product
  void* operands = nullptr;
  const T* projected;  // W_ih·x + b, gate order
  int64_t hidden, padded_hidden;
  T* c;       // [row][padded_hidden], updated
  T* h_next;  // [row][ldh_next], whole vectors
  int64_t ldh_next;
  T* y;  // [row][ldy], exactly `hidden` columns; or null
  int64_t ldy;
  T* saved_c;              // [row][padded_hidden], or null
  T* saved_gates;          // [row][4·padded_hidden], or null
  bool from_last = false;  // see "Alternating panel order"
};

// The cell once more for unit blocks first … last-1 of `rows` rows, in a backward pass: what a forward pass did not keep.
template <typename T>
struct Replay {
  int64_t first_unit_block, last_unit_block;
  int64_t rows;
  int64_t padded_hidden;
  const T* gates;  // [row][4·padded_hidden]: the activations; or null, if `sums` are given:
  T* sums;         // likewise: W_ih·x + W_hh·h + b in, the activations out
  const T* c;      // [row][padded_hidden]: before the step
  T* c_next;       // likewise, after it; or null
};

// The cell's backward for unit blocks first … last-1 of `rows` rows.
template <typename T>
struct StepBackward {
  int64_t first_unit_block, last_unit_block;
  int64_t rows;
  int64_t hidden, padded_hidden;
  const T* gates;
  const T* dh;  // [row][lddh]
  int64_t lddh;
  const T* dy;  // added to dh; or null
  int64_t lddy;
  const T* c_next;  // [row][padded_hidden]
  const T* c;       // likewise: the state before the step
  T* dc;            // [row][padded_hidden], updated
  T* dgates;        // [row][lddg], torch's order; zero in the padding, whatever the padding of `gates` holds
  int64_t lddg;
  T* projected;  // o·tanh(c_next), the projection's input, [row][ldm]; or null
  int64_t ldm;
};

// A weight gradient: c[m][n] = Σ over rows of a[row][m]·b[row][n], added to c with `accumulate`. The sum is taken in
// gradient blocks of kGradientRows rows. As much of a and b is copied to `scratch` at a time as stays in a second-level
// cache. The rows may be in two runs, as in a ring; where the second run begins changes no bit of the sums.
template <typename T>
inline constexpr int64_t kGradientRows = 1536 / int64_t{sizeof(T)};
inline constexpr int64_t kGradientColumns = 280;  // of a
inline constexpr int64_t kWidestVectorBytes = 64;
template <typename T>
inline constexpr int64_t kGradientScratch =
    kGradientRows<T> * (kGradientColumns + 2 * kWidestVectorBytes / int64_t{sizeof(T)});

template <typename T>
struct GradientProduct {
  T* c;
  int64_t ldc;
  const T* a;
  const T* a_rest;  // rows from `parting` on
  int64_t lda;
  const T* b;
  const T* b_rest;
  int64_t ldb;
  int64_t rows, parting, m, n;
  bool accumulate;
  bool rounded = false;  // a and b are rounded to bfloat16, where units multiply it
  void* scratch;         // for kGradientScratch numbers
};

// The operands of a row, two in each word: the high parts, then the low parts if they are taken, whole vectors of each.
// A row has one vector more than that, so that rows are no power of two apart: such rows would share one set of a
// cache.
constexpr int64_t operand_part(int64_t inner) { return (inner + 31) / 32 * 16; }
constexpr int64_t operand_words(int64_t inner, int64_t parts) { return parts * operand_part(inner) + 16; }

template <typename T>
struct CpuKernels {
  int64_t vector_elements;
  bool units;  // there are units that multiply bfloat16: products of panels in Storage::bf16 need memory for operands
  // Panels first … last-1 of W (4H, K), row-major, columns in gate order, `width` vectors a panel.
  void (*pack_gates)(const T* w, int64_t hidden, int64_t inner, int64_t width, int64_t first, int64_t last,
                     Storage storage, void* panels);
  // Panels of the transpose of W (columns, K): column n is row n of W.
  void (*pack_rows)(const T* w, int64_t columns, int64_t inner, int64_t width, int64_t first, int64_t last,
                    Storage storage, void* panels);
  // Panels of W (row_blocks·rows_per_block, columns) as it is; every row block is padded with zeros to `padded_rows`.
  void (*pack_columns)(const T* w, int64_t columns, int64_t row_blocks, int64_t rows_per_block, int64_t padded_rows,
                       int64_t width, int64_t first, int64_t last, Storage storage, void* panels);
  // Sum of two biases (either may be null), in gate order, unit blocks first … last-1.
  void (*pack_bias)(const T* b_ih, const T* b_hh, int64_t hidden, int64_t first, int64_t last, T* bias);
  void (*product)(const Product<T>&);
  void (*step_forward)(const StepForward<T>&);
  void (*step_backward)(const StepBackward<T>&);
  void (*replay)(const Replay<T>&);
  void (*gradient)(const GradientProduct<T>&);
  // sum[n] = Σ over rows of a[row][n], n < columns, row after row; added to sum with `accumulate`.
  void (*sum_rows)(const T* a, int64_t lda, int64_t rows, int64_t columns, bool accumulate, T* sum);
  // sigmoid and tanh of n numbers, for tests.
  void (*maths)(const T* x, int64_t n, T* sigmoid, T* tanh);
  // The sums a and b of a fingerprint block, see fingerprint.h.
  void (*digest)(const void* data, int64_t bytes, const void* key, uint64_t* ab);
};

// Bytes that a product or a step of `rows` rows needs for its operands; 0 if it takes the activations as they are.
template <typename T>
int64_t operand_bytes(const CpuKernels<T>& kernels, Storage storage, int64_t rows, int64_t inner) {
  return kernels.units && storage == Storage::bf16 ? rows * operand_words(inner, 2) * int64_t{sizeof(int32_t)} : 0;
}

// The table of each instruction set; null if it was not built.
template <typename T>
const CpuKernels<T>* kernels_default();
template <typename T>
const CpuKernels<T>* kernels_avx2();
template <typename T>
const CpuKernels<T>* kernels_avx512();
template <typename T>
const CpuKernels<T>* kernels_avx512_bf16();

// The instruction set in use: the best that the processor has, or the one that STACKED_LSTM_EXT_ISA names.
// Throws std::runtime_error when the named instruction set is unknown, was not built, or cannot run here.
const char* isa();
template <typename T>
const CpuKernels<T>& kernels();

}  // namespace stacked_lstm::cpu
