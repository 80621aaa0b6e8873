// tests/emulator/device_matrix.h: matrix instructions, and maths whose instruction matters, of
// csrc/cuda/primitives.cuh, on the host. The last parameter of each is the caller's place.
#pragma once

#include <bit>
#include <cstdint>

#include "core.h"
#include "matrix.h"

namespace stacked_lstm::cuda {

using emulator::Location;

inline void load_matrix_x1(uint32_t (&r)[1], uint32_t shared_address, Location at = Location::current()) {
  emulator::load_matrices(r, 1, shared_address, false, at);
}
inline void load_matrix_x2(uint32_t (&r)[2], uint32_t shared_address, Location at = Location::current()) {
  emulator::load_matrices(r, 2, shared_address, false, at);
}
inline void load_matrix_x4(uint32_t (&r)[4], uint32_t shared_address, Location at = Location::current()) {
  emulator::load_matrices(r, 4, shared_address, false, at);
}
inline void load_matrix_x1_transposed(uint32_t (&r)[1], uint32_t shared_address, Location at = Location::current()) {
  emulator::load_matrices(r, 1, shared_address, true, at);
}
inline void load_matrix_x2_transposed(uint32_t (&r)[2], uint32_t shared_address, Location at = Location::current()) {
  emulator::load_matrices(r, 2, shared_address, true, at);
}
inline void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t shared_address, Location at = Location::current()) {
  emulator::load_matrices(r, 4, shared_address, true, at);
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location at = Location::current()) {
  emulator::warp_multiply(emulator::Element::bf16, {d, a, b}, at);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location at = Location::current()) {
  emulator::warp_multiply(emulator::Element::f16, {d, a, b}, at);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location at = Location::current()) {
  emulator::warp_multiply(emulator::Element::tf32, {d, a, b}, at);
}

// A NaN keeps its bits: those of memory that nobody has written are known by them.
inline float nearest_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return x != x ? x : std::bit_cast<float>((bits + 0x1000u) & ~0x1FFFu);
}

inline float tanh_approx(float x) { return emulator::tanh_approx(x); }
inline float reciprocal_approx(float x) { return emulator::reciprocal_approx(x); }
inline float exp2_approx(float x) { return emulator::exp2_approx(x); }
inline float lesser_or_nan(float a, float b) { return a != a ? a : b != b ? b : a < b ? a : b; }

}  // namespace stacked_lstm::cuda
