// tests/emulator/matrix.h: the warp-wide matrix instructions: their arithmetic on the registers of 32 lanes, which
// needs nothing of a running kernel, and the instructions themselves.
//
// A lane is numbered 4·group + member. Where an element of a fragment lives is the PTX ISA's (sections "Matrix
// fragments for mma.m16n8k16" and "... mma.m16n8k8"): see the layout functions below, which are all that knows it.
#pragma once

#include <cstdint>

#include "core.h"

namespace stacked_lstm::emulator {

inline constexpr int kLanes = 32;

// What the operands of a product are stored as. The accumulators are float.
enum class Element { bf16, f16, tf32 };

// Which NaNs an operand of a product may hold. A network that diverged holds NaNs of its own; those that memory starts
// with, and that a copy in flight leaves at its destination (all bits set), mean that a kernel read too early.
enum class NaNs { any, all_but_unwritten, none };

struct Position {
  int row, column;
};

// A product d = a·b + d of shape m16n8k16 (bf16 and fp16, two elements a register) or m16n8k8 (tf32, one).
struct MmaOperands {
  float* d;           // [4]
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
};

constexpr int depth(Element element) { return element == Element::tf32 ? 8 : 16; }
constexpr int elements_a_register(Element element) { return element == Element::tf32 ? 1 : 2; }

// Where in its matrix the element `part` of register `index` of `lane` is.
Position place_in_a(Element element, int lane, int index, int part);
Position place_in_b(Element element, int lane, int index, int part);
Position place_in_d(int lane, int index);

// The product of a whole warp, in place. As on the hardware, products are exact, are aligned with the largest of
// them and the accumulator, cut to the bits that a tensor core keeps, summed, and cut to float.
void multiply(Element element, const MmaOperands (&lanes)[kLanes]);

// The first NaN among the operands that `allowed` does not let pass.
struct FoundNaN {
  bool found = false;
  char operand;  // 'a' or 'b'
  Position place;
  int lane;
  uint32_t bits;
};
FoundNaN find_nan(Element element, const MmaOperands (&lanes)[kLanes], NaNs allowed);

// ldmatrix of one 8x8 matrix of 16-bit elements: rows[i] are the eight elements of row i. Returns lane's register.
uint32_t matrix_register(const uint16_t (&rows)[8][8], int lane, bool transposed);

// Maths whose instruction matters, no more precise than the PTX ISA promises: what relies on more is seen.
float tanh_approx(float x);        // relative error up to 2^-11
float reciprocal_approx(float x);  // absolute error up to 2^-23 for x in [1, 2]; denormals count as zero
float exp2_approx(float x);        // up to 2 units in the last place; denormals count as zero

// ------------------------------------------------------------------------------------------------- in a running kernel

NaNs& allowed_nans();  // of products and of ldmatrix; process-wide

// ldmatrix of 1, 2 or 4 matrices, and mma, of the current thread's warp.
void load_matrices(uint32_t* registers, int matrices, uint32_t shared_address, bool transposed, Location);
void warp_multiply(Element element, const MmaOperands& operands, Location);

}  // namespace stacked_lstm::emulator
