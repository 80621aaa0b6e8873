// tests/ptx/probes/probes.cpp: launches the probes (probes.cuh) on the machine that runs PTX, or on the emulator that runs their
// C++, and checks what they computed.
//
//   probes --ptx FILE [--seeds N] [--steps N] [name ...]      what nvcc made of probes.cu
//   probes [--seeds N] [name ...]                             its C++, on the emulator
//
// One line a probe. Status 0: right; 1: wrong numbers, or an error of the running kernel; 2: the kernel cannot be decoded.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../../csrc/cuda/launch.cuh"
#include "../machine.h"
#include "probes.cuh"

using namespace stacked_lstm;
using namespace stacked_lstm::cuda;
using namespace stacked_lstm::cuda::probes;

namespace {

struct Where {
  const ptx::Module* module = nullptr;  // null: the emulator
  ptx::Options options;                 // of the machine
};
Where where;

// Memory of the kernel, of exactly so many bytes, aligned to 16.
template <typename T>
class Buffer {
 public:
  Buffer(const char* name, std::vector<T> values, ptx::Ranges::Access access = ptx::Ranges::Access::read_write)
      : name_(name), access_(access), size_(values.size()), memory_(new Line[values.size() * sizeof(T) / 16 + 1]) {
    std::memcpy(memory_.get(), values.data(), size_ * sizeof(T));
  }
  T* data() const { return reinterpret_cast<T*>(memory_.get()); }
  const T& operator[](size_t n) const { return data()[n]; }
  size_t size() const { return size_; }
  void add_to(ptx::Ranges& ranges) const { ranges.add(data(), size_ * sizeof(T), name_, access_); }

 private:
  struct alignas(16) Line {
    unsigned char bytes[16];
  };
  const char* name_;
  ptx::Ranges::Access access_;
  size_t size_;
  std::unique_ptr<Line[]> memory_;
};

// An argument as the kernel takes it, and as the machine takes it: bytes.
template <typename P, typename T>
P passed(const Buffer<T>& buffer) {
  return buffer.data();
}
template <typename P>
P passed(int value) {
  return value;
}
template <typename T>
void add_to(ptx::Ranges& ranges, const Buffer<T>& buffer) {
  buffer.add_to(ranges);
}
void add_to(ptx::Ranges&, int) {}

// What is wrong, or "".
template <typename... P, typename... A>
std::string start(const char* name, void (*kernel)(P...), const LaunchConfig& config, const A&... arguments) {
  if (!where.module) {
    const Status status = launch(config, kernel, passed<P>(arguments)...);
    return status.text;
  }
  ptx::Launch of;
  of.grid[0] = config.grid.x, of.block[0] = config.block.x;
  of.shared_bytes = config.shared_bytes, of.cluster = config.cluster;
  const auto bytes = [](auto value) {
    std::vector<uint8_t> all(sizeof value);
    std::memcpy(all.data(), &value, sizeof value);
    return all;
  };
  of.parameters = {bytes(passed<P>(arguments))...};
  ptx::Ranges ranges;
  (add_to(ranges, arguments), ...);
  ptx::run(*where.module, name, of, ranges, where.options);
  return "";
}

LaunchConfig config(unsigned blocks, int threads, size_t shared_bytes = 0, unsigned cluster = 1) {
  LaunchConfig c;
  c.grid = dim3(blocks), c.block = dim3(static_cast<unsigned>(threads));
  c.shared_bytes = shared_bytes, c.cluster = cluster, c.co_resident = true;
  return c;
}

// ------------------------------------------------------------------------------------------------------ inputs, results

using Random = std::mt19937_64;
constexpr auto kRead = ptx::Ranges::Access::read;

template <typename T>
T random_value(Random& random) {
  T value;
  uint64_t words[2] = {random(), random()};
  static_assert(sizeof value <= sizeof words);
  std::memcpy(&value, words, sizeof value);
  return value;
}
template <typename T>
std::vector<T> random_values(size_t count) {
  Random random(count * 16 + sizeof(T));
  std::vector<T> values(count);
  for (T& value : values) value = random_value<T>(random);
  return values;
}
// What a kernel's output holds before.
template <typename T>
std::vector<T> untouched(size_t count) {
  std::vector<T> values(count);
  if (count) std::memset(static_cast<void*>(values.data()), 0xCD, count * sizeof(T));
  return values;
}

template <typename T>
std::string hex(const T& value) {
  std::string text = "0x";
  unsigned char bytes[sizeof value];
  std::memcpy(bytes, &value, sizeof value);
  for (size_t n = sizeof value; n-- > 0;) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", bytes[n]);
    text += digits;
  }
  return text;
}
template <typename T>
std::string same(const Buffer<T>& got, const std::vector<T>& expected) {
  if (got.size() != expected.size()) return "wrong numbers: a result of another size";
  for (size_t n = 0; n < expected.size(); ++n) {
    if (std::memcmp(&got[n], &expected[n], sizeof(T)) != 0) {
      return "wrong numbers: element " + std::to_string(n) + " of " + std::to_string(expected.size()) + " is " +
             hex(got[n]) + ", expected " + hex(expected[n]);
    }
  }
  return "";
}
// To a relative error; NaN and infinity, and the sign of zero, have to be the same.
std::string close(const Buffer<float>& got, const std::vector<double>& expected, double relative) {
  for (size_t n = 0; n < expected.size(); ++n) {
    const double a = got[n], b = expected[n];
    const bool fits = std::isnan(b)             ? std::isnan(a)
                      : b == 0 || std::isinf(b) ? a == b && std::signbit(a) == std::signbit(b)
                                                : std::fabs(a - b) <= relative * std::fabs(b);
    if (!fits) {
      return "wrong numbers: element " + std::to_string(n) + " is " + std::to_string(a) + ", expected " +
             std::to_string(b);
    }
  }
  return "";
}

// ----------------------------------------------------------------------------------------------------------- the probes

std::string named_barriers() {
  constexpr size_t kRounds = 3;
  const Buffer<uint32_t> in("in", random_values<uint32_t>(kRounds * kWarp), kRead);
  const Buffer<uint32_t> out("out", untouched<uint32_t>(kRounds * kWarp));
  const std::string error = start("probe_named_barriers", probe_named_barriers, config(1, NamedBarriers::kThreads), in,
                                  out, static_cast<int>(kRounds));
  std::vector<uint32_t> expected(out.size());
  for (size_t n = 0; n < expected.size(); ++n) expected[n] = in[n / kWarp * kWarp + kWarp - 1 - n % kWarp];
  return error.empty() ? same(out, expected) : error;
}

std::string kept_value() {
  const Buffer<uint32_t> in("in", random_values<uint32_t>(kWarp), kRead);
  const Buffer<uint32_t> out("out", untouched<uint32_t>(kWarp));
  const std::string error = start("probe_kept", probe_kept, config(1, kWarp), in, out);
  std::vector<uint32_t> expected(out.size());
  for (size_t n = 0; n < expected.size(); ++n) expected[n] = (in[n] + 1) * 3;
  return error.empty() ? same(out, expected) : error;
}

// Sums carry from the lower half into the upper, and no bit operation, no maximum and no increment gives the same.
template <typename T>
std::vector<T> message_values() {
  std::vector<T> values = random_values<T>(8);
  values[5] = static_cast<T>(0x1000000370000003), values[6] = static_cast<T>(0x20000001F0000005);
  return values;
}
enum class Through { memory, block, cluster };
template <typename T>
std::string message(const char* name, void (*kernel)(Message<T>*, const T*, T*), Through through) {
  const Buffer<T> values("values", message_values<T>(), kRead);
  const T beside = values[7];
  Message<T> before;
  std::memset(static_cast<void*>(&before), 0, sizeof before);
  for (auto* word :
       {&before.data[0], &before.data[1], &before.data[2], &before.flag[0], &before.flag[1], &before.sum}) {
    word->beside = beside;
  }
  before.sum.value = values[6];
  const Buffer<Message<T>> memory("message", std::vector<Message<T>>(through == Through::cluster ? 3 : 1, before));
  const std::vector<T> received = {values[0], values[2], values[4], static_cast<T>(values[5] + values[6])};
  std::vector<T> in_block;
  for (int times = 0; times < 2; ++times) in_block.insert(in_block.end(), received.begin(), received.end());
  in_block.insert(in_block.end(), {0, 0, 0, 0, 0, beside});  // `beside` of the words in shared memory
  std::vector<T> expected;
  LaunchConfig launched = config(2, 1);
  switch (through) {
    case Through::memory:
      expected = received;
      break;
    case Through::block:
      expected = in_block;
      launched = config(1, 2 * kWarp);
      break;
    case Through::cluster:
      for (int block = 0; block < 2; ++block) expected.insert(expected.end(), in_block.begin(), in_block.end());
      expected.insert(expected.end(), received.begin(), received.end());
      launched = config(2, 2 * kWarp, 0, 2);
  }
  const Buffer<T> out("out", untouched<T>(expected.size()));
  const std::string error = start(name, kernel, launched, memory, values, out);
  if (!error.empty()) return error;
  if (std::string wrong = same(out, expected); !wrong.empty()) return wrong;
  Message<T> after = before;
  after.data[0].value = values[0], after.data[1].value = values[2], after.data[2].value = values[4];
  after.flag[0].value = values[1], after.flag[1].value = values[3];
  after.sum.value = static_cast<T>(values[5] + values[6]);
  return same(memory, std::vector<Message<T>>(memory.size(), after));
}

// The device's clock counts from some day of the past, a multiprocessor's from its start.
std::string clocks() {
  const Buffer<uint64_t> out("out", untouched<uint64_t>(4));
  const std::string error = start("probe_clocks", probe_clocks, config(1, 1), out);
  if (!error.empty()) return error;
  if (out[3] <= out[0]) return "wrong numbers: clock_cycles() did not go forward";
  if (out[2] < out[1]) return "wrong numbers: clock_nanoseconds() went back";
  if (where.module && (out[1] >> 40 == 0 || out[3] >> 40 != 0)) return "wrong numbers: the clocks are mixed up";
  return "";
}

// The register `index` of `lane`: of row lane / 4, or of that column, two elements.
std::string load_matrix(const char* name, void (*kernel)(const uint16_t*, const int*, uint32_t*), int count,
                        bool transposed) {
  const Buffer<uint16_t> in("in", random_values<uint16_t>(64 * 8), kRead);
  std::vector<int> rows(64);
  for (int n = 0; n < 64; ++n) rows[static_cast<size_t>(n)] = n;
  std::shuffle(rows.begin(), rows.end(), Random(7));
  rows.resize(kWarp);
  const Buffer<int> chosen("rows", rows, kRead);
  std::vector<uint32_t> expected;
  for (int matrix = 0; matrix < count; ++matrix) {
    for (int l = 0; l < kWarp; ++l) {
      const auto element = [&](int part) -> uint32_t {
        const int row = transposed ? l % 4 * 2 + part : l / 4, column = transposed ? l / 4 : l % 4 * 2 + part;
        return in[static_cast<size_t>(rows[static_cast<size_t>(matrix * 8 + row)] * 8 + column)];
      };
      expected.push_back(element(0) | element(1) << 16);
    }
  }
  const Buffer<uint32_t> out("out", untouched<uint32_t>(expected.size()));
  const std::string error = start(name, kernel, config(1, kWarp), in, chosen, out);
  return error.empty() ? same(out, expected) : error;
}

enum class Element { bf16, f16, tf32 };
// Small integers: every sum is exact, in whatever order it is made.
std::string mma(const char* name, void (*kernel)(const uint32_t*, const uint32_t*, float*), Element element) {
  const int depth = element == Element::tf32 ? 8 : 16, parts = element == Element::tf32 ? 1 : 2;
  Random random(3);
  const auto small = [&] { return static_cast<int>(random() % 31) - 15; };
  const auto bits = [&](int value) -> uint32_t {
    const auto single = std::bit_cast<uint32_t>(static_cast<float>(value));
    if (element == Element::tf32) return single | static_cast<uint32_t>(random() & 0x1FFF);  // bits that do not count
    if (element == Element::bf16) return single >> 16;
    return value == 0 ? 0 : (single >> 16 & 0x8000) | ((single >> 23 & 0xFF) - 127 + 15) << 10 | (single >> 13 & 0x3FF);
  };
  int a[16][16], b[16][8], d[16][8];
  for (auto& row : a) std::generate(std::begin(row), std::end(row), small);
  for (auto& row : b) std::generate(std::begin(row), std::end(row), small);
  for (auto& row : d) std::generate(std::begin(row), std::end(row), small);
  std::vector<uint32_t> a_parts, b_parts;
  std::vector<float> before, expected;
  // The ISA's figures, "Matrix fragments for mma.m16n8k16" and "... mma.m16n8k8".
  for (int n = 0; n < 4; ++n) {
    for (int l = 0; l < kWarp; ++l) {
      const int group = l / 4, member = l % 4;
      uint32_t word = 0;
      for (int part = 0; part < parts; ++part) {
        const int column = element == Element::tf32 ? member + n / 2 * 4 : member * 2 + part + n / 2 * 8;
        word |= bits(a[group + n % 2 * 8][column]) << 16 * part;
      }
      a_parts.push_back(word);
      before.push_back(static_cast<float>(d[group + n / 2 * 8][member * 2 + n % 2]));
    }
  }
  for (int n = 0; n < 2; ++n) {
    for (int l = 0; l < kWarp; ++l) {
      const int group = l / 4, member = l % 4;
      uint32_t word = 0;
      for (int part = 0; part < parts; ++part) {
        word |= bits(b[element == Element::tf32 ? member + 4 * n : member * 2 + part + 8 * n][group]) << 16 * part;
      }
      b_parts.push_back(word);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      for (int k = 0; k < depth; ++k) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int n = 0; n < 4; ++n) {
    for (int l = 0; l < kWarp; ++l) expected.push_back(static_cast<float>(d[l / 4 + n / 2 * 8][l % 4 * 2 + n % 2]));
  }
  const Buffer<uint32_t> a_in("a", a_parts, kRead), b_in("b", b_parts, kRead);
  const Buffer<float> sums("d", before);
  const std::string error = start(name, kernel, config(1, kWarp), a_in, b_in, sums);
  return error.empty() ? same(sums, expected) : error;
}

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kDenormal = 1e-40f;

std::vector<float> numbers(std::vector<float> special, float low, float high) {
  Random random(11);
  while (special.size() < kWarp) special.push_back(std::uniform_real_distribution<float>(low, high)(random));
  return special;
}
std::string function(const char* name, void (*kernel)(const float*, float*), const std::vector<float>& x,
                     const std::function<double(float)>& f, double relative) {
  const Buffer<float> in("x", x, kRead), out("y", untouched<float>(kWarp));
  const std::string error = start(name, kernel, config(1, kWarp), in, out);
  std::vector<double> expected(kWarp);
  std::transform(x.begin(), x.end(), expected.begin(), f);
  return error.empty() ? close(out, expected, relative) : error;
}
std::string nearest() {
  // Ties, up and down, of both signs; what carries into the exponent; what is exact.
  const std::vector<float> x = numbers({0x1.001p0f, 0x1.003p0f, -0x1.001p0f, -0x1.003p0f, 0x1.ffffp0f, 0x1.004p0f, 0.0f,
                                        -0.0f, kInfinity, kNaN, 0x1.001002p0f, 0x1.000ffep0f},
                                       -2, 2);
  return function(
      "probe_nearest_tf32", probe_nearest_tf32, x,
      [](float value) {
        if (!std::isfinite(value)) return double{value};
        int exponent;
        const double fraction = std::frexp(double{value}, &exponent);  // 11 bits: std::round's ties go away
        return std::ldexp(std::round(std::ldexp(fraction, 11)), exponent - 11);
      },
      0);
}
std::string tanh_() {
  return function(
      "probe_tanh", probe_tanh, numbers({0.5f, -0.5f, 1, -3, 9, -9, kNaN}, -2, 2),
      [](float x) { return std::tanh(double{x}); }, 0x1p-10);
}
std::string reciprocal() {
  return function(
      "probe_reciprocal", probe_reciprocal,
      numbers({1, -3, kDenormal, -kDenormal, 0x1.8p127f, -0x1.8p127f, kInfinity, 0.0f, kNaN}, 0.5f, 9),
      [](float x) {
        const double y = 1 / (std::fabs(x) < 0x1p-126f ? std::copysign(0.0, double{x}) : double{x});
        return std::fabs(y) < 0x1p-126 ? std::copysign(0.0, y) : y;  // denormals are 0, at both ends
      },
      0x1p-22);
}
std::string exp2_() {
  return function(
      "probe_exp2", probe_exp2, numbers({1, 0.5f, -3, kDenormal, -130, -126.5f, 200, -kInfinity, kNaN}, -9, 9),
      [](float x) {
        const double y = std::exp2(double{x});
        return y < 0x1p-126 ? 0.0 : y > 0x1p128 ? double{kInfinity} : y;
      },
      0x1p-21);
}
std::string lesser() {
  const std::vector<float> a = numbers({1, 2, -1, kNaN, 1, kNaN, kInfinity, -kInfinity}, -9, 9);
  const std::vector<float> b = numbers({2, 1, -2, 1, kNaN, kNaN, 1, 1}, -4, 4);
  const Buffer<float> first("a", a, kRead), second("b", b, kRead), out("y", untouched<float>(kWarp));
  const std::string error = start("probe_lesser", probe_lesser, config(1, kWarp), first, second, out);
  std::vector<double> expected(kWarp);
  for (size_t n = 0; n < kWarp; ++n) expected[n] = a[n] != a[n] || b[n] != b[n] ? kNaN : std::min(a[n], b[n]);
  return error.empty() ? close(out, expected, 0) : error;
}

// Where a lane copies less than its slot, the source ends there.
std::string copies(const char* name, void (*kernel)(const uint8_t*, const int*, uint8_t*), size_t bytes) {
  std::vector<int> some(kWarp);
  for (size_t l = 0; l < kWarp; ++l) some[l] = static_cast<int>(l * 7 % bytes);
  some[kWarp - 1] = static_cast<int>(bytes) - 1;
  const size_t size = 3 * kWarp * bytes;
  const Buffer<int> sizes("sizes", some, kRead);
  const Buffer<uint8_t> in("in", random_values<uint8_t>(size - 1), kRead), out("out", untouched<uint8_t>(size));
  const std::string error = start(name, kernel, config(1, kWarp), in, sizes, out);
  std::vector<uint8_t> expected(size);
  for (size_t n = 0; n < size; ++n) {
    const size_t slot = n / bytes, l = slot % kWarp;
    const bool whole = slot / kWarp == 1;
    expected[n] = whole || n % bytes < static_cast<size_t>(some[l]) ? in[n] : 0;
  }
  return error.empty() ? same(out, expected) : error;
}

std::string reversed_rows(const char* name, void (*kernel)(const uint32_t*, uint32_t*)) {
  const Buffer<uint32_t> in("in", random_values<uint32_t>(2 * kWarp), kRead),
      out("out", untouched<uint32_t>(2 * kWarp));
  const std::string error = start(name, kernel, config(1, 2 * kWarp), in, out);
  std::vector<uint32_t> expected(out.size());
  for (size_t n = 0; n < expected.size(); ++n) expected[n] = in[n / kWarp * kWarp + kWarp - 1 - n % kWarp];
  return error.empty() ? same(out, expected) : error;
}

std::string mbarriers(const char* name, void (*kernel)(const uint32_t*, uint32_t*, int)) {
  constexpr size_t kRounds = 4;
  const Buffer<uint32_t> in("in", random_values<uint32_t>(kRounds * kWarp), kRead);
  const Buffer<uint32_t> out("out", untouched<uint32_t>(2 * kRounds * kWarp + 2));
  const std::string error = start(name, kernel, config(1, 2 * kWarp), in, out, static_cast<int>(kRounds));
  std::vector<uint32_t> expected;
  for (size_t n = 0; n < 2 * kRounds * kWarp; ++n) {
    expected.push_back(in[n / kWarp % kRounds * kWarp + kWarp - 1 - n % kWarp]);
  }
  expected.resize(expected.size() + 2, in[0] - in[1]);
  return error.empty() ? same(out, expected) : error;
}

constexpr unsigned kCluster = 4, kClusters = 2, kBlocks = kCluster * kClusters;

std::string cluster_place() {
  const Buffer<uint32_t> out("out", untouched<uint32_t>(2 * kBlocks));
  const std::string error = start("probe_cluster_place", probe_cluster_place, config(kBlocks, 1, 0, kCluster), out);
  std::vector<uint32_t> expected;
  for (unsigned block = 0; block < kBlocks; ++block) expected.insert(expected.end(), {block % kCluster, kCluster});
  return error.empty() ? same(out, expected) : error;
}

// Of the block that is `distance` further on in the cluster.
unsigned peer(size_t block, unsigned distance) {
  const auto b = static_cast<unsigned>(block);
  return b / kCluster * kCluster + (b + distance) % kCluster;
}

template <typename T>
std::string peers(const char* name, void (*kernel)(const T*, T*)) {
  const Buffer<T> in("in", random_values<T>(kBlocks * kWarp), kRead), out("out", untouched<T>(2 * kBlocks * kWarp));
  const std::string error = start(name, kernel, config(kBlocks, kWarp, sizeof(Peers<T>), kCluster), in, out);
  std::vector<T> expected;
  for (size_t n = 0; n < 2 * kBlocks * kWarp; ++n) {
    const size_t block = n / kWarp / 2, l = n % kWarp;
    const bool was_read = n / kWarp % 2 != 0;  // else: written by the block before, which read it two further on
    expected.push_back(in[peer(block, was_read ? 2 : 1) * kWarp + kWarp - 1 - l]);
  }
  return error.empty() ? same(out, expected) : error;
}

std::string split_cluster_barrier() {
  const Buffer<uint32_t> in("in", random_values<uint32_t>(kBlocks * kWarp), kRead);
  const Buffer<uint32_t> out("out", untouched<uint32_t>(kBlocks * kWarp));
  const std::string error = start("probe_split_cluster_barrier", probe_split_cluster_barrier,
                                  config(kBlocks, kWarp, sizeof(Peers<uint32_t>), kCluster), in, out);
  std::vector<uint32_t> expected;
  for (size_t n = 0; n < out.size(); ++n) expected.push_back(in[peer(n / kWarp, kCluster - 1) * kWarp + n % kWarp] + 1);
  return error.empty() ? same(out, expected) : error;
}

std::string arrivals() {
  const Buffer<uint32_t> in("in", random_values<uint32_t>(kBlocks), kRead), out("out", untouched<uint32_t>(kBlocks));
  const std::string error =
      start("probe_arrive_peer", probe_arrive_peer, config(kBlocks, kWarp, sizeof(Arrivals), kCluster), in, out);
  std::vector<uint32_t> expected = untouched<uint32_t>(kBlocks);
  for (size_t n = 0; n < kBlocks; ++n) expected[n] = n % kCluster ? in[n] : expected[n];
  return error.empty() ? same(out, expected) : error;
}

template <typename T>
std::string pushes(const char* name, void (*kernel)(const T*, T*)) {
  const size_t size = kBlocks * 2 * kWarp;
  const Buffer<T> in("in", random_values<T>(size), kRead), out("out", untouched<T>(size));
  const std::string error = start(name, kernel, config(kBlocks, kWarp, sizeof(Pushes<T>), kCluster), in, out);
  std::vector<T> expected;
  for (size_t n = 0; n < size; ++n)
    expected.push_back(in[peer(n / kWarp / 2, kCluster - 1) * 2 * kWarp + n % (2 * kWarp)]);
  return error.empty() ? same(out, expected) : error;
}

std::string bulk() {
  const size_t piece = kWarp;
  const Buffer<uint4> in("in", random_values<uint4>(kBlocks * 2 * piece), kRead);
  const Buffer<uint4> out("out", untouched<uint4>(kBlocks * 4 * piece));
  const std::string error = start("probe_bulk", probe_bulk, config(kBlocks, kWarp, sizeof(Bulk), kCluster), in, out);
  std::vector<uint4> expected;
  for (size_t block = 0; block < kBlocks; ++block) {
    const uint4* const sent = &in[peer(block, kCluster - 1) * 2 * piece];
    const uint4* const second = &in[block * 2 * piece + piece];
    expected.insert(expected.end(), second, second + piece);
    expected.insert(expected.end(), sent, sent + piece);
    expected.insert(expected.end(), second, second + piece);
    expected.insert(expected.end(), sent, sent + piece);
    expected[expected.size() - piece] = second[0];
  }
  return error.empty() ? same(out, expected) : error;
}
std::string proxy_fence() {
  const Buffer<uint4> in("in", random_values<uint4>(kWarp), kRead), out("out", untouched<uint4>(kWarp));
  const std::string error = start("probe_proxy_fence", probe_proxy_fence, config(1, kWarp, sizeof(Proxies)), in, out);
  return error.empty() ? same(out, std::vector<uint4>(in.data(), in.data() + kWarp)) : error;
}

// ----------------------------------------------------------------------------------------------------------- the program

struct Probe {
  const char* name;  // of the kernel
  int architecture;  // the first that can run it
  std::function<std::string()> run;
};
#define PROBE(architecture, kernel, ...) {#kernel, architecture, [] { return __VA_ARGS__; }}
const Probe kProbes[] = {
    PROBE(80, probe_named_barriers, named_barriers()),
    PROBE(80, probe_kept, kept_value()),
    PROBE(80, probe_device_32, message<uint32_t>("probe_device_32", probe_device_32, Through::memory)),
    PROBE(80, probe_device_64, message<uint64_t>("probe_device_64", probe_device_64, Through::memory)),
    PROBE(80, probe_system_32, message<uint32_t>("probe_system_32", probe_system_32, Through::memory)),
    PROBE(80, probe_system_64, message<uint64_t>("probe_system_64", probe_system_64, Through::memory)),
    PROBE(80, probe_block_32, message<uint32_t>("probe_block_32", probe_block_32, Through::block)),
    PROBE(80, probe_block_64, message<uint64_t>("probe_block_64", probe_block_64, Through::block)),
    PROBE(90, probe_cluster_32, message<uint32_t>("probe_cluster_32", probe_cluster_32, Through::cluster)),
    PROBE(90, probe_cluster_64, message<uint64_t>("probe_cluster_64", probe_cluster_64, Through::cluster)),
    PROBE(80, probe_clocks, clocks()),
    PROBE(80, probe_load_matrix_x1, load_matrix("probe_load_matrix_x1", probe_load_matrix_x1, 1, false)),
    PROBE(80, probe_load_matrix_x2, load_matrix("probe_load_matrix_x2", probe_load_matrix_x2, 2, false)),
    PROBE(80, probe_load_matrix_x4, load_matrix("probe_load_matrix_x4", probe_load_matrix_x4, 4, false)),
    PROBE(80, probe_load_matrix_x1_transposed,
          load_matrix("probe_load_matrix_x1_transposed", probe_load_matrix_x1_transposed, 1, true)),
    PROBE(80, probe_load_matrix_x2_transposed,
          load_matrix("probe_load_matrix_x2_transposed", probe_load_matrix_x2_transposed, 2, true)),
    PROBE(80, probe_load_matrix_x4_transposed,
          load_matrix("probe_load_matrix_x4_transposed", probe_load_matrix_x4_transposed, 4, true)),
    PROBE(80, probe_mma_bf16, mma("probe_mma_bf16", probe_mma_bf16, Element::bf16)),
    PROBE(80, probe_mma_f16, mma("probe_mma_f16", probe_mma_f16, Element::f16)),
    PROBE(80, probe_mma_tf32, mma("probe_mma_tf32", probe_mma_tf32, Element::tf32)),
    PROBE(80, probe_nearest_tf32, nearest()),
    PROBE(80, probe_tanh, tanh_()),
    PROBE(80, probe_reciprocal, reciprocal()),
    PROBE(80, probe_exp2, exp2_()),
    PROBE(80, probe_lesser, lesser()),
    PROBE(80, probe_copy_async_4, copies("probe_copy_async_4", probe_copy_async_4, 4)),
    PROBE(80, probe_copy_async_8, copies("probe_copy_async_8", probe_copy_async_8, 8)),
    PROBE(80, probe_copy_async_16, copies("probe_copy_async_16", probe_copy_async_16, 16)),
    PROBE(80, probe_copy_async_arrive, reversed_rows("probe_copy_async_arrive", probe_copy_async_arrive)),
    PROBE(80, probe_mbarrier_wait, mbarriers("probe_mbarrier_wait", probe_mbarrier_wait)),
    PROBE(80, probe_mbarrier_test, mbarriers("probe_mbarrier_test", probe_mbarrier_test)),
    PROBE(90, probe_cluster_place, cluster_place()),
    PROBE(90, probe_peers_4, peers<uint32_t>("probe_peers_4", probe_peers_4)),
    PROBE(90, probe_peers_8, peers<uint2>("probe_peers_8", probe_peers_8)),
    PROBE(90, probe_peers_16, peers<uint4>("probe_peers_16", probe_peers_16)),
    PROBE(90, probe_split_cluster_barrier, split_cluster_barrier()),
    PROBE(90, probe_arrive_peer, arrivals()),
    PROBE(90, probe_push_4, pushes<uint32_t>("probe_push_4", probe_push_4)),
    PROBE(90, probe_push_8, pushes<uint2>("probe_push_8", probe_push_8)),
    PROBE(90, probe_push_16, pushes<uint4>("probe_push_16", probe_push_16)),
    PROBE(90, probe_bulk, bulk()),
    PROBE(90, probe_proxy_fence, proxy_fence()),
};
#undef PROBE

}  // namespace

int main(int count, char** arguments) {
  uint64_t seeds = 4;
  std::string file;
  std::vector<std::string> names;
  where.options.most_steps = uint64_t{1} << 20;
  where.options.order = true;
  for (int n = 1; n < count; ++n) {
    const std::string word = arguments[n];
    const auto value = [&] { return n + 1 < count ? arguments[++n] : ""; };
    if (word == "--seeds") {
      seeds = std::strtoull(value(), nullptr, 10);
    } else if (word == "--steps") {
      where.options.most_steps = std::strtoull(value(), nullptr, 10);
    } else if (word == "--ptx") {
      file = value();
    } else {
      names.push_back(word);
    }
  }
  emulator::options().print = false;
  int architecture = 90;
  std::unique_ptr<ptx::Module> module;
  try {
    if (!file.empty()) {
      module = std::make_unique<ptx::Module>(file);
      where.module = module.get();
      architecture = std::atoi(module->target().c_str() + 3);  // "sm_90a"
    }
  } catch (const ptx::Error& error) {
    std::printf("REFUSED %s: %s\n", file.c_str(), error.what());
    return 2;
  }
  for (const Probe& probe : kProbes) {
    if (probe.architecture > architecture) continue;
    if (!names.empty() && std::find(names.begin(), names.end(), probe.name) == names.end()) continue;
    try {
      if (module) module->program(probe.name);
    } catch (const ptx::Error& error) {
      std::printf("REFUSED %s: %s\n", probe.name, error.what());
      return 2;
    }
    for (uint64_t seed = 1; seed <= seeds; ++seed) {
      std::string error;
      where.options.seed = emulator::options().seed = seed;
      emulator::options().order = seed % 2 ? emulator::Order::random : emulator::Order::priorities;
      try {
        error = probe.run();
      } catch (const ptx::Error& found) {
        error = found.what();
      }
      if (error.empty()) continue;
      std::printf("FAILED %s (seed %llu): %s\n", probe.name, static_cast<unsigned long long>(seed), error.c_str());
      return 1;
    }
    std::printf("ok     %s\n", probe.name);
  }
  return 0;
}
