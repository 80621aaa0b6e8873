// tests/emulator/persistent_forward.cpp: runs the persistent forward kernel and checks every number that it writes.
//
//   persistent_forward [--order O] [--seed N] [--seeds N] [--exact] [--l2] [--every] [--unjudged] [name ...]
//
// runs all cases whose name begins like one of these; --l2: of those, what needs no cluster; --every: instead, a case for
// each instance that was compiled; --seeds N: in N random orders; --unjudged: only the
// bits of the orders are compared.
//
// The reference computes every step in float64 from the h that the kernel itself has left for the step before and the lane
// below. So roundings are the kernel's own, errors do not add up, and the tolerance is that of one step. It shares no
// equation with the kernel. All memory that the kernel gets lies between guard zones of NaN: outputs start as NaN too,
// and a zone that is read makes a matrix operand NaN, which the emulator reports. --exact: no zones, for AddressSanitizer.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/stack/philox.h"
#include "lend.h"
#include "persistent_forward_instances.h"

using namespace stacked_lstm;
using namespace stacked_lstm::persistent;

namespace {

bool exact = false, judged = true;
std::mt19937 generator;

float uniform(float bound) { return std::uniform_real_distribution<float>(-bound, bound)(generator); }
size_t count_of(int64_t n) { return static_cast<size_t>(n); }

// Memory between two zones. All bits set is NaN in every format.
template <typename T>
class Guarded {
 public:
  Guarded() = default;
  explicit Guarded(int64_t count) : zone_(exact ? 0 : 256 / sizeof(T)), all_(count_of(count) + 2 * zone_) {
    std::memset(static_cast<void*>(all_.data()), 0xFF, all_.size() * sizeof(T));
  }
  T* data() { return all_.data() + zone_; }
  T& operator[](int64_t n) { return data()[n]; }
  int64_t size() const { return static_cast<int64_t>(all_.size() - 2 * zone_); }
  bool intact() const { return all_set(0, zone_) && all_set(all_.size() - zone_, zone_); }
  bool untouched() const { return all_set(0, all_.size()); }
  bool untouched(int64_t first, int64_t count) const { return all_set(zone_ + count_of(first), count_of(count)); }

 private:
  bool all_set(size_t first, size_t count) const {
    const auto* bytes = reinterpret_cast<const unsigned char*>(all_.data() + first);
    return std::all_of(bytes, bytes + count * sizeof(T), [](unsigned char byte) { return byte == 0xFF; });
  }
  size_t zone_ = 0;
  std::vector<T> all_;
};

enum Element { kBf16, kF16, kF32 };
enum Way { kForward, kReverse, kBoth };
enum : unsigned {
  kH0 = 1,
  kC0 = 2,
  kBiasIh = 4,
  kBiasHh = 8,
  kSaveC = 16,
  kSaveGates = 32,
  kHn = 64,
  kCn = 128,
  kShared = 256,      // W_ih in shared memory
  kStrided = 512,     // x is batch-first, with gaps between its rows
  kMasked = 1024,     // dropout between layers
  kCopied = 2048,     // `above` without a mask
  kShifted = 4096,    // pointers that stand on no more than an element
  kPadded = 8192,     // lengths, and rows for all sequences at every step
  kResets = 16384,    // sequences are reset
  kResidual = 32768,  // lanes of the upper layers add their x to what the layer above sees
  kInitial = kH0 | kC0,
  kBias = kBiasIh | kBiasHh,
  kSaves = kSaveC | kSaveGates,
  kLast = kHn | kCn,
  kAll = kInitial | kBias | kSaves | kLast | kShared,
};

struct Case {
  std::string name;
  Element element;
  Product product;
  Exchange exchange;
  int pieces, splits, batch_tiles, groups, blocks, chunk;
  int layers, steps, batch, inputs, hidden;
  unsigned options = kAll;
  Way way = kForward;
  int batch_groups = 1, copies = 1;
  std::vector<int> lengths = {};  // of each sequence, falling: of a packed batch, or, kPadded, of a padded one

  bool has(unsigned option) const { return (options & option) != 0; }
  int directions() const { return way == kBoth ? 2 : 1; }
  int lanes() const { return layers * directions(); }
};

constexpr Product kTensor = Product::tensor, kExact = Product::exact;
constexpr Exchange kCluster = Exchange::cluster, kL2 = Exchange::l2;
std::vector<int> falling(int steps, int batch) {  // lengths with ends at every step
  std::vector<int> lengths;
  for (int b = 0; b < batch; ++b) lengths.push_back(std::max(1, steps - b * steps / std::max(1, batch - 1)));
  return lengths;
}

const std::vector<Case> kCases = {
    //                                    pieces splits tiles groups blocks chunk   L  T  B  I   H
    {"one_step", kBf16, kTensor, kCluster, 2, 1, 1, 1, 2, 4, 1, 1, 1, 1, 9},             // nothing to exchange
    {"two_blocks", kBf16, kTensor, kCluster, 2, 1, 1, 1, 2, 2, 4, 9, 3, 17, 16, kBias},  // the smallest cluster
    {"deep", kBf16, kTensor, kCluster, 2, 1, 1, 1, 2, 1, 8, 3, 1, 1, 9},                 // fewer steps than layers
    {"two_steps", kBf16, kTensor, kCluster, 2, 1, 1, 2, 2, 4, 2, 2, 8, 17, 30},          // one push, a group half empty
    {"ragged", kBf16, kTensor, kCluster, 2, 1, 1, 1, 3, 6, 3, 19, 3, 17, 20, kSaves},    // 4, 2 steps, … 1 together
    {"forty", kF16, kTensor, kCluster, 2, 2, 1, 3, 2, 3, 3, 9, 8, 128, 40},              // float16
    {"wide_batch", kBf16, kTensor, kCluster, 2, 2, 4, 3, 4, 2, 2, 5, 17, 64, 96},        // a batch tile nearly empty
    {"full_batch", kBf16, kTensor, kCluster, 2, 4, 4, 2, 8, 3, 2, 4, 32, 40, 128},       // four splits
    {"odd_batch", kBf16, kTensor, kCluster, 2, 4, 2, 2, 7, 2, 2, 3, 9, 17, 100, kBias | kMasked},
    {"three_splits", kBf16, kTensor, kCluster, 2, 3, 1, 2, 5, 4, 2, 4, 5, 33, 75},       // 150 bytes a row
    {"wide_input", kBf16, kTensor, kCluster, 2, 2, 1, 2, 2, 4, 2, 6, 4, 1101, 32},       // x in three parts
    {"wide_input_l2", kBf16, kTensor, kL2, 2, 2, 1, 2, 2, 4, 1, 6, 4, 1104, 32, kBias},  // and W_ih from L2
    {"largest", kBf16, kTensor, kCluster, 2, 4, 1, 2, 16, 2, 1, 2, 8, 17, 256, kBias},   // a cluster of 16
    {"eight", kBf16, kTensor, kCluster, 2, 1, 1, 1, 8, 2, 1, 2, 1, 3, 60, kBias},        // a cluster of 8
    {"l2_one", kBf16, kTensor, kL2, 2, 1, 1, 1, 1, 2, 3, 3, 1, 1, 1},
    {"inside_one", kBf16, kTensor, kL2, 2, 1, 1, 1, 1, 2, 4, 9, 3, 17, 8, kBias},  // one block: h stays in it
    {"inside_wide", kBf16, kTensor, kL2, 2, 1, 1, 8, 1, 3, 3, 8, 7, 33, 61},       // as many units as a block has
    {"inside_split", kF16, kTensor, kL2, 2, 2, 1, 3, 1, 2, 2, 7, 8, 17, 24, kAll | kMasked, kBoth},
    {"inside_batch", kBf16, kTensor, kL2, 2, 1, 2, 3, 1, 2, 2, 5, 21, 17, 20, kAll, kReverse, 2, 2, falling(5, 21)},
    {"inside_exact", kF32, kExact, kL2, 2, 1, 1, 3, 1, 2, 2, 6, 5, 7, 24},
    {"inside_tf32", kF32, kTensor, kL2, 2, 3, 1, 2, 1, 3, 2, 7, 3, 17, 13, kAll, kForward, 1, 1, {7, 4, 1}},
    {"not_inside", kBf16, kTensor, kL2, 8, 1, 1, 2, 1, 2, 2, 5, 3, 17, 16},  // too many weights: words to itself
    {"l2_ragged", kBf16, kTensor, kL2, 2, 1, 1, 1, 3, 4, 3, 19, 3, 17, 20, kSaves},
    {"l2_forty", kF16, kTensor, kL2, 2, 2, 1, 3, 2, 3, 3, 9, 8, 64, 40},
    {"l2_batch", kBf16, kTensor, kL2, 2, 2, 2, 3, 4, 3, 2, 5, 13, 64, 96},
    {"l2_eighty", kBf16, kTensor, kL2, 2, 2, 1, 1, 10, 2, 1, 3, 1, 3, 80, kBias},  // two words of a column a thread
    {"l2_two_hundred", kBf16, kTensor, kL2, 2, 4, 1, 1, 25, 2, 2, 3, 3, 33, 200,
     kBias},  // more blocks than a cluster has
    {"l2_widest", kBf16, kTensor, kL2, 8, 3, 1, 2, 48, 2, 1, 2, 3, 40, 768, kAll},
    // Float32: exact, and on the tensor cores.
    {"exact", kF32, kExact, kCluster, 2, 1, 1, 2, 2, 3, 3, 8, 5, 7, 30},
    {"exact_split", kF32, kExact, kCluster, 2, 2, 1, 2, 3, 4, 2, 5, 8, 40, 41, kAll | kMasked},
    {"l2_exact", kF32, kExact, kL2, 2, 2, 1, 1, 5, 2, 2, 5, 3, 20, 40, kBias | kLast},
    {"l2_exact_batch", kF32, kExact, kL2, 2, 3, 2, 2, 6, 2, 2, 3, 11, 33, 96},
    {"tf32", kF32, kTensor, kCluster, 2, 1, 1, 2, 2, 3, 3, 8, 5, 7, 30},
    {"tf32_batch", kF32, kTensor, kCluster, 2, 3, 4, 1, 12, 2, 2, 3, 17, 20, 96, kAll | kMasked},
    {"l2_tf32", kF32, kTensor, kL2, 2, 4, 1, 2, 6, 2, 2, 4, 3, 64, 96},
    // Both directions, batch groups, lengths, dropout.
    {"reverse", kBf16, kTensor, kCluster, 2, 1, 1, 1, 3, 2, 3, 7, 3, 17, 20, kAll, kReverse},
    {"both", kBf16, kTensor, kCluster, 2, 1, 1, 1, 3, 2, 2, 7, 3, 17, 21, kAll | kMasked, kBoth},
    {"l2_both", kF16, kTensor, kL2, 2, 1, 1, 2, 2, 3, 1, 5, 3, 17, 21, kAll, kBoth},
    {"copies", kBf16, kTensor, kCluster, 2, 1, 1, 1, 3, 2, 2, 5, 17, 17, 20, kAll, kForward, 3, 3},
    {"rounds", kBf16, kTensor, kL2, 2, 1, 1, 1, 3, 2, 2, 5, 19, 17, 20, kAll | kMasked, kBoth, 3, 2},
    {"masked", kBf16, kTensor, kCluster, 2, 1, 1, 2, 2, 2, 3, 5, 3, 17, 30, kAll | kMasked},
    {"copied", kBf16, kTensor, kCluster, 2, 1, 1, 2, 2, 2, 2, 4, 3, 17, 30, kAll | kCopied},
    {"strided", kBf16, kTensor, kCluster, 2, 1, 1, 2, 2, 2, 2, 5, 3, 24, 30, kAll | kStrided},
    {"shifted", kBf16, kTensor, kL2, 2, 1, 1, 2, 2, 2, 2, 5, 3, 32, 32, kAll | kShifted},
    {"packed", kBf16, kTensor, kCluster, 2, 1, 1, 1, 3, 2, 2, 7, 5, 17, 20, kAll | kMasked, kBoth, 1, 1, falling(7, 5)},
    {"l2_packed", kBf16, kTensor, kL2, 2, 1, 1, 1, 3, 3, 3, 9, 8, 16, 20, kAll, kForward, 1, 1, falling(9, 8)},
    // The last batch group's sequences are all shorter than T, and of the second one's one is.
    {"packed_groups",
     kBf16,
     kTensor,
     kL2,
     2,
     1,
     1,
     1,
     3,
     2,
     2,
     8,
     18,
     17,
     20,
     kAll | kMasked,
     kBoth,
     3,
     3,
     {8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 7, 3, 2, 2, 1, 1, 1}},
    {"packed_exact", kF32,  kExact, kCluster, 2,           1, 1, 1, 3, 2, 2, 6, 4, 17, 20,
     kAll | kMasked, kBoth, 1,      1,        {6, 5, 2, 1}},
    {"packed_tf32", kF32, kTensor, kL2, 2, 1, 1, 1, 3, 2, 2, 6, 4, 17, 20, kAll, kReverse, 1, 1, {6, 5, 2, 1}},
    {"lengths", kBf16, kTensor, kCluster,     2, 1, 1, 1, 3, 2, 2, 7, 5, 17, 20, kAll | kPadded | kMasked,
     kBoth,     1,     1,       falling(7, 5)},
    {"lengths_strided", kBf16, kTensor, kL2,          2, 1, 1, 1, 3, 3, 2, 5, 4, 24, 20, kAll | kPadded | kStrided,
     kForward,          1,     1,       falling(5, 4)},
    {"lengths_groups",
     kF32,
     kTensor,
     kL2,
     2,
     1,
     1,
     1,
     3,
     2,
     2,
     6,
     11,
     17,
     20,
     kAll | kPadded,
     kReverse,
     2,
     2,
     {6, 6, 6, 6, 6, 4, 3, 3, 1, 1, 1}},
    {"resets", kBf16, kTensor, kCluster, 2, 1, 1, 1, 3, 3, 2, 9, 5, 17, 20, kAll | kResets | kMasked, kBoth},
    {"resets_one", kBf16, kTensor, kCluster, 2, 1, 1, 1, 2, 4, 1, 1, 2, 1, 9, kAll | kResets},
    {"resets_eight",           kBf16,    kTensor, kCluster, 2,        1, 1, 1, 8, 2, 2, 4, 3, 3, 60,
     kAll | kResets | kPadded, kReverse, 1,       1,        {4, 4, 2}},
    {"resets_most", kBf16, kTensor, kCluster, 2, 4, 1, 2, 16, 2, 1, 3, 8, 17, 256, kSaves | kResets},  // most pushes
    {"resets_batch", kF32, kTensor, kCluster, 2, 3, 4, 1, 12, 2, 2, 4, 27, 20, 96, kAll | kResets},
    {"resets_groups",
     kBf16,
     kTensor,
     kL2,
     2,
     1,
     1,
     1,
     3,
     2,
     2,
     8,
     13,
     17,
     20,
     kAll | kPadded | kResets,
     kBoth,
     2,
     2,
     {8, 8, 8, 8, 8, 7, 5, 3, 3, 2, 1, 1, 1}},
    {"l2_resets", kBf16, kTensor, kL2, 2, 2, 2, 3, 4, 3, 2, 5, 13, 64, 96, kBias | kInitial | kResets},
    {"inside_resets", kF32, kExact, kL2, 2, 1, 1, 3, 1, 2, 2, 6, 5, 7, 24, kAll | kResets},
    {"residual", kBf16, kTensor, kCluster,     2, 1, 1, 1, 3, 3, 4, 7, 5, 17, 21, kAll | kMasked | kPadded | kResidual,
     kForward,   1,     1,       falling(7, 5)},
    {"residual_l2", kF32, kTensor, kL2, 2, 1, 1, 1, 3, 2, 3, 5, 3, 7, 20, kAll | kResidual | kShifted, kReverse},
    {"residual_packed", kBf16, kTensor, kL2,          2, 1, 1, 1, 3, 2, 3, 6, 9, 7, 20, kAll | kMasked | kResidual,
     kForward,          2,     2,       falling(6, 9)},
    {"thirty", kBf16, kTensor, kCluster, 2, 1, 1, 1, 2, 2, 30, 5, 2, 3, 11, kAll | kMasked},
    {"l2_thirty", kBf16, kTensor, kL2, 2, 1, 1, 1, 1, 2, 30, 5, 2, 3, 7, kAll | kMasked},
    {"l2_most_lanes", kBf16, kTensor, kL2, 2, 1, 1, 1, 2, 1, 32, 3, 2, 3, 9, kBias},
};

// A case for each compiled instance, over more than one piece and tile where it has them, with each option in turn.
template <typename T>
void append_every(std::vector<Case>& all, Element element, const std::string& name) {
  const int piece = kPieceElements<T>;
  for (const ForwardEntry<T>& entry : forward_entries<T>()) {
    const auto turn = static_cast<int>(all.size());
    const Instance& i = entry.instance;
    Case c = {};
    c.name = name + (i.product == kTensor ? "_tensor" : "_exact") + (i.exchange == kCluster ? "_cluster_" : "_l2_") +
             std::to_string(i.pieces) + "_" + std::to_string(i.batch_tiles);
    c.element = element, c.product = i.product, c.exchange = i.exchange, c.pieces = i.pieces,
    c.batch_tiles = i.batch_tiles;
    c.splits = i.pieces <= 4 ? 1 + turn % 2 : 1;
    c.hidden = (c.splits * c.pieces - 1) * piece + 5;
    const int groups = (c.hidden + kGroupUnits - 1) / kGroupUnits;
    c.groups = groups > 16 ? 4 : 2;
    c.blocks = (groups + c.groups - 1) / c.groups;
    c.layers = 2, c.steps = 4, c.batch = kTileColumns * (c.batch_tiles - 1) + 3, c.inputs = 19, c.chunk = 1 + turn % 3;
    c.batch_groups = c.copies = 1;
    switch (turn % 5) {
      case 0:
        c.options = kAll | kMasked;
        break;
      case 1:
        c.options = kAll | kStrided;
        break;
      case 2:
        c.options = kBias | kLast | kSaveC | kShifted, c.way = kReverse;
        break;
      case 3:
        c.options = kAll, c.lengths = falling(c.steps, c.batch);
        break;
      case 4:
        c.options = kAll | kMasked, c.way = kBoth, c.lengths = falling(c.steps, c.batch);
        break;
    }
    all.push_back(c);
  }
}
std::vector<Case> every_instance() {
  std::vector<Case> all;
  append_every<bfloat16>(all, kBf16, "bf16");
  append_every<float16>(all, kF16, "f16");
  append_every<float>(all, kF32, "f32");
  return all;
}

// What a TF32 holds of x: 11 significant bits, ties away from zero.
double tf32(double x) {
  int exponent = 0;
  const double mantissa = std::frexp(x, &exponent);
  return std::ldexp(std::round(std::ldexp(mantissa, 11)), exponent - 11);
}

// A stack, and the memory that the kernel gets.
template <typename T>
struct Stack {
  struct Memory {
    Guarded<T> weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, h_n, c_n;
    Guarded<float> saved_c, saved_gates;
  };
  const Case& c;
  ForwardArguments<T> arguments = {};
  std::vector<int64_t> first_row;
  std::vector<uint8_t> resets;
  int64_t x_width, saved_stride, h_stride;
  Guarded<T> x;
  std::vector<Guarded<T>> h, above;  // a layer each
  std::vector<Memory> lanes;
  std::vector<uint32_t> chunks_done;
  std::vector<uint64_t> words;
  const int64_t seed = 0x123456789;
  // Every link has a rate of its own.
  Dropout dropout(int layer) const { return {0.3 + 0.1 * (layer % 4), static_cast<uint64_t>(seed)}; }

  int64_t shift() const { return c.has(kShifted) ? 1 : 0; }

  explicit Stack(const Case& with) : c(with) {
    generator.seed(static_cast<unsigned>(c.hidden * 7 + c.layers));
    const int directions = c.directions();
    first_row.push_back(0);
    for (int t = 0; t < c.steps; ++t) {
      int64_t active = 0;
      for (int b = 0; b < c.batch; ++b) active += length(b) > t;
      first_row.push_back(first_row.back() + active);
    }
    x_width = c.inputs + (c.has(kStrided) ? 8 : 0);
    saved_stride = (c.hidden + 15) / 16 * 16;
    h_stride = int64_t{directions} * c.hidden;
    const int64_t rows = packed() ? first_row.back() : int64_t{c.steps} * c.batch, state = int64_t{c.batch} * c.hidden,
                  units = c.hidden;
    x = Guarded<T>(rows * x_width + shift());
    for (int t = 0; t < c.steps; ++t) {
      for (int b = 0; b < c.batch && t < length(b); ++b) {
        const int64_t from = shift() + (c.has(kStrided) ? int64_t{b} * c.steps + t : row(t, b)) * x_width;
        for (int k = 0; k < c.inputs; ++k) x[from + k] = narrow<T>(uniform(1));
      }
    }
    const bool masks = c.has(kMasked) || c.has(kCopied);
    const auto has_above = [&](int layer) { return c.has(kResidual) || (masks && layer + 1 < c.layers); };
    const float bound = 1.5f / std::sqrt(static_cast<float>(c.hidden));
    for (int layer = 0; layer < c.layers; ++layer) {
      h.emplace_back(rows * h_stride + shift());
      above.emplace_back(has_above(layer) ? rows * h_stride : 0);
      for (int direction = 0; direction < directions; ++direction) {
        const int64_t inputs = layer == 0 ? c.inputs : c.hidden;
        lanes.push_back({Guarded<T>(4 * units * inputs + shift()), Guarded<T>(4 * units * units + shift()),
                         Guarded<T>(4 * units), Guarded<T>(4 * units), Guarded<T>(state), Guarded<T>(state),
                         Guarded<T>(state), Guarded<T>(state), Guarded<float>(rows * saved_stride),
                         Guarded<float>(4 * rows * saved_stride)});
        Memory& m = lanes.back();
        fill(m.weight_ih, bound), fill(m.weight_hh, bound), fill(m.bias_ih, 0.5f), fill(m.bias_hh, 0.5f);
        fill(m.h_0, 0.9f), fill(m.c_0, 1.5f);
      }
    }
    Cut& cut = arguments.cut;
    cut.product = c.product, cut.exchange = c.exchange, cut.batch_tiles = c.batch_tiles, cut.pieces = c.pieces;
    cut.splits = c.splits, cut.groups = c.groups, cut.blocks = c.blocks, cut.chunk_steps = c.chunk;
    cut.inputs_in_shared = c.has(kShared);
    LaunchSizes& sizes = arguments.sizes;
    sizes.steps = sizes.last_step = c.steps, sizes.batch = c.batch, sizes.hidden = c.hidden, sizes.lanes = c.lanes();
    sizes.batch_groups = c.batch_groups, sizes.copies = c.copies;
    sizes.h_stride = h_stride, sizes.saved_stride = saved_stride;
    for (int t = 0; t < c.steps && c.has(kResets); ++t) {
      for (int b = 0; b < c.batch; ++b) resets.push_back(t >= length(b) || uniform(1) < -0.2f);
    }
    sizes.resets = c.has(kResets) ? resets.data() : nullptr;
    sizes.rows_before = ragged() ? first_row.data() : nullptr, sizes.packed = packed();
    for (int n = c.lanes(); n < kMaxLanes; ++n) arguments.lane[n].inputs = 1 << 20;  // no lane of this launch
    for (int n = 0; n < c.lanes(); ++n) {
      const int layer = n / directions, direction = n % directions;
      const int64_t column = int64_t{direction} * c.hidden;
      Memory& m = lanes[count_of(n)];
      ForwardLane<T>& lane = arguments.lane[n];
      if (c.has(kMasked)) lane.mask = {dropout(layer).threshold(), dropout(layer).scale(), &seed};
      lane.weight_ih = m.weight_ih.data() + shift(), lane.weight_hh = m.weight_hh.data() + shift();
      lane.bias_ih = c.has(kBiasIh) ? m.bias_ih.data() : nullptr;
      lane.bias_hh = c.has(kBiasHh) ? m.bias_hh.data() : nullptr;
      lane.h = h[count_of(layer)].data() + shift() + column;
      lane.above = has_above(layer) ? above[count_of(layer)].data() + column : nullptr;
      lane.h_0 = c.has(kH0) ? m.h_0.data() : nullptr;
      lane.c_0 = c.has(kC0) ? m.c_0.data() : nullptr;
      lane.h_n = c.has(kHn) ? m.h_n.data() : nullptr;
      lane.c_n = c.has(kCn) ? m.c_n.data() : nullptr;
      lane.saved_c = c.has(kSaveC) ? m.saved_c.data() : nullptr;
      lane.saved_gates = c.has(kSaveGates) ? m.saved_gates.data() : nullptr;
      lane.reverse = c.way == kReverse || direction == 1;
      lane.layer = layer, lane.h_column = column;
      if (layer == 0) {
        lane.below = -1, lane.inputs = c.inputs;
        lane.x = x.data() + shift();
        lane.x_step_stride = c.has(kStrided) ? x_width : c.batch * x_width;
        lane.x_row_stride = c.has(kStrided) ? c.steps * x_width : x_width;
      } else {
        const ForwardLane<T>& under = arguments.lane[n - directions];
        lane.below = n - directions, lane.inputs = c.hidden;
        lane.x = under.above ? under.above : under.h;
        lane.x_step_stride = c.batch * h_stride, lane.x_row_stride = h_stride;
        if (c.has(kResidual)) lane.residual = lane.x + column;
      }
    }
  }

  int length(int b) const { return ragged() ? c.lengths[count_of(b)] : c.steps; }
  bool ragged() const { return !c.lengths.empty(); }
  bool packed() const { return ragged() && !c.has(kPadded); }
  int64_t row(int t, int b) const { return (packed() ? first_row[count_of(t)] : int64_t{t} * c.batch) + b; }

  static void fill(Guarded<T>& values, float bound) {
    for (int64_t n = 0; n < values.size(); ++n) values[n] = narrow<T>(uniform(bound));
  }

  // What the next launch may touch.
  void lend() {
    using enum emulator::Access;
    const auto lend = [](const std::string& name, auto& memory, emulator::Access access) {
      emulator::lend(name, memory.data(), static_cast<int64_t>(memory.size()), access);
    };
    emulator::device_memory().clear();
    lend("x", x, read);
    for (size_t layer = 0; layer < h.size(); ++layer) {
      lend("h of layer " + std::to_string(layer), h[layer], read_write);
      lend("above of layer " + std::to_string(layer), above[layer], read_write);
    }
    for (size_t n = 0; n < lanes.size(); ++n) {
      Memory& m = lanes[n];
      const std::string of = " of lane " + std::to_string(n);
      lend("weight_ih" + of, m.weight_ih, read), lend("weight_hh" + of, m.weight_hh, read);
      lend("bias_ih" + of, m.bias_ih, read), lend("bias_hh" + of, m.bias_hh, read);
      lend("h_0" + of, m.h_0, read), lend("c_0" + of, m.c_0, read);
      lend("h_n" + of, m.h_n, read_write), lend("c_n" + of, m.c_n, read_write);
      lend("saved_c" + of, m.saved_c, read_write), lend("saved_gates" + of, m.saved_gates, read_write);
    }
    lend("chunks_done", chunks_done, read_write), lend("words", words, read_write);
    if (ragged()) lend("rows_before", first_row, read);
    if (c.has(kResets)) lend("resets", resets, read);
    if (c.has(kMasked)) emulator::lend("seed", &seed, 1, read);
  }

  // All batch groups, `copies` in a launch.
  Outcome launch(const ForwardEntry<T>& entry) {
    LaunchSizes& sizes = arguments.sizes;
    for (sizes.first_batch_group = 0; sizes.first_batch_group < c.batch_groups;
         sizes.first_batch_group += sizes.copies) {
      sizes.copies = std::min(c.copies, c.batch_groups - sizes.first_batch_group);
      chunks_done.assign(count_of(sizes.copies * c.lanes() * c.blocks), 0);
      words.assign(count_of(forward_words<T>(arguments.cut, sizes.copies, c.lanes())), 0);
      arguments.chunks_done = chunks_done.data();
      arguments.words = c.exchange == kL2 ? words.data() : nullptr;
      lend();
      const Outcome outcome = entry.launch(arguments, nullptr);
      if (outcome.kind != Outcome::ok) return outcome;
    }
    return {};
  }

  template <typename F>
  void for_outputs(F f) {
    for (auto& values : h) f(values);
    for (auto& values : above) f(values);
    for (Memory& m : lanes) f(m.h_n), f(m.c_n), f(m.saved_c), f(m.saved_gates);
  }
  bool untouched() {
    bool all = true;
    for_outputs([&](auto& values) { all = all && values.untouched(); });
    return all;
  }
  // Of all that the kernel has written.
  std::string bits() {
    std::string all;
    for_outputs([&](auto& values) {
      all.append(reinterpret_cast<const char*>(values.data()), count_of(values.size()) * sizeof(values[0]));
    });
    return all;
  }

  const ForwardEntry<T>* entry() const {
    for (const ForwardEntry<T>& e : forward_entries<T>()) {
      if (e.instance.runs(arguments.cut)) return &e;
    }
    return nullptr;
  }

  double operand(T value) const {
    return std::is_same_v<T, float> && c.product == kTensor ? tf32(widen(value)) : double{widen(value)};
  }

  // What is wrong with the numbers, or "".
  std::string judge() {
    const int chunks = (c.steps + c.chunk - 1) / c.chunk;
    for (size_t n = 0; n < chunks_done.size(); ++n) {
      const int lane = static_cast<int>(n) / c.blocks % c.lanes(), layer = lane / c.directions();
      if (chunks_done[n] != static_cast<uint32_t>(layer + 1 < c.layers ? chunks : 0)) {
        return "wrong numbers: the counter of block " + std::to_string(n);
      }
    }
    bool intact = true;
    for_outputs([&](auto& values) { intact = intact && values.intact(); });
    if (!intact) return "wrong numbers: a guard zone was written";
    for (int lane = 0; lane < c.lanes(); ++lane) {
      for (int b = 0; b < c.batch; ++b) {
        const std::string error = judge(lane, b);
        if (!error.empty()) return error;
      }
    }
    return judge_above();
  }

  std::string judge(int number, int b) {
    const double unit = std::is_same_v<T, bfloat16> ? 0x1p-8 : std::is_same_v<T, float16> ? 0x1p-11 : 0x1p-24;
    // Sums of some hundred products, σ and tanh, c over some steps: about a tenth of this.
    const double fp32 = std::is_same_v<T, float> ? 4e-6 : 3e-5;
    // And of bfloat16 tanh, which is relative: see FastMaths. That of g decays with c.
    const double of_tanh = std::is_same_v<T, bfloat16> ? 0x1p-11 : 0;
    const int layer = number / c.directions();
    Memory& m = lanes[count_of(number)];
    const ForwardLane<T>& lane = arguments.lane[number];
    const auto sigmoid = [](double v) { return 1 / (1 + std::exp(-v)); };
    const int hidden = c.hidden;
    std::vector<double> cell(count_of(hidden), 0.0), before(count_of(hidden), 0.0), of_cell(count_of(hidden), 0.0);
    for (int j = 0; j < hidden; ++j) {
      if (c.has(kC0)) cell[count_of(j)] = widen(m.c_0[b * hidden + j]);
      if (c.has(kH0)) before[count_of(j)] = operand(m.h_0[b * hidden + j]);
    }
    for (int s = 0; s < length(b); ++s) {
      const int t = lane.reverse ? length(b) - 1 - s : s;
      const int64_t at = row(t, b);
      const int boundary = lane.reverse ? t + 1 : t;  // see csrc/stack/resets.h
      if (c.has(kResets) && boundary < length(b) && resets[count_of(boundary * c.batch + b)]) {
        for (std::vector<double>* values : {&cell, &before, &of_cell}) values->assign(count_of(hidden), 0.0);
      }
      const T* row_x =
          packed() ? lane.x + at * lane.x_row_stride : lane.x + t * lane.x_step_stride + b * lane.x_row_stride;
      for (int j = 0; j < hidden; ++j) {
        double gate[4];
        for (int g = 0; g < 4; ++g) {
          const int64_t gate_row = int64_t{g} * hidden + j;
          double sum = c.has(kBiasIh) ? double{widen(m.bias_ih[gate_row])} : 0;
          if (c.has(kBiasHh)) sum += widen(m.bias_hh[gate_row]);
          const T* w_ih = lane.weight_ih + gate_row * lane.inputs;
          const T* w_hh = lane.weight_hh + gate_row * hidden;
          for (int k = 0; k < lane.inputs; ++k) sum += operand(w_ih[k]) * operand(row_x[k]);
          for (int k = 0; k < hidden; ++k) sum += operand(w_hh[k]) * before[count_of(k)];
          gate[g] = g == 2 ? std::tanh(sum) : sigmoid(sum);
        }
        double& state = cell[count_of(j)];
        state = gate[1] * state + gate[0] * gate[2];
        double& of_state = of_cell[count_of(j)];
        of_state = gate[1] * of_state + gate[0] * std::fabs(gate[2]) * of_tanh;
        const double expected = gate[3] * std::tanh(state);
        const double of_h = gate[3] * of_state + std::fabs(expected) * of_tanh;
        const auto wrong = [&](const char* what, double got, double wanted, double tolerance) -> std::string {
          if (std::fabs(got - wanted) <= tolerance) return "";
          return "wrong numbers: " + std::string(what) + " of unit " + std::to_string(j) + ", sequence " +
                 std::to_string(b) + " at layer " + std::to_string(layer) + ", lane " + std::to_string(number) +
                 ", time " + std::to_string(t) + " is " + std::to_string(got) + ", expected " + std::to_string(wanted);
        };
        const T h_here = lane.h[at * h_stride + j];
        std::string error = wrong("h", widen(h_here), expected, unit * std::fabs(expected) + of_h + fp32);
        if (error.empty() && c.has(kSaveC)) {
          error = wrong("c", m.saved_c[at * saved_stride + j], state, of_state + fp32 * (1 + std::fabs(state)));
        }
        for (int g = 0; g < 4 && error.empty() && c.has(kSaveGates); ++g) {
          error = wrong("a gate", m.saved_gates[(4 * at + g) * saved_stride + j], gate[g],
                        fp32 + (g == 2) * std::fabs(gate[g]) * of_tanh);
        }
        if (error.empty() && s + 1 == length(b)) {
          if (c.has(kHn) && std::memcmp(&m.h_n[b * hidden + j], &h_here, sizeof(T)) != 0) {
            error = wrong("h_n", widen(m.h_n[b * hidden + j]), expected, -1);
          }
          if (error.empty() && c.has(kCn)) {
            error =
                wrong("c_n", widen(m.c_n[b * hidden + j]), state, (unit + fp32) * std::fabs(state) + of_state + fp32);
          }
        }
        if (!error.empty()) return error;
      }
      for (int j = 0; j < hidden; ++j) before[count_of(j)] = operand(lane.h[at * h_stride + j]);
      for (int64_t n = 0; n < 5; ++n) {  // c, and the rows of four gates
        const int64_t gap = (n == 0 ? at : 4 * at + n - 1) * saved_stride + hidden;
        if (!(n == 0 ? m.saved_c : m.saved_gates).untouched(gap, saved_stride - hidden)) {
          return "wrong numbers: what stands behind the units of lane " + std::to_string(number) + " was written";
        }
      }
    }
    for (int t = length(b); t < c.steps && !packed(); ++t) {
      const int64_t at = row(t, b);
      if (h[count_of(layer)].untouched(shift() + at * h_stride + lane.h_column, hidden) &&
          m.saved_c.untouched(at * saved_stride, saved_stride) &&
          m.saved_gates.untouched(4 * at * saved_stride, 4 * saved_stride)) {
        continue;
      }
      return "wrong numbers: the padding of lane " + std::to_string(number) + " was written at time " +
             std::to_string(t);
    }
    const bool asked = (c.has(kSaveC) || m.saved_c.untouched()) && (c.has(kSaveGates) || m.saved_gates.untouched()) &&
                       (c.has(kHn) || m.h_n.untouched()) && (c.has(kCn) || m.c_n.untouched());
    return asked ? ""
                 : "wrong numbers: an output of lane " + std::to_string(number) + " that nobody asked for was written";
  }

  // h as the layer above sees it: the same mask, to the bit, as the CPU's.
  std::string judge_above() {
    for (int layer = 0; layer < c.layers; ++layer) {
      if (above[count_of(layer)].size() == 0) continue;
      for (int b = 0; b < c.batch; ++b) {
        for (int t = length(b); t < c.steps && !packed(); ++t) {
          if (!above[count_of(layer)].untouched(row(t, b) * h_stride, h_stride)) {
            return "wrong numbers: the padding of what the layer above sees was written at time " + std::to_string(t);
          }
        }
        for (int t = 0; t < length(b); ++t) {
          std::vector<float> expected(count_of(h_stride));
          const int64_t from = row(t, b) * h_stride;
          for (int64_t j = 0; j < h_stride; ++j) expected[count_of(j)] = widen(h[count_of(layer)][shift() + from + j]);
          if (c.has(kMasked)) dropout(layer).apply(expected.data(), h_stride, int64_t{t} * c.batch + b, layer);
          const bool adds = c.has(kResidual) && layer > 0;
          for (int64_t j = 0; j < h_stride && adds; ++j) {
            expected[count_of(j)] += widen(above[count_of(layer - 1)][from + j]);
          }
          for (int64_t j = 0; j < h_stride; ++j) {
            const T wanted = narrow<T>(expected[count_of(j)]);
            if (std::memcmp(&above[count_of(layer)][from + j], &wanted, sizeof(T)) == 0) continue;
            return "wrong numbers: what the layer above sees of unit " + std::to_string(j) + ", sequence " +
                   std::to_string(b) + ", time " + std::to_string(t) + " of layer " + std::to_string(layer);
          }
        }
      }
    }
    return "";
  }
};

// No error where only what the package compiles is at hand (tests/ptx): some cases are of other instances.
const std::string kAbsent = "absent";

template <typename T>
std::string run(const Case& c) {
  Stack<T> stack(c);
  const ForwardEntry<T>* entry = stack.entry();
  if (!entry) return emulator::launcher() ? kAbsent : "no such kernel was compiled";
  const Outcome outcome = stack.launch(*entry);
  const std::string error = outcome.kind != Outcome::ok ? outcome.text : judged ? stack.judge() : "";
  if (!error.empty()) return error;
  // In every order of the threads the same bits.
  static std::map<std::string, std::string> first;
  const std::string bits = stack.bits();
  return first.emplace(c.name, bits).first->second == bits ? "" : "wrong numbers: other bits than in the first order";
}

const Case& named(const std::string& name) {
  for (const Case& c : kCases) {
    if (c.name == name) return c;
  }
  std::abort();
}

using Arguments = ForwardArguments<bfloat16>;

// A launch of which `piece` is in the refusal; then nothing has been written.
std::string refused(const char* name, Outcome::Kind kind, const std::string& piece,
                    const std::function<void(Arguments&, emulator::Device&)>& change) {
  const Case& c = named(name);
  Stack<bfloat16> stack(c);
  const ForwardEntry<bfloat16>* entry = stack.entry();
  stack.chunks_done.assign(count_of(c.copies * c.lanes() * c.blocks), 0);
  stack.words.assign(count_of(forward_words<bfloat16>(stack.arguments.cut, c.copies, c.lanes())), 0);
  stack.arguments.chunks_done = stack.chunks_done.data();
  stack.arguments.words = stack.words.data();
  const emulator::Device before = emulator::options().device;
  change(stack.arguments, emulator::options().device);
  const Outcome outcome = entry->launch(stack.arguments, nullptr);
  emulator::options().device = before;
  if (outcome.kind != kind || outcome.text.find(piece) == std::string::npos) {
    return "instead of \"" + piece + "\": \"" + outcome.text + "\"";
  }
  return stack.untouched() ? "" : "refused, and something was written: " + outcome.text;
}

std::string refusals() {
  using emulator::Device;
  constexpr auto kFailed = Outcome::failed, kRefused = Outcome::refused;
  const std::string errors[] = {
      refused("ragged", kRefused, "9 (in clusters of 3) have to be resident at once, the device holds 6",
              [](Arguments&, Device& d) { d.cluster_slots = 2; }),
      refused("l2_ragged", kRefused, "9 have to be resident at once, the device holds 8",
              [](Arguments&, Device& d) { d.multiprocessors = 4, d.blocks_per_multiprocessor = 2; }),
      refused("ragged", kFailed, "invalid configuration", [](Arguments&, Device& d) { d.shared_per_block = 1024; }),
      refused("ragged", kFailed, "compiled for 2 pieces", [](Arguments& a, Device&) { a.cut.pieces = 4; }),
      refused("ragged", kFailed, "compiled for", [](Arguments& a, Device&) { a.cut.exchange = kL2; }),
      refused("ragged", kFailed, "0 lanes: a launch takes 1 to 32", [](Arguments& a, Device&) { a.sizes.lanes = 0; }),
      refused("ragged", kFailed, "33 lanes: a launch takes 1 to 32", [](Arguments& a, Device&) { a.sizes.lanes = 33; }),
      refused("ragged", kFailed, "no steps", [](Arguments& a, Device&) { a.sizes.steps = 0; }),
      refused("ragged", kFailed, "a packed batch without its rows", [](Arguments& a, Device&) { a.sizes.packed = 1; }),
      refused("packed", kFailed, "resets of a packed batch",
              [](Arguments& a, Device&) {
                static const uint8_t none = 0;
                a.sizes.resets = &none;
              }),
      refused("ragged", kFailed, "chunks of none", [](Arguments& a, Device&) { a.cut.chunk_steps = 0; }),
      refused("ragged", kFailed, "1 groups of a batch of 0", [](Arguments& a, Device&) { a.sizes.batch = 0; }),
      refused("ragged", kFailed, "0 groups of a batch", [](Arguments& a, Device&) { a.sizes.batch_groups = 0; }),
      refused("ragged", kFailed, "4 groups of a batch of 3", [](Arguments& a, Device&) { a.sizes.batch_groups = 4; }),
      refused("ragged", kFailed, "0 batch groups from", [](Arguments& a, Device&) { a.sizes.copies = 0; }),
      refused("ragged", kFailed, "from number -1", [](Arguments& a, Device&) { a.sizes.first_batch_group = -1; }),
      refused("ragged", kFailed, "1 batch groups from number 1 on, of 1",
              [](Arguments& a, Device&) { a.sizes.first_batch_group = 1; }),
      refused("ragged", kFailed, "9 sequences of at most 8", [](Arguments& a, Device&) { a.sizes.batch = 9; }),
      refused("copies", kFailed, "9 sequences of at most 8", [](Arguments& a, Device&) { a.sizes.batch = 25; }),
      refused("ragged", kFailed, "0 groups of 1 warps", [](Arguments& a, Device&) { a.cut.groups = 0; }),
      refused("ragged", kFailed, "1 groups of 0 warps", [](Arguments& a, Device&) { a.cut.splits = 0; }),
      refused("ragged", kFailed, "9 groups of 1 warps", [](Arguments& a, Device&) { a.cut.groups = 9; }),
      refused("ragged", kFailed, "0 blocks of a lane: a cluster has 2 to 16",
              [](Arguments& a, Device&) { a.cut.blocks = 0; }),
      refused("ragged", kFailed, "1 blocks of a lane: a cluster has 2 to 16, since a cluster of one block has no peers",
              [](Arguments& a, Device&) { a.cut.blocks = 1, a.sizes.hidden = 8; }),
      refused("ragged", kFailed, "17 blocks of a lane: a cluster has 2 to 16",
              [](Arguments& a, Device&) { a.cut.blocks = 17; }),
      refused("l2_ragged", kFailed, "0 blocks of a lane: it has at least 1",
              [](Arguments& a, Device&) { a.cut.blocks = 0; }),
      refused("ragged", kFailed, "hidden 0, units", [](Arguments& a, Device&) { a.sizes.hidden = 0; }),
      refused("ragged", kFailed, "hidden 20, units 16, K 64", [](Arguments& a, Device&) { a.cut.blocks = 2; }),
      refused("ragged", kFailed, "hidden 20, units 72, K 64", [](Arguments& a, Device&) { a.cut.blocks = 9; }),
      refused("l2_ragged", kFailed, "without words", [](Arguments& a, Device&) { a.words = nullptr; }),
      refused("ragged", kFailed, "lane 1 has 0 inputs", [](Arguments& a, Device&) { a.lane[1].inputs = 0; }),
      refused("ragged", kFailed, "lane 1 adds its input to nothing",
              [](Arguments& a, Device&) { a.lane[1].residual = a.lane[1].x; }),
      refused("ragged", kFailed, "lane 1 is above lane -2", [](Arguments& a, Device&) { a.lane[1].below = -2; }),
      refused("ragged", kFailed, "lane 1 is above lane 1", [](Arguments& a, Device&) { a.lane[1].below = 1; }),
      refused("ragged", kFailed, "no counters", [](Arguments& a, Device&) { a.chunks_done = nullptr; }),
      refused("ragged", kFailed, "lane 1 goes the other way", [](Arguments& a, Device&) { a.lane[1].reverse = 1; }),
      refused("ragged", kFailed, "lane 1's x is not", [](Arguments& a, Device&) { a.lane[1].x += 1; }),
      refused("masked", kFailed, "lane 1's x is not", [](Arguments& a, Device&) { a.lane[1].x = a.lane[0].h; }),
      refused("ragged", kFailed, "lane 1's x is not", [](Arguments& a, Device&) { a.lane[1].inputs = 19; }),
      refused("ragged", kFailed, "lane 1's x is not", [](Arguments& a, Device&) { a.lane[1].x_row_stride = 21; }),
      refused("ragged", kFailed, "lane 1's x is not", [](Arguments& a, Device&) { a.lane[1].x_step_stride = 61; }),
  };
  for (const std::string& error : errors) {
    if (!error.empty()) return error;
  }
  return "";
}

// What comes of a sequence depends on no other: its numbers have the same bits beside a sequence of NaN.
template <typename T>
std::string independent(const char* name) {
  const Case& c = named(name);
  Stack<T> with(c), without(c);
  constexpr int kOther = 1;
  for (int t = 0; t < c.steps; ++t) {
    for (int k = 0; k < c.inputs; ++k)
      with.x[(int64_t{t} * c.batch + kOther) * with.x_width + k] = narrow<T>(std::nanf(""));
  }
  for (Stack<T>* stack : {&with, &without}) {
    const Outcome outcome = stack->launch(*stack->entry());
    if (outcome.kind != Outcome::ok) return outcome.text;
  }
  for (int layer = 0; layer < c.layers; ++layer) {
    auto &h = with.h[count_of(layer)], &expected = without.h[count_of(layer)];
    for (int64_t n = 0; n < h.size(); ++n) {
      const int64_t b = n / with.h_stride % c.batch;
      const bool right = b == kOther ? std::isnan(widen(h[n])) : std::memcmp(&h[n], &expected[n], sizeof(T)) == 0;
      if (!right) return "wrong numbers: h of sequence " + std::to_string(b) + ", beside one of NaN";
    }
  }
  return "";
}

std::string independence() {
  for (const std::string& error : {independent<bfloat16>("two_steps"), independent<float>("exact"),
                                   independent<bfloat16>("l2_ragged"), independent<bfloat16>("wide_batch")}) {
    if (!error.empty()) return error;
  }
  return "";
}

// What the capacity functions say is what launches find.
std::string capacity() {
  const emulator::Device before = emulator::options().device;
  for (const char* name : {"ragged", "l2_ragged"}) {
    const Case& c = named(name);
    Stack<bfloat16> stack(c);
    const ForwardEntry<bfloat16>* entry = stack.entry();
    emulator::options().device.cluster_slots = 3;
    emulator::options().device.multiprocessors = 3, emulator::options().device.blocks_per_multiprocessor = 3;
    const int64_t fits = entry->capacity(stack.arguments.cut, c.inputs, c.hidden);
    const Outcome whole = stack.launch(*entry);
    emulator::options().device.cluster_slots = 2, emulator::options().device.multiprocessors = 2;
    const int64_t less = entry->capacity(stack.arguments.cut, c.inputs, c.hidden);
    emulator::options().device.largest_cluster = 2, emulator::options().device.shared_per_block = 1024;
    const int64_t none = entry->capacity(stack.arguments.cut, c.inputs, c.hidden);
    emulator::options().device = before;
    if (fits != 9 || less != 6 || none != 0 || whole.kind != Outcome::ok) {
      return "wrong numbers: capacities " + std::to_string(fits) + ", " + std::to_string(less) + ", " +
             std::to_string(none) + " of 9, 6, 0 blocks: " + whole.text;
    }
  }
  return "";
}

// As good as FastMaths says, whatever the other gates of the cell are.
std::string maths() {
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  const float huge = std::numeric_limits<float>::max(), infinite = std::numeric_limits<float>::infinity();
  const float nan = std::nanf("");
  std::vector<float> others = {-infinite, -huge, -60, -3, 0, 7, 60, huge, infinite};
  for (const bool tanh_unit : {false, true}) {
    const auto exact_tanh = [&](double got, double x) {
      const double error = std::fabs(got - std::tanh(x));
      return tanh_unit ? error <= 0x1p-11 * std::fabs(std::tanh(x)) : error < 0x1p-20;
    };
    const auto right = [&](const Gates<float>& a) {
      const Gates<float> y = fast_gates(tanh_unit, a);
      for (const auto& [got, x] : {std::pair{y.i, a.i}, {y.f, a.f}, {y.o, a.o}}) {
        if (!(std::fabs(got - sigmoid(x)) < 0x1p-20 && got > 0 && got <= 1 + 4 * 0x1p-23)) return false;
        if (x < -25 && !(std::fabs(got - sigmoid(x)) < 1e-9)) return false;
      }
      return exact_tanh(y.g, a.g) && exact_tanh(fast_tanh(tanh_unit, a.g), a.g);
    };
    for (double x = -40; x <= 40; x += 0x1p-5) {
      for (const float u : others) {
        const auto v = static_cast<float>(x);
        for (const Gates<float>& a :
             {Gates<float>{v, u, u, u}, {u, v, u, u}, {u, u, v, u}, {u, u, u, v}, {v, -v, u, v}}) {
          if (!right(a)) return "wrong numbers: a cell of " + std::to_string(x) + " and " + std::to_string(u);
        }
      }
    }
    for (const float u : others) {
      for (const float v : others) {
        if (!right({u, v, v, u}) || !right({v, u, u, u})) return "wrong numbers: a cell at its ends";
      }
      for (const Gates<float>& a : {Gates<float>{nan, u, u, u}, {u, nan, u, u}, {u, u, nan, u}, {u, u, u, nan}}) {
        const Gates<float> y = fast_gates(tanh_unit, a);
        const bool kept = (a.i == a.i || y.i != y.i) && (a.f == a.f || y.f != y.f) && (a.g == a.g || y.g != y.g) &&
                          (a.o == a.o || y.o != y.o);
        if (!kept) return "wrong numbers: a NaN that went away";
      }
    }
    if (!std::isnan(fast_tanh(tanh_unit, nan))) return "wrong numbers: tanh of NaN";
  }
  return "";
}

struct Schedule {
  emulator::Order order;
  uint64_t seed;
};

std::vector<Schedule> schedules(const char* order, uint64_t seed, uint64_t seeds) {
  using emulator::Order;
  std::vector<Schedule> random;
  for (uint64_t n = 0; n < seeds; ++n) random.push_back({Order::random, seed + n});
  if (!random.empty()) return random;
  if (!order) return {{Order::forward, 1}, {Order::reverse, 1}, {Order::random, 1}, {Order::priorities, 1}};
  for (const Order known : {Order::forward, Order::reverse, Order::random, Order::priorities}) {
    if (std::strcmp(order, emulator::name(known)) == 0) return {{known, seed}};
  }
  std::fprintf(stderr, "no such order: %s\n", order);
  std::exit(2);
}

std::string run_element(const Case& c) {
  return c.element == kBf16 ? run<bfloat16>(c) : c.element == kF16 ? run<float16>(c) : run<float>(c);
}

}  // namespace

int main(int count, char** arguments) {
  const char* order = nullptr;
  uint64_t seed = 1, seeds = 0;
  bool every = false, only_l2 = false;
  std::vector<std::string> names;
  for (int n = 1; n < count; ++n) {
    const std::string argument = arguments[n];
    if (argument == "--exact") {
      exact = true;
    } else if (argument == "--unjudged") {
      judged = false;
    } else if (argument == "--every") {
      every = true;
    } else if (argument == "--l2") {
      only_l2 = true;
    } else if (argument == "--seeds" && n + 1 < count) {
      seeds = std::strtoull(arguments[++n], nullptr, 10);
    } else if (argument == "--order" && n + 1 < count) {
      order = arguments[++n];
    } else if (argument == "--seed" && n + 1 < count) {
      seed = std::strtoull(arguments[++n], nullptr, 10);
    } else {
      names.push_back(argument);
    }
  }
  emulator::options().print = false;  // the report is part of the line below
  bool any = false;
  const auto wanted = [&](const std::string& name) {
    return names.empty() || std::any_of(names.begin(), names.end(), [&](const auto& n) { return name.starts_with(n); });
  };
  const auto check = [&](const std::string& name, const std::vector<Schedule>& all, auto body) {
    if (!wanted(name)) return;
    any = true;
    for (const Schedule& schedule : all) {
      emulator::options().order = schedule.order;
      emulator::options().seed = schedule.seed;
      const std::string error = body();
      if (error.empty()) continue;
      if (error == kAbsent) return static_cast<void>(std::printf("absent %s\n", name.c_str()));
      std::printf("FAILED %s (order %s, seed %llu): %s\n", name.c_str(), emulator::name(schedule.order),
                  static_cast<unsigned long long>(schedule.seed), error.c_str());
      std::exit(1);
    }
    std::printf("ok     %s\n", name.c_str());
    std::fflush(stdout);
  };
  for (const Case& c : every ? every_instance() : kCases) {
    if (only_l2 && c.exchange != kL2) continue;
    check(c.name, schedules(order, seed, seeds), [&] { return run_element(c); });
  }
  if (!every && !only_l2) {
    check("independence", {{emulator::Order::forward, 1}}, independence);
    if (!emulator::launcher()) {  // the rest is the host's
      check("refusals", {{emulator::Order::forward, 1}}, refusals);
      check("capacity", {{emulator::Order::forward, 1}}, capacity);
      check("maths", {{emulator::Order::forward, 1}}, maths);
    }
  }
  if (!any) std::printf("FAILED: nothing has such a name\n");
  return any ? 0 : 1;
}
