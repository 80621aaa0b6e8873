// tests/ptx/arithmetic.cpp: what every lane computes for itself: integers, floating point, comparisons, selections.
//
// Rounding is the ISA's where it says one. Approximations (.approx) are no better than the ISA promises, and the same
// functions as the emulator's: see tests/emulator/matrix.h.
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <limits>
#include <type_traits>

#include "../emulator/matrix.h"
#include "decoder.h"

namespace ptx {

namespace {

template <typename T>
using Unsigned = std::make_unsigned_t<T>;

// Wrapping arithmetic: overflow of signed numbers is defined in PTX.
template <typename T, typename F>
T wrapping(T a, T b, F f) {
  using W = std::conditional_t<(sizeof(T) < 4), uint32_t, Unsigned<T>>;
  return static_cast<T>(f(static_cast<W>(a), static_cast<W>(b)));
}

template <typename T>
T canonical(T x) {
  return x != x ? std::numeric_limits<T>::quiet_NaN() : x;
}

struct Add {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>)
      return a + b;
    else
      return wrapping(a, b, [](auto x, auto y) { return x + y; });
  }
};
struct Sub {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>)
      return a - b;
    else
      return wrapping(a, b, [](auto x, auto y) { return x - y; });
  }
};
struct Mul {  // the low half
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>)
      return a * b;
    else
      return wrapping(a, b, [](auto x, auto y) { return x * y; });
  }
};
struct MulHigh {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (sizeof(T) == 8) {
      using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
      return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> 64);
    } else {
      using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
      return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> (8 * sizeof(T)));
    }
  }
};
// Division by zero is undefined by the ISA; the machine stops there: see divide().
struct Div {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_signed_v<T>) {
      if (b == T(-1)) return wrapping(T(0), a, [](auto x, auto y) { return x - y; });
    }
    return static_cast<T>(a / b);
  }
};
struct Rem {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_signed_v<T>) {
      if (b == T(-1)) return 0;
    }
    return static_cast<T>(a % b);
  }
};
struct Min {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>) {
      if (a != a) return canonical(b);
      if (b != b) return a;
      if (a == b) return std::signbit(a) ? a : b;
    }
    return a < b ? a : b;
  }
};
struct Max {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>) {
      if (a != a) return canonical(b);
      if (b != b) return a;
      if (a == b) return std::signbit(a) ? b : a;
    }
    return a > b ? a : b;
  }
};
struct MinNaN {
  float operator()(float a, float b) const { return a != a || b != b ? std::nanf("") : Min()(a, b); }
};
struct MaxNaN {
  float operator()(float a, float b) const { return a != a || b != b ? std::nanf("") : Max()(a, b); }
};
struct And {
  template <typename T>
  T operator()(T a, T b) const {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <typename T>
  T operator()(T a, T b) const {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <typename T>
  T operator()(T a, T b) const {
    return static_cast<T>(a ^ b);
  }
};
struct Not {
  template <typename T>
  T operator()(T a) const {
    return static_cast<T>(~a);
  }
};
struct Neg {
  template <typename T>
  T operator()(T a) const {
    if constexpr (std::is_floating_point_v<T>)
      return -a;
    else
      return wrapping(T(0), a, [](auto x, auto y) { return x - y; });
  }
};
struct Abs {
  template <typename T>
  T operator()(T a) const {
    if constexpr (std::is_floating_point_v<T>)
      return std::fabs(a);
    else
      return a < 0 ? Neg()(a) : a;
  }
};
struct CopySign {  // the sign of a, the rest of b
  template <typename T>
  T operator()(T a, T b) const {
    return std::copysign(b, a);
  }
};
struct Fma {
  template <typename T>
  T operator()(T a, T b, T c) const {
    return std::fma(a, b, c);
  }
};
struct FmaDown {
  template <typename T>
  T operator()(T a, T b, T c) const {
    std::fesetround(FE_DOWNWARD);
    volatile T x = a, y = b, z = c;
    volatile T result = std::fma(x, y, z);
    std::fesetround(FE_TONEAREST);
    return result;
  }
};
struct Mad {
  template <typename T>
  T operator()(T a, T b, T c) const {
    return Add()(Mul()(a, b), c);
  }
};
struct DivideNear {
  template <typename T>
  T operator()(T a, T b) const {
    return a / b;
  }
};
// Two units in the last place for a divisor within 2^-126 ... 2^126; 0, or NaN of an infinity, beyond.
struct DivideApprox {
  float operator()(float a, float b) const {
    if (std::fabs(b) > 0x1p126f && !std::isinf(b)) {
      return std::isinf(a) || a != a ? std::nanf("")
                                     : std::copysign(0.0f, std::signbit(a) != std::signbit(b) ? -1.0f : 1.0f);
    }
    return a / b;
  }
};
struct ReciprocalNear {
  template <typename T>
  T operator()(T a) const {
    return 1 / a;
  }
};
struct ReciprocalApprox {
  float operator()(float a) const { return stacked_lstm::emulator::reciprocal_approx(a); }
};
// Of the upper 32 bits of a double, with 20 bits of mantissa; the lower 32 bits of the result are 0.
struct ReciprocalGross {
  double operator()(double a) const {
    constexpr uint64_t kUpper = 0xFFFFFFFF00000000u;
    uint64_t bits;
    std::memcpy(&bits, &a, 8);
    bits &= kUpper;
    std::memcpy(&a, &bits, 8);
    double result = 1 / (std::fabs(a) < 0x1p-1022 ? std::copysign(0.0, a) : a);
    std::memcpy(&bits, &result, 8);
    bits &= kUpper;
    std::memcpy(&result, &bits, 8);
    return std::fabs(result) < 0x1p-1022 ? std::copysign(0.0, result) : result;
  }
};
struct ExpTwoApprox {
  float operator()(float a) const { return stacked_lstm::emulator::exp2_approx(a); }
};
struct TanhApprox {
  float operator()(float a) const { return stacked_lstm::emulator::tanh_approx(a); }
};
struct SquareRoot {
  template <typename T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};

// Shifts by more than the width leave nothing (or the sign).
struct ShiftLeft {
  template <typename T>
  T operator()(T a, uint32_t n) const {
    return n >= 8 * sizeof(T) ? T(0) : static_cast<T>(static_cast<Unsigned<T>>(a) << n);
  }
};
struct ShiftRight {
  template <typename T>
  T operator()(T a, uint32_t n) const {
    constexpr uint32_t bits = 8 * sizeof(T);
    if (std::is_signed_v<T>) return static_cast<T>(a >> (n >= bits ? bits - 1 : n));
    return n >= bits ? T(0) : static_cast<T>(a >> n);
  }
};

// ---- over lanes

template <typename T, typename F>
void unary(Warp& w, const Instruction& i, uint32_t lanes) {
  T* d = w.out<T>(i.out[0]);
  const T* a = w.in<T>(i.in[0]);
  each(lanes, [&](int n) { d[n] = F()(a[n]); });
}
template <typename T, typename F>
void binary(Warp& w, const Instruction& i, uint32_t lanes) {
  T* d = w.out<T>(i.out[0]);
  const T *a = w.in<T>(i.in[0]), *b = w.in<T>(i.in[1]);
  each(lanes, [&](int n) { d[n] = F()(a[n], b[n]); });
}
template <typename T, typename F>
void ternary(Warp& w, const Instruction& i, uint32_t lanes) {
  T* d = w.out<T>(i.out[0]);
  const T *a = w.in<T>(i.in[0]), *b = w.in<T>(i.in[1]), *c = w.in<T>(i.in[2]);
  each(lanes, [&](int n) { d[n] = F()(a[n], b[n], c[n]); });
}
template <typename T, typename F>
void shift(Warp& w, const Instruction& i, uint32_t lanes) {
  T* d = w.out<T>(i.out[0]);
  const T* a = w.in<T>(i.in[0]);
  const uint32_t* b = w.in<uint32_t>(i.in[1]);
  each(lanes, [&](int n) { d[n] = F()(a[n], b[n]); });
}
template <typename T, typename F>
void divide(Warp& w, const Instruction& i, uint32_t lanes) {
  T* d = w.out<T>(i.out[0]);
  const T *a = w.in<T>(i.in[0]), *b = w.in<T>(i.in[1]);
  each(lanes, [&](int n) {
    if (b[n] == 0) fault(n, "a division by zero");
    d[n] = F()(a[n], b[n]);
  });
}
template <typename T, typename Wide>
void multiply_wide(Warp& w, const Instruction& i, uint32_t lanes) {
  Wide* d = w.out<Wide>(i.out[0]);
  const T *a = w.in<T>(i.in[0]), *b = w.in<T>(i.in[1]);
  const Wide* c = i.ins == 3 ? w.in<Wide>(i.in[2]) : nullptr;
  each(lanes, [&](int n) {
    const Wide product = static_cast<Wide>(static_cast<Wide>(a[n]) * static_cast<Wide>(b[n]));
    d[n] = c ? Add()(product, c[n]) : product;
  });
}

// ---- comparisons: `mode` is a Comparison, with unordered ones for floating point

enum Comparison : uint8_t { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };

template <typename T>
bool compare(Comparison comparison, T a, T b) {
  const bool unordered = a != a || b != b;
  switch (comparison) {
    case kEq:
      return a == b;
    case kNe:
      return a != b && !unordered;
    case kLt:
      return a < b;
    case kLe:
      return a <= b;
    case kGt:
      return a > b;
    case kGe:
      return a >= b;
    case kEqu:
      return a == b || unordered;
    case kNeu:
      return a != b;
    case kLtu:
      return a < b || unordered;
    case kLeu:
      return a <= b || unordered;
    case kGtu:
      return a > b || unordered;
    case kGeu:
      return a >= b || unordered;
    case kNum:
      return !unordered;
    case kNan:
      return unordered;
  }
  return false;
}

// `number`: 0, or how a predicate, the last source, joins in: 1 and, 2 or, 3 xor.
template <typename T>
void set_predicate(Warp& w, const Instruction& i, uint32_t lanes) {
  uint8_t* d = w.out<uint8_t>(i.out[0]);
  const T *a = w.in<T>(i.in[0]), *b = w.in<T>(i.in[1]);
  const uint8_t* c = i.number ? w.in<uint8_t>(i.in[2]) : nullptr;
  const auto comparison = static_cast<Comparison>(i.mode);
  each(lanes, [&](int n) {
    bool result = compare(comparison, a[n], b[n]);
    if (i.number == 1) result = result && c[n];
    if (i.number == 2) result = result || c[n];
    if (i.number == 3) result = result != (c[n] != 0);
    d[n] = result;
  });
}

template <typename T>
void select(Warp& w, const Instruction& i, uint32_t lanes) {
  T* d = w.out<T>(i.out[0]);
  const T *a = w.in<T>(i.in[0]), *b = w.in<T>(i.in[1]);
  const uint8_t* p = w.in<uint8_t>(i.in[2]);
  each(lanes, [&](int n) { d[n] = p[n] ? a[n] : b[n]; });
}

void not_predicate(Warp& w, const Instruction& i, uint32_t lanes) {
  uint8_t* d = w.out<uint8_t>(i.out[0]);
  const uint8_t* a = w.in<uint8_t>(i.in[0]);
  each(lanes, [&](int n) { d[n] = !a[n]; });
}

// ---- bits

template <typename T>
void insert(Warp& w, const Instruction& i, uint32_t lanes) {  // in: what, into what, at which bit, how many
  each(lanes, [&](int n) {
    const T a = w.in<T>(i.in[0])[n], b = w.in<T>(i.in[1])[n];
    const uint32_t at = w.in<uint32_t>(i.in[2])[n] & 0xFF, count = w.in<uint32_t>(i.in[3])[n] & 0xFF;
    T mask = 0;
    for (uint32_t bit = at; bit < at + count && bit < 8 * sizeof(T); ++bit) mask |= T(1) << bit;
    const T shifted = at < 8 * sizeof(T) ? static_cast<T>(a << at) : T(0);
    w.out<T>(i.out[0])[n] = static_cast<T>((b & ~mask) | (shifted & mask));
  });
}
template <typename T>
void extract(Warp& w, const Instruction& i, uint32_t lanes) {  // in: of what, from which bit, how many
  constexpr uint32_t kBits = 8 * sizeof(T);
  each(lanes, [&](int n) {
    const auto a = static_cast<Unsigned<T>>(w.in<T>(i.in[0])[n]);
    const uint32_t at = w.in<uint32_t>(i.in[1])[n] & 0xFF, count = w.in<uint32_t>(i.in[2])[n] & 0xFF;
    const uint32_t sign_at = std::min(at + count - 1, kBits - 1);
    const bool sign = std::is_signed_v<T> && count != 0 && (a >> sign_at & 1);
    Unsigned<T> result = 0;
    for (uint32_t bit = 0; bit < kBits; ++bit) {
      const bool set = bit < count && at + bit < kBits ? a >> (at + bit) & 1 : sign;
      if (set) result |= Unsigned<T>(1) << bit;
    }
    w.out<T>(i.out[0])[n] = static_cast<T>(result);
  });
}

void permute_bytes(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int n) {
    const uint64_t bytes = w.in<uint32_t>(i.in[0])[n] | static_cast<uint64_t>(w.in<uint32_t>(i.in[1])[n]) << 32;
    const uint32_t selector = w.in<uint32_t>(i.in[2])[n];
    uint32_t result = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t pick = selector >> (4 * k) & 0xF;
      auto byte = static_cast<uint32_t>(bytes >> (8 * (pick & 7)) & 0xFF);
      if (pick & 8) byte = byte & 0x80 ? 0xFF : 0;
      result |= byte << (8 * k);
    }
    w.out<uint32_t>(i.out[0])[n] = result;
  });
}

// A word of b:a, shifted as 64 bits. A distance that wraps is taken modulo 32, and one that is clamped is at most 32.
template <bool kLeft, bool kWraps>
void shift_funnel(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int n) {
    const uint64_t both = w.in<uint32_t>(i.in[0])[n] | static_cast<uint64_t>(w.in<uint32_t>(i.in[1])[n]) << 32;
    const uint32_t asked = w.in<uint32_t>(i.in[2])[n], distance = kWraps ? asked % 32 : std::min(asked, 32u);
    w.out<uint32_t>(i.out[0])[n] = static_cast<uint32_t>(both >> (kLeft ? 32 - distance : distance));
  });
}

// ---- decoding

// f(T()) for the C++ type of a PTX type.
template <typename F>
Execute with_integer(Decoder& d, Type type, F f) {
  if (type.is_signed()) {
    if (type.width == 16) return f(int16_t());
    if (type.width == 32) return f(int32_t());
    if (type.width == 64) return f(int64_t());
  } else if (type.is_integer()) {
    if (type.width == 16) return f(uint16_t());
    if (type.width == 32) return f(uint32_t());
    if (type.width == 64) return f(uint64_t());
  }
  d.fail("an integer type of 16, 32 or 64 bits expected");
}
template <typename F>
Execute with_number(Decoder& d, Type type, F f) {
  if (type.kind == Type::floating && type.width == 32) return f(float());
  if (type.kind == Type::floating && type.width == 64) return f(double());
  return with_integer(d, type, f);
}
template <typename F>
Execute with_float(Decoder& d, Type type, F f) {
  if (type.kind == Type::floating && type.width == 32) return f(float());
  if (type.kind == Type::floating && type.width == 64) return f(double());
  d.fail("f32 or f64 expected");
}

void sources(Decoder& d, Type type, size_t count) {
  d.no_more();
  d.count(count + 1);
  d.out(0, type.width);
  for (size_t n = 1; n <= count; ++n) {
    if (type.kind == Type::floating) {
      d.in_float(n, type.width);
    } else {
      d.in(n, type.width);
    }
  }
}

template <typename F>
bool two_numbers(Decoder& d) {
  d.take("rn");
  const Type type = d.type();
  sources(d, type, 2);
  d.executes(with_number(d, type, [](auto t) { return Execute{binary<decltype(t), F>}; }));
  return true;
}
template <typename F>
bool one_number(Decoder& d) {
  const Type type = d.type();
  sources(d, type, 1);
  d.executes(with_number(d, type, [](auto t) { return Execute{unary<decltype(t), F>}; }));
  return true;
}
template <typename F>
bool bitwise(Decoder& d) {
  const Type type = d.type();
  if (type.kind == Type::predicate) {
    sources(d, type, 2);
    d.executes(binary<uint8_t, F>);
    return true;
  }
  if (type.kind != Type::bits) d.fail("a type without sign expected");
  sources(d, type, 2);
  d.executes(with_integer(d, type, [](auto t) { return Execute{binary<decltype(t), F>}; }));
  return true;
}
template <typename F>
bool quotient(Decoder& d) {
  const Type type = d.integer();
  sources(d, type, 2);
  d.executes(with_integer(d, type, [](auto t) { return Execute{divide<decltype(t), F>}; }));
  return true;
}
template <typename F>
bool shifted(Decoder& d) {
  const Type type = d.integer();
  d.no_more();
  d.count(3);
  d.out(0, type.width);
  d.in(1, type.width);
  d.in(2, 32);
  d.executes(with_integer(d, type, [](auto t) { return Execute{shift<decltype(t), F>}; }));
  return true;
}

// mul.lo, mul.hi, mul.wide; mad.lo, mad.wide; mul of floating point.
bool multiplication(Decoder& d) {
  const bool adds = d.is("mad");
  if (d.take("wide")) {
    const Type type = d.integer();
    d.no_more();
    d.count(adds ? 4 : 3);
    d.out(0, 2 * type.width);
    d.in(1, type.width);
    d.in(2, type.width);
    if (adds) d.in(3, 2 * type.width);
    if (type.width == 16) {
      d.executes(type.is_signed() ? Execute{multiply_wide<int16_t, int32_t>}
                                  : Execute{multiply_wide<uint16_t, uint32_t>});
    } else if (type.width == 32) {
      d.executes(type.is_signed() ? Execute{multiply_wide<int32_t, int64_t>}
                                  : Execute{multiply_wide<uint32_t, uint64_t>});
    } else {
      d.fail("16 or 32 bits expected");
    }
    return true;
  }
  if (d.take("hi")) {
    if (adds) d.fail("mad.hi is not known");
    const Type type = d.integer();
    sources(d, type, 2);
    d.executes(with_integer(d, type, [](auto t) { return Execute{binary<decltype(t), MulHigh>}; }));
    return true;
  }
  if (d.take("lo")) {
    const Type type = d.integer();
    sources(d, type, adds ? 3 : 2);
    d.executes(with_integer(d, type, [&](auto t) {
      return adds ? Execute{ternary<decltype(t), Mad>} : Execute{binary<decltype(t), Mul>};
    }));
    return true;
  }
  if (adds) d.fail("mad of floating point is not known");
  d.take("rn");
  const Type type = d.type();
  sources(d, type, 2);
  d.executes(with_float(d, type, [](auto t) { return Execute{binary<decltype(t), Mul>}; }));
  return true;
}

bool fused(Decoder& d) {
  const bool down = d.take("rm");
  if (!down) d.need("rn");
  const Type type = d.type();
  sources(d, type, 3);
  d.executes(with_float(d, type, [&](auto t) {
    return down ? Execute{ternary<decltype(t), FmaDown>} : Execute{ternary<decltype(t), Fma>};
  }));
  return true;
}

bool division(Decoder& d) {
  if (d.take("approx")) {
    const Type type = d.type();
    if (type.kind != Type::floating || type.width != 32) d.fail("f32 expected");
    sources(d, type, 2);
    d.executes(binary<float, DivideApprox>);
    return true;
  }
  if (d.take("rn")) {
    const Type type = d.type();
    sources(d, type, 2);
    d.executes(with_float(d, type, [](auto t) { return Execute{binary<decltype(t), DivideNear>}; }));
    return true;
  }
  return quotient<Div>(d);
}

bool reciprocal(Decoder& d) {
  if (d.take("rn")) {
    const Type type = d.type();
    sources(d, type, 1);
    d.executes(with_float(d, type, [](auto t) { return Execute{unary<decltype(t), ReciprocalNear>}; }));
    return true;
  }
  d.need("approx");
  d.need("ftz");
  const Type type = d.type();
  sources(d, type, 1);
  d.executes(with_float(d, type, [](auto t) {
    using T = decltype(t);
    if constexpr (std::is_same_v<T, float>)
      return Execute{unary<T, ReciprocalApprox>};
    else
      return Execute{unary<T, ReciprocalGross>};
  }));
  return true;
}

template <typename F>
bool approximation(Decoder& d, bool flushes) {
  d.need("approx");
  if (flushes) d.need("ftz");
  const Type type = d.type();
  if (type.kind != Type::floating || type.width != 32) d.fail("f32 expected");
  sources(d, type, 1);
  d.executes(unary<float, F>);
  return true;
}

template <typename F, typename WithNaN>
bool lesser(Decoder& d) {
  if (d.take("NaN")) {
    const Type type = d.type();
    if (type.kind != Type::floating || type.width != 32) d.fail("f32 expected");
    sources(d, type, 2);
    d.executes(binary<float, WithNaN>);
    return true;
  }
  return two_numbers<F>(d);
}

bool comparison(Decoder& d) {
  static const std::pair<const char*, Comparison> known[] = {
      {"eq", kEq},   {"ne", kNe},   {"lt", kLt},   {"le", kLe},   {"gt", kGt},   {"ge", kGe},   {"equ", kEqu},
      {"neu", kNeu}, {"ltu", kLtu}, {"leu", kLeu}, {"gtu", kGtu}, {"geu", kGeu}, {"num", kNum}, {"nan", kNan}};
  d.instruction().mode = d.one_of(known, "a comparison expected");
  const char* joins[] = {"and", "or", "xor"};
  for (uint32_t n = 0; n < 3; ++n) {
    if (d.take(joins[n])) d.instruction().number = n + 1;
  }
  const Type type = d.type();
  if (type.kind != Type::floating && d.instruction().mode >= kEqu) d.fail("an unordered comparison of integers");
  d.no_more();
  d.count(d.instruction().number ? 4 : 3);
  d.out(0, 1);
  for (size_t n = 1; n <= 2; ++n) type.kind == Type::floating ? d.in_float(n, type.width) : d.in(n, type.width);
  if (d.instruction().number) d.in(3, 1);
  d.executes(with_number(d, type, [](auto t) { return Execute{set_predicate<decltype(t)>}; }));
  return true;
}

bool selection(Decoder& d) {
  const Type type = d.type();
  d.no_more();
  d.count(4);
  d.out(0, type.width);
  for (size_t n = 1; n <= 2; ++n) type.kind == Type::floating ? d.in_float(n, type.width) : d.in(n, type.width);
  d.in(3, 1);
  d.executes(type.width == 16   ? Execute{select<uint16_t>}
             : type.width == 32 ? Execute{select<uint32_t>}
                                : Execute{select<uint64_t>});
  return true;
}

bool negation(Decoder& d) {
  const Type type = d.type();
  if (type.kind == Type::predicate) {
    sources(d, type, 1);
    d.executes(not_predicate);
    return true;
  }
  if (type.kind != Type::bits) d.fail("a type without sign expected");
  sources(d, type, 1);
  d.executes(with_integer(d, type, [](auto t) { return Execute{unary<decltype(t), Not>}; }));
  return true;
}

bool field(Decoder& d) {
  const bool inserts = d.is("bfi");
  const Type type = d.integer();
  if (type.width < 32) d.fail("32 or 64 bits expected");
  d.no_more();
  d.count(inserts ? 5 : 4);
  d.out(0, type.width);
  d.in(1, type.width);
  if (inserts) d.in(2, type.width);
  d.in(inserts ? 3 : 2, 32);
  d.in(inserts ? 4 : 3, 32);
  d.executes(with_integer(d, type, [&](auto t) {
    using T = decltype(t);
    return inserts ? Execute{insert<Unsigned<T>>} : Execute{extract<T>};
  }));
  return true;
}

bool byte_permutation(Decoder& d) {
  if (d.type().width != 32) d.fail("b32 expected");
  d.no_more();
  d.count(4);
  d.out(0, 32);
  for (size_t n = 1; n <= 3; ++n) d.in(n, 32);
  d.executes(permute_bytes);
  return true;
}

bool funnel_shift(Decoder& d) {
  const std::pair<const char*, bool> directions[] = {{"l", true}, {"r", false}};
  const std::pair<const char*, bool> ends[] = {{"wrap", true}, {"clamp", false}};
  const bool left = d.one_of(directions, "l or r expected"), wraps = d.one_of(ends, "wrap or clamp expected");
  if (d.type().width != 32) d.fail("b32 expected");
  d.no_more();
  d.count(4);
  d.out(0, 32);
  for (size_t n = 1; n <= 3; ++n) d.in(n, 32);
  d.executes(left ? (wraps ? shift_funnel<true, true> : shift_funnel<true, false>)
                  : (wraps ? shift_funnel<false, true> : shift_funnel<false, false>));
  return true;
}

bool sign_copy(Decoder& d) {
  const Type type = d.type();
  sources(d, type, 2);
  d.executes(with_float(d, type, [](auto t) { return Execute{binary<decltype(t), CopySign>}; }));
  return true;
}

bool root(Decoder& d) {
  d.need("rn");
  const Type type = d.type();
  sources(d, type, 1);
  d.executes(with_float(d, type, [](auto t) { return Execute{unary<decltype(t), SquareRoot>}; }));
  return true;
}

}  // namespace

bool decode_arithmetic(Decoder& d) {
  if (d.is("add")) return two_numbers<Add>(d);
  if (d.is("sub")) return two_numbers<Sub>(d);
  if (d.is("mul") || d.is("mad")) return multiplication(d);
  if (d.is("fma")) return fused(d);
  if (d.is("div")) return division(d);
  if (d.is("rem")) return quotient<Rem>(d);
  if (d.is("rcp")) return reciprocal(d);
  if (d.is("sqrt")) return root(d);
  if (d.is("min")) return lesser<Min, MinNaN>(d);
  if (d.is("max")) return lesser<Max, MaxNaN>(d);
  if (d.is("abs")) return one_number<Abs>(d);
  if (d.is("neg")) return one_number<Neg>(d);
  if (d.is("copysign")) return sign_copy(d);
  if (d.is("ex2")) return approximation<ExpTwoApprox>(d, true);
  if (d.is("tanh")) return approximation<TanhApprox>(d, false);
  if (d.is("and")) return bitwise<And>(d);
  if (d.is("or")) return bitwise<Or>(d);
  if (d.is("xor")) return bitwise<Xor>(d);
  if (d.is("not")) return negation(d);
  if (d.is("shl")) return shifted<ShiftLeft>(d);
  if (d.is("shr")) return shifted<ShiftRight>(d);
  if (d.is("setp")) return comparison(d);
  if (d.is("selp")) return selection(d);
  if (d.is("bfi") || d.is("bfe")) return field(d);
  if (d.is("prmt")) return byte_permutation(d);
  if (d.is("shf")) return funnel_shift(d);
  return false;
}

}  // namespace ptx
