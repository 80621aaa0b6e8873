// tests/emulator/matrix.cpp: see matrix.h.
#include "matrix.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "async.h"

namespace stacked_lstm::emulator {
namespace {

// Eight columns at once: the compiler makes vector instructions of these.
constexpr int kRows = 16, kColumns = 8;
typedef float Floats __attribute__((vector_size(kColumns * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kColumns * sizeof(int32_t))));

// A tensor core adds this many products and the accumulator at once, and keeps this many bits of them. Both are what
// was measured on the first generation that has all three formats; later ones keep no fewer.
// (Fasi, Higham, Mikaitis & Pranesh 2021, "Numerical behavior of NVIDIA tensor cores".)
constexpr int products_at_once(Element element) { return element == Element::tf32 ? 4 : 8; }
constexpr int kKeptBits = 25;

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

float widen_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 0x1F, mantissa = half & 0x3FF;
  if (exponent == 0x1F) return float_of(sign | 0x7F800000u | mantissa << 13);
  const float magnitude =
      exponent ? std::ldexp(1.0f + mantissa * 0x1p-10f, static_cast<int>(exponent) - 15) : mantissa * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

// Every float16 there is: products are looked up, not computed.
struct HalfTable {
  float value[1 << 16];
  HalfTable() {
    for (int bits = 0; bits < 1 << 16; ++bits) value[bits] = widen_half(static_cast<uint16_t>(bits));
  }
};

float element_of(Element element, uint32_t word, int part) {
  switch (element) {
    case Element::bf16:
      return float_of(part ? word & 0xFFFF0000u : word << 16);
    case Element::f16: {
      static const HalfTable table;
      return table.value[part ? word >> 16 : word & 0xFFFF];
    }
    case Element::tf32:
      return float_of(word & ~0x1FFFu);  // the low 13 bits are not looked at
  }
  return std::numeric_limits<float>::quiet_NaN();
}

// The bits of an element as they are stored, all set when nobody wrote them.
bool is_unwritten(Element element, uint32_t word, int part) {
  if (element == Element::tf32) return word == 0xFFFFFFFFu;
  return (part ? word >> 16 : word & 0xFFFF) == 0xFFFF;
}

// Adds `count` products to the accumulator, each column by itself. Where a term is infinite or NaN, or all are
// so small that the unit below is no normal number, the sum is the plain one.
template <int count>
void add_products(const float* a, const Floats* b, Floats& accumulator) {
  const Floats sum = accumulator;
  Floats product[count];
  Ints largest = (Ints)sum & 0x7FFFFFFF;
  for (int k = 0; k < count; ++k) {
    product[k] = a[k] * b[k];
    const Ints magnitude = (Ints)product[k] & 0x7FFFFFFF;
    largest = magnitude > largest ? magnitude : largest;
  }
  const Ints exponent = largest >> 23;
  const Ints alignable = (exponent >= kKeptBits + 1) & (exponent < 255);
  // The unit is 2^-(kKeptBits - 1) of the power of two that begins the largest term: no term has more than kKeptBits.
  const Ints unit_exponent = alignable ? exponent - (kKeptBits - 1) : 127 + (Ints){};
  const Floats unit = (Floats)(unit_exponent << 23), units_in_one = (Floats)((254 - unit_exponent) << 23);
  const Floats zero = {};
  Ints units = __builtin_convertvector(alignable ? sum * units_in_one : zero, Ints);
  Floats plain = sum;
  for (int k = 0; k < count; ++k) {
    units += __builtin_convertvector(alignable ? product[k] * units_in_one : zero, Ints);
    plain += product[k];
  }
  // The sum may have grown to more bits than a float has: cut it to 24, so that the conversion below is exact.
  const Ints sign = units >> 31;
  Ints magnitude = (units ^ sign) - sign;
  for (int bit = 24; bit < kKeptBits + 4; ++bit) {
    magnitude &= magnitude >= Ints{} + (1 << bit) ? ~Ints{} << (bit - 23) : ~Ints{};
  }
  const Floats aligned = __builtin_convertvector((magnitude ^ sign) - sign, Floats) * unit;
  accumulator = alignable ? aligned : plain;
}

template <int at_once, int depth>
void multiply_rows(const float (&a)[kRows][16], const Floats* b, Floats* d) {
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < depth; k += at_once) add_products<at_once>(&a[row][k], &b[k], d[row]);
  }
}

// Cuts x, which is finite, to its leading `bits` bits.
float cut(double x, int bits) {
  int exponent;
  const double mantissa = std::frexp(x, &exponent);
  return static_cast<float>(std::ldexp(std::trunc(std::ldexp(mantissa, bits)), exponent - bits));
}

float without_denormals(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

}  // namespace

Position place_in_a(Element element, int lane, int index, int part) {
  const int group = lane / 4, member = lane % 4, row = group + index % 2 * 8;
  if (element == Element::tf32) return {row, member + index / 2 * 4};
  return {row, member * 2 + part + index / 2 * 8};
}

Position place_in_b(Element element, int lane, int index, int part) {
  const int group = lane / 4, member = lane % 4;
  if (element == Element::tf32) return {member + index * 4, group};
  return {member * 2 + part + index * 8, group};
}

Position place_in_d(int lane, int index) { return {lane / 4 + index / 2 * 8, lane % 4 * 2 + index % 2}; }

void multiply(Element element, const MmaOperands (&lanes)[kLanes]) {
  float a[kRows][16];
  Floats b[16], d[kRows];
  const int parts = elements_a_register(element);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int part = 0; part < parts; ++part) {
      for (int index = 0; index < 4; ++index) {
        const Position place = place_in_a(element, lane, index, part);
        a[place.row][place.column] = element_of(element, lanes[lane].a[index], part);
      }
      for (int index = 0; index < 2; ++index) {
        const Position place = place_in_b(element, lane, index, part);
        b[place.row][place.column] = element_of(element, lanes[lane].b[index], part);
      }
    }
    for (int index = 0; index < 4; ++index) {
      const Position place = place_in_d(lane, index);
      d[place.row][place.column] = lanes[lane].d[index];
    }
  }
  if (element == Element::tf32) {
    multiply_rows<products_at_once(Element::tf32), depth(Element::tf32)>(a, b, d);
  } else {
    multiply_rows<products_at_once(Element::bf16), depth(Element::bf16)>(a, b, d);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int index = 0; index < 4; ++index) {
      const Position place = place_in_d(lane, index);
      lanes[lane].d[index] = d[place.row][place.column];
    }
  }
}

FoundNaN find_nan(Element element, const MmaOperands (&lanes)[kLanes], NaNs allowed) {
  if (allowed == NaNs::any) return {};
  const auto refused = [&](uint32_t word, int part) {
    if (allowed == NaNs::all_but_unwritten) return is_unwritten(element, word, part);
    const float value = element_of(element, word, part);
    return value != value;
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int part = 0; part < elements_a_register(element); ++part) {
      for (int index = 0; index < 4; ++index) {
        const uint32_t word = lanes[lane].a[index];
        if (refused(word, part)) return {true, 'a', place_in_a(element, lane, index, part), lane, word};
      }
      for (int index = 0; index < 2; ++index) {
        const uint32_t word = lanes[lane].b[index];
        if (refused(word, part)) return {true, 'b', place_in_b(element, lane, index, part), lane, word};
      }
    }
  }
  return {};
}

uint32_t matrix_register(const uint16_t (&rows)[8][8], int lane, bool transposed) {
  const int row = lane / 4, column = lane % 4 * 2;
  const auto element = [&](int r, int c) -> uint32_t { return transposed ? rows[c][r] : rows[r][c]; };
  return element(row, column) | element(row, column + 1) << 16;
}

float tanh_approx(float x) {
  if (x != x) return x;
  // Below 2^-12 the tangent is its argument to the precision of the instruction.
  return cut(std::fabs(x) < 0x1p-12f ? double{x} : std::tanh(double{x}), 12);
}

float reciprocal_approx(float x) {
  const float inverse = 1.0f / without_denormals(x);
  if (inverse != inverse || std::isinf(inverse)) return inverse;
  return without_denormals(cut(1.0 / double{x}, 23));
}

float exp2_approx(float x) {
  const double power = std::exp2(double{without_denormals(x)});
  if (power != power || power > double{std::numeric_limits<float>::max()}) return static_cast<float>(power);
  return without_denormals(cut(power, 23));
}

// ------------------------------------------------------------------------------------------------- in a running kernel

namespace {

struct LoadMatrix {
  uint32_t* registers;
  uint32_t address;
};

// Eight lanes give the rows of a matrix, lane 8i + r row r of matrix i; register i of a lane is its part of matrix i.
template <int matrices, bool transposed>
void load_of_a_warp(void* const* arguments, unsigned, Location at) {
  for (int i = 0; i < matrices; ++i) {
    uint16_t rows[8][8];
    for (int r = 0; r < 8; ++r) {
      const uint32_t address = static_cast<const LoadMatrix*>(arguments[8 * i + r])->address;
      const std::byte* row = shared_pointer(address, sizeof rows[r], 16, "ldmatrix", at);
      if (&owner(address, at) != &this_block()) {
        fail(Kind::out_of_bounds, at, "ldmatrix: row %d of matrix %d lies in another block's shared memory", r, i);
      }
      before_shared_read(address, sizeof rows[r], "ldmatrix", at);
      tsan::read(row, sizeof rows[r]);
      std::memcpy(rows[r], row, sizeof rows[r]);
      // Two elements at a time: one alone may be half of a 32-bit number, or padding that no product takes.
      for (int c = 0; c < 8 && allowed_nans() != NaNs::any; c += 2) {
        if (rows[r][c] == 0xFFFF && rows[r][c + 1] == 0xFFFF) {
          fail(Kind::not_written, at,
               "ldmatrix: nobody has written row %d, columns %d and %d of matrix %d (address %u)", r, c, c + 1, i,
               address);
        }
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      static_cast<LoadMatrix*>(arguments[lane])->registers[i] = matrix_register(rows, lane, transposed);
    }
  }
}

template <Element element>
void multiply_of_a_warp(void* const* arguments, unsigned, Location at) {
  MmaOperands lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = *static_cast<const MmaOperands*>(arguments[lane]);
  const FoundNaN nan = find_nan(element, lanes, allowed_nans());
  if (nan.found) {
    fail(Kind::not_a_number, at, "mma: %c[%d][%d], in lane %d, is NaN (register %08x)%s", nan.operand, nan.place.row,
         nan.place.column, nan.lane, nan.bits,
         allowed_nans() == NaNs::none ? "" : ", as memory that nobody has written");
  }
  multiply(element, lanes);
}

}  // namespace

NaNs& allowed_nans() {
  static NaNs allowed = NaNs::all_but_unwritten;
  return allowed;
}

void load_matrices(uint32_t* registers, int matrices, uint32_t shared_address, bool transposed, Location at) {
  struct Variant {
    const char* name;
    Combine combine;
  };
  static constexpr Variant kVariants[] = {
      {"ldmatrix.x1", load_of_a_warp<1, false>}, {"ldmatrix.x1.trans", load_of_a_warp<1, true>},
      {"ldmatrix.x2", load_of_a_warp<2, false>}, {"ldmatrix.x2.trans", load_of_a_warp<2, true>},
      {"ldmatrix.x4", load_of_a_warp<4, false>}, {"ldmatrix.x4.trans", load_of_a_warp<4, true>},
  };
  const Variant& variant = kVariants[matrices / 2 * 2 + transposed];
  LoadMatrix load{registers, shared_address};
  whole_warp_operation(variant.name, &load, variant.combine, at);
}

void warp_multiply(Element element, const MmaOperands& operands, Location at) {
  MmaOperands mine = operands;
  switch (element) {
    case Element::bf16:
      return whole_warp_operation("mma.bf16", &mine, multiply_of_a_warp<Element::bf16>, at);
    case Element::f16:
      return whole_warp_operation("mma.f16", &mine, multiply_of_a_warp<Element::f16>, at);
    case Element::tf32:
      return whole_warp_operation("mma.tf32", &mine, multiply_of_a_warp<Element::tf32>, at);
  }
}

}  // namespace stacked_lstm::emulator
