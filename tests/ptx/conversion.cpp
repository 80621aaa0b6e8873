// tests/ptx/conversion.cpp: cvt, between integers, floating point and the formats of 16 bits.
#include <cmath>
#include <limits>

#include "decoder.h"

namespace ptx {

namespace {

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// To the nearest, ties to even, of a format with `exponent_bits` and `mantissa_bits`; a NaN becomes the canonical one.
uint16_t narrow(float x, int exponent_bits, int mantissa_bits) {
  const auto sign = static_cast<uint16_t>(bits_of(x) >> 16 & 0x8000u);
  if (x != x) return 0x7FFF;
  const int bias = (1 << (exponent_bits - 1)) - 1, least = 1 - bias;
  const double magnitude = std::fabs(double{x});
  if (magnitude == 0) return sign;
  const auto infinity = static_cast<uint16_t>(((1 << exponent_bits) - 1) << mantissa_bits);
  if (std::isinf(magnitude)) return sign | infinity;
  int exponent = std::max(std::ilogb(magnitude), least);
  // In units of the last place; nearbyint rounds ties to even.
  auto units = static_cast<int64_t>(std::nearbyint(std::ldexp(magnitude, mantissa_bits - exponent)));
  if (units == int64_t{2} << mantissa_bits) units >>= 1, ++exponent;
  if (exponent > bias) return sign | infinity;
  if (units < int64_t{1} << mantissa_bits) return static_cast<uint16_t>(sign | units);  // denormal, or zero
  return static_cast<uint16_t>(sign | (exponent + bias) << mantissa_bits | (units - (int64_t{1} << mantissa_bits)));
}

float widen_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 0x1F, mantissa = half & 0x3FF;
  if (exponent == 0x1F) return float_of(sign | 0x7F800000u | mantissa << 13);
  if (exponent == 0) return float_of(sign | bits_of(std::ldexp(static_cast<float>(mantissa), -24)));
  return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

// The nearest TF32, ties away from zero; the lower 13 bits become zeros.
uint32_t nearest_tensor_float(uint32_t bits) {
  if ((bits & 0x7F800000u) == 0x7F800000u) return bits & 0x7FFFFFu ? 0x7FFFFFFFu : bits;
  return (bits + 0x1000u) & ~0x1FFFu;
}

template <typename To, typename From>
void convert_integer(Warp& w, const Instruction& i, uint32_t lanes) {
  To* d = w.out<To>(i.out[0]);
  const From* a = w.in<From>(i.in[0]);
  each(lanes, [&](int n) { d[n] = static_cast<To>(a[n]); });
}

// Where a register is wider than the type: its lower bits; and in the destination extended as the type says.
void convert_wider_integer(Warp& w, const Instruction& i, uint32_t lanes) {
  const unsigned from_bits = i.element_bytes * 8u, to_bits = i.number & 0xFF;
  const bool from_signed = i.is_signed, to_signed = i.mode != 0;
  each(lanes, [&](int n) {
    uint64_t value = 0;
    std::memcpy(&value, w.in<char>(i.in[0]) + n * i.in[0].bytes, i.in[0].bytes);
    const auto extend = [&](unsigned bits, bool is_signed) {
      if (bits == 64) return;
      value &= (uint64_t{1} << bits) - 1;
      if (is_signed && value >> (bits - 1)) value |= ~uint64_t{0} << bits;
    };
    extend(from_bits, from_signed);
    extend(to_bits, to_signed);
    std::memcpy(w.out<char>(i.out[0]) + n * i.out[0].bytes, &value, i.out[0].bytes);
  });
}

enum Rounding : uint8_t { kExact, kNearest, kNearestInteger, kZeroInteger, kDownInteger, kUpInteger };

template <typename T>
T to_integer(Rounding rounding, T x) {
  switch (rounding) {
    case kNearestInteger:
      return std::nearbyint(x);
    case kZeroInteger:
      return std::trunc(x);
    case kDownInteger:
      return std::floor(x);
    case kUpInteger:
      return std::ceil(x);
    default:
      return x;
  }
}

// Between formats of floating point. `number` 1: saturated to 0 … 1, NaN to 0.
template <typename To, typename From>
void convert_float(Warp& w, const Instruction& i, uint32_t lanes) {
  To* d = w.out<To>(i.out[0]);
  const From* a = w.in<From>(i.in[0]);
  const auto rounding = static_cast<Rounding>(i.mode);
  each(lanes, [&](int n) {
    auto x = static_cast<To>(to_integer(rounding, a[n]));
    if (i.number == 1) x = x > 0 ? std::min(x, To(1)) : To(0);
    d[n] = x;
  });
}
template <typename To, typename From>
void float_of_integer(Warp& w, const Instruction& i, uint32_t lanes) {
  To* d = w.out<To>(i.out[0]);
  const From* a = w.in<From>(i.in[0]);
  each(lanes, [&](int n) { d[n] = static_cast<To>(a[n]); });
}
// Clamped to what the integer can hold; NaN is 0 (of 32 bits and less).
template <typename To, typename From>
void integer_of_float(Warp& w, const Instruction& i, uint32_t lanes) {
  To* d = w.out<To>(i.out[0]);
  const From* a = w.in<From>(i.in[0]);
  const auto rounding = static_cast<Rounding>(i.mode);
  each(lanes, [&](int n) {
    const auto x = static_cast<long double>(to_integer(rounding, a[n]));
    const long double least = std::numeric_limits<To>::min(), most = std::numeric_limits<To>::max();
    d[n] = x != x ? To(0) : static_cast<To>(std::min(std::max(x, least), most));
  });
}

void half_of_float(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int n) { w.out<uint16_t>(i.out[0])[n] = narrow(w.in<float>(i.in[0])[n], 5, 10); });
}
void bfloat_of_float(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int n) { w.out<uint16_t>(i.out[0])[n] = narrow(w.in<float>(i.in[0])[n], 8, 7); });
}
void float_of_half(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int n) { w.out<float>(i.out[0])[n] = widen_half(w.in<uint16_t>(i.in[0])[n]); });
}
void float_of_bfloat(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int n) { w.out<float>(i.out[0])[n] = float_of(uint32_t{w.in<uint16_t>(i.in[0])[n]} << 16); });
}
void tensor_float_of_float(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int n) { w.out<uint32_t>(i.out[0])[n] = nearest_tensor_float(w.in<uint32_t>(i.in[0])[n]); });
}

template <typename F>
Execute with_integer(Decoder& d, Type type, F f) {
  if (type.width == 16) return type.is_signed() ? f(int16_t()) : f(uint16_t());
  if (type.width == 32) return type.is_signed() ? f(int32_t()) : f(uint32_t());
  if (type.width == 64) return type.is_signed() ? f(int64_t()) : f(uint64_t());
  d.fail("an integer of 16, 32 or 64 bits expected");
}

bool between_integers(Decoder& d, Type to, Type from) {
  d.out(0, to.width, true);
  d.in(1, from.width, true);
  Instruction& i = d.instruction();
  if (i.out[0].bytes == to.bytes() && i.in[0].bytes == from.bytes() && to.width >= 16 && from.width >= 16) {
    d.executes(with_integer(d, to, [&](auto t) {
      return with_integer(d, from, [&](auto f) { return Execute{convert_integer<decltype(t), decltype(f)>}; });
    }));
  } else {
    i.element_bytes = static_cast<uint8_t>(from.bytes());
    i.is_signed = from.is_signed();
    i.number = to.width;
    i.mode = to.is_signed();
    d.executes(convert_wider_integer);
  }
  return true;
}

}  // namespace

bool decode_conversion(Decoder& d) {
  if (!d.is("cvt")) return false;
  static const std::pair<const char*, Rounding> roundings[] = {
      {"rn", kNearest}, {"rni", kNearestInteger}, {"rzi", kZeroInteger}, {"rmi", kDownInteger}, {"rpi", kUpInteger}};
  Rounding rounding = kExact;
  for (const auto& [name, which] : roundings) {
    if (d.take(name)) rounding = which;
  }
  const bool away = d.take("rna"), saturates = d.take("sat");
  const Type to = d.type(), from = d.type();
  d.no_more();
  d.count(2);
  Instruction& i = d.instruction();
  i.mode = rounding;
  if (away || to.kind == Type::tensor_float) {
    if (!away || to.kind != Type::tensor_float || from.kind != Type::floating || from.width != 32 || saturates) {
      d.fail("cvt.rna.tf32.f32 expected");
    }
    d.out(0, 32);
    d.in(1, 32);
    d.executes(tensor_float_of_float);
    return true;
  }
  if (to.kind == Type::bits || from.kind == Type::bits || to.kind == Type::predicate || from.kind == Type::predicate) {
    d.fail("types of numbers expected");
  }
  const bool to_float = !to.is_integer(), from_float = !from.is_integer();
  if (!to_float && !from_float) {
    if (rounding != kExact || saturates) d.fail("integers are not rounded");
    return between_integers(d, to, from);
  }
  if (saturates && !(to_float && from_float)) d.fail(".sat between formats of floating point expected");
  d.out(0, to.width);
  d.in(1, from.width);
  i.number = saturates;
  if (to.width == 16 || from.width == 16) {
    if (!to_float || !from_float || to.width == from.width || saturates) d.fail("between f32 and 16 bits expected");
    if ((to.width == 16) != (rounding == kNearest) || (to.width == 32 && rounding != kExact))
      d.fail(".rn where bits are lost");
    if (to.width == 16) {
      d.executes(to.kind == Type::bfloat ? bfloat_of_float : half_of_float);
    } else {
      d.executes(from.kind == Type::bfloat ? float_of_bfloat : float_of_half);
    }
    return true;
  }
  if (to_float && from_float) {
    const bool loses = to.width < from.width;
    if (loses && rounding == kExact) d.fail("a rounding expected");
    if (to.width > from.width && rounding != kExact) d.fail("nothing to round");
    d.executes(
        to.width == 32
            ? (from.width == 32 ? Execute{convert_float<float, float>} : Execute{convert_float<float, double>})
            : (from.width == 32 ? Execute{convert_float<double, float>} : Execute{convert_float<double, double>}));
  } else if (to_float) {
    if (rounding != kNearest) d.fail(".rn expected");
    d.executes(with_integer(d, from, [&](auto f) {
      using From = decltype(f);
      return to.width == 32 ? Execute{float_of_integer<float, From>} : Execute{float_of_integer<double, From>};
    }));
  } else {
    if (rounding < kNearestInteger) d.fail("a rounding to an integer expected");
    d.executes(with_integer(d, to, [&](auto t) {
      using To = decltype(t);
      return from.width == 32 ? Execute{integer_of_float<To, float>} : Execute{integer_of_float<To, double>};
    }));
  }
  return true;
}

}  // namespace ptx
