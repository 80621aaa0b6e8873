// tests/persistent/persistent_host.cpp: what csrc/persistent/kernels.h asks of the persistent kernels, as plain loops, in a
// library for Python. It proves the driver (csrc/persistent/driver.h), and says what the kernels have to compute.
//
// Lane after lane, step after step: a lane that waits for a later one is refused. Everything else that the contract asks of a
// driver is checked too, and refused with a sentence; launches are counted, the cuts of all are kept.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../csrc/persistent/kernels.h"

using namespace stacked_lstm;
using namespace stacked_lstm::persistent;

namespace {

// ---- What a test may set, and ask -----------------------------------------------------------------------------------

int64_t launches = 0;
int64_t capacity = 1 << 20;     // blocks at once
int64_t refuse_from = 1 << 20;  // the launch from which on the device is taken
int64_t watchdog_at = -1;       // the launch whose watchdog expires
const void* last_x = nullptr;   // of lane 0
bool few = false;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Maths {
  static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
  static double tanh(double x) { return std::tanh(x); }
};

// An operand of a product: of TF32, the nearest one.
template <typename T>
double operand(const Cut& cut, T x) {
  if constexpr (std::is_same_v<T, float>) {
    if (cut.product == Product::tensor && std::isfinite(x)) {
      const uint32_t bits = number_detail::bits_of(x);
      return number_detail::float_of((bits + 0x0FFFu + (bits >> 13 & 1)) & ~0x1FFFu);
    }
  }
  return widen(x);
}

Outcome failed(const std::string& text) { return {Outcome::failed, text}; }

// What is wrong with a launch whatever its direction, or "".
template <typename T, typename Arguments>
std::string misfit(const Arguments& a, const Instance* instances, int count) {
  const Cut& cut = a.cut;
  const LaunchSizes& s = a.sizes;
  const auto number = [](int64_t n) { return std::to_string(n); };
  if (std::none_of(instances, instances + count, [&](const Instance& i) { return i.runs(cut); }))
    return "no such kernel";
  if (s.lanes < 1 || s.lanes > kMaxLanes) return number(s.lanes) + " lanes";
  if (cut.units() < s.hidden) return "units for " + number(cut.units()) + " of " + number(s.hidden);
  if (std::string error = blocks_misfit(cut); !error.empty()) return error;
  if (s.first_batch_group < 0 || s.copies < 1 || s.first_batch_group + s.copies > s.batch_groups)
    return "batch groups out of range";
  for (int group = 0; group < s.batch_groups; ++group) {
    if (s.first_sequence(group + 1) - s.first_sequence(group) > cut.columns()) return "a batch group is too wide";
  }
  if (s.first_step < 0 || s.first_step >= s.last_step || s.last_step > s.steps) return "steps out of range";
  if (s.packed && (!s.rows_before || s.resets)) return "a packed batch without its rows, or with resets";
  if (!a.chunks_done) return "no counters";
  for (int64_t n = 0; n < int64_t{s.copies} * s.lanes * cut.blocks; ++n) {
    if (a.chunks_done[n] != 0) return "counters that are not zero";
  }
  if ((cut.exchange == Exchange::l2) != (a.words != nullptr)) return "words without L2, or L2 without words";
  return "";
}
template <typename Words>
std::string stale_words(const uint64_t* words, Words count) {
  return words && std::any_of(words, words + count, [](uint64_t w) { return w != 0; }) ? "words that are not zero" : "";
}

// What both directions ask of a step.
struct Steps {
  const LaunchSizes& s;
  int reverse;

  int time(int step) const { return reverse ? s.steps - 1 - step : step; }
  int64_t first_row(int t) const { return s.packed ? s.rows_before[t] : int64_t{t} * s.batch; }
  int active(int t) const {
    return s.rows_before ? static_cast<int>(s.rows_before[t + 1] - s.rows_before[t]) : s.batch;
  }
  bool has(int step, int b) const { return step >= 0 && step < s.steps && b < active(time(step)); }
  int64_t row(int step, int b) const { return first_row(time(step)) + b; }
  // Whether a sequence is reset before this step, which it has.
  bool reset(int step, int b) const {
    const int boundary = reverse ? time(step) + 1 : time(step);  // see csrc/stack/resets.h
    return s.resets && boundary < s.steps && b < active(boundary) && s.resets[int64_t{boundary} * s.batch + b];
  }
};

// 0, or what is kept times its scale.
double mask_of(const gates::Mask& mask, const LaunchSizes& s, int layer, int64_t column, int t, int b) {
  if (!mask.seed) return 1;
  const uint64_t blocks = static_cast<uint64_t>(s.h_stride + 3) / 4;
  const uint64_t e = (static_cast<uint64_t>(t) * static_cast<uint64_t>(s.batch) + static_cast<uint64_t>(b)) * blocks +
                     static_cast<uint64_t>(column) / 4;
  const auto seed = static_cast<uint64_t>(*mask.seed);
  const Philox random =
      philox4x32_10(static_cast<uint32_t>(e), static_cast<uint32_t>(e >> 32), static_cast<uint32_t>(layer), 0,
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return random.word[column % 4] >= mask.threshold ? static_cast<double>(static_cast<float>(mask.scale)) : 0.0;
}

template <typename Arguments>
Outcome outcome_of(const Arguments& a) {
  ++launches;
  if (launches > refuse_from) {
    return {Outcome::refused,
            "too many blocks in cooperative launch: 8 have to be resident at once, the device holds 0"};
  }
  if (a.watchdog && launches == watchdog_at) {
    Watchdog& w = *a.watchdog;
    w.expired = 1, w.what = Watchdog::hand_over, w.block = 5, w.thread = 33, w.copy = 0, w.lane = 1, w.rank = 2;
    w.step = 4, w.for_lane = 0, w.for_block = 1, w.for_count = 3;
  }
  return {};
}

// ---- Forward --------------------------------------------------------------------------------------------------------

constexpr Product kProducts[] = {Product::tensor, Product::exact};
constexpr Exchange kExchanges[] = {Exchange::cluster, Exchange::l2};

template <typename T>
const std::vector<Instance>& forward_instances() {
  static std::vector<Instance> all;
  all.clear();
  for (const Product product : kProducts) {
    if (product == Product::exact && !std::is_same_v<T, float>) continue;
    for (const Exchange exchange : kExchanges) {
      for (const int batch_tiles : {1, 2, 4}) {
        for (const int pieces : {2, 4, 8}) {
          if (few && (batch_tiles > 1 || pieces > 2)) continue;
          all.push_back({product, exchange, batch_tiles, pieces, 0});
        }
      }
    }
  }
  return all;
}

template <typename T>
void forward_lane(const ForwardArguments<T>& a, const ForwardLane<T>& l) {
  const LaunchSizes& s = a.sizes;
  const Steps steps{s, l.reverse};
  const int hidden = s.hidden, inputs = l.inputs;
  const int begin = s.first_sequence(s.first_batch_group), end = s.first_sequence(s.first_batch_group + s.copies);
  std::vector<double> w_ih(static_cast<size_t>(4 * hidden) * inputs), w_hh(static_cast<size_t>(4 * hidden) * hidden);
  for (size_t n = 0; n < w_ih.size(); ++n) w_ih[n] = operand(a.cut, l.weight_ih[n]);
  for (size_t n = 0; n < w_hh.size(); ++n) w_hh[n] = operand(a.cut, l.weight_hh[n]);
  std::vector<double> x(inputs), h_before(hidden);
  for (int b = begin; b < end; ++b) {
    std::vector<T> h(hidden);
    std::vector<float> c(hidden);
    for (int j = 0; j < hidden; ++j) {
      h[j] = l.h_0 ? l.h_0[int64_t{b} * hidden + j] : narrow<T>(0.0f);
      c[j] = l.c_0 ? widen(l.c_0[int64_t{b} * hidden + j]) : 0.0f;
    }
    for (int step = 0; step < s.steps; ++step) {
      if (!steps.has(step, b)) continue;
      if (steps.reset(step, b)) std::fill(h.begin(), h.end(), T{}), std::fill(c.begin(), c.end(), 0.0f);
      const int t = steps.time(step);
      const int64_t row = steps.row(step, b);
      const T* from = s.packed ? l.x + row * l.x_row_stride : l.x + t * l.x_step_stride + b * l.x_row_stride;
      for (int k = 0; k < inputs; ++k) x[k] = operand(a.cut, from[k]);
      for (int k = 0; k < hidden; ++k) h_before[k] = operand(a.cut, h[k]);
      for (int j = 0; j < hidden; ++j) {
        double sum[4];
        for (int gate = 0; gate < 4; ++gate) {
          const int64_t g = int64_t{gate} * hidden + j;
          sum[gate] = (l.bias_ih ? widen(l.bias_ih[g]) : 0.0) + (l.bias_hh ? widen(l.bias_hh[g]) : 0.0);
          for (int k = 0; k < inputs; ++k) sum[gate] += w_ih[static_cast<size_t>(g * inputs + k)] * x[k];
          for (int k = 0; k < hidden; ++k) sum[gate] += w_hh[static_cast<size_t>(g * hidden + k)] * h_before[k];
        }
        double cell = c[j];
        Gates<double> y;
        h[j] = narrow<T>(
            static_cast<float>(LstmCell::forward<Maths>(Gates<double>{sum[0], sum[1], sum[2], sum[3]}, cell, y)));
        c[j] = static_cast<float>(cell);
        if (l.saved_c) l.saved_c[row * s.saved_stride + j] = c[j];
        if (l.saved_gates) {
          float* to = l.saved_gates + 4 * row * s.saved_stride + j;
          to[0] = static_cast<float>(y.i);
          to[s.saved_stride] = static_cast<float>(y.f);
          to[2 * s.saved_stride] = static_cast<float>(y.g);
          to[3 * s.saved_stride] = static_cast<float>(y.o);
        }
        l.h[row * s.h_stride + j] = h[j];
        if (l.above) {
          const double kept = mask_of(l.mask, s, l.layer, l.h_column + j, t, b);
          const double added = l.residual ? widen(l.residual[row * s.h_stride + j]) : 0.0;
          l.above[row * s.h_stride + j] = narrow<T>(static_cast<float>(widen(h[j]) * kept + added));
        }
      }
    }
    for (int j = 0; j < hidden; ++j) {
      if (l.h_n) l.h_n[int64_t{b} * hidden + j] = h[j];
      if (l.c_n) l.c_n[int64_t{b} * hidden + j] = narrow<T>(c[j]);
    }
  }
}

template <typename T>
Outcome forward(const ForwardArguments<T>& a, void*) {
  const auto& instances = forward_instances<T>();
  const Cut& cut = a.cut;
  const LaunchSizes& s = a.sizes;
  std::string error = misfit<T>(a, instances.data(), static_cast<int>(instances.size()));
  if (error.empty()) error = stale_words(a.words, forward_words<T>(cut, s.copies, s.lanes));
  if (!error.empty()) return failed(error);
  if (s.first_step != 0 || s.last_step != s.steps) return failed("forward takes all steps");
  if (cut.splits * cut.pieces * kPieceElements<T> < s.hidden) return failed("K is less than hidden");
  if (cut.groups * cut.splits > kMaxWarps || cut.unit_tiles != 0) return failed("the warps of a block");
  for (int n = 0; n < s.lanes; ++n) {
    const ForwardLane<T>& l = a.lane[n];
    if (!l.weight_ih || !l.weight_hh || !l.x || !l.h || l.inputs < 1) return failed("something is missing");
    if (l.below >= n || l.below < -1) return failed("lane " + std::to_string(n) + " waits for a later one");
    if (l.below >= 0) {
      const ForwardLane<T>& below = a.lane[l.below];
      if (l.x != (below.above ? below.above : below.h) || below.reverse || l.reverse)
        return failed("x is not what is below");
      if (l.inputs != s.hidden) return failed("inputs of a lane above another");
      if (l.x_row_stride != s.h_stride || l.x_step_stride != s.batch * s.h_stride) return failed("strides of h");
    }
    if (l.h_column != (l.reverse ? s.hidden : 0)) return failed("the column of a direction");
    if (l.above && !l.mask.seed && !l.residual) return failed("a mask without a seed");
    if (l.residual &&
        (!l.above || l.residual != l.x + l.h_column || l.inputs != s.h_stride || l.x_row_stride != s.h_stride))
      return failed("a residual that is not the lane's part of its input");
  }
  const Outcome outcome = outcome_of(a);
  if (outcome.kind != Outcome::ok) return outcome;
  last_x = a.lane[0].x;
  for (int n = 0; n < s.lanes; ++n) forward_lane(a, a.lane[n]);
  return {};
}

// ---- Backward -------------------------------------------------------------------------------------------------------

template <typename T>
const std::vector<Instance>& backward_instances() {
  static std::vector<Instance> all;
  all.clear();
  for (const Product product : kProducts) {
    if (product == Product::exact && !std::is_same_v<T, float>) continue;
    for (const Exchange exchange : kExchanges) {
      for (const int batch_tiles : {1, 2, 4}) {
        for (const int groups : {1, 2, 4}) {
          for (const int unit_tiles : {1, 2, 4, 8}) {
            if (few && (batch_tiles > 1 || groups > 2 || unit_tiles > 1)) continue;
            all.push_back({product, exchange, batch_tiles, backward_pieces<T>(groups), unit_tiles});
          }
        }
      }
    }
  }
  return all;
}

template <typename T>
void backward_lane(const BackwardArguments<T>& a, const BackwardLane<T>& l, const BackwardLane<T>* over) {
  const LaunchSizes& s = a.sizes;
  const Steps steps{s, l.reverse};
  const int hidden = s.hidden;
  const int begin = s.first_sequence(s.first_batch_group), end = s.first_sequence(s.first_batch_group + s.copies);
  std::vector<double> w_hh(static_cast<size_t>(4 * hidden) * hidden), w_ih;
  for (size_t n = 0; n < w_hh.size(); ++n) w_hh[n] = operand(a.cut, l.weight_hh[n]);
  if (over) {
    w_ih.resize(w_hh.size());
    for (size_t n = 0; n < w_ih.size(); ++n) w_ih[n] = operand(a.cut, l.weight_ih_above[n]);
  }
  // Wᵀ·dgates of a row.
  const auto product = [&](const std::vector<double>& w, const T* dgates, int j) {
    double sum = 0;
    for (int64_t g = 0; g < 4 * hidden; ++g) sum += w[static_cast<size_t>(g * hidden + j)] * operand(a.cut, dgates[g]);
    return sum;
  };
  for (int b = begin; b < end; ++b) {
    const int64_t at = int64_t{b} * hidden;
    std::vector<double> dc(hidden, kNaN);
    for (int step = s.last_step - 1; step >= s.first_step; --step) {
      if (!steps.has(step, b)) continue;
      const bool later = steps.has(step + 1, b);
      const bool first = !steps.has(step - 1, b);  // of the sequence
      const int t = steps.time(step);
      const int64_t row = steps.row(step, b);
      for (int j = 0; j < hidden; ++j) {
        double dh = l.grad_output ? widen(l.grad_output[row * s.h_stride + j]) : 0.0;
        if (l.grad_above || over) {
          const double above = over ? product(w_ih, over->grad_gates + row * s.gates_stride, j)
                                    : static_cast<double>(l.grad_above[row * s.h_stride + j]);
          dh += above * mask_of(l.mask, s, l.layer, l.h_column + j, t, b);
        }
        if (later) {  // from memory: of the launch before, too
          if (!steps.reset(step + 1, b)) dh += product(w_hh, l.grad_gates + steps.row(step + 1, b) * s.gates_stride, j);
          if (step + 1 == s.last_step) dc[j] = l.carried_c[at + j];
        } else {
          dh += l.grad_h_n ? widen(l.grad_h_n[at + j]) : 0.0;
          dc[j] = l.grad_c_n ? widen(l.grad_c_n[at + j]) : 0.0;
        }
        if (l.grad_cell) dc[j] += widen(l.grad_cell[row * s.h_stride + j]);
        Gates<double> y;
        if (l.gates) {
          const float* g = l.gates + 4 * row * s.saved_stride + j;
          y = {g[0], g[s.saved_stride], g[2 * s.saved_stride], g[3 * s.saved_stride]};
        } else {
          double sum[4];
          for (int gate = 0; gate < 4; ++gate) {
            const int64_t g = int64_t{gate} * hidden + j;
            sum[gate] = l.preactivations[4 * row * hidden + g] + (l.bias_ih ? widen(l.bias_ih[g]) : 0.0) +
                        (l.bias_hh ? widen(l.bias_hh[g]) : 0.0);
          }
          y = activate_gates<Maths>(Gates<double>{sum[0], sum[1], sum[2], sum[3]});
        }
        const double c = l.c[row * s.saved_stride + j];
        const double before = steps.reset(step, b) ? 0.0
                              : !first             ? l.c[steps.row(step - 1, b) * s.saved_stride + j]
                              : l.c_0              ? static_cast<double>(widen(l.c_0[at + j]))
                                                   : 0.0;
        const Gates<double> d = LstmCell::backward<Maths>(y, before, c, dh, dc[j]);
        T* to = l.grad_gates + row * s.gates_stride + j;
        to[0] = narrow<T>(static_cast<float>(d.i));
        to[hidden] = narrow<T>(static_cast<float>(d.f));
        to[2 * hidden] = narrow<T>(static_cast<float>(d.g));
        to[3 * hidden] = narrow<T>(static_cast<float>(d.o));
        if (steps.reset(step, b)) dc[j] = 0;
      }
    }
    // A sequence's own first step; a reverse lane may have had it in an earlier launch.
    int sequence_begins = 0;
    while (!steps.has(sequence_begins, b)) ++sequence_begins;
    for (int j = 0; j < hidden; ++j) {
      const bool here = sequence_begins < s.last_step;  // this launch has had some of its steps
      const bool begun = sequence_begins >= s.first_step;
      double dh = kNaN, dcell = dc[j];
      if (!here) {
        dh = l.carried_h[at + j];
        dcell = l.carried_c[at + j];
      } else if (begun) {
        const T* dgates = l.grad_gates + steps.row(sequence_begins, b) * s.gates_stride;
        dh = steps.reset(sequence_begins, b) ? 0 : product(w_hh, dgates, j);
      }
      if (s.first_step > 0) {
        l.carry_h[at + j] = static_cast<float>(dh);
        l.carry_c[at + j] = static_cast<float>(dcell);
      } else {
        if (l.grad_h_0) l.grad_h_0[at + j] = narrow<T>(static_cast<float>(dh));
        if (l.grad_c_0) l.grad_c_0[at + j] = narrow<T>(static_cast<float>(dcell));
      }
    }
  }
}

template <typename T>
Outcome backward(const BackwardArguments<T>& a, void*) {
  const auto& instances = backward_instances<T>();
  const Cut& cut = a.cut;
  const LaunchSizes& s = a.sizes;
  std::string error = misfit<T>(a, instances.data(), static_cast<int>(instances.size()));
  if (error.empty()) error = stale_words(a.words, backward_words<T>(cut, s.copies, s.lanes));
  if (!error.empty()) return failed(error);
  if (cut.pieces != backward_pieces<T>(cut.groups)) return failed("pieces are not those of the groups");
  if (128 * cut.unit_tiles < s.hidden) return failed("rows for fewer units than there are");
  for (int n = 0; n < s.lanes; ++n) {
    const BackwardLane<T>& l = a.lane[n];
    if (!l.weight_hh || !l.c || !l.grad_gates) return failed("something is missing");
    if ((l.gates != nullptr) == (l.preactivations != nullptr)) return failed("gates, or what makes them");
    if (l.over >= n || l.over < -1) return failed("lane " + std::to_string(n) + " waits for a later one");
    if ((l.over >= 0) != (l.weight_ih_above != nullptr)) return failed("the weights of a lane above");
    if (l.over >= 0 && (l.grad_above || l.reverse != a.lane[l.over].reverse)) return failed("two gradients from above");
    if ((s.last_step < s.steps) != (l.carried_h != nullptr)) return failed("what an earlier launch left");
    if ((s.first_step > 0) != (l.carry_h != nullptr)) return failed("what the next launch needs");
    if (l.h_column != (l.reverse ? s.hidden : 0)) return failed("the column of a direction");
  }
  const Outcome outcome = outcome_of(a);
  if (outcome.kind != Outcome::ok) return outcome;
  for (int n = 0; n < s.lanes; ++n)
    backward_lane(a, a.lane[n], a.lane[n].over >= 0 ? &a.lane[a.lane[n].over] : nullptr);
  return {};
}

int64_t forward_capacity(const Cut&, int, int) { return capacity; }
int64_t backward_capacity(const Cut&, int, bool) { return capacity; }

template <typename T>
PersistentKernels<T> kernels() {
  const auto &f = forward_instances<T>(), &b = backward_instances<T>();
  return {f.data(),    static_cast<int>(f.size()), b.data(),         static_cast<int>(b.size()), forward<T>,
          backward<T>, forward_capacity,           backward_capacity};
}

}  // namespace

// Everything as at the start; then the address of the table.
extern "C" const void* host_persistent_kernels(bool few_instances) {
  launches = 0, capacity = 1 << 20, refuse_from = 1 << 20, watchdog_at = -1, few = few_instances;
  static PersistentTable table;
  table = {kernels<float>(), kernels<bfloat16>(), kernels<float16>()};
  return &table;
}
extern "C" void host_persistent_capacity(int64_t blocks) { capacity = blocks; }
extern "C" void host_persistent_refuse_from(int64_t launch) { refuse_from = launches + launch; }
extern "C" void host_persistent_watchdog_at(int64_t launch) { watchdog_at = launches + launch; }
// Where the first lane of the last forward launch found its input.
extern "C" const void* host_persistent_input() { return last_x; }
// Since it was last asked.
extern "C" int64_t host_persistent_launches() { return std::exchange(launches, 0); }
