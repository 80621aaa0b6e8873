// tests/emulator/persistent_backward.cpp: runs the persistent backward kernel and checks every gradient that it writes.
//
//   persistent_backward [--order O] [--seed N] [--seeds N] [--exact] [--l2] [--every] [--wide] [--unjudged] [name ...]
//
// runs all cases whose name begins like one of these; --l2: of those, what needs no cluster; --every: instead, a case for
// each instance that was compiled; --seeds N: in N random orders; --unjudged: only the
// bits of the orders are compared.
//
// The reference computes every step in float64 from the dgates that the kernel itself has left for the step after it and for
// the lane above. So roundings are the kernel's own, errors do not add up, and the tolerance is that of one step. It shares
// no equation with the kernel. All memory that the kernel gets lies between guard zones of NaN: outputs start as NaN too,
// and a zone that is read makes a matrix operand NaN, which the emulator reports. --exact: no zones, for AddressSanitizer.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/stack/philox.h"
#include "lend.h"
#include "persistent_backward_instances.h"

using namespace stacked_lstm;
using namespace stacked_lstm::persistent;

namespace {

bool exact = false, judged = true, wide = false;
std::mt19937 generator;

float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(generator); }
size_t count(int64_t n) { return static_cast<size_t>(n); }
std::string number(double n) { return std::to_string(n); }
std::string number(int n) { return std::to_string(n); }

// Memory between two zones. All bits set is NaN in every format.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t elements = 0) : zone_(exact ? 0 : 256 / sizeof(T)), all_(count(elements) + 2 * zone_) {
    std::memset(static_cast<void*>(all_.data()), 0xFF, all_.size() * sizeof(T));
  }
  T* data() { return all_.data() + zone_; }
  T& operator[](int64_t n) { return data()[n]; }
  size_t size() const { return all_.size() - 2 * zone_; }
  bool intact() const { return all_set(0, zone_) && all_set(all_.size() - zone_, zone_); }
  bool untouched() const { return all_set(0, all_.size()); }
  // All of it, or the first `width` of every `stride` elements.
  void fill(float low, float high, int64_t width = 1, int64_t stride = 1) {
    for (int64_t n = 0; n < static_cast<int64_t>(size()); ++n) {
      if (n % stride < width) data()[n] = narrow<T>(uniform(low, high));
    }
  }
  // Makes elements NaN again.
  void forget(int64_t first, int64_t elements) {
    std::memset(static_cast<void*>(data() + first), 0xFF, count(elements) * sizeof(T));
  }
  bool untouched(int64_t first, int64_t elements) const { return all_set(zone_ + count(first), count(elements)); }
  std::string bytes() { return {reinterpret_cast<const char*>(data()), size() * sizeof(T)}; }

 private:
  bool all_set(size_t first, size_t elements) const {
    const auto* bytes = reinterpret_cast<const unsigned char*>(all_.data() + first);
    return std::all_of(bytes, bytes + elements * sizeof(T), [](unsigned char byte) { return byte == 0xFF; });
  }
  size_t zone_;
  std::vector<T> all_;
};

enum : unsigned {
  kInitial = 1,     // c_0
  kOutput = 2,      // grad_output
  kLast = 4,        // grad_h_n, grad_c_n
  kFirst = 8,       // grad_h_0, grad_c_0 are wanted
  kShared = 16,     // inputs_in_shared
  kAbove = 32,      // grad_above, of the top lanes
  kRecompute = 64,  // pre-activations instead of gates; and:
  kBias = 128,
  kPacked = 256,
  kReverse = 512,
  kBoth = 1024,  // both directions of one layer, instead of a stack of lanes
  kDropout = 2048,
  kMisaligned = 4096,  // weights and gradients at odd addresses, as far as their type allows
  kTopFirst = 8192,    // lane 0 is the top one, instead of the last
  kCell = 16384,       // grad_cell
  kPadded = 32768,     // lengths, and rows for all sequences at every step
  kResets = 65536,     // sequences are reset
  kAll = kInitial | kOutput | kLast | kFirst | kShared,
};
enum class Number { bf16, f16, f32 };
using enum Number;

struct Case {
  std::string name;
  Number type;
  Product product;
  int unit_tiles, pieces, batch_tiles;
  Exchange exchange;
  int lanes, steps, batch, hidden, blocks, chunk_steps;
  unsigned options;
  int segment_steps = 0;  // a second time in launches of so many steps: the same bits. 0: not
  int batch_groups = 1, copies = 1;
};

constexpr Exchange kCluster = Exchange::cluster, kL2 = Exchange::l2;
constexpr Product kTensor = Product::tensor, kExact = Product::exact;
const std::vector<Case> kCases = {
    //                     product   m p tiles           L   T   B   H blocks chunk
    {"one_step", bf16, kTensor, 1, 4, 1, kCluster, 1, 1, 1, 33, 2, 4, kAll},
    {"alone", bf16, kTensor, 1, 4, 1, kCluster, 1, 3, 8, 40, 2, 4, kOutput | kAbove},  // nobody wants grad_h_0
    {"two_steps", bf16, kTensor, 1, 4, 1, kCluster, 2, 2, 3, 40, 2, 4, kAll, 1},
    {"deep", bf16, kTensor, 1, 4, 1, kCluster, 32, 2, 1, 33, 2, 1, kAll},  // fewer steps than lanes; chunks of one step
    {"ragged", bf16, kTensor, 1, 4, 1, kCluster, 3, 11, 3, 40, 2, 4, kAll | kRecompute | kBias, 5},
    {"ninety_six", bf16, kTensor, 1, 4, 1, kCluster, 2, 3, 3, 96, 4, 2, kAll | kAbove | kDropout, 2},  // 128 units
    {"dropout", bf16, kTensor, 1, 4, 1, kCluster, 3, 3, 3, 41, 2, 2, (kAll | kDropout | kMisaligned) & ~kShared},
    {"packed", bf16, kTensor, 1, 4, 1, kCluster, 2, 7, 5, 40, 2, 3, kAll | kPacked, 2},
    {"reverse", bf16, kTensor, 1, 4, 1, kCluster, 2, 7, 5, 40, 2, 3, kAll | kPacked | kReverse, 2},
    {"nothing_last", bf16, kTensor, 1, 4, 1, kCluster, 1, 7, 5, 40, 2, 3, kOutput | kFirst | kPacked | kReverse, 3},
    {"both", bf16, kTensor, 1, 4, 1, kCluster, 2, 5, 4, 37, 2, 2,
     kAll | kBoth | kPacked | kAbove | kDropout | kRecompute, 2},
    {"full", bf16, kTensor, 2, 4, 4, kCluster, 2, 3, 29, 200, 7, 2, kAll | kOutput, 0},  // four cells a thread
    {"groups", bf16, kTensor, 2, 4, 4, kCluster, 2, 3, 17, 40, 2, 2, kAll | kPacked, 2, 3,
     2},  // the last round has one
    {"layer_512", bf16, kTensor, 4, 4, 1, kCluster, 2, 2, 8, 512, 16, 2, kAll},
    {"half", f16, kTensor, 2, 4, 1, kCluster, 2, 4, 8, 200, 7, 3, kAll, 3},
    {"tf32", f32, kTensor, 1, 4, 2, kCluster, 3, 4, 13, 40, 3, 2, kAll, 2},
    {"tf32_odd", f32, kTensor, 1, 4, 2, kCluster, 2, 3, 9, 17, 2, 2, (kAll | kRecompute) & ~kShared, 2},
    {"float", f32, kExact, 2, 2, 1, kCluster, 2, 3, 3, 37, 5, 2, kAll | kRecompute | kBias,
     2},  // the last tile is a half
    {"sixteen", f32, kExact, 2, 2, 1, kCluster, 1, 2, 1, 128, 16, 2, kAll},
    {"l2_one", bf16, kTensor, 1, 4, 1, kL2, 3, 3, 1, 1, 1, 1, (kAll & ~kOutput) | kTopFirst, 2},
    {"l2_two", bf16, kTensor, 1, 4, 1, kL2, 2, 3, 3, 40, 2, 2, kAll | kPacked},
    {"inside_one", bf16, kTensor, 1, 4, 1, kL2, 3, 7, 5, 29, 1, 2, kAll | kPacked, 3},  // one block: sums stay in it
    {"inside_reverse", bf16, kTensor, 1, 4, 1, kL2, 2, 6, 5, 32, 1, 3, kAll | kPacked | kReverse | kDropout, 2},
    {"inside_batch", bf16, kTensor, 1, 4, 4, kL2, 2, 5, 29, 20, 1, 2, (kAll | kRecompute | kBias) & ~kShared, 2},
    {"inside_tf32", f32, kTensor, 1, 4, 2, kL2, 2, 5, 13, 15, 1, 2, kAll | kBoth | kAbove, 2},
    {"inside_float", f32, kExact, 1, 4, 1, kL2, 3, 4, 3, 9, 1, 1, kAll, 3},
    {"not_inside", f32, kExact, 2, 2, 1, kL2, 2, 4, 3, 7, 1, 2, kAll, 2},  // words to itself
    {"l2_ragged", bf16, kTensor, 1, 4, 1, kL2, 3, 11, 3, 40, 2, 4, kAll | kPacked, 5},
    {"l2_batch", bf16, kTensor, 2, 4, 2, kL2, 2, 3, 17, 136, 5, 2, kAll | kReverse, 2, 2, 2},
    {"l2_seventeen", f32, kExact, 2, 2, 1, kL2, 1, 2, 1, 136, 17, 2, kAll},  // a warp's second tile has owners, too
    {"l2_tf32", f32, kTensor, 8, 2, 1, kL2, 2, 4, 5, 77, 10, 2, kAll, 2},    // four threads share a cell
    {"l2_float", f32, kExact, 2, 2, 1, kL2, 2, 3, 5, 40, 5, 2, (kAll | kDropout | kPacked | kReverse) & ~kShared, 2},
    // The caller's gradients of h and c of every lane, also of lanes with a lane above them.
    {"states_one", bf16, kTensor, 1, 4, 1, kL2, 3, 3, 1, 1, 1, 1, kAll | kCell | kDropout, 2},
    {"states_three", f32, kExact, 2, 2, 1, kL2, 2, 5, 3, 3, 1, 2, kAll | kCell | kPacked | kReverse, 2},
    {"states_both", f32, kTensor, 1, 4, 2, kCluster, 2, 5, 13, 17, 2, 2,
     kAll | kBoth | kPacked | kAbove | kDropout | kRecompute | kBias | kCell, 2},
    {"states_last", f16, kTensor, 2, 4, 1, kCluster, 2, 4, 5, 65, 3, 3, (kAll | kCell | kPacked) & ~(kLast | kInitial),
     3},
    {"states_only", bf16, kTensor, 1, 4, 1, kCluster, 3, 4, 3, 65, 3, 2, kCell | kFirst | kRecompute, 3},
    {"lengths", bf16, kTensor, 1, 4, 1, kCluster, 2, 7, 5, 40, 2, 3, kAll | kPadded | kAbove | kDropout | kCell, 2},
    {"lengths_both", f32, kTensor, 1, 4, 2, kCluster, 2, 5, 13, 17, 2, 2,
     kAll | kBoth | kPadded | kAbove | kDropout | kRecompute | kBias, 2, 2, 1},
    {"resets", bf16, kTensor, 1, 4, 1, kCluster, 2, 9, 5, 40, 2, 3, kAll | kResets | kDropout | kRecompute, 2},
    {"resets_one", bf16, kTensor, 1, 4, 1, kCluster, 1, 1, 2, 33, 2, 4, kAll | kResets},
    {"resets_both", f32, kExact, 2, 2, 1, kL2, 2, 6, 5, 17, 3, 2, kAll | kBoth | kPadded | kResets | kAbove | kCell, 1},
    {"resets_cells", bf16, kTensor, 2, 4, 4, kCluster, 2, 4, 29, 200, 7, 2, kAll | kPadded | kResets, 3},
    {"resets_float", f32, kExact, 2, 2, 1, kCluster, 1, 3, 3, 17, 3, 2, kAll | kResets},  // threads without a cell
    {"resets_inside", bf16, kTensor, 1, 4, 1, kL2, 2, 6, 5, 29, 1, 2, kAll | kResets | kReverse, 4},
    {"resets_shares", f32, kTensor, 8, 2, 1, kL2, 2, 4, 5, 77, 10, 2, kAll | kResets, 2},
    {"l2_768", bf16, kTensor, 6, 2, 1, kL2, 1, 2, 3, 768, 48, 2, kAll & ~kShared},
};

// A case for each compiled instance, with each option in turn. With --wide, some warps have units in all of
// their tiles: where there is one batch tile, for it takes long, and not in float16, which is as bfloat16 is.
template <typename T>
void append_every(std::vector<Case>& all, Number type, const std::string& element) {
  for (const BackwardKernel<T>& kernel : backward_kernels<T>()) {
    const auto turn = static_cast<int>(all.size());
    const Instance& i = kernel.instance;
    const int block_units = kGroupUnits * i.pieces / backward_pieces<T>(1),
              unit_tiles = wide && i.batch_tiles == 1 && type != f16 ? i.unit_tiles : std::min(i.unit_tiles, 2),
              hidden = kMaxWarps * 16 * (unit_tiles - 1) + 37;
    Case c = {};
    c.name = element + (i.product == kTensor ? "_tensor" : "_exact") + (i.exchange == kCluster ? "_cluster_" : "_l2_") +
             number(i.unit_tiles) + "_" + number(i.pieces) + "_" + number(i.batch_tiles);
    c.type = type, c.product = i.product, c.exchange = i.exchange;
    c.unit_tiles = i.unit_tiles, c.pieces = i.pieces, c.batch_tiles = i.batch_tiles;
    c.hidden = hidden, c.blocks = (hidden + block_units - 1) / block_units;
    constexpr int kMostBlocks = 132;  // of one a multiprocessor
    c.lanes = 2 * c.blocks <= kMostBlocks ? 2 : 1;
    c.steps = i.unit_tiles > 2 ? 2 : 3, c.batch = kTileColumns * (c.batch_tiles - 1) + 3, c.chunk_steps = 1 + turn % 3;
    c.batch_groups = c.copies = 1;
    constexpr unsigned kEach[] = {kAll, kAll | kRecompute | kBias, kAll | kPacked | kReverse,
                                  (kAll | kCell | kDropout | kAbove) & ~kShared,
                                  kAll | kBoth | kPacked | kAbove | kDropout | kRecompute | kCell};
    c.options = c.lanes == 1 ? kAll | kCell : kEach[turn % 5];
    Cut cut;
    cut.exchange = c.exchange, cut.batch_tiles = c.batch_tiles, cut.pieces = c.pieces, cut.unit_tiles = c.unit_tiles;
    cut.groups = c.pieces / backward_pieces<T>(1), cut.blocks = c.blocks, cut.chunk_steps = c.chunk_steps;
    constexpr size_t kMostBytes = 160 << 10;  // of a block's shared memory, on the smallest device
    if (backward_shared_bytes<T>(cut, c.hidden, true) > kMostBytes) c.options &= ~unsigned{kShared};
    cut.inputs_in_shared = (c.options & kShared) != 0;
    if (backward_shared_bytes<T>(cut, c.hidden, true) > kMostBytes) c.chunk_steps = 1;
    c.segment_steps = turn % 3 == 0 ? 2 : 0;
    all.push_back(c);
  }
}
std::vector<Case> every_instance() {
  std::vector<Case> all;
  append_every<bfloat16>(all, bf16, "bf16");
  append_every<float16>(all, f16, "f16");
  append_every<float>(all, f32, "f32");
  return all;
}

float as_operand(float x, bool tf32) {
  if (!tf32) return x;
  // The nearest number with 10 bits of mantissa, ties away from zero (as cvt.rna.tf32).
  return number_detail::float_of((number_detail::bits_of(x) + 0x1000u) & ~0x1FFFu);
}

// A stack, and the memory that the kernel gets.
template <typename T>
struct Stack {
  struct Memory {
    Guarded<T> weight_hh, weight_ih_above, grad_output, grad_cell;
    Guarded<T> bias_ih, bias_hh, c_0, grad_h_n, grad_c_n, grad_h_0, grad_c_0;
    Guarded<float> grad_above, gates, preactivations, c, carry_h, carry_c;
  };
  const Case& c;
  const int directions;
  int64_t rows;
  std::vector<int> lengths;
  std::vector<int64_t> first_row;
  std::vector<uint8_t> resets;
  int64_t seed = 987654321;
  // Every link has a rate of its own.
  static Dropout dropout(int layer) { return {0.4 + 0.1 * (layer % 3), 987654321}; }
  Guarded<T> grad_gates;  // of both directions, or lane after lane
  std::vector<Memory> lanes;
  std::vector<uint32_t> chunks_done;
  std::vector<uint64_t> words;
  Watchdog watchdog = {};
  BackwardArguments<T> arguments = {};

  explicit Stack(const Case& with) : c(with), directions(has(kBoth) ? 2 : 1) {
    generator.seed(static_cast<unsigned>(c.hidden * 7 + c.lanes));
    for (int b = 0; b < c.batch; ++b) {
      lengths.push_back(has(kPacked | kPadded) ? std::max(1, c.steps - b * (c.steps + 1) / c.batch) : c.steps);
    }
    first_row.push_back(0);
    for (int t = 0; t < c.steps; ++t) {
      const auto active = std::count_if(lengths.begin(), lengths.end(), [&](int length) { return length > t; });
      first_row.push_back(first_row.back() + active);
    }
    rows = has(kPadded) ? int64_t{c.steps} * c.batch : first_row.back();

    LaunchSizes& s = arguments.sizes;
    s.steps = s.last_step = c.steps;
    s.batch = c.batch, s.hidden = c.hidden, s.lanes = c.lanes;
    s.batch_groups = c.batch_groups, s.copies = c.copies;
    s.h_stride = int64_t{directions} * c.hidden;
    s.saved_stride = (c.hidden + 15) / 16 * 16;
    s.gates_stride = int64_t{directions} * 4 * c.hidden;
    s.rows_before = has(kPacked | kPadded) ? first_row.data() : nullptr, s.packed = has(kPacked);
    for (int t = 0; t < c.steps && has(kResets); ++t) {
      for (int b = 0; b < c.batch; ++b) resets.push_back(t >= lengths[count(b)] || uniform(0, 1) < 0.4f);
    }
    s.resets = has(kResets) ? resets.data() : nullptr;
    Cut& cut = arguments.cut;
    cut.product = c.product, cut.exchange = c.exchange;
    cut.batch_tiles = c.batch_tiles, cut.pieces = c.pieces, cut.unit_tiles = c.unit_tiles;
    cut.groups = c.pieces / backward_pieces<T>(1);
    cut.blocks = c.blocks, cut.chunk_steps = c.chunk_steps, cut.inputs_in_shared = has(kShared);

    const int64_t hidden = c.hidden, state = c.batch * hidden, odd = has(kMisaligned) ? 1 : 0;
    const float bound = 1.5f / std::sqrt(static_cast<float>(c.hidden));
    grad_gates = Guarded<T>(rows * 4 * hidden * c.lanes + odd);
    for (int n = 0; n < c.lanes; ++n) {
      lanes.push_back({Guarded<T>(4 * hidden * hidden + odd), Guarded<T>(4 * hidden * hidden + odd),
                       Guarded<T>(rows * s.h_stride), Guarded<T>(rows * s.h_stride), Guarded<T>(4 * hidden),
                       Guarded<T>(4 * hidden), Guarded<T>(state), Guarded<T>(state), Guarded<T>(state),
                       Guarded<T>(state), Guarded<T>(state), Guarded<float>(rows * s.h_stride),
                       Guarded<float>(rows * 4 * s.saved_stride), Guarded<float>(rows * 4 * hidden),
                       Guarded<float>(rows * s.saved_stride), Guarded<float>(state), Guarded<float>(state)});
      Memory& m = lanes.back();
      m.weight_hh.fill(-bound, bound), m.weight_ih_above.fill(-bound, bound);
      m.grad_output.fill(-1, 1), m.grad_above.fill(-1, 1);
      m.bias_ih.fill(-0.5f, 0.5f), m.bias_hh.fill(-0.5f, 0.5f), m.c_0.fill(-1.5f, 1.5f);
      m.grad_h_n.fill(-1, 1), m.grad_c_n.fill(-1, 1);
      m.gates.fill(0.05f, 0.95f, hidden, s.saved_stride), m.preactivations.fill(-2, 2);
      m.c.fill(-1.5f, 1.5f, hidden, s.saved_stride);
      m.grad_cell.fill(-1, 1);  // the last: without it, everything else is the same
      for (int b = 0; b < c.batch && has(kPadded); ++b) {
        for (int t = lengths[count(b)]; t < c.steps; ++t) {
          const int64_t at = int64_t{t} * c.batch + b;
          m.grad_output.forget(at * s.h_stride, s.h_stride), m.grad_cell.forget(at * s.h_stride, s.h_stride);
          m.grad_above.forget(at * s.h_stride, s.h_stride), m.c.forget(at * s.saved_stride, s.saved_stride);
          m.gates.forget(4 * at * s.saved_stride, 4 * s.saved_stride);
          m.preactivations.forget(at * 4 * hidden, 4 * hidden);
        }
      }
    }
    for (int n = 0; n < c.lanes; ++n) {
      Memory& m = lanes[count(n)];
      BackwardLane<T>& lane = arguments.lane[n];
      lane.over = has(kBoth) ? -1 : has(kTopFirst) ? n - 1 : n + 1 < c.lanes ? n + 1 : -1;
      lane.layer = has(kBoth) ? 3 : has(kTopFirst) ? c.lanes - 1 - n : n;
      lane.reverse = has(kBoth) ? n : has(kReverse);
      lane.h_column = has(kBoth) ? n * hidden : 0;
      if (has(kDropout)) lane.mask = {dropout(lane.layer).threshold(), dropout(lane.layer).scale(), &seed};
      lane.weight_hh = m.weight_hh.data() + odd;
      if (lane.over >= 0) lane.weight_ih_above = m.weight_ih_above.data() + odd;
      if (has(kOutput)) lane.grad_output = m.grad_output.data() + lane.h_column;
      if (has(kCell)) lane.grad_cell = m.grad_cell.data() + lane.h_column;
      if (has(kAbove) && lane.over < 0) lane.grad_above = m.grad_above.data() + lane.h_column;
      (has(kRecompute) ? lane.preactivations : lane.gates) = has(kRecompute) ? m.preactivations.data() : m.gates.data();
      if (has(kBias)) lane.bias_ih = m.bias_ih.data(), lane.bias_hh = m.bias_hh.data();
      lane.c = m.c.data();
      if (has(kInitial)) lane.c_0 = m.c_0.data();
      if (has(kLast)) lane.grad_h_n = m.grad_h_n.data(), lane.grad_c_n = m.grad_c_n.data();
      lane.grad_gates = grad_gates.data() + odd + (has(kBoth) ? n * 4 * hidden : n * rows * 4 * hidden);
    }
    arguments.watchdog = &watchdog;
  }

  bool has(unsigned option) const { return (c.options & option) != 0; }

  const BackwardKernel<T>* kernel() const {
    for (const BackwardKernel<T>& kernel : backward_kernels<T>()) {
      if (kernel.instance.runs(arguments.cut)) return &kernel;
    }
    return nullptr;
  }

  // What the next launch may touch.
  void lend() {
    using enum emulator::Access;
    const auto lend = [](const std::string& name, auto& memory, emulator::Access access) {
      emulator::lend(name, memory.data(), static_cast<int64_t>(memory.size()), access);
    };
    emulator::device_memory().clear();
    lend("grad_gates", grad_gates, read_write);
    for (size_t n = 0; n < lanes.size(); ++n) {
      Memory& m = lanes[n];
      const std::string of = " of lane " + std::to_string(n);
      lend("weight_hh" + of, m.weight_hh, read), lend("weight_ih_above" + of, m.weight_ih_above, read);
      lend("grad_output" + of, m.grad_output, read), lend("grad_above" + of, m.grad_above, read);
      lend("grad_cell" + of, m.grad_cell, read);
      lend("gates" + of, m.gates, read), lend("preactivations" + of, m.preactivations, read);
      lend("bias_ih" + of, m.bias_ih, read), lend("bias_hh" + of, m.bias_hh, read);
      lend("c" + of, m.c, read), lend("c_0" + of, m.c_0, read);
      lend("grad_h_n" + of, m.grad_h_n, read), lend("grad_c_n" + of, m.grad_c_n, read);
      lend("carry_h" + of, m.carry_h, read_write), lend("carry_c" + of, m.carry_c, read_write);
      lend("grad_h_0" + of, m.grad_h_0, read_write), lend("grad_c_0" + of, m.grad_c_0, read_write);
    }
    lend("chunks_done", chunks_done, read_write), lend("words", words, read_write);
    if (has(kPacked | kPadded)) lend("rows_before", first_row, read);
    if (has(kResets)) lend("resets", resets, read);
    if (has(kDropout)) emulator::lend("seed", &seed, 1, read);
  }

  // The whole sequence, in launches of `steps` steps (counted from 0, as the driver does).
  Outcome launch(int steps) {
    const BackwardKernel<T>* compiled = kernel();
    if (!compiled) return {Outcome::failed, "no such kernel was compiled"};
    for (int last = c.steps; last > 0;) {
      const int first = (last - 1) / steps * steps;
      for (int group = 0; group < c.batch_groups; group += c.copies) {
        BackwardArguments<T> now = arguments;
        now.sizes.first_step = first, now.sizes.last_step = last;
        now.sizes.first_batch_group = group, now.sizes.copies = std::min(c.copies, c.batch_groups - group);
        chunks_done.assign(count(now.sizes.copies * c.lanes * c.blocks), 0);
        words.assign(count(backward_words<T>(now.cut, now.sizes.copies, c.lanes)), 0);
        now.chunks_done = chunks_done.data();
        now.words = c.exchange == kL2 ? words.data() : nullptr;
        for (int n = 0; n < c.lanes; ++n) {
          Memory& m = lanes[count(n)];
          BackwardLane<T>& lane = now.lane[n];
          if (last < c.steps) lane.carried_c = m.carry_c.data();
          if (first > 0) lane.carry_c = m.carry_c.data();
          if (has(kPacked | kPadded) && lane.reverse) {  // dh is carried only from and to where sequences begin
            if (last < c.steps) lane.carried_h = m.carry_h.data();
            if (first > 0) lane.carry_h = m.carry_h.data();
          }
          if (first == 0 && has(kFirst)) lane.grad_h_0 = m.grad_h_0.data(), lane.grad_c_0 = m.grad_c_0.data();
        }
        lend();
        const Outcome outcome = compiled->launch(now, nullptr);
        if (outcome.kind != Outcome::ok) return outcome;
        const int chunks = (last - first + c.chunk_steps - 1) / c.chunk_steps;
        for (size_t n = 0; n < chunks_done.size(); ++n) {
          const int lane = static_cast<int>(n) / c.blocks % c.lanes;
          const bool read =
              std::any_of(arguments.lane, arguments.lane + c.lanes, [&](auto& l) { return l.over == lane; });
          if (chunks_done[n] != static_cast<uint32_t>(read ? chunks : 0)) {
            return {Outcome::failed, "wrong numbers: the counter of a block of lane " + number(lane)};
          }
        }
      }
      last = first;
    }
    return {};
  }

  // Of all that the caller gets.
  std::string bits() {
    std::string all = grad_gates.bytes();
    for (Memory& m : lanes) all += m.grad_h_0.bytes() + m.grad_c_0.bytes();
    return all;
  }

  bool untouched() const {
    return grad_gates.untouched() && std::all_of(lanes.begin(), lanes.end(), [](const Memory& m) {
             return m.grad_h_0.untouched() && m.grad_c_0.untouched() && m.carry_h.untouched() && m.carry_c.untouched();
           });
  }

  // Row of the batch at a step of a lane; -1: the sequence has no such step.
  int64_t row(const BackwardLane<T>& lane, int step, int b) const {
    const int t = lane.reverse ? c.steps - 1 - step : step;
    if (step < 0 || step >= c.steps || t >= lengths[count(b)]) return -1;
    return (has(kPadded) ? int64_t{t} * c.batch : first_row[count(t)]) + b;
  }

  // Whether the sequence is reset before this step of a lane, which it has: see csrc/stack/resets.h.
  bool reset(const BackwardLane<T>& lane, int step, int b) const {
    const int boundary = lane.reverse ? c.steps - step : step;
    return has(kResets) && boundary < lengths[count(b)] && resets[count(boundary * c.batch + b)];
  }

  // Σ over gate rows of weight[row][unit] · dgates[row].
  double transposed(const T* weight, const T* dgates, int unit) const {
    const bool tf32 = std::is_same_v<T, float> && c.product == kTensor;
    double sum = 0;
    for (int64_t k = 0; k < 4 * c.hidden; ++k) {
      sum += double{as_operand(widen(weight[k * c.hidden + unit]), tf32)} * as_operand(widen(dgates[k]), tf32);
    }
    return sum;
  }

  // What is wrong with the numbers, or "".
  std::string judge() {
    const double unit = std::is_same_v<T, bfloat16> ? 0x1p-8 : std::is_same_v<T, float16> ? 0x1p-11 : 0x1p-23;
    // Sums of some hundred products, FastMaths, dc over some steps: about a tenth of this.
    const double fp32 = c.product == kExact ? 3e-6 : 3e-5;
    const int64_t stride = arguments.sizes.gates_stride, saved = arguments.sizes.saved_stride, hidden = c.hidden;
    if (!grad_gates.intact()) return "wrong numbers: a guard zone of dgates was written";
    for (int n = 0; n < c.lanes; ++n) {
      Memory& m = lanes[count(n)];
      const BackwardLane<T>& lane = arguments.lane[n];
      if (!(m.grad_h_0.intact() && m.grad_c_0.intact() && m.carry_h.intact() && m.carry_c.intact())) {
        return "wrong numbers: a guard zone of lane " + number(n) + " was written";
      }
      if (!has(kFirst) && !(m.grad_h_0.untouched() && m.grad_c_0.untouched())) {
        return "wrong numbers: an output of lane " + number(n) + " that nobody asked for was written";
      }
      for (int b = 0; b < c.batch; ++b) {
        for (int t = lengths[count(b)]; t < c.steps && has(kPadded); ++t) {
          const int64_t first = lane.grad_gates - grad_gates.data() + (int64_t{t} * c.batch + b) * stride;
          if (!grad_gates.untouched(first, 4 * hidden)) return "wrong numbers: the padding of dgates was written";
        }
        for (int j = 0; j < c.hidden; ++j) {
          const auto wrong = [&](const char* what, int step, double got, double expected, double size) -> std::string {
            if (std::fabs(got - expected) <= unit * std::fabs(expected) + fp32 * (1 + size)) return "";
            return "wrong numbers: " + std::string(what) + " of unit " + number(j) + ", sequence " + number(b) +
                   " at lane " + number(n) + ", step " + number(step) + " is " + number(got) + ", expected " +
                   number(expected);
          };
          double dc = 0, dh = 0;
          int64_t after = -1;  // row of the step after
          for (int s = c.steps - 1; s >= 0; --s) {
            const int64_t at = row(lane, s, b), before = row(lane, s - 1, b);
            if (at < 0) continue;
            const int t = lane.reverse ? c.steps - 1 - s : s;
            double above = 0;
            if (lane.over >= 0) {
              above = transposed(lane.weight_ih_above, arguments.lane[lane.over].grad_gates + at * stride, j);
            } else if (lane.grad_above) {
              above = lane.grad_above[at * arguments.sizes.h_stride + j];
            }
            if (has(kDropout)) {
              std::vector<double> mask(count(arguments.sizes.h_stride), 1.0);
              dropout(lane.layer).apply(mask.data(), arguments.sizes.h_stride, int64_t{t} * c.batch + b, lane.layer);
              above *= mask[count(lane.h_column + j)];
            }
            dh = above;
            if (lane.grad_output) dh += widen(lane.grad_output[at * arguments.sizes.h_stride + j]);
            if (after >= 0 && reset(lane, s + 1, b)) {
              dc = 0;
            } else if (after >= 0) {
              dh += transposed(lane.weight_hh, lane.grad_gates + after * stride, j);
            } else if (has(kLast)) {
              dh += widen(m.grad_h_n[b * hidden + j]);
              dc = widen(m.grad_c_n[b * hidden + j]);
            }
            if (lane.grad_cell) dc += widen(lane.grad_cell[at * arguments.sizes.h_stride + j]);
            double y[4];
            for (int64_t g = 0; g < 4; ++g) {
              y[g] = has(kRecompute) ? m.preactivations[(4 * at + g) * hidden + j] : m.gates[(4 * at + g) * saved + j];
              if (!has(kRecompute)) continue;
              if (has(kBias)) y[g] += double{widen(m.bias_ih[g * hidden + j])} + widen(m.bias_hh[g * hidden + j]);
              y[g] = g == 2 ? std::tanh(y[g]) : 1 / (1 + std::exp(-y[g]));
            }
            const double c_next = m.c[at * saved + j], tanh_c = std::tanh(c_next);
            const double c_before = reset(lane, s, b) ? 0
                                    : before >= 0     ? m.c[before * saved + j]
                                    : has(kInitial)   ? widen(m.c_0[b * hidden + j])
                                                      : 0;
            dc += dh * y[3] * (1 - tanh_c * tanh_c);
            const double expected[4] = {dc * y[2] * y[0] * (1 - y[0]), dc * c_before * y[1] * (1 - y[1]),
                                        dc * y[0] * (1 - y[2] * y[2]), dh * tanh_c * y[3] * (1 - y[3])};
            for (int64_t g = 0; g < 4; ++g) {
              const std::string error = wrong("a dgate", s, widen(lane.grad_gates[at * stride + g * hidden + j]),
                                              expected[g], std::fabs(dh) + std::fabs(dc));
              if (!error.empty()) return error;
            }
            dc *= y[1];
            after = at;
          }
          if (!has(kFirst)) continue;
          const bool reset_at_once = !lane.reverse && reset(lane, 0, b);
          if (reset_at_once) dc = 0;
          const double dh_0 = reset_at_once ? 0 : transposed(lane.weight_hh, lane.grad_gates + after * stride, j);
          std::string error = wrong("grad_h_0", -1, widen(m.grad_h_0[b * hidden + j]), dh_0, std::fabs(dh_0));
          if (error.empty()) error = wrong("grad_c_0", -1, widen(m.grad_c_0[b * hidden + j]), dc, std::fabs(dc));
          if (!error.empty()) return error;
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
  if (!stack.kernel() && emulator::launcher()) return kAbsent;
  const Outcome outcome = stack.launch(c.steps);
  const std::string error = outcome.kind != Outcome::ok ? outcome.text : judged ? stack.judge() : "";
  if (!error.empty()) return error;
  // In every order of the threads the same bits.
  static std::map<std::string, std::string> first;
  const std::string bits = stack.bits();
  if (first.emplace(c.name, bits).first->second != bits) return "wrong numbers: other bits than in the first order";
  if (c.segment_steps == 0) return "";
  // And in any number of launches.
  Stack<T> again(c);
  const Outcome segments = again.launch(c.segment_steps);
  if (segments.kind != Outcome::ok) return "in segments: " + segments.text;
  if (again.bits() == bits) return "";
  const std::string why = again.judge();
  return "wrong numbers: other bits in segments" + (why.empty() ? why : ": " + why);
}

// A launch of which `piece` is in the refusal; then nothing has been written.
using Change = std::function<void(BackwardArguments<bfloat16>&, emulator::Device&)>;
std::string refused(const Case& c, Outcome::Kind kind, const std::string& piece, const Change& change) {
  Stack<bfloat16> stack(c);
  const emulator::Device before = emulator::options().device;
  const BackwardKernel<bfloat16>* kernel = stack.kernel();
  BackwardArguments<bfloat16>& a = stack.arguments;
  stack.chunks_done.assign(count(c.copies * c.lanes * c.blocks), 0);
  stack.words.assign(count(backward_words<bfloat16>(a.cut, c.copies, c.lanes)), 0);
  a.chunks_done = stack.chunks_done.data(), a.words = stack.words.data();
  change(a, emulator::options().device);
  const Outcome outcome = kernel->launch(a, nullptr);
  emulator::options().device = before;
  if (outcome.kind != kind || outcome.text.find(piece) == std::string::npos) {
    return "instead of \"" + piece + "\": \"" + outcome.text + "\"";
  }
  return stack.untouched() ? "" : "refused, and something was written: " + outcome.text;
}

const Case& named(const std::string& name) {
  for (const Case& c : kCases) {
    if (c.name == name) return c;
  }
  std::abort();
}

std::string refusals() {
  const Case &cluster = named("two_steps"), &l2 = named("l2_ragged");
  using emulator::Device;
  using Arguments = BackwardArguments<bfloat16>;
  const auto fails = [&](const std::string& piece, const std::function<void(Arguments&)>& change) {
    return refused(cluster, Outcome::failed, piece, [&](Arguments& a, Device&) { change(a); });
  };
  float carried = 0;
  int64_t rows_before = 0;
  const uint8_t no_resets = 0;
  const std::string errors[] = {
      refused(cluster, Outcome::refused, "4 (in clusters of 2) have to be resident at once, the device holds 2",
              [](Arguments&, Device& d) { d.cluster_slots = 1; }),
      refused(l2, Outcome::refused, "6 have to be resident at once, the device holds 5",
              [](Arguments&, Device& d) { d.multiprocessors = 5, d.threads_per_multiprocessor = 256; }),
      refused(l2, Outcome::failed, "no memory to exchange through", [](Arguments& a, Device&) { a.words = nullptr; }),
      fails("no memory to exchange through", [](Arguments& a) { a.chunks_done = nullptr; }),
      fails("compiled for another cut", [](Arguments& a) { a.cut.batch_tiles = 2; }),
      fails("compiled for another cut", [](Arguments& a) { a.cut.groups = 2; }),
      fails("33 lanes: a launch takes 1 to 32", [](Arguments& a) { a.sizes.lanes = 33; }),
      fails("0 lanes", [](Arguments& a) { a.sizes.lanes = 0; }),
      fails("steps 2 to 2 of 2", [](Arguments& a) { a.sizes.first_step = 2; }),
      fails("steps -1 to 2 of 2", [](Arguments& a) { a.sizes.first_step = -1; }),
      fails("steps 0 to 3 of 2", [](Arguments& a) { a.sizes.last_step = 3; }),
      fails("a packed batch without its rows", [](Arguments& a) { a.sizes.packed = 1; }),
      refused(named("packed"), Outcome::failed, "resets of a packed batch",
              [&](Arguments& a, Device&) { a.sizes.resets = &no_resets; }),
      fails("in chunks of 0", [](Arguments& a) { a.cut.chunk_steps = 0; }),
      fails("0 blocks of a lane: a cluster has 2 to 16", [](Arguments& a) { a.cut.blocks = 0; }),
      fails("1 blocks of a lane: a cluster has 2 to 16, since a cluster of one block has no peers",
            [](Arguments& a) { a.cut.blocks = 1, a.sizes.hidden = 32; }),
      fails("17 blocks of a lane: a cluster has 2 to 16", [](Arguments& a) { a.cut.blocks = 17; }),
      refused(l2, Outcome::failed, "0 blocks of a lane: it has at least 1",
              [](Arguments& a, Device&) { a.cut.blocks = 0; }),
      fails("hidden 72, units 64, rows of weights 128", [](Arguments& a) { a.sizes.hidden = 72; }),
      fails("hidden 40, units 160, rows of weights 128", [](Arguments& a) { a.cut.blocks = 5; }),
      fails("hidden 0, units 64", [](Arguments& a) { a.sizes.hidden = 0; }),
      fails("batch groups 0 to 2 of 1", [](Arguments& a) { a.sizes.copies = 2; }),
      fails("batch groups -1 to 0 of 1", [](Arguments& a) { a.sizes.first_batch_group = -1; }),
      fails("batch groups 0 to 0 of 1", [](Arguments& a) { a.sizes.copies = 0; }),
      fails("batch 9 in 1 groups of 1 to 8", [](Arguments& a) { a.sizes.batch = 9; }),
      fails("batch 3 in 4 groups of 1 to 8", [](Arguments& a) { a.sizes.batch_groups = 4; }),
      fails("lane 1: weights, c, gates", [](Arguments& a) { a.lane[1].weight_hh = nullptr; }),
      fails("lane 1: weights, c, gates", [](Arguments& a) { a.lane[1].c = nullptr; }),
      fails("lane 1: weights, c, gates", [](Arguments& a) { a.lane[1].grad_gates = nullptr; }),
      fails("lane 1: weights, c, gates", [](Arguments& a) { a.lane[1].gates = nullptr; }),
      fails("lane 0: nothing carried to step 1", [](Arguments& a) { a.sizes.last_step = 1; }),
      fails("lane 0: nowhere to carry step 1", [](Arguments& a) { a.sizes.first_step = 1; }),
      fails("lane 0: nothing carried to step 1",
            [&](Arguments& a) {
              a.sizes.last_step = 1, a.sizes.rows_before = &rows_before;
              for (int n = 0; n < 2; ++n) a.lane[n].carried_c = &carried, a.lane[n].reverse = 1;
            }),
      fails("lane 0: nowhere to carry step 1",
            [&](Arguments& a) {
              a.sizes.first_step = 1, a.sizes.rows_before = &rows_before;
              for (int n = 0; n < 2; ++n) a.lane[n].carry_c = &carried, a.lane[n].reverse = 1;
            }),
      fails("lane 0: no such lane above it: 2", [](Arguments& a) { a.lane[0].over = 2; }),
      fails("lane 0: no such lane above it: 1", [](Arguments& a) { a.lane[0].reverse = 1; }),
      fails("lane 0: no such lane above it: 1", [](Arguments& a) { a.lane[0].weight_ih_above = nullptr; }),
      fails("lane 0: begins at column 2, no multiple of 4", [](Arguments& a) { a.lane[0].h_column = 2; }),
      fails("lane 1: no such lane above it: 0", [](Arguments& a) { a.lane[0].over = -1, a.lane[1].over = 0; }),
      refused(l2, Outcome::failed, "lane 2: weights, c, gates",  // lane 0 may well be above lane 1
              [](Arguments& a, Device&) {
                a.lane[0].over = -1, a.lane[1].over = 0, a.lane[1].weight_ih_above = a.lane[0].weight_ih_above;
                a.lane[2].c = nullptr;
              }),
      refused(l2, Outcome::failed, "lane 1: no such lane above it: 3",
              [](Arguments& a, Device&) { a.lane[1].over = 3, a.lane[3].over = 0; }),
      fails("lane 0: above itself",
            [](Arguments& a) { a.lane[1].over = 0, a.lane[1].weight_ih_above = a.lane[0].weight_ih_above; }),
  };
  for (const std::string& error : errors) {
    if (!error.empty()) return error;
  }
  // Nor does any other kernel run in such clusters.
  cuda::LaunchConfig lone;
  lone.grid = dim3(1), lone.block = dim3(32), lone.cluster = 1;
  void (*const nothing)() = [] {};
  if (cuda::launch(lone, nothing).ok() || cuda::capacity(lone, nothing) != 0)
    return "a launch in clusters of one block";
  lone.cluster = 0;
  if (!cuda::launch(lone, nothing).ok() || cuda::capacity(lone, nothing) == 0) return "no launch without clusters";
  // As many as were refused above.
  const emulator::Device before = emulator::options().device;
  Stack<bfloat16> stack(l2);
  emulator::options().device.multiprocessors = 5, emulator::options().device.threads_per_multiprocessor = 256;
  const int64_t held = stack.kernel()->capacity(stack.arguments.cut, l2.hidden, true);
  stack.arguments.cut.chunk_steps = 1000;
  const int64_t none = stack.kernel()->capacity(stack.arguments.cut, l2.hidden, true);
  emulator::options().device = before;
  return held == 5 && none == 0 ? "" : "capacities: " + number(double(held)) + ", " + number(double(none));
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

}  // namespace

int main(int arguments_count, char** arguments) {
  const char* order = nullptr;
  uint64_t seed = 1, seeds = 0;
  bool every = false, only_l2 = false;
  std::vector<std::string> names;
  for (int n = 1; n < arguments_count; ++n) {
    const std::string argument = arguments[n];
    if (argument == "--exact") {
      exact = true;
    } else if (argument == "--wide") {
      wide = true;
    } else if (argument == "--unjudged") {
      judged = false;
    } else if (argument == "--every") {
      every = true;
    } else if (argument == "--l2") {
      only_l2 = true;
    } else if (argument == "--seeds" && n + 1 < arguments_count) {
      seeds = std::strtoull(arguments[++n], nullptr, 10);
    } else if (argument == "--order" && n + 1 < arguments_count) {
      order = arguments[++n];
    } else if (argument == "--seed" && n + 1 < arguments_count) {
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
  const auto check = [&](const std::string& name, auto body) {
    if (!wanted(name)) return;
    any = true;
    for (const Schedule& schedule : schedules(order, seed, seeds)) {
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
    check(c.name, [&] { return c.type == f32 ? run<float>(c) : c.type == f16 ? run<float16>(c) : run<bfloat16>(c); });
  }
  if (!every && !only_l2 && !emulator::launcher()) check("refusals", refusals);  // the host's
  if (!any) std::printf("FAILED: nothing has such a name\n");
  return any ? 0 : 1;
}
