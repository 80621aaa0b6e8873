// tests/ptx/matrix.cpp: mma and ldmatrix, by the tables of the PTX ISA ("Matrix fragments for mma.m16n8k16 with floating point
// type", "... for mma.m16n8k8", "ldmatrix"). How the sums inside an mma are rounded is open there: see MmaSums.
#include <cmath>
#include <limits>

#include "decoder.h"

namespace ptx {

namespace {

enum Element : uint8_t { kBf16, kF16, kTf32 };

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The element `part` of a register.
float element_of(Element element, uint32_t word, int part) {
  if (element == kTf32) return float_of(word & ~0x1FFFu);  // the lower 13 bits do not count
  const uint32_t half = part ? word >> 16 : word & 0xFFFF;
  if (element == kBf16) return float_of(half << 16);
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 0x1F, mantissa = half & 0x3FF;
  if (exponent == 0x1F) return float_of(sign | 0x7F800000u | mantissa << 13);
  const float magnitude =
      exponent ? float_of((exponent + 112) << 23 | mantissa << 13) : std::ldexp(static_cast<float>(mantissa), -24);
  return sign ? -magnitude : magnitude;
}

constexpr int kKeptBits = 25;       // of a term that is aligned with the largest one
constexpr int kProductsAtOnce = 8;  // of two 16-bit elements; half as many of TF32

// 2^exponent, of a double that is no denormal.
double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(1023 + exponent) << 52;
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}

// `count` products and the accumulator, as a tensor core adds them: aligned with the largest term, cut, and the sum cut to
// float. Terms that are not finite, or all so small that a unit would be no normal number: a plain sum.
float truncated_sum(const float* a, const float* b, int count, float accumulator) {
  float largest = std::fabs(accumulator);
  bool finite = std::isfinite(accumulator);
  float products[kProductsAtOnce];  // exact: no operand has more than 11 significant bits
  for (int k = 0; k < count; ++k) {
    products[k] = a[k] * b[k];
    finite &= std::isfinite(products[k]);
    largest = std::max(largest, std::fabs(products[k]));
  }
  // A unit is 2^-(kKeptBits - 1) of the power of two that begins the largest term.
  const int exponent = largest < 0x1p-126f ? -200 : std::ilogb(largest) - (kKeptBits - 1);
  if (!finite || exponent < std::numeric_limits<float>::min_exponent) {
    float sum = accumulator;
    for (int k = 0; k < count; ++k) sum += products[k];
    return sum;
  }
  const double units_in_one = power_of_two(-exponent);
  auto units = static_cast<int64_t>(accumulator * units_in_one);  // cut towards zero
  for (int k = 0; k < count; ++k) units += static_cast<int64_t>(products[k] * units_in_one);
  int64_t magnitude = std::abs(units);
  for (int bit = 24; magnitude >> bit; ++bit) magnitude &= ~int64_t{0} << (bit - 23);  // 24 bits are left
  return static_cast<float>(static_cast<double>(units < 0 ? -magnitude : magnitude) * power_of_two(exponent));
}

// Once rounded: the products are exact in double, and so is their sum to far more bits than a float has.
float nearest_sum(const float* a, const float* b, int count, float accumulator) {
  double sum = accumulator;
  for (int k = 0; k < count; ++k) sum += double{a[k]} * double{b[k]};
  return static_cast<float>(sum);
}

// in: four registers of a, two of b, four of c. out: four of d.
void multiply(Warp& w, const Instruction& i, uint32_t) {
  const auto element = static_cast<Element>(i.mode);
  const int depth = element == kTf32 ? 8 : 16, parts = element == kTf32 ? 1 : 2;
  float a[16][16], b[8][16], d[16][8];  // b by columns
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, in_group = lane % 4;
    for (int part = 0; part < parts; ++part) {
      for (int n = 0; n < 4; ++n) {
        const int row = group + n % 2 * 8, column = parts * in_group + part + n / 2 * (depth / 2);
        a[row][column] = element_of(element, w.in<uint32_t>(i.in[static_cast<size_t>(n)])[lane], part);
      }
      for (int n = 0; n < 2; ++n) {
        const int row = parts * in_group + part + n * (depth / 2);
        b[group][row] = element_of(element, w.in<uint32_t>(i.in[4 + static_cast<size_t>(n)])[lane], part);
      }
    }
    for (int n = 0; n < 4; ++n)
      d[group + n / 2 * 8][in_group * 2 + n % 2] = w.in<float>(i.in[6 + static_cast<size_t>(n)])[lane];
  }
  const bool truncates = w.machine().options.mma_sums == MmaSums::truncated;
  const int at_once = truncates ? kProductsAtOnce * parts / 2 : depth;
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float& sum = d[row][column];
      for (int k = 0; k < depth; k += at_once) {
        sum = truncates ? truncated_sum(&a[row][k], &b[column][k], at_once, sum)
                        : nearest_sum(&a[row][k], &b[column][k], at_once, sum);
      }
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int n = 0; n < 4; ++n)
      w.out<float>(i.out[static_cast<size_t>(n)])[lane] = d[lane / 4 + n / 2 * 8][lane % 4 * 2 + n % 2];
  }
}

bool decode_multiplication(Decoder& d) {
  d.need("sync");
  d.need("aligned");
  const bool tensor_float = d.take("m16n8k8");
  if (!tensor_float) d.need("m16n8k16");
  d.need("row");
  d.need("col");
  d.need("f32");
  const Type a = d.type(), b = d.type();
  d.need("f32");
  d.no_more();
  if (a.kind != b.kind || a.width != b.width) d.fail("a and b of one type expected");
  Instruction& i = d.instruction();
  if (tensor_float && a.kind == Type::tensor_float) {
    i.mode = kTf32;
  } else if (!tensor_float && a.kind == Type::bfloat) {
    i.mode = kBf16;
  } else if (!tensor_float && a.kind == Type::floating && a.width == 16) {
    i.mode = kF16;
  } else {
    d.fail("m16n8k16 of bf16 or f16, or m16n8k8 of tf32, expected");
  }
  d.count(4);
  d.out_group(0, 4, 32);
  d.in_group(1, 4, 32);
  d.in_group(2, 2, 32);
  d.in_group(3, 4, 32);
  d.instruction().spread = Spread::sums;
  d.executes(multiply, Flow::aligned);
  return true;
}

// Lanes 8n … 8n + 7 say where the rows of matrix n are; each lane gets two neighbours of one row of every matrix.
void load_matrices(Warp& w, const Instruction& i, uint32_t) {
  for (int n = 0; n < i.elements; ++n) {
    const uint8_t* rows[8];
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * n + row;
      const uint32_t address = w.in<uint32_t>(i.in[0])[lane] + static_cast<uint32_t>(i.offset);
      rows[row] = w.machine().shared(w, lane, address, 16, false, true);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      uint16_t pair[2];
      for (int k = 0; k < 2; ++k) {
        const int row = i.mode ? lane % 4 * 2 + k : lane / 4, column = i.mode ? lane / 4 : lane % 4 * 2 + k;
        std::memcpy(&pair[k], rows[row] + 2 * column, 2);
      }
      w.out<uint32_t>(i.out[static_cast<size_t>(n)])[lane] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
}

bool decode_matrix_load(Decoder& d) {
  d.need("sync");
  d.need("aligned");
  d.need("m8n8");
  Instruction& i = d.instruction();
  i.elements = d.take("x4") ? 4 : d.take("x2") ? 2 : 1;
  if (i.elements == 1) d.need("x1");
  i.mode = d.take("trans");
  if (!d.take("shared") && !d.take("shared::cta")) d.fail("shared memory expected");
  if (d.type().width != 16) d.fail("b16 expected");
  d.no_more();
  d.count(2);
  d.out_group(0, i.elements, 32);
  d.address(1, Space::shared_cta);
  d.executes(load_matrices, Flow::aligned);
  return true;
}

}  // namespace

bool decode_matrix(Decoder& d) {
  if (d.is("mma")) return decode_multiplication(d);
  if (d.is("ldmatrix")) return decode_matrix_load(d);
  return false;
}

}  // namespace ptx
