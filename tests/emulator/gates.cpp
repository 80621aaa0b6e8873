// tests/emulator/gates.cpp: the kernels of csrc/cuda/gates.cu, on the host, against the equations written a second time.
//
//   gates [--order forward|reverse|random|priorities] [--seed n] [--quick] [--host] [--stop] [--unjudged] [part …]
//
// The truth is computed in long double, and every number of it carries a bound of what rounding can have done to it in
// the kernel's arithmetic (Bounded). A result has to lie between the bounds, both rounded to what the tensor holds; none
// of gates.h, elements.h, cell.h, number.h and philox.h is used for it.
//
// Every buffer has forbidden zones: before it, behind it, and in each row from the width to the stride. There, inputs
// hold a signalling NaN, and outputs hold another one everywhere: what is read from a zone shows in the results, what is
// written to one is found, and so is what was not written. AddressSanitizer is told of the zones.
//
// --host tests the loops of gates_host.cpp instead. --quick leaves out the larger sizes, for the sanitizers.
// --stop ends the program at the first failure. --unjudged looks at no result.
#include <malloc.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cuda/gates.h"
#include "lend.h"

// AddressSanitizer's, where the kernels are instrumented. This file never is.
extern "C" {
[[gnu::weak]] void __asan_poison_memory_region(const volatile void*, size_t);
[[gnu::weak]] void __asan_unpoison_memory_region(const volatile void*, size_t);
}

using namespace stacked_lstm;

namespace {

using Real = long double;

// ---- The report -----------------------------------------------------------------------------------------------------

int64_t checks = 0, failures = 0;
bool stop_at_first = false;

void expect(bool fine, const std::string& what) {
  ++checks;
  if (fine) return;
  if (++failures <= 20) std::printf("FAILED %s\n", what.c_str());
  if (failures == 20) std::printf("further failures are only counted\n");
  if (stop_at_first) std::exit(1);
}

std::string text(Real x) {
  char digits[48];
  std::snprintf(digits, sizeof digits, "%.12Lg", x);
  return digits;
}

// ---- Numbers --------------------------------------------------------------------------------------------------------

template <size_t kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<8> {
  using type = uint64_t;
};
template <typename T>
using Word = typename WordOf<sizeof(T)>::type;

template <typename T>
struct Format;
template <>
struct Format<float> {
  static constexpr const char* name = "float32";
  static constexpr int exponent_bits = 8, fraction_bits = 23;
};
template <>
struct Format<double> {
  static constexpr const char* name = "float64";
  static constexpr int exponent_bits = 11, fraction_bits = 52;
};
template <>
struct Format<bfloat16> {
  static constexpr const char* name = "bfloat16";
  static constexpr int exponent_bits = 8, fraction_bits = 7;
};
template <>
struct Format<float16> {
  static constexpr const char* name = "float16";
  static constexpr int exponent_bits = 5, fraction_bits = 10;
};

// Signalling NaNs: the exponent all ones, the first bit of the fraction 0, and a pattern that no arithmetic makes.
template <typename T>
constexpr Word<T> signalling(Word<T> pattern) {
  constexpr int fraction = Format<T>::fraction_bits;
  const Word<T> exponent = static_cast<Word<T>>((Word<T>{1} << Format<T>::exponent_bits) - 1) << fraction;
  return exponent | (pattern & ((Word<T>{1} << (fraction - 1)) - 1));
}
template <typename T>
constexpr Word<T> kForbidden = signalling<T>(static_cast<Word<T>>(0x2525252525252525u));  // beside inputs
template <typename T>
constexpr Word<T> kUnwritten = signalling<T>(static_cast<Word<T>>(0x1313131313131313u));  // in and beside outputs

// What the format's definition says these bits are.
template <typename T>
Real decode(uint64_t bits) {
  constexpr int fraction_bits = Format<T>::fraction_bits, exponent_bits = Format<T>::exponent_bits;
  constexpr int bias = (1 << (exponent_bits - 1)) - 1, all_ones = (1 << exponent_bits) - 1;
  const uint64_t fraction = bits & ((uint64_t{1} << fraction_bits) - 1);
  const int exponent = static_cast<int>(bits >> fraction_bits & all_ones);
  const bool negative = bits >> (fraction_bits + exponent_bits) & 1;
  Real magnitude;
  if (exponent == all_ones) {
    magnitude = fraction ? std::numeric_limits<Real>::quiet_NaN() : std::numeric_limits<Real>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<Real>(fraction), 1 - bias - fraction_bits);
  } else {
    magnitude =
        std::ldexp(static_cast<Real>(fraction + (uint64_t{1} << fraction_bits)), exponent - bias - fraction_bits);
  }
  return negative ? -magnitude : magnitude;
}

Real real(float x) { return x; }
Real real(double x) { return x; }
Real real(bfloat16 x) {
  static const std::vector<Real> table = [] {
    std::vector<Real> all;
    for (uint32_t bits = 0; bits < 65536; ++bits) all.push_back(decode<bfloat16>(bits));
    return all;
  }();
  return table[x.bits];
}
Real real(float16 x) {
  static const std::vector<Real> table = [] {
    std::vector<Real> all;
    for (uint32_t bits = 0; bits < 65536; ++bits) all.push_back(decode<float16>(bits));
    return all;
  }();
  return table[x.bits];
}

// The nearest number of T, ties to even. For the 16-bit types it is looked for among all of them.
template <typename T>
T nearest(Real x) {
  if constexpr (sizeof(T) > 2) {
    return static_cast<T>(x);
  } else {
    const uint16_t infinity = static_cast<uint16_t>(((1 << Format<T>::exponent_bits) - 1) << Format<T>::fraction_bits);
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const Real magnitude = std::fabs(x);
    if (std::isnan(x)) return T{0x7FFF};
    // Positive numbers are ordered as their bits are. For rounding, in the place of infinity stands what would come next.
    const auto at = [&](uint32_t bits) {
      return bits < infinity ? real(T{static_cast<uint16_t>(bits)})
                             : std::ldexp(Real{1}, 1 << (Format<T>::exponent_bits - 1));
    };
    if (magnitude >= at(infinity)) return T{static_cast<uint16_t>(sign | infinity)};
    uint32_t below = 0, above = infinity;  // at(below) <= magnitude < at(above)
    while (above - below > 1) {
      const uint32_t middle = (below + above) / 2;
      (at(middle) <= magnitude ? below : above) = middle;
    }
    const Real down = magnitude - at(below), up = at(above) - magnitude;
    const bool take_above = up < down || (up == down && below % 2 == 1);
    return T{static_cast<uint16_t>(sign | (take_above ? above : below))};
  }
}

// A number, and how far from it the kernel's may lie, computing in A. Every operation adds half a unit in the last place,
// and the smallest normal number of A, below which a device may flush to zero. Infinities and NaN are exact.
template <typename A>
struct Bounded {
  Real value = 0, error = 0;

  static constexpr Real roundoff = std::numeric_limits<A>::epsilon() / 2;
  static Bounded rounded(Real value, Real error, Real ulps = 1) {
    if (!std::isfinite(value)) return {value, 0};
    return {value, error + ulps * roundoff * (std::fabs(value) + error) + std::numeric_limits<A>::min()};
  }
  friend Bounded operator+(Bounded a, Bounded b) { return rounded(a.value + b.value, a.error + b.error); }
  friend Bounded operator-(Bounded a, Bounded b) { return rounded(a.value - b.value, a.error + b.error); }
  friend Bounded operator*(Bounded a, Bounded b) {
    return rounded(a.value * b.value, std::fabs(a.value) * b.error + std::fabs(b.value) * a.error + a.error * b.error);
  }
};

// σ and tanh, of libraries that are right to four roundings. The error of x counts by the steepest slope within it, that
// at the place nearest to 0: σ' = σ(x)·σ(-x), tanh' = 1/cosh².
template <typename A>
Bounded<A> sigmoid(Bounded<A> x) {
  const auto exact = [](Real a) { return 1 / (1 + std::exp(-a)); };
  const Real place = std::max<Real>(std::fabs(x.value) - x.error, 0);
  return Bounded<A>::rounded(exact(x.value), x.error * exact(place) * exact(-place), 4);
}
template <typename A>
Bounded<A> hyperbolic_tangent(Bounded<A> x) {
  const Real place = std::cosh(std::max<Real>(std::fabs(x.value) - x.error, 0));
  return Bounded<A>::rounded(std::tanh(x.value), x.error / place / place, 4);
}

template <typename T>
bool within(T got, Bounded<Accumulator<T>> wanted) {
  const Real value = real(got);
  if (std::isnan(wanted.value)) return std::isnan(value) && std::bit_cast<Word<T>>(got) != kUnwritten<T>;
  if (std::isinf(wanted.value)) return value == wanted.value;
  return value >= real(nearest<T>(wanted.value - wanted.error)) &&
         value <= real(nearest<T>(wanted.value + wanted.error));
}

// ---- The equations, and their derivative by hand --------------------------------------------------------------------

template <typename A>
struct CellState {
  Bounded<A> i, f, g, o;
};

template <typename A>
CellState<A> gates_of(const std::array<Bounded<A>, 4>& a) {
  return {sigmoid(a[0]), sigmoid(a[1]), hyperbolic_tangent(a[2]), sigmoid(a[3])};
}

// c' = f·c + i·g, and h = o·tanh c'. For a loss E with ∂E/∂h = dh, and dc what comes to ∂E/∂c' from later steps:
//
//   ∂E/∂c'  = dc + dh·o·(1 - tanh² c')                    since ∂h/∂c' = o·(1 - tanh² c')
//   ∂E/∂a_i = ∂E/∂c'·g·i·(1 - i)                          σ' = σ·(1 - σ)
//   ∂E/∂a_f = ∂E/∂c'·c·f·(1 - f)
//   ∂E/∂a_g = ∂E/∂c'·i·(1 - g²)                           tanh' = 1 - tanh²
//   ∂E/∂a_o = dh·tanh c'·o·(1 - o)
//   ∂E/∂c   = ∂E/∂c'·f
template <typename A>
struct CellGradient {
  std::array<Bounded<A>, 4> a;
  Bounded<A> c;
};

template <typename A>
CellGradient<A> gradient_of(const CellState<A>& y, Bounded<A> c, Bounded<A> c_next, Bounded<A> dh, Bounded<A> dc) {
  const Bounded<A> one{1, 0}, squashed = hyperbolic_tangent(c_next);
  const Bounded<A> total = dc + dh * y.o * (one - squashed * squashed);
  return {{total * y.g * y.i * (one - y.i), total * c * y.f * (one - y.f), total * y.i * (one - y.g * y.g),
           dh * squashed * y.o * (one - y.o)},
          total * y.f};
}

// The derivative above against differences of the equations.
void check_derivative() {
  using Exact = Bounded<double>;
  const auto loss = [](const std::array<Real, 5>& x, Real dh, Real dc) {
    const CellState<double> y = gates_of<double>({Exact{x[0]}, Exact{x[1]}, Exact{x[2]}, Exact{x[3]}});
    const Real c = y.f.value * x[4] + y.i.value * y.g.value;
    return dh * y.o.value * std::tanh(c) + dc * c;
  };
  for (int n = 0; n < 200; ++n) {
    std::array<Real, 5> x;
    for (size_t k = 0; k < 5; ++k) x[k] = std::sin(Real(n * 7 + static_cast<int>(k) * 3));
    const Real dh = std::cos(Real(n)), dc = std::cos(Real(3 * n + 1));
    const CellState<double> y = gates_of<double>({Exact{x[0]}, Exact{x[1]}, Exact{x[2]}, Exact{x[3]}});
    const Exact c_next{y.f.value * x[4] + y.i.value * y.g.value};
    const CellGradient<double> d = gradient_of(y, Exact{x[4]}, c_next, Exact{dh}, Exact{dc});
    for (size_t k = 0; k < 5; ++k) {
      const Real step = 1e-5L;
      std::array<Real, 5> more = x, less = x;
      more[k] += step, less[k] -= step;
      const Real slope = (loss(more, dh, dc) - loss(less, dh, dc)) / (2 * step);
      expect(std::fabs(slope - (k < 4 ? d.a[k] : d.c).value) < 1e-9L, "the derivative written by hand is not one");
    }
  }
}

// ---- Another cell ---------------------------------------------------------------------------------------------------

// A cell that is no LSTM. Each of its results shows where each argument went.
struct SumCell {
  template <typename Math, typename T>
  static Gates<T> activate(const Gates<T>& a, const T& c, const T& c_next) {
    return {a.i + c, a.f + c_next, a.g, a.o};
  }
  template <typename Math, typename T>
  static T output(const Gates<T>& y, const T& c_next) {
    return y.o - c_next;
  }
  template <typename Math, typename T>
  static T forward(const Gates<T>& a, T& c, Gates<T>& y) {
    y = {a.i + 1, a.f + 2, a.g + 3, a.o + 4};
    c = c + a.f;
    return output<Math>(y, c);
  }
  template <typename Math, typename T>
  static Gates<T> backward(const Gates<T>& y, const T& c, const T& c_next, const T& dh, T& dc) {
    dc = dc + c;
    return {y.i + dh, y.f + c_next, y.g, y.o};
  }
};

// The kernels take every equation from the cell that they are instantiated for.
void check_other_cell() {
  const gates::CellSizes sizes{1, 1, 1, 4};
  const std::array<float, 4> sums{10, 20, 30, 40}, zeros{};
  std::array<float, 4> gates{};
  float c = 100, h = 0;
  gates::ForwardCell<float> forward{};
  forward.input_part = sums.data(), forward.recurrent_part = zeros.data();
  forward.c = &c, forward.h = &h, forward.saved_gates = gates.data(), forward.rows = 1;
  gates::forward_units<1, float, SumCell>(sizes, forward, 0, 0);
  expect(c == 120 && h == 44 - 120 && gates == std::array<float, 4>{11, 22, 33, 44}, "another cell's forward");

  const float c_next = 200, c_0 = 300, grad_output = 5;
  for (const bool saved : {true, false}) {
    float grad_c = 7, cell_h = 0;
    std::array<float, 4> grad{}, all_grad{};
    gates::BackwardCell<float> backward{};
    backward.incoming.grad_output = &grad_output;
    backward.gates = saved ? sums.data() : nullptr;
    backward.input_part = sums.data(), backward.recurrent_part = zeros.data();
    backward.c = &c_next, backward.c_0 = &c_0, backward.grad_c = &grad_c, backward.cell_h = &cell_h;
    backward.grad_gates = grad.data(), backward.all_grad_gates = all_grad.data(), backward.rows = 1;
    gates::backward_units<1, float, SumCell>(sizes, backward, 0, 0);
    const std::array<float, 4> wanted =
        saved ? std::array<float, 4>{15, 220, 30, 40} : std::array<float, 4>{315, 420, 30, 40};
    expect(grad == wanted && all_grad == wanted && grad_c == 307 && cell_h == 40 - 200, "another cell's backward");
  }
}

// ---- Dropout, a second time -----------------------------------------------------------------------------------------

// Philox4x32-10 as in Salmon et al. 2011, table 2 and section 3.
std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t{counter[0]} * 0xD2511F53u, right = uint64_t{counter[2]} * 0xCD9E8D57u;
    counter = {static_cast<uint32_t>(right >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(right),
               static_cast<uint32_t>(left >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(left)};
    key = {key[0] + 0x9E3779B9u, key[1] + 0xBB67AE85u};
  }
  return counter;
}

void check_philox() {
  struct Known {
    std::array<uint32_t, 4> counter;
    std::array<uint32_t, 2> key;
    std::array<uint32_t, 4> answer;
  };
  const Known known[] = {
      // Random123, kat_vectors: philox4x32 10
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}},
      {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}},
      {{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u},
       {0xa4093822u, 0x299f31d0u},
       {0xd16cfe09u, 0x94fdcceb, 0x5001e420u, 0x24126ea1u}},
  };
  for (const Known& k : known) {
    expect(philox(k.counter, k.key) == k.answer, "this file's Philox does not give Random123's known answers");
    const Philox ours = philox4x32_10(k.counter[0], k.counter[1], k.counter[2], k.counter[3], k.key[0], k.key[1]);
    expect(std::equal(k.answer.begin(), k.answer.end(), ours.word), "philox.h does not give Random123's known answers");
  }
}

// Whether dropout at `rate` keeps an element: number `column` of row `row` of a layer's output, which is `width` wide.
bool kept(int64_t seed, int64_t layer, int64_t row, int64_t column, int64_t width, Real rate) {
  const uint64_t place = static_cast<uint64_t>(row) * static_cast<uint64_t>((width + 3) / 4 * 4) +
                         static_cast<uint64_t>(column);  // rows are padded to whole blocks of four words
  const uint64_t block = place / 4;
  const uint32_t word =
      philox({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), static_cast<uint32_t>(layer), 0},
             {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)})[place % 4];
  return word >= std::floor(rate * 4294967296.0L);
}

// ---- Buffers --------------------------------------------------------------------------------------------------------

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}
  uint64_t bits() {  // splitmix64
    uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  Real between(Real low, Real high) {
    return low + (high - low) * static_cast<Real>(bits() >> 11) / 9007199254740992.0L;
  }

 private:
  uint64_t state_;
};

enum class Role { input, output, in_place };

// Rows of a tensor. Only those from `first` on are filled and looked at, where there are too many for a test.
struct Plane {
  int64_t rows, width, stride;
  int64_t first = 0;
};

// A plane in memory, with forbidden zones around; or a null pointer.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Plane& plane, Role role, int64_t offset, Random& random, Real low, Real high)
      : plane_(plane), role_(role) {
    const int64_t inside = plane.rows ? (plane.rows - 1) * plane.stride + plane.width : 0;
    const int64_t zone = std::min<int64_t>((plane.rows / 64 + 9) * 64 * plane.stride, kLargestZone);
    elements_ = zone + offset + inside + zone;
    sparse_ = elements_ > kLargestDense;
    if (sparse_) {
      // Address space without memory: pages come as they are touched.
      void* pages = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (pages == MAP_FAILED) {
        std::printf("FAILED no address space for %zu bytes\n", bytes());
        std::exit(1);
      }
      memory_ = {static_cast<T*>(pages), Unmap{bytes()}};
    } else {
      memory_ = {static_cast<T*>(std::aligned_alloc(64, (bytes() + 63) / 64 * 64)), Unmap{0}};
      std::fill_n(words(), elements_, role == Role::input ? kForbidden<T> : kUnwritten<T>);
    }
    data_ = memory_.get() + zone + offset;
    for (int64_t row = plane.first; row < plane.rows; ++row) {
      if (role == Role::output && !sparse_) break;
      for (int64_t unit = 0; unit < plane.width; ++unit) {
        set(row, unit, role == Role::output ? std::bit_cast<T>(kUnwritten<T>) : nearest<T>(random.between(low, high)));
      }
    }
  }

  T* get() const { return data_; }
  const Plane& plane() const { return plane_; }
  Role role() const { return role_; }
  explicit operator bool() const { return data_ != nullptr; }
  void set(int64_t row, int64_t unit, T value) { data_[row * plane_.stride + unit] = value; }
  T at(int64_t row, int64_t unit) const { return data_[row * plane_.stride + unit]; }
  T before(int64_t row, int64_t unit) const { return before_.empty() ? at(row, unit) : before_[place(row, unit)]; }

  // From here on the kernel may touch the plane and nothing else.
  void hand_over() {
    if (!data_) return;
    if (sparse_ && role_ == Role::in_place) {
      window_ = true;
      for (int64_t row = plane_.first; row < plane_.rows; ++row) {
        for (int64_t unit = 0; unit < plane_.width; ++unit) before_.push_back(at(row, unit));
      }
    }
    if (sparse_) return;
    before_.assign(memory_.get(), memory_.get() + elements_);
    each_zone([](const T* begin, const T* end) { poison(begin, end); });
  }

  // To the next launch: the rows, and nothing between them.
  void lend(const std::string& name) const {
    const auto access = role_ == Role::input ? emulator::Access::read : emulator::Access::read_write;
    if (!data_) return;
    if (plane_.stride == plane_.width && plane_.first == 0) {
      return emulator::lend(name, data_, plane_.rows * plane_.width, access);
    }
    for (int64_t row = plane_.first; row < plane_.rows; ++row) {
      emulator::lend(name + ", row " + std::to_string(row), data_ + row * plane_.stride, plane_.width, access);
    }
  }

  // Whether nothing has changed beside the plane, and in it nothing if it was an input.
  bool intact() {
    if (!data_ || sparse_) return true;
    bool same = true;
    each_zone([&](const T* begin, const T* end) {
      unpoison(begin, end);
      same = same && std::memcmp(begin, before_.data() + (begin - memory_.get()),
                                 static_cast<size_t>(end - begin) * sizeof(T)) == 0;
    });
    return same && (role_ != Role::input || std::memcmp(memory_.get(), before_.data(), bytes()) == 0);
  }

 private:
  static constexpr int64_t kLargestZone = 4096, kLargestDense = 1 << 23;

  struct Unmap {
    size_t bytes;
    void operator()(T* memory) const {
      if (bytes) {
        munmap(memory, bytes);
      } else {
        std::free(memory);
      }
    }
  };

  size_t bytes() const { return static_cast<size_t>(elements_) * sizeof(T); }
  Word<T>* words() { return reinterpret_cast<Word<T>*>(memory_.get()); }
  size_t place(int64_t row, int64_t unit) const {
    return static_cast<size_t>(window_ ? (row - plane_.first) * plane_.width + unit
                                       : data_ - memory_.get() + row * plane_.stride + unit);
  }

  template <typename Visit>
  void each_zone(const Visit& visit) const {
    const T* const end = memory_.get() + elements_;
    visit(memory_.get(), data_);
    for (int64_t row = 0; row < plane_.rows; ++row) {
      const T* const begin = data_ + row * plane_.stride + plane_.width;
      visit(begin, row + 1 < plane_.rows ? data_ + (row + 1) * plane_.stride : end);
    }
    if (plane_.rows == 0) visit(data_, end);
  }

  static void poison(const T* begin, const T* end) {
    if (__asan_poison_memory_region) __asan_poison_memory_region(begin, static_cast<size_t>(end - begin) * sizeof(T));
  }
  static void unpoison(const T* begin, const T* end) {
    if (__asan_unpoison_memory_region)
      __asan_unpoison_memory_region(begin, static_cast<size_t>(end - begin) * sizeof(T));
  }

  Plane plane_{};
  Role role_ = Role::input;
  int64_t elements_ = 0;
  bool sparse_ = false, window_ = false;
  std::unique_ptr<T, Unmap> memory_{nullptr, Unmap{0}};
  T* data_ = nullptr;
  std::vector<T> before_;
};

// ---- A step to be tested --------------------------------------------------------------------------------------------

enum class Share { none, some, all };
int64_t share_of(Share share, int64_t rows) {
  return share == Share::none ? 0 : share == Share::all ? rows : (rows + 1) / 2;
}

// What may be left out: bits of Setup::absent.
enum : unsigned {
  kBias = 1,
  kOutput = 2,
  kAbove = 4,
  kSavedC = 8,
  kSavedGates = 16,  // backward: the gates come from pre-activations
  kGradLast = 32,
  kCellH = 64,
  kMask = 128,
  kGradCell = 256,
  kResets = 512,
  kBelow = 1024,  // backward: passed
  kSum = 2048,
  kPassedOutput = 4096,
};

struct Setup {
  int64_t width = 17;
  std::vector<int64_t> rows{5};
  int64_t first_row = 0;     // rows before it are neither filled nor run nor looked at
  int64_t directions = 1;    // of a layer: cell n belongs to direction n mod directions
  int64_t pad = 0;           // strides are so much more than what they hold
  int64_t column_shift = 0;  // of the element numbering
  int64_t element_row = 0;   // where its rows begin
  int misaligned = -1;       // number of a buffer that begins one element later, if the kernel has it
  unsigned absent = 0;
  Share carried = Share::some, continued = Share::some;
  Share reset = Share::all;  // of the rows, which can be reset; a third of them is
  bool in_place = false;     // residual links: the sum is stored in the place of what it is made of
  int64_t h_more = 16;       // a row that keeps h is so much longer than one of the layer's output
  double rate = 0.3;
  int64_t seed = 0x0123456789ABCDEF;
  Real largest = 2;  // of the inputs
  int special = -1;  // number of a buffer, one of whose elements is
  Real special_value = 0;

  bool has(unsigned what) const { return !(absent & what); }
  double rate_of(int64_t cell) const { return cell % 3 == 1 ? rate / 2 : rate; }  // of dropout
  std::string describe() const {
    std::string words = std::to_string(width) + " units, rows";
    for (size_t n = 0; n < std::min<size_t>(rows.size(), 4); ++n) words += " " + std::to_string(rows[n]);
    if (rows.size() > 4) words += " … (" + std::to_string(rows.size()) + " cells)";
    words += ", " + std::to_string(directions) + " directions, strides + " + std::to_string(pad);
    if (misaligned >= 0) words += ", buffer " + std::to_string(misaligned) + " misaligned";
    if (absent) words += ", absent " + std::to_string(absent);
    words += ", carried " + std::to_string(static_cast<int>(carried));
    words += ", continued " + std::to_string(static_cast<int>(continued)) + ", rate " + text(rate);
    words += ", reset " + std::to_string(static_cast<int>(reset)) + (in_place ? ", in place" : "");
    if (h_more != 16) words += ", rows of h + " + std::to_string(h_more);
    if (largest != 2) words += ", inputs up to " + text(largest);
    if (special >= 0) words += ", " + text(special_value) + " in buffer " + std::to_string(special);
    return words;
  }
};

// One cell's place in a step, and the maker of its buffers, which are numbered as they are made.
class Maker {
 public:
  Maker(const Setup& setup, int64_t cell, Random& random) : setup(setup), cell(cell), random_(random) {}

  template <typename T>
  Buffer<T> make(bool wanted, Plane plane, Role role, Real low, Real high) {
    const int number = numbers_++;
    if (!wanted) return {};
    misaligned_ |= number == setup.misaligned;
    Buffer<T> buffer(plane, role, number == setup.misaligned ? 1 : 0, random_, low, high);
    if (number == setup.special && role != Role::output && plane.rows > plane.first) {
      const int64_t row = plane.first + static_cast<int64_t>(random_.bits() % (plane.rows - plane.first));
      buffer.set(row, static_cast<int64_t>(random_.bits() % plane.width), nearest<T>(setup.special_value));
    }
    return buffer;
  }
  template <typename T>
  Buffer<T> make(bool wanted, Plane plane, Role role) {
    return make<T>(wanted, plane, role, -setup.largest, setup.largest);
  }

  // Which rows are reset. Those behind the last that can be are marked, too.
  std::vector<uint8_t> resets() {
    if (!setup.has(kResets)) return {};
    std::vector<uint8_t> reset(static_cast<size_t>(rows()), 1);
    for (int64_t row = 0; row < resettable_rows(); ++row) reset[static_cast<size_t>(row)] = random_.bits() % 3 == 0;
    return reset;
  }
  int64_t resettable_rows() const { return share_of(setup.reset, rows()); }

  int64_t rows() const { return setup.rows[static_cast<size_t>(cell)]; }
  // `count` vectors of the width in a row of its own, or in one of a wider tensor.
  Plane dense(int64_t count = 1) const { return {rows() * count, setup.width, setup.width, setup.first_row * count}; }
  Plane in_output() const { return {rows(), setup.width, setup.directions * setup.width + setup.pad, setup.first_row}; }
  Plane in_h() const { return {rows(), setup.width, in_output().stride + setup.h_more, setup.first_row}; }
  Plane in_reserve(int64_t count = 1) const {
    return {rows() * count, setup.width, setup.width + setup.pad, setup.first_row * count};
  }
  // The part of a plane that some of the rows, from the first one on, have.
  static Plane head(Plane plane, int64_t rows) {
    plane.rows = rows, plane.first = std::min(plane.first, rows);
    return plane;
  }
  gates::Element element() const {
    gates::Element element = {
        setup.element_row + cell * 100, cell % setup.directions * setup.width + setup.column_shift, 2 + cell, {}};
    if (setup.has(kMask)) {
      const double rate = setup.rate_of(cell);
      element.mask.threshold = static_cast<uint64_t>(rate * 4294967296.0);
      element.mask.scale = rate < 1 ? 1 / (1 - rate) : 0;
      element.mask.seed = &setup.seed;
    }
    return element;
  }

  const Setup& setup;
  const int64_t cell;
  bool misaligned() const { return misaligned_; }

 private:
  Random& random_;
  int numbers_ = 0;
  bool misaligned_ = false;
};

template <typename T>
Bounded<Accumulator<T>> exact(const Buffer<T>& buffer, int64_t row, int64_t unit) {
  return {real(buffer.before(row, unit)), 0};
}

// x times dropout's mask.
template <typename A>
Bounded<A> masked(const Setup& setup, const gates::Element& element, int64_t row, int64_t unit, Bounded<A> x) {
  const int64_t output_width = setup.directions * setup.width + setup.pad;
  const double rate = setup.rate_of(element.layer - 2);
  const bool keeps =
      kept(setup.seed, element.layer, element.first_row + row, element.column + unit, output_width, rate);
  const Real scale = rate < 1 ? 1 / (1 - static_cast<Real>(rate)) : 0;
  return x * (keeps ? Bounded<A>::rounded(scale, 0) : Bounded<A>{0, 0});
}

// The rows that are reset.
struct ResetsTest {
  explicit ResetsTest(Maker& m) : marks(m.resets()), rows(m.resettable_rows()) {}

  gates::RowResets given() const { return {marks.empty() ? nullptr : marks.data(), rows}; }
  bool reset(int64_t row) const { return !marks.empty() && row < rows && marks[static_cast<size_t>(row)] == 1; }

  const std::vector<uint8_t> marks;
  const int64_t rows;
};

// What is found at one place, by the name of the tensor.
using Complain = std::function<void(const char* tensor, int64_t row, int64_t unit, Real got, Real wanted)>;

template <typename T>
void compare(const Buffer<T>& buffer, int64_t row, int64_t unit, Bounded<Accumulator<T>> wanted, const char* tensor,
             const Complain& complain) {
  ++checks;
  const T got = buffer.at(row, unit);
  if (!within(got, wanted)) complain(tensor, row, unit, real(got), wanted.value);
}

template <typename T>
void compare_bits(const Buffer<T>& buffer, int64_t row, int64_t unit, T wanted, const char* tensor,
                  const Complain& complain) {
  ++checks;
  const T got = buffer.at(row, unit);
  if (std::bit_cast<Word<T>>(got) != std::bit_cast<Word<T>>(wanted)) {
    complain(tensor, row, unit, real(got), real(wanted));
  }
}

// ---- The four kernels' cells ----------------------------------------------------------------------------------------

// Residual links: what is added to a row, and the sum once more.
template <typename T>
struct SumsTest {
  using A = Accumulator<T>;

  SumsTest(Maker& m, bool wanted, const Plane& plane)
      : in_place(m.setup.in_place),
        below(m.make<T>(wanted && m.setup.has(kBelow), plane, in_place ? Role::in_place : Role::input)),
        sum(m.make<T>(wanted && !in_place && m.setup.has(kSum), plane, Role::output)) {}

  template <typename Visit>
  void each_buffer(const Visit& visit) {
    visit("below", below), visit("sum", sum);
  }
  T* sum_given() const { return in_place ? below.get() : sum.get(); }

  // `target` has to hold x and what is added to it: the bits of `same` if nothing is.
  void check(const Buffer<T>& target, int64_t row, int64_t unit, Bounded<A> x, const T* same, const char* name,
             const Complain& complain) const {
    if (below) {
      compare(target, row, unit, x + exact(below, row, unit), name, complain);
    } else if (same) {
      compare_bits(target, row, unit, *same, name, complain);
    } else {
      compare(target, row, unit, x, name, complain);
    }
    const Buffer<T>& again = in_place ? below : sum;
    if (again) compare_bits(again, row, unit, target.at(row, unit), "sum", complain);
  }

  const bool in_place;
  Buffer<T> below, sum;
};

template <typename T>
struct ForwardTest {
  using A = Accumulator<T>;
  using Cell = gates::ForwardCell<T>;
  static constexpr const char* name = "forward";
  static constexpr auto kernel = &gates::GateKernels<T>::forward;

  explicit ForwardTest(Maker& m)
      : setup(m.setup),
        element(m.element()),
        input_part(m.make<A>(true, m.dense(4), Role::input)),
        recurrent_part(m.make<A>(true, m.dense(4), Role::input)),
        bias(m.make<A>(m.setup.has(kBias), {4, m.setup.width, m.setup.width}, Role::input)),
        c(m.make<A>(true, m.dense(), Role::in_place)),
        h(m.make<T>(true, m.dense(), Role::output)),
        output(m.make<T>(m.setup.has(kOutput), m.in_h(), Role::output)),
        above(m.make<T>(m.setup.has(kAbove), m.in_output(), Role::output)),
        saved_c(m.make<A>(m.setup.has(kSavedC), m.in_reserve(), Role::output)),
        saved_gates(m.make<A>(m.setup.has(kSavedGates), m.in_reserve(4), Role::output)),
        sums(m, m.setup.has(kAbove), m.in_output()),
        resets(m),
        cell{input_part.get(), recurrent_part.get(), bias.get(),       c.get(),           h.get(),
             output.get(),     above.get(),          saved_c.get(),    saved_gates.get(), m.rows(),
             element,          resets.given(),       sums.below.get(), sums.sum_given()} {}

  template <typename Visit>
  void each_buffer(const Visit& visit) {
    visit("input_part", input_part), visit("recurrent_part", recurrent_part), visit("bias", bias), visit("c", c);
    visit("h", h), visit("output", output), visit("above", above), visit("saved_c", saved_c);
    visit("saved_gates", saved_gates), sums.each_buffer(visit);
  }

  void check(int64_t row, int64_t unit, const Complain& complain) const {
    std::array<Bounded<A>, 4> a;
    for (int64_t gate = 0; gate < 4; ++gate) {
      Bounded<A>& sum = a[static_cast<size_t>(gate)];
      sum = exact(input_part, 4 * row + gate, unit);
      if (!resets.reset(row)) sum = sum + exact(recurrent_part, 4 * row + gate, unit);
      if (bias) sum = sum + exact(bias, gate, unit);
    }
    const CellState<A> y = gates_of(a);
    const Bounded<A> c_next = y.f * (resets.reset(row) ? Bounded<A>{} : exact(c, row, unit)) + y.i * y.g;
    compare(c, row, unit, c_next, "c", complain);
    compare(h, row, unit, y.o * hyperbolic_tangent(c_next), "h", complain);
    if (output) compare_bits(output, row, unit, h.at(row, unit), "output", complain);
    if (above) {
      const T own = h.at(row, unit);
      Bounded<A> seen{real(own), 0};
      if (setup.has(kMask)) seen = masked(setup, element, row, unit, seen);
      sums.check(above, row, unit, seen, setup.has(kMask) ? nullptr : &own, "above", complain);
    }
    if (saved_c) compare_bits(saved_c, row, unit, c.at(row, unit), "saved_c", complain);
    if (saved_gates) {
      compare(saved_gates, 4 * row, unit, y.i, "saved i", complain);
      compare(saved_gates, 4 * row + 1, unit, y.f, "saved f", complain);
      compare(saved_gates, 4 * row + 2, unit, y.g, "saved g", complain);
      compare(saved_gates, 4 * row + 3, unit, y.o, "saved o", complain);
    }
  }

  const Setup& setup;
  gates::Element element;
  Buffer<A> input_part, recurrent_part, bias, c;
  Buffer<T> h, output, above;
  Buffer<A> saved_c, saved_gates;
  SumsTest<T> sums;
  ResetsTest resets;
  Cell cell;
};

template <typename T>
struct IncomingTest {
  using A = Accumulator<T>;

  explicit IncomingTest(Maker& m)
      : setup(m.setup),
        element(m.element()),
        carried(share_of(m.setup.carried, m.rows())),
        grad_output(m.make<T>(m.setup.has(kOutput), m.in_h(), Role::input)),
        above(m.make<A>(m.setup.has(kAbove), m.in_output(), Role::input)),
        recurrent(m.make<A>(carried > 0, Maker::head(m.dense(), carried), Role::input)),
        grad_last(m.make<T>(m.setup.has(kGradLast), m.dense(), Role::input)),
        passed_output(m.make<T>(m.setup.has(kAbove) && m.setup.has(kPassedOutput), m.in_output(), Role::input)),
        passed(m.make<A>(m.setup.has(kAbove) && m.setup.has(kBelow), m.in_output(),
                         m.setup.in_place ? Role::in_place : Role::input)),
        passed_on(
            m.make<A>(m.setup.has(kAbove) && !m.setup.in_place && m.setup.has(kSum), m.in_output(), Role::output)) {}

  template <typename Visit>
  void each_buffer(const Visit& visit) {
    visit("grad_output", grad_output), visit("incoming above", above), visit("recurrent", recurrent);
    visit("grad_last", grad_last), visit("passed_output", passed_output), visit("passed", passed);
    visit("passed on", passed_on);
  }

  gates::Incoming<T> incoming() const {
    return {grad_output.get(),   above.get(),  recurrent.get(),
            grad_last.get(),     carried,      element,
            passed_output.get(), passed.get(), setup.in_place ? passed.get() : passed_on.get()};
  }

  // The gradient of what the layer hands up.
  Bounded<A> from_above(int64_t row, int64_t unit) const {
    Bounded<A> sum = exact(above, row, unit);
    if (passed_output) sum = sum + Bounded<A>{real(passed_output.at(row, unit)), 0};
    if (passed) sum = sum + exact(passed, row, unit);
    return sum;
  }
  void check_passed_on(int64_t row, int64_t unit, const Complain& complain) const {
    const Buffer<A>& place = setup.in_place ? passed : passed_on;
    if (place) compare(place, row, unit, from_above(row, unit), "passed on", complain);
  }

  Bounded<A> sum(int64_t row, int64_t unit) const {
    Bounded<A> dh;
    if (above) {
      dh = from_above(row, unit);
      if (setup.has(kMask)) dh = masked(setup, element, row, unit, dh);
    }
    if (grad_output) dh = dh + exact(grad_output, row, unit);
    if (row < carried) dh = dh + exact(recurrent, row, unit);
    if (row >= carried && grad_last) dh = dh + exact(grad_last, row, unit);
    return dh;
  }

  const Setup& setup;
  gates::Element element;
  int64_t carried;
  Buffer<T> grad_output;
  Buffer<A> above, recurrent;
  Buffer<T> grad_last, passed_output;
  Buffer<A> passed, passed_on;
};

template <typename T>
struct BackwardTest {
  using A = Accumulator<T>;
  using Cell = gates::BackwardCell<T>;
  static constexpr const char* name = "backward";
  static constexpr auto kernel = &gates::GateKernels<T>::backward;

  explicit BackwardTest(Maker& m)
      : in(m),
        continued(share_of(m.setup.continued, m.rows())),
        gates(m.make<A>(m.setup.has(kSavedGates), m.in_reserve(4), Role::input)),
        input_part(m.make<A>(!m.setup.has(kSavedGates), m.dense(4), Role::input)),
        recurrent_part(m.make<A>(!m.setup.has(kSavedGates), m.dense(4), Role::input)),
        bias(m.make<A>(m.setup.has(kBias), {4, m.setup.width, m.setup.width}, Role::input)),
        c(m.make<A>(true, m.in_reserve(), Role::input)),
        c_before(m.make<A>(continued > 0, Maker::head(m.in_reserve(), continued), Role::input)),
        c_0(m.make<T>(continued < m.rows(), m.dense(), Role::input)),
        grad_cell(m.make<T>(m.setup.has(kGradCell), in_gradients(m), Role::input)),
        grad_c(m.make<A>(true, m.dense(), Role::in_place)),
        grad_gates(m.make<T>(true, m.dense(4), Role::output)),
        all_grad_gates(
            m.make<T>(true, {m.rows(), 4 * m.setup.width, gates_stride(m.setup), m.setup.first_row}, Role::output)),
        cell_h(m.make<T>(m.setup.has(kCellH), m.dense(), Role::output)),
        resets(m),
        cell{in.incoming(),   gates.get(),  input_part.get(), recurrent_part.get(),
             bias.get(),      c.get(),      c_before.get(),   c_0.get(),
             grad_cell.get(), grad_c.get(), grad_gates.get(), all_grad_gates.get(),
             cell_h.get(),    m.rows(),     continued,        resets.given()} {}

  static int64_t gates_stride(const Setup& setup) { return setup.directions * 4 * setup.width + setup.pad; }
  static Plane in_gradients(const Maker& m) {
    return {m.rows(), m.setup.width, gates_stride(m.setup) / 4, m.setup.first_row};
  }
  static bool packs_fit(const Setup& setup, int64_t pack) {
    return !setup.has(kGradCell) || gates_stride(setup) / 4 % pack == 0;
  }

  template <typename Visit>
  void each_buffer(const Visit& visit) {
    in.each_buffer(visit);
    visit("gates", gates), visit("input_part", input_part), visit("recurrent_part", recurrent_part);
    visit("bias", bias), visit("c", c), visit("c_before", c_before), visit("c_0", c_0);
    visit("grad_cell", grad_cell), visit("grad_c", grad_c), visit("grad_gates", grad_gates);
    visit("all_grad_gates", all_grad_gates), visit("cell_h", cell_h);
  }

  void check(int64_t row, int64_t unit, const Complain& complain) const {
    std::array<Bounded<A>, 4> a;
    for (int64_t gate = 0; gate < 4; ++gate) {
      Bounded<A>& sum = a[static_cast<size_t>(gate)];
      sum = exact(gates ? gates : input_part, 4 * row + gate, unit);
      if (!gates && !resets.reset(row)) sum = sum + exact(recurrent_part, 4 * row + gate, unit);
      if (!gates && bias) sum = sum + exact(bias, gate, unit);
    }
    const CellState<A> y = gates ? CellState<A>{a[0], a[1], a[2], a[3]} : gates_of(a);
    Bounded<A> before = row < continued ? exact(c_before, row, unit) : Bounded<A>{real(c_0.at(row, unit)), 0};
    if (resets.reset(row)) before = {};
    in.check_passed_on(row, unit, complain);
    const Bounded<A> dh = in.sum(row, unit), after = exact(c, row, unit);
    Bounded<A> dc = exact(grad_c, row, unit);
    if (grad_cell) dc = dc + Bounded<A>{real(grad_cell.at(row, unit)), 0};
    const CellGradient<A> d = gradient_of(y, before, after, dh, dc);
    compare(grad_c, row, unit, resets.reset(row) ? Bounded<A>{} : d.c, "grad_c", complain);
    static constexpr const char* kNames[] = {"grad of i", "grad of f", "grad of g", "grad of o"};
    for (int64_t gate = 0; gate < 4; ++gate) {
      const T mine = all_grad_gates.at(row, gate * in.setup.width + unit);
      compare(all_grad_gates, row, gate * in.setup.width + unit, d.a[static_cast<size_t>(gate)], kNames[gate],
              complain);
      compare_bits(grad_gates, 4 * row + gate, unit, resets.reset(row) ? T{} : mine, "grad_gates", complain);
    }
    if (cell_h) compare(cell_h, row, unit, y.o * hyperbolic_tangent(after), "cell_h", complain);
  }

  IncomingTest<T> in;
  int64_t continued;
  Buffer<A> gates, input_part, recurrent_part, bias, c, c_before;
  Buffer<T> c_0, grad_cell;
  Buffer<A> grad_c;
  Buffer<T> grad_gates, all_grad_gates, cell_h;
  ResetsTest resets;
  Cell cell;
};

template <typename T>
struct CollectTest {
  using Cell = gates::CollectCell<T>;
  static constexpr const char* name = "collect";
  static constexpr auto kernel = &gates::GateKernels<T>::collect;

  explicit CollectTest(Maker& m)
      : in(m),
        grad(m.make<T>(true, m.dense(), Role::output)),
        all_grad(m.make<T>(true, m.dense(), Role::output)),
        cell{in.incoming(), grad.get(), all_grad.get(), m.rows()} {}

  template <typename Visit>
  void each_buffer(const Visit& visit) {
    in.each_buffer(visit);
    visit("grad", grad), visit("all_grad", all_grad);
  }

  void check(int64_t row, int64_t unit, const Complain& complain) const {
    in.check_passed_on(row, unit, complain);
    compare(grad, row, unit, in.sum(row, unit), "grad", complain);
    compare_bits(all_grad, row, unit, grad.at(row, unit), "all_grad", complain);
  }

  IncomingTest<T> in;
  Buffer<T> grad, all_grad;
  Cell cell;
};

template <typename T>
struct CopyTest {
  using A = Accumulator<T>;
  using Cell = gates::CopyCell<T>;
  static constexpr const char* name = "copy";
  static constexpr auto kernel = &gates::GateKernels<T>::copy;

  explicit CopyTest(Maker& m)
      : setup(m.setup),
        element(m.element()),
        carried(share_of(m.setup.carried, m.rows())),
        source(m.make<T>(carried > 0, Maker::head(m.in_output(), carried), Role::input)),
        initial(m.make<T>(carried < m.rows(), m.dense(), Role::input)),
        target(m.make<T>(true, m.in_reserve(), Role::output)),
        sums(m, true, m.in_reserve()),
        resets(m),
        cell{source.get(),   m.in_output().stride,  initial.get(),
             target.get(),   m.in_reserve().stride, m.rows(),
             carried,        setup.has(kMask),      element,
             resets.given(), sums.below.get(),      sums.sum_given()} {}

  template <typename Visit>
  void each_buffer(const Visit& visit) {
    visit("source", source), visit("initial", initial), visit("target", target), sums.each_buffer(visit);
  }

  void check(int64_t row, int64_t unit, const Complain& complain) const {
    const T from = resets.reset(row) ? T{} : row < carried ? source.at(row, unit) : initial.at(row, unit);
    Bounded<A> x{real(from), 0};
    if (setup.has(kMask)) x = masked(setup, element, row, unit, x);
    sums.check(target, row, unit, x, setup.has(kMask) ? nullptr : &from, "target", complain);
  }

  const Setup& setup;
  gates::Element element;
  int64_t carried;
  Buffer<T> source, initial, target;
  SumsTest<T> sums;
  ResetsTest resets;
  Cell cell;
};

// ---- Running a step and looking at it -------------------------------------------------------------------------------

struct Arguments {
  bool quick = false, host = false, judged = true;
  std::vector<std::string> parts;
} arguments;
Random values(1);

const gates::GateTable& table() { return arguments.host ? gates::host_kernels() : gates::cuda_gate_kernels(); }

// The threads of a launch: blocks of 128, as many of them along a row as it has packs of `pack` units, if it has so many.
uint64_t threads_of(int64_t width, int64_t rows, int64_t cells, int64_t pack) {
  const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  const int64_t packs = blocks(width, pack);
  const int64_t across = std::min<int64_t>(static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(packs))), 128);
  return static_cast<uint64_t>(blocks(packs, across) * blocks(rows, 128 / across) * cells * 128);
}

template <template <typename> class Test, typename T>
void run(const Setup& setup) {
  const std::string what = std::string(Test<T>::name) + " " + Format<T>::name + ", " + setup.describe();
  const int64_t cells = static_cast<int64_t>(setup.rows.size());
  std::vector<std::unique_ptr<Test<T>>> tests;
  std::vector<typename Test<T>::Cell> given;
  // Whole packs wherever they are possible.
  constexpr int64_t pack = 16 / sizeof(Accumulator<T>);
  bool packed = setup.width % pack == 0 && setup.pad % pack == 0 && setup.column_shift % pack == 0;
  packed = packed && setup.h_more % pack == 0;
  if constexpr (requires { Test<T>::packs_fit(setup, pack); }) packed = packed && Test<T>::packs_fit(setup, pack);
  for (int64_t n = 0; n < cells; ++n) {
    Maker maker(setup, n, values);
    tests.push_back(std::make_unique<Test<T>>(maker));
    given.push_back(tests.back()->cell);
    packed = packed && !maker.misaligned();
  }
  for (auto& test : tests) test->each_buffer([](const char*, auto& buffer) { buffer.hand_over(); });

  gates::CellSizes sizes;
  sizes.width = setup.width;
  sizes.output_stride = setup.directions * setup.width + setup.pad;
  sizes.saved_stride = setup.width + setup.pad;
  sizes.gates_stride = setup.directions * 4 * setup.width + setup.pad;
  sizes.h_stride = sizes.output_stride + setup.h_more;
  emulator::device_memory().clear();
  for (int64_t n = 0; n < cells; ++n) {
    const std::string of = " of cell " + std::to_string(n);
    tests[static_cast<size_t>(n)]->each_buffer([&](const char* name, const auto& buffer) { buffer.lend(name + of); });
    if constexpr (requires { tests[0]->resets; }) {
      const ResetsTest& resets = tests[static_cast<size_t>(n)]->resets;
      emulator::lend("resets" + of, resets.given().reset, static_cast<int64_t>(resets.marks.size()),
                     emulator::Access::read);
    }
  }
  emulator::lend("seed", setup.has(kMask) ? &setup.seed : nullptr, 1, emulator::Access::read);
  const std::string error = (table().of<T>().*Test<T>::kernel)(sizes, given.data(), cells, nullptr);
  expect(error.empty(), what + ": " + error);

  const int64_t most = *std::max_element(setup.rows.begin(), setup.rows.end());
  if (!arguments.host && !emulator::launcher() && most > 0 && cells <= 64 && setup.first_row == 0) {
    const uint64_t threads = emulator::statistics().threads;
    expect(threads == threads_of(setup.width, most, cells, packed ? pack : 1),
           what + ": " + std::to_string(threads) + " threads, so units are " + (packed ? "not " : "") + "packed");
  }

  for (int64_t n = 0; n < cells; ++n) {
    Test<T>& test = *tests[static_cast<size_t>(n)];
    test.each_buffer([&](const char* name, auto& buffer) {
      expect(buffer.intact(), what + ": cell " + std::to_string(n) + ", " + name + ": written where it must not be");
    });
    const Complain complain = [&](const char* tensor, int64_t row, int64_t unit, Real got, Real wanted) {
      --checks;
      expect(false, what + ": wrong numbers, cell " + std::to_string(n) + ", " + tensor + " of row " +
                        std::to_string(row) + ", unit " + std::to_string(unit) + ": " + text(got) + " instead of " +
                        text(wanted));
    };
    for (int64_t row = setup.first_row; arguments.judged && row < setup.rows[static_cast<size_t>(n)]; ++row) {
      for (int64_t unit = 0; unit < setup.width; ++unit) test.check(row, unit, complain);
    }
  }
}

template <typename T>
void run_all(Setup setup) {
  run<ForwardTest, T>(setup);
  run<BackwardTest, T>(setup);
  setup.absent ^= kSavedGates;
  run<BackwardTest, T>(setup);
  run<CollectTest, T>(setup);
  run<CopyTest, T>(setup);
}

// ---- The parts ------------------------------------------------------------------------------------------------------

// Every size beside a power of two, in whole packs and not, as wide as it is long and not; some rows have ended.
template <typename T>
void sizes_part() {
  const int64_t most = arguments.quick ? 1100 : 4300;
  int64_t turn = 0;
  for (const int64_t width : {1, 2, 3, 4, 17, 20, 65, 129, 132, 1023, 1024}) {
    for (const int64_t rows : {1, 3, 17, 65, 129, 1023}) {
      if (width * rows > most) continue;
      Setup setup;
      setup.width = width;
      setup.rows = {rows, rows / 2, 0, std::min<int64_t>(rows, 3)};
      setup.directions = 1 + turn % 2;
      setup.pad = std::array<int64_t, 3>{0, 16, 3}[static_cast<size_t>(turn % 3)];
      setup.rate = turn % 5 == 0 ? 1.0 : 0.3;
      setup.element_row = turn % 4 ? 0 : int64_t{1} << 34;  // element numbers beyond 32 bits
      ++turn;
      run_all<T>(setup);
    }
  }
}

// Every pointer that may be null, every share of the rows that goes on.
template <typename T>
void options_part() {
  for (const int64_t width : {17, 20}) {
    for (unsigned absent = 0; absent < 256; ++absent) {
      if (arguments.quick && absent % 5) continue;
      Setup setup;
      // kGradCell goes by the number of the others: there it is with each two of them, in every combination, and not there.
      setup.width = width, setup.absent = absent | (std::popcount(absent) % 2 ? unsigned{kGradCell} : 0u);
      setup.absent |= std::popcount(absent / 2) % 2 ? unsigned{kResets} : 0u;
      setup.absent |= static_cast<unsigned>(values.bits() >> 32) & (kBelow | kSum | kPassedOutput);
      setup.in_place = values.bits() % 3 == 0;
      setup.rows = {4, 3};
      if (absent < 32 || (absent & kMask && absent < 160)) run<ForwardTest, T>(setup);
      for (const Share carried : {Share::none, Share::some, Share::all}) {
        setup.carried = carried;
        if ((absent & (kBias | kSavedC | kSavedGates | kCellH)) == 0) run<CollectTest, T>(setup);
        if (absent == 0 || absent == kMask) run<CopyTest, T>(setup);
        if (absent & kSavedC) continue;  // no pointer of these kernels
        setup.continued = static_cast<Share>((static_cast<unsigned>(carried) + absent / 64) % 3);
        setup.reset = static_cast<Share>((static_cast<unsigned>(carried) + absent / 16) % 3);
        run<BackwardTest, T>(setup);
      }
    }
    for (const Share carried : {Share::none, Share::some, Share::all}) {
      for (const Share continued : {Share::none, Share::some, Share::all}) {
        Setup setup;
        setup.width = width, setup.carried = carried, setup.continued = setup.reset = continued;
        setup.rows = {4, 1, 0, 3};
        run_all<T>(setup);
      }
    }
  }
}

// What residual links add, and where they store it, with and without a mask.
template <typename T>
void links_part() {
  for (const int64_t width : {17, 20}) {
    for (const unsigned links : {0u, 1u, 2u, 3u, 4u, 5u, 6u, 7u}) {
      for (const unsigned absent : {0u, unsigned{kMask}}) {
        for (const bool in_place : {false, true}) {
          Setup setup;
          setup.width = width, setup.rows = {3, 2}, setup.absent = absent, setup.in_place = in_place;
          setup.absent |= (links & 1 ? unsigned{kBelow} : 0u) | (links & 2 ? unsigned{kSum} : 0u) |
                          (links & 4 ? unsigned{kPassedOutput} : 0u);
          run_all<T>(setup);
        }
      }
    }
  }
}

// Pointers, strides and columns that are not on 16 bytes: one unit at a time, and right.
template <typename T>
void alignment_part() {
  for (const int64_t width : {4, 20}) {
    const int64_t rows =
        width == 4 ? 33 : 5;  // of packs one block, of single units two: the number of threads tells them apart
    for (const int64_t more : {1, 2, 3, 4}) {
      Setup setup;
      setup.width = width, setup.rows = {rows, 2}, setup.h_more = more;
      run_all<T>(setup);
    }
    for (int misaligned = -1; misaligned < 20; ++misaligned) {
      Setup setup;
      setup.width = width, setup.rows = {rows, 2}, setup.misaligned = misaligned;
      run_all<T>(setup);
    }
    for (const int64_t pad : {1, 2, 3, 4, 12, 16}) {
      Setup setup;
      setup.width = width, setup.rows = {rows, 2}, setup.pad = pad;
      run_all<T>(setup);
    }
    for (const int64_t shift : {1, 2, 3, 4}) {
      Setup setup;
      setup.width = width, setup.rows = {rows, 2}, setup.column_shift = shift, setup.pad = 4;
      run_all<T>(setup);
    }
  }
}

// More cells than a launch takes, and as many as the small and the large one take.
template <typename T>
void cells_part() {
  for (const int64_t cells : {0, 1, 7, 8, 9, 63, 64, 65, 128, 130}) {
    if (arguments.quick && cells > 65) continue;
    Setup setup;
    setup.width = 5, setup.directions = 2;
    setup.rows.clear();
    for (int64_t n = 0; n < cells; ++n) setup.rows.push_back(n * 5 % 4);
    if (cells == 0) {
      gates::CellSizes sizes{5, 5, 5, 20};
      expect(table().of<T>().forward(sizes, nullptr, 0, nullptr).empty(), "no cell at all");
      expect(table().of<T>().copy(sizes, nullptr, 0, nullptr).empty(), "no cell at all");
      continue;
    }
    run_all<T>(setup);
    if (cells != 9) continue;
    setup.width = 8;  // whole packs, too
    run_all<T>(setup);
  }
  Setup nothing;
  nothing.rows = {0, 0};
  run_all<T>(nothing);
}

// Gates that are shut or open, and NaN and infinities, one at a time: they show where they belong and nowhere else.
template <typename T>
void specials_part() {
  for (const Real largest : {20.0L, 200.0L, 2e4L}) {
    Setup setup;
    setup.rows = {7}, setup.width = 20, setup.largest = largest;
    setup.absent = kSavedGates;  // large numbers are pre-activations here, not gates
    run<ForwardTest, T>(setup);
    run<BackwardTest, T>(setup);
  }
  const Real infinity = std::numeric_limits<Real>::infinity(), nan = std::numeric_limits<Real>::quiet_NaN();
  for (const Real value : {nan, infinity, -infinity}) {
    for (int buffer = 0; buffer < 19; ++buffer) {
      for (const double rate : {0.3, 1.0}) {
        Setup setup;
        setup.rows = {3, 2}, setup.special = buffer, setup.special_value = value, setup.rate = rate;
        setup.width = buffer % 2 ? 17 : 20;
        setup.absent = rate == 1.0 ? unsigned{kSavedGates} : 0;
        run<ForwardTest, T>(setup);
        run<BackwardTest, T>(setup);
        run<CollectTest, T>(setup);
        run<CopyTest, T>(setup);
      }
    }
  }
}

// Seeds and rates.
template <typename T>
void dropout_part() {
  for (const int64_t seed : {int64_t{0}, int64_t{1}, int64_t{-1}, int64_t{1} << 31, (int64_t{1} << 32) + 1,
                             std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min()}) {
    for (const double rate : {1e-9, 0.3, 0.5, 0.999, 1.0}) {
      Setup setup;
      setup.seed = seed, setup.rate = rate, setup.directions = 2, setup.width = seed & 1 ? 6 : 8;
      run<ForwardTest, T>(setup);
      run<CollectTest, T>(setup);
      run<CopyTest, T>(setup);
    }
  }
  // A threshold that is itself a number drawn, whose element is kept.
  for (const uint32_t layer : {0, 1, 2}) {
    Setup setup;
    setup.seed = 0, setup.rate = philox({0, 0, layer, 0}, {0, 0})[0] / 4294967296.0;
    run<ForwardTest, T>(setup);
  }
}

// Tensors of more than 2³¹ elements, whose pages are there only where they are touched.
template <typename T>
void huge_part() {
  for (const int64_t width : {5, 8}) {
    Setup setup;
    setup.width = width, setup.rows = {3, 1}, setup.pad = int64_t{1} << 30, setup.element_row = int64_t{1} << 40;
    run_all<T>(setup);
  }
  if (arguments.host || emulator::launcher()) return;  // tests/ptx runs whole grids
  // Rows beyond 2³¹, of which only the last blocks are run.
  for (const int64_t width : {1, 3, 4}) {
    Setup setup;
    setup.width = width, setup.first_row = int64_t{1} << 31, setup.rows = {setup.first_row + 3};
    setup.absent = kOutput | kAbove | kMask | kResets | kBelow | kSum;
    setup.carried = setup.continued = Share::all;
    const int64_t packs = width == 4 && sizeof(T) <= 4 ? 1 : width == 4 ? 2 : width;
    const int64_t rows_a_block = 128 / static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(packs)));
    emulator::options().first_block = static_cast<uint64_t>(setup.first_row / rows_a_block);
    run_all<T>(setup);
    emulator::options().first_block = 0;
  }
}

// Numbers that travel as arguments: one block's threads more or less, one launch's numbers more or less.
template <typename T>
void numbers_part() {
  if (!std::is_same_v<T, float>) return;  // they are the same for all
  constexpr int64_t kUntouched = -1;
  for (const size_t count : {0, 1, 127, 128, 129, 499, 500, 501, 1000, 1203}) {
    std::vector<int64_t> given(count), got(count + 2, kUntouched);
    for (size_t n = 0; n < count; ++n) given[n] = (int64_t{1} << 40) + static_cast<int64_t>(n * n);
    emulator::device_memory().clear();
    emulator::lend("numbers", got.data() + 1, static_cast<int64_t>(count), emulator::Access::read_write);
    const std::string error = table().numbers(given.data(), static_cast<int64_t>(count), got.data() + 1, nullptr);
    expect(error.empty() && std::equal(given.begin(), given.end(), got.begin() + 1) && got.front() == kUntouched &&
               got.back() == kUntouched,
           std::to_string(count) + " numbers: '" + error + "'");
  }
}

// What no grid holds is refused, in words that name the sizes, before anything is touched.
template <typename T>
void refusal_part() {
  if (arguments.host) return;
  const auto refused = [](int64_t width, int64_t rows) {
    gates::CellSizes sizes{width, width, width, 4 * width};
    gates::CopyCell<T> cell{};
    cell.rows = rows;
    const std::string error = table().of<T>().copy(sizes, &cell, 1, nullptr);
    expect(
        error.find(std::to_string(rows)) != std::string::npos && error.find(std::to_string(width)) != std::string::npos,
        "a step that no grid holds: '" + error + "'");
  };
  // A step of nothing is none, and so is refused by nobody.
  const gates::CellSizes no_units{};
  gates::CopyCell<T> cell{};
  cell.rows = 3;
  const std::string error = table().of<T>().copy(no_units, &cell, 1, nullptr);
  expect(error.empty(), "a step without units: '" + error + "'");
  refused((int64_t{1} << 23) * 4, 1);
  refused(3, int64_t{1} << 40);
}

// csrc/stack/number.h, against the definition of the formats.
template <typename T>
void number_part() {
  if constexpr (sizeof(T) == 2) {
    const std::string name = Format<T>::name;
    for (uint32_t bits = 0; bits < 65536; ++bits) {
      const float wide = widen(T{static_cast<uint16_t>(bits)});
      const Real wanted = decode<T>(bits);
      const bool same =
          std::isnan(wanted) ? std::isnan(wide) : real(wide) == wanted && std::signbit(wide) == bits >> 15;
      expect(same, name + " to float32 of bits " + std::to_string(bits));
    }
    const auto narrows = [&](float x) {
      const T got = narrow<T>(x), wanted = nearest<T>(real(x));
      const bool same = std::isnan(x) ? std::isnan(real(got)) : got.bits == wanted.bits;
      expect(same, name + " of float32 " + text(x) + " is " + text(real(got)) + " instead of " + text(real(wanted)));
    };
    const float infinity = std::numeric_limits<float>::infinity();
    for (uint32_t bits = 0; bits < 0x8000; ++bits) {
      const Real here = decode<T>(bits), next = decode<T>(bits + 1);
      if (!std::isfinite(here)) break;
      // A number, the tie with the next one (for the largest: with what would be the next), and what is beside a tie.
      const Real beyond = std::isfinite(next) ? next : 2 * here - decode<T>(bits - 1);
      const float tie = static_cast<float>((here + beyond) / 2);
      for (const float x : {static_cast<float>(here), tie, std::nextafter(tie, 0.0f), std::nextafter(tie, infinity)}) {
        narrows(x), narrows(-x);
      }
    }
    const uint32_t step = arguments.quick ? 65537 : 4099;  // through all floats, NaNs of every kind among them
    for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += step)
      narrows(std::bit_cast<float>(static_cast<uint32_t>(bits)));
    for (const uint32_t bits : {0x7F800000u, 0x7F800001u, 0x7FBFFFFFu, 0x7FC00000u, 0x7FFFFFFFu, 0xFF800000u,
                                0xFF800001u, 0x7F7FFFFFu, 1u, 0x007FFFFFu, 0x00800000u}) {
      narrows(std::bit_cast<float>(bits)), narrows(-std::bit_cast<float>(bits));
    }
  }
}

// Every kernel once with packs and once without, for ThreadSanitizer, to which every thread is dear.
template <typename T>
void once_part() {
  for (const int64_t width : {3, 4}) {
    Setup setup;
    setup.width = width, setup.directions = 2;
    run_all<T>(setup);
  }
}

struct Part {
  const char* name;
  void (*of_float)();
  void (*of_double)();
  void (*of_bfloat16)();
  void (*of_float16)();
};

#define PART(name) {#name, name##_part<float>, name##_part<double>, name##_part<bfloat16>, name##_part<float16>}
const Part kParts[] = {PART(once),  PART(number),  PART(sizes),    PART(options), PART(links),   PART(alignment),
                       PART(cells), PART(dropout), PART(specials), PART(huge),    PART(refusal), PART(numbers)};
#undef PART

bool wanted(const char* part) {
  const auto& parts = arguments.parts;
  return parts.empty() || std::find(parts.begin(), parts.end(), part) != parts.end();
}

}  // namespace

int main(int count, char** words) {
  mallopt(M_MMAP_THRESHOLD, 1 << 28), mallopt(M_TRIM_THRESHOLD, 1 << 28);  // memory is kept, and used again
  for (int n = 1; n < count; ++n) {
    const std::string word = words[n];
    const std::string next = n + 1 < count ? words[n + 1] : "";
    if (word == "--quick") {
      arguments.quick = true;
    } else if (word == "--stop") {
      stop_at_first = true;
    } else if (word == "--unjudged") {
      arguments.judged = false;
    } else if (word == "--host") {
      arguments.host = true;
    } else if (word == "--seed") {
      emulator::options().seed = std::stoull(next);
      values = Random(emulator::options().seed), ++n;
    } else if (word == "--order") {
      using emulator::Order;
      const std::pair<const char*, Order> orders[] = {{"forward", Order::forward},
                                                      {"reverse", Order::reverse},
                                                      {"random", Order::random},
                                                      {"priorities", Order::priorities}};
      for (const auto& [name, order] : orders) {
        if (next == name) emulator::options().order = order;
      }
      ++n;
    } else {
      arguments.parts.push_back(word);
    }
  }
  check_derivative();
  check_other_cell();
  check_philox();
  for (const Part& part : kParts) {
    if (!wanted(part.name)) continue;
    const int64_t before = checks;
    part.of_float(), part.of_double(), part.of_bfloat16(), part.of_float16();
    std::printf("%s: %lld checks\n", part.name, static_cast<long long>(checks - before));
    std::fflush(stdout);
  }
  std::printf("%lld checks, %lld failures\n", static_cast<long long>(checks), static_cast<long long>(failures));
  return failures > 0;
}
