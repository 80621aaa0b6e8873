// tests/emulator/selftest_matrix.cpp: the matrix instructions of the emulator, against the PTX ISA's own formulae
// (written out once more here, element by element) and against products in double; then in running kernels, legal and
// illegal.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>

#include "cuda/primitives.cuh"
#include "emulator/core.h"
#include "emulator/matrix.h"

namespace {

using namespace stacked_lstm::emulator;
namespace cuda = stacked_lstm::cuda;

constexpr Element kElements[] = {Element::bf16, Element::f16, Element::tf32};
const char* name_of(Element element) {
  return element == Element::bf16 ? "bf16" : element == Element::f16 ? "fp16" : "tf32";
}

int failures = 0;

void judge(const std::string& name, const std::string& fault) {
  failures += !fault.empty();
  std::printf("%s %s%s%s\n", fault.empty() ? "ok    " : "FAILED", name.c_str(), fault.empty() ? "" : ": ",
              fault.c_str());
}

template <typename... A>
std::string text(const char* format, A... arguments) {
  char buffer[256];
  std::snprintf(buffer, sizeof buffer, format, arguments...);
  return buffer;
}

// The PTX ISA's tables, in its own words: "groupID = %laneid >> 2, threadID_in_group = %laneid % 4", and i counts the
// elements of a lane's fragment.
Position ptx_a(Element element, int laneid, int i) {
  const int groupID = laneid >> 2, threadID_in_group = laneid % 4;
  if (element == Element::tf32) {
    return {i == 0 || i == 2 ? groupID : groupID + 8, i == 0 || i == 1 ? threadID_in_group : threadID_in_group + 4};
  }
  const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? groupID : groupID + 8;
  const int column = i < 4 ? threadID_in_group * 2 + (i & 1) : threadID_in_group * 2 + (i & 1) + 8;
  return {row, column};
}
Position ptx_b(Element element, int laneid, int i) {
  const int groupID = laneid >> 2, threadID_in_group = laneid % 4;
  if (element == Element::tf32) return {i == 0 ? threadID_in_group : threadID_in_group + 4, groupID};
  return {i < 2 ? threadID_in_group * 2 + (i & 1) : threadID_in_group * 2 + (i & 1) + 8, groupID};
}
Position ptx_c(int laneid, int i) {
  const int groupID = laneid >> 2, threadID_in_group = laneid % 4;
  return {i < 2 ? groupID : groupID + 8, threadID_in_group * 2 + (i & 1)};
}

// Storage of a number, exact for those the tests use.
uint32_t stored(Element element, double x) {
  float value = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (element == Element::bf16) return bits >> 16;
  if (element == Element::tf32) return bits;
  if (x == 0) return bits >> 16;
  if (std::isinf(x)) return x < 0 ? 0xFC00 : 0x7C00;
  if (std::isnan(x)) return 0x7E00;
  int exponent;
  const double mantissa = std::frexp(std::fabs(x), &exponent);  // in [1/2, 1)
  const uint32_t sign = x < 0 ? 0x8000 : 0;
  if (exponent < -13) return sign | static_cast<uint32_t>(std::ldexp(std::fabs(x), 24));
  return sign | static_cast<uint32_t>(exponent + 14) << 10 | (static_cast<uint32_t>(std::ldexp(mantissa, 11)) & 0x3FF);
}

// A random number that the format holds exactly.
double random_number(Element element, std::mt19937& random, int lowest_exponent, int highest_exponent) {
  const int bits = element == Element::bf16 ? 8 : 11;
  const double mantissa = static_cast<double>(random() % (1u << bits)) + (1u << bits);
  const int exponent = lowest_exponent + static_cast<int>(random() % (highest_exponent - lowest_exponent + 1));
  const double magnitude = std::ldexp(std::floor(mantissa / 2) * 2, exponent - bits);
  return random() & 1 ? magnitude : -magnitude;
}

// One product, with its matrices and its registers.
struct Product {
  Element element;
  double a[16][16] = {}, b[16][8] = {}, c[16][8] = {};
  uint32_t a_registers[kLanes][4] = {}, b_registers[kLanes][2] = {};
  float d_registers[kLanes][4] = {};

  explicit Product(Element e) : element(e) {}

  void pack() {
    const int parts = elements_a_register(element);
    std::memset(a_registers, 0, sizeof a_registers);
    std::memset(b_registers, 0, sizeof b_registers);
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4 * parts; ++i) {
        const Position p = ptx_a(element, lane, i);
        a_registers[lane][i / parts] |= stored(element, a[p.row][p.column]) << (i % parts * 16);
      }
      for (int i = 0; i < 2 * parts; ++i) {
        const Position p = ptx_b(element, lane, i);
        b_registers[lane][i / parts] |= stored(element, b[p.row][p.column]) << (i % parts * 16);
      }
      for (int i = 0; i < 4; ++i) {
        const Position p = ptx_c(lane, i);
        d_registers[lane][i] = static_cast<float>(c[p.row][p.column]);
      }
    }
  }

  void run() {
    MmaOperands lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = {d_registers[lane], a_registers[lane], b_registers[lane]};
    multiply(element, lanes);
  }

  // The largest error, in units of what the hardware may lose: every product and every partial sum is cut to 24 bits or
  // more of the largest of them.
  double error_in_bounds(std::string& fault) {
    double worst = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const Position p = ptx_c(lane, i);
        double exact = c[p.row][p.column], magnitude = std::fabs(exact);
        for (int k = 0; k < depth(element); ++k) {
          exact += a[p.row][k] * b[k][p.column];
          magnitude += std::fabs(a[p.row][k] * b[k][p.column]);
        }
        const double got = d_registers[lane][i], bound = (depth(element) + 4) * 0x1p-23 * magnitude;
        const double share = got == exact ? 0 : std::fabs(got - exact) / bound;
        if (!(share <= worst)) {
          worst = share;
          if (!(share <= 1)) fault = text("d[%d][%d] is %.9g instead of %.9g", p.row, p.column, got, exact);
        }
      }
    }
    return worst;
  }
};

// Every element of a and of b by itself: a one there must bring a whole row of b, or column of a, to the right place.
void layouts(Element element) {
  const int parts = elements_a_register(element);
  std::string fault;
  for (int lane = 0; lane < kLanes && fault.empty(); ++lane) {
    for (int i = 0; i < 4 * parts; ++i) {
      const Position want = ptx_a(element, lane, i), is = place_in_a(element, lane, i / parts, i % parts);
      if (want.row != is.row || want.column != is.column) fault = text("a: lane %d, element %d", lane, i);
      Product one(element);
      for (int k = 0; k < depth(element); ++k) {
        for (int n = 0; n < 8; ++n) one.b[k][n] = k * 8 + n;
      }
      one.pack();
      one.a_registers[lane][i / parts] |= stored(element, 1.0) << (i % parts * 16);
      one.a[want.row][want.column] = 1;
      one.run();
      one.error_in_bounds(fault);
    }
    for (int i = 0; i < 2 * parts; ++i) {
      const Position want = ptx_b(element, lane, i), is = place_in_b(element, lane, i / parts, i % parts);
      if (want.row != is.row || want.column != is.column) fault = text("b: lane %d, element %d", lane, i);
      Product one(element);
      for (int m = 0; m < 16; ++m) {
        for (int k = 0; k < depth(element); ++k) one.a[m][k] = m * 16 + k;
      }
      one.pack();
      one.b_registers[lane][i / parts] |= stored(element, 1.0) << (i % parts * 16);
      one.b[want.row][want.column] = 1;
      one.run();
      one.error_in_bounds(fault);
    }
    for (int i = 0; i < 4; ++i) {
      const Position want = ptx_c(lane, i), is = place_in_d(lane, i);
      if (want.row != is.row || want.column != is.column) fault = text("d: lane %d, element %d", lane, i);
    }
  }
  judge(text("mma %s: every element of the fragments at its place", name_of(element)), fault);
}

void random_products(Element element) {
  struct Range {
    const char* name;
    int lowest, highest;
  };
  const Range ranges[] = {{"numbers of one size", 0, 1}, {"numbers of many sizes", -7, 7}, {"small numbers", -13, -9}};
  std::mt19937 random(7);
  for (const Range& range : ranges) {
    double worst = 0;
    std::string fault;
    for (int repeat = 0; repeat < 20; ++repeat) {
      Product product(element);
      for (auto& row : product.a) {
        for (double& x : row) x = random_number(element, random, range.lowest, range.highest);
      }
      for (auto& row : product.b) {
        for (double& x : row) x = random_number(element, random, range.lowest, range.highest);
      }
      for (auto& row : product.c) {
        for (double& x : row) x = random_number(element, random, 2 * range.lowest, 2 * range.highest);
      }
      product.pack();
      // In place, four times over: d goes on where it was.
      for (int turn = 0; turn < 4; ++turn) {
        product.run();
        worst = std::fmax(worst, product.error_in_bounds(fault));
        for (int lane = 0; lane < kLanes; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const Position p = ptx_c(lane, i);
            product.c[p.row][p.column] = product.d_registers[lane][i];
          }
        }
      }
    }
    judge(text("mma %s: %s, at most %.2f of the bound", name_of(element), range.name, worst), fault);
  }
}

// One row of a against one column of b, and what the sum must be; NaN stands for any NaN.
void special_values() {
  const double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  struct Row {
    const char* name;
    Element element;
    double a0, b0, a1, b1, c, want;
  };
  const Row rows[] = {
      {"infinity times one", Element::bf16, inf, 1, 1, 1, 0, inf},
      {"infinity minus infinity", Element::f16, inf, 1, inf, -1, 0, nan},
      {"infinity times zero", Element::tf32, inf, 0, 1, 1, 0, nan},
      {"NaN", Element::bf16, nan, 0, 1, 1, 0, nan},
      {"NaN", Element::f16, nan, 0, 1, 1, 0, nan},
      {"NaN", Element::tf32, nan, 0, 1, 1, 0, nan},
      {"NaN in the accumulator", Element::f16, 0, 0, 1, 1, nan, nan},
      {"denormals are numbers", Element::f16, 0x1p-24, 1024, 0x3p-24, 1, 0, 0x403p-24},
      {"denormals are numbers", Element::bf16, 0x1p-133, 0x1p10, 0, 0, 0, 0x1p-123},
      {"a denormal sum", Element::bf16, 0x1p-70, 0x1p-70, 0x1p-70, 0x1p-71, 0, 0x3p-141},
      {"overflow", Element::bf16, 0x1p100, 0x1p100, 0, 0, 0, inf},
      {"a sum that just fits", Element::bf16, 0x1p64, 0x1p63, 0, 0, -1, 0x1p127},
      {"two products of half the last bit count", Element::f16, 0x1p-12, 0x1p-12, 0x1p-12, 0x1p-12, 1, 1 + 0x1p-23},
      {"two of a quarter are cut off", Element::f16, 0x1p-12, 0x1p-13, 0x1p-12, 0x1p-13, 1, 1},
      {"a cancelled sum is exact", Element::bf16, 0x1p10, 0x1p10, 1, 1, -0x1p20, 1},
      {"a small product beside a large one is lost", Element::bf16, 0x1p20, 0x1p20, 1, 1, -0x1p40, 0},
      {"the low 13 bits of tf32 are ignored", Element::tf32, 1 + 0x1p-11, 1, 0, 0, 0, 1},
      {"and bit 13 is not", Element::tf32, 1 + 0x1p-10, 1, 0, 0, 0, 1 + 0x1p-10},
  };
  for (const Row& row : rows) {
    Product product(row.element);
    product.a[3][1] = row.a0, product.b[1][2] = row.b0;
    product.a[3][4] = row.a1, product.b[4][2] = row.b1;
    product.c[3][2] = row.c;
    product.pack();
    product.run();
    std::string fault;
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const Position p = ptx_c(lane, i);
        if (p.row != 3 || p.column != 2) continue;
        const double got = product.d_registers[lane][i];
        if (!(got == row.want || (got != got && row.want != row.want))) fault = text("%a instead of %a", got, row.want);
      }
    }
    judge(text("mma %s: %s", name_of(row.element), row.name), fault);
  }
}

void matrix_registers() {
  uint16_t rows[8][8];
  for (int r = 0; r < 8; ++r) {
    for (int c = 0; c < 8; ++c) rows[r][c] = static_cast<uint16_t>(r * 16 + c);
  }
  std::string fault;
  // PTX ISA: lane l holds row l/4, columns 2(l%4) and 2(l%4)+1; of the transposed matrix with .trans.
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const uint32_t row = lane >> 2, column = 2 * (lane & 3);
    const uint32_t plain = (row * 16 + column) | (row * 16 + column + 1) << 16;
    const uint32_t transposed = (column * 16 + row) | ((column + 1) * 16 + row) << 16;
    if (matrix_register(rows, static_cast<int>(lane), false) != plain) fault = text("lane %u", lane);
    if (matrix_register(rows, static_cast<int>(lane), true) != transposed) fault = text("lane %u, transposed", lane);
  }
  judge("ldmatrix: every element in its lane", fault);
}

void approximations() {
  struct Row {
    const char* name;
    float (*function)(float);
    double (*exact)(double);
    float lowest, highest;
    double bound;  // of the relative error
  };
  const Row rows[] = {
      {"tanh", tanh_approx, [](double x) { return std::tanh(x); }, -12.0f, 12.0f, 0x1p-11},
      {"reciprocal", reciprocal_approx, [](double x) { return 1 / x; }, 1.0f, 2.0f, 0x1p-22},
      {"exp2", exp2_approx, [](double x) { return std::exp2(x); }, -125.0f, 127.0f, 0x1p-22},
  };
  for (const Row& row : rows) {
    double worst = 0;
    for (int i = 0; i <= 100000; ++i) {
      const float x = row.lowest + (row.highest - row.lowest) * static_cast<float>(i) / 100000;
      const double exact = row.exact(x), error = row.function(x) == exact ? 0 : row.function(x) / exact - 1;
      worst = std::fmax(worst, std::fabs(error));
    }
    // No better than half of what is promised either: that is what it is for.
    std::string fault;
    if (worst > row.bound || worst < row.bound / 2)
      fault = text("relative error %.3g, promised %.3g", worst, row.bound);
    judge(text("%s: relative error %.3g", row.name, worst), fault);
  }
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const bool ends = tanh_approx(inf) == 1 && tanh_approx(-inf) == -1 && tanh_approx(0x1p-140f) == 0x1p-140f &&
                    reciprocal_approx(0) == inf && reciprocal_approx(-0.0f) == -inf && reciprocal_approx(inf) == 0 &&
                    reciprocal_approx(0x1p-130f) == inf && reciprocal_approx(0x1p127f) == 0 && exp2_approx(-inf) == 0 &&
                    exp2_approx(inf) == inf && exp2_approx(128) == inf && exp2_approx(-127) == 0 &&
                    exp2_approx(0) == 1 && std::isnan(tanh_approx(nan)) && std::isnan(reciprocal_approx(nan)) &&
                    std::isnan(exp2_approx(nan));
  judge("tanh, reciprocal, exp2: infinities, zeros, denormals, NaN", ends ? "" : "a wrong value");
}

// --------------------------------------------------------------------------------------------- in running kernels

constexpr Order kOrders[] = {Order::forward, Order::reverse, Order::random, Order::priorities};

Report run_warp(Order order, const std::function<void()>& kernel) {
  options().order = order;
  options().print = false;
  Shape shape;
  shape.block = dim3(kLanes);
  shape.shared_bytes = 4096;
  return run(shape, kernel);
}

// Rows of 8 elements, 48 bytes apart. Lane l names row kRowOf(l): no two matrices' rows lie in order.
struct Tile {
  alignas(128) uint16_t row[kLanes][24];
};
constexpr unsigned row_of(unsigned lane) { return lane * 13 % kLanes; }
constexpr uint16_t tile_element(unsigned row, unsigned column) { return static_cast<uint16_t>(row * 256 + column); }

template <int matrices, bool transposed>
void load_from_kernel(const char* name, void (*load)(uint32_t (&)[matrices], uint32_t, Location)) {
  std::string fault;
  for (Order order : kOrders) {
    uint32_t got[kLanes][matrices];
    const Report report = run_warp(order, [&] {
      Tile& tile = cuda::dynamic_shared<Tile>();
      const unsigned lane = threadIdx.x;
      for (unsigned c = 0; c < 8; ++c) tile.row[lane][c] = tile_element(lane, c);
      cuda::warp_barrier();
      // The addresses of lanes that name no row are not looked at.
      const uint32_t address = lane < 8 * matrices ? cuda::shared_address(tile.row[row_of(lane)]) : 3;
      load(got[lane], address, Location::current());
    });
    if (!report.ok()) fault = report.text;
    for (unsigned lane = 0; lane < kLanes && report.ok(); ++lane) {
      for (unsigned i = 0; i < matrices; ++i) {
        for (unsigned part = 0; part < 2; ++part) {
          const unsigned r = lane / 4, c = lane % 4 * 2 + part;
          const uint16_t want = transposed ? tile_element(row_of(8 * i + c), r) : tile_element(row_of(8 * i + r), c);
          if ((got[lane][i] >> 16 * part & 0xFFFF) != want) fault = text("lane %u, register %u", lane, i);
        }
      }
    }
  }
  judge(text("%s in a kernel", name), fault);
}

// d = a·b through shared memory, as kernels do it: a by rows, b as it lies (k by n) through the transposed load.
void product_from_kernel(Element element) {
  std::mt19937 random(3);
  Product product(element);
  for (auto& row : product.a) {
    for (double& x : row) x = random_number(element, random, -2, 2);
  }
  for (auto& row : product.b) {
    for (double& x : row) x = random_number(element, random, -2, 2);
  }
  std::string fault;
  for (Order order : kOrders) {
    const Report report = run_warp(order, [&] {
      struct Operands {
        alignas(128) uint16_t a[16][24], b[16][8];
      };
      Operands& shared = cuda::static_shared<Operands>();
      const unsigned lane = threadIdx.x;
      for (unsigned i = lane; i < 16 * 16; i += kLanes) {
        shared.a[i / 16][i % 16] = static_cast<uint16_t>(stored(element, product.a[i / 16][i % 16]));
      }
      for (unsigned i = lane; i < 16 * 8; i += kLanes) {
        shared.b[i / 8][i % 8] = static_cast<uint16_t>(stored(element, product.b[i / 8][i % 8]));
      }
      cuda::block_barrier();
      uint32_t a[4], b[2];
      cuda::load_matrix_x4(a, cuda::shared_address(&shared.a[lane % 16][lane / 16 * 8]));
      cuda::load_matrix_x2_transposed(b, cuda::shared_address(shared.b[lane % 16]));
      float (&d)[4] = product.d_registers[lane];
      for (float& x : d) x = 0;
      element == Element::bf16 ? cuda::mma_bf16(d, a, b) : cuda::mma_f16(d, a, b);
    });
    if (!report.ok()) fault = report.text;
    product.error_in_bounds(fault);
  }
  judge(text("mma %s in a kernel, by ldmatrix", name_of(element)), fault);
}

void tf32_from_kernel() {
  Product product(Element::tf32);
  std::mt19937 random(4);
  for (auto& row : product.a) {
    for (double& x : row) x = random_number(Element::tf32, random, -2, 2);
  }
  for (auto& row : product.b) {
    for (double& x : row) x = random_number(Element::tf32, random, -2, 2);
  }
  product.pack();
  const Report report = run_warp(Order::random, [&] {
    const unsigned lane = threadIdx.x;
    cuda::mma_tf32(product.d_registers[lane], product.a_registers[lane], product.b_registers[lane]);
  });
  std::string fault = report.text;
  product.error_in_bounds(fault);
  judge("mma tf32 in a kernel", fault);
}

// ------------------------------------------------------------------------------------------------------------ illegal

Tile& written_tile() {
  Tile& tile = cuda::dynamic_shared<Tile>();
  for (unsigned c = 0; c < 24; ++c) tile.row[threadIdx.x][c] = 1;
  cuda::warp_barrier();
  return tile;
}

void load_all(uint32_t address) {
  uint32_t r[4];
  cuda::load_matrix_x4(r, address);
}

void misaligned_row() { load_all(cuda::shared_address(written_tile().row[threadIdx.x]) + (threadIdx.x == 9 ? 8 : 0)); }
void row_out_of_bounds() {
  load_all(cuda::shared_address(written_tile().row[threadIdx.x]) + (threadIdx.x == 9 ? 4096 : 0));
}
void no_address() {
  written_tile();
  load_all(0);
}
void nobody_wrote_it() { load_all(cuda::shared_address(cuda::dynamic_shared<Tile>().row[threadIdx.x])); }
void a_lane_has_gone() {
  const uint32_t address = cuda::shared_address(written_tile().row[threadIdx.x]);
  if (threadIdx.x == 5) return;
  load_all(address);
}
void a_lane_is_elsewhere() {
  const uint32_t address = cuda::shared_address(written_tile().row[threadIdx.x]);
  uint32_t r[4], one[1];
  if (threadIdx.x == 5) {
    cuda::load_matrix_x1(one, address);
  } else {
    cuda::load_matrix_x4(r, address);
  }
}
void multiply_words(uint32_t a_word, uint32_t b_word) {
  const uint32_t a[4] = {a_word, 0, 0, 0}, b[2] = {0, b_word};
  float d[4] = {};
  cuda::mma_bf16(d, a, b);
}
void unwritten_operand() { multiply_words(threadIdx.x == 7 ? 0xFFFF0000 : 0, 0); }
void unwritten_operand_b() { multiply_words(0, threadIdx.x == 7 ? 0x0000FFFF : 0); }
void unwritten_tf32() {
  const uint32_t a[4] = {0, 0, 0, threadIdx.x == 7 ? ~0u : 0}, b[2] = {};
  float d[4] = {};
  cuda::mma_tf32(d, a, b);
}
void lanes_multiply_and_load() {
  const uint32_t address = cuda::shared_address(written_tile().row[threadIdx.x]);
  if (threadIdx.x < 16) {
    load_all(address);
  } else {
    multiply_words(0, 0);
  }
}
void plain_nan() { multiply_words(threadIdx.x == 7 ? 0x7FC0 : 0, 0); }

void illegal() {
  struct Row {
    const char* name;
    void (*kernel)();
    Kind kind;
    NaNs allowed = NaNs::all_but_unwritten;
  };
  const Row rows[] = {
      {"ldmatrix: a misaligned row", misaligned_row, Kind::misaligned},
      {"ldmatrix: a row out of bounds", row_out_of_bounds, Kind::out_of_bounds},
      {"ldmatrix: address 0", no_address, Kind::out_of_bounds},
      {"ldmatrix: memory that nobody wrote", nobody_wrote_it, Kind::not_written},
      {"ldmatrix: the same, NaNs allowed", nobody_wrote_it, Kind::none, NaNs::any},
      {"ldmatrix: a lane has exited", a_lane_has_gone, Kind::warp_mismatch},
      {"ldmatrix: a lane loads less", a_lane_is_elsewhere, Kind::warp_mismatch},
      {"mma: half the warp is at an ldmatrix", lanes_multiply_and_load, Kind::warp_mismatch},
      {"mma: an element of a that nobody wrote", unwritten_operand, Kind::not_a_number},
      {"mma: an element of b that nobody wrote", unwritten_operand_b, Kind::not_a_number},
      {"mma: a tf32 that nobody wrote", unwritten_tf32, Kind::not_a_number},
      {"mma: the same, NaNs allowed", unwritten_operand, Kind::none, NaNs::any},
      {"mma: a NaN of the data's own", plain_nan, Kind::none},
      {"mma: the same, no NaN allowed", plain_nan, Kind::not_a_number, NaNs::none},
  };
  for (const Row& row : rows) {
    std::string fault, found;
    for (Order order : kOrders) {
      allowed_nans() = row.allowed;
      const Report report = run_warp(order, row.kernel);
      allowed_nans() = NaNs::all_but_unwritten;
      if (report.kind != row.kind)
        fault = text("order %s: %s", name(order), report.ok() ? "nothing found" : report.text.c_str());
      found = report.text;
    }
    judge(row.name, fault);
    if (!found.empty()) std::printf("       %s\n", found.c_str());
  }
}

}  // namespace

int main() {
  for (Element element : kElements) {
    layouts(element);
    random_products(element);
  }
  special_values();
  matrix_registers();
  approximations();

  load_from_kernel<1, false>("ldmatrix x1", cuda::load_matrix_x1);
  load_from_kernel<2, false>("ldmatrix x2", cuda::load_matrix_x2);
  load_from_kernel<4, false>("ldmatrix x4", cuda::load_matrix_x4);
  load_from_kernel<1, true>("ldmatrix x1, transposed", cuda::load_matrix_x1_transposed);
  load_from_kernel<2, true>("ldmatrix x2, transposed", cuda::load_matrix_x2_transposed);
  load_from_kernel<4, true>("ldmatrix x4, transposed", cuda::load_matrix_x4_transposed);
  product_from_kernel(Element::bf16);
  product_from_kernel(Element::f16);
  tf32_from_kernel();
  illegal();
  return failures != 0;
}
