// tests/sanitize/main.cpp: the CPU kernels under a sanitizer, with no torch and no OpenMP in the process, so that every
// thread and every access is seen.
//
// Small stacks with every option run under every kind of schedule and every kind of pool: one thread a worker, all
// workers on one thread, and threads that come one after another. What is checked beside the sanitizer's own findings:
// every output is written (they start as NaN), and every schedule gives the same bits as one worker alone.
//
//   kernels [STRIDE [PART PARTS]]   of each problem every STRIDE-th schedule (1); of the problems one of PARTS parts
//
// A problem is a case and a type. The n-th problem begins with schedule n: with a stride of 3, the number of types, every
// case meets every schedule, and so does every type.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/packed.h"
#include "../../csrc/cpu/step.h"
#include "../../csrc/stack/state_layout.h"

using namespace stacked_lstm;

namespace {

enum class Pool { threads, one_thread, one_after_another };

class PlainPlatform : public cpu::Platform {
 public:
  explicit PlainPlatform(Pool pool) : pool_(pool) {}

  void parallel(int64_t workers, const std::function<void(int64_t)>& member) override {
    if (pool_ == Pool::one_thread) return member(workers);
    if (pool_ == Pool::one_after_another) {
      for (int64_t n = 0; n < workers; ++n) member(1);
      return;
    }
    std::vector<std::thread> threads;
    for (int64_t n = 0; n < workers; ++n) threads.emplace_back([&] { member(1); });
    for (std::thread& thread : threads) thread.join();
  }
  bool at_the_same_time() const override { return pool_ != Pool::one_after_another; }

 private:
  const Pool pool_;
};

struct Case {
  const char* name;
  int64_t layers, batch, steps, input, hidden, projection;
  bool bidirectional, packed, dropout;
  Saving saving;
  int64_t narrower = 0;  // by so many units a layer is narrower than the one below; then only even layers project
  bool states = false;   // all h and c are results and have gradients
  LinkKind link = LinkKind::plain;
  bool resets = false;
  int64_t padding = 0;  // steps behind the longest sequence, of a padded batch; `packed` then stands for its lengths

  int64_t hidden_of(int64_t k) const { return std::max<int64_t>(hidden - k * narrower, 1); }
  int64_t projection_of(int64_t k) const { return narrower != 0 && k % 2 ? 0 : projection; }
};

const Case kCases[] = {
    {"one cell", 1, 1, 1, 1, 1, 0, false, false, false, Saving::full},
    {"fewer steps than layers", 5, 2, 3, 5, 7, 0, false, false, true, Saving::full},
    {"no size a multiple of a vector", 3, 5, 9, 13, 21, 0, false, false, false, Saving::recompute},
    {"several panels", 2, 9, 6, 33, 150, 0, false, false, false, Saving::full},
    {"two rows, several panels", 2, 2, 6, 9, 150, 0, false, false, false, Saving::full},
    {"lengths", 3, 7, 8, 9, 20, 0, false, true, true, Saving::full},
    {"lengths, both directions", 2, 4, 7, 6, 70, 0, true, true, true, Saving::recompute},
    {"projection", 3, 3, 8, 10, 140, 37, false, false, false, Saving::full},
    {"projection, both directions, lengths", 2, 5, 6, 4, 19, 5, true, true, true, Saving::full},
    {"both directions", 3, 2, 5, 8, 16, 0, true, false, true, Saving::full},
    {"weight gradients in blocks of rows", 1, 16, 26, 9, 96, 0, false, false, false, Saving::full},
    {"many blocks of rows", 2, 96, 11, 3, 70, 0, false, false, false, Saving::full},
    {"blocks of one step", 3, 250, 5, 3, 5, 0, false, false, true, Saving::recompute},
    {"many blocks of rows, every option", 2, 40, 32, 3, 9, 5, true, true, true, Saving::recompute},
    {"gates of several stretches again", 2, 5, 70, 3, 9, 0, false, false, false, Saving::recompute},
    {"many blocks of rows, lengths", 3, 40, 32, 3, 9, 0, false, true, false, Saving::full},
    {"widths", 3, 5, 9, 10, 150, 0, false, false, true, Saving::recompute, 70},
    {"widths, layers of a buffer grow", 4, 3, 9, 10, 8, 0, false, false, false, Saving::full, -40},
    {"widths, some projections, both directions, lengths, states", 3, 5, 20, 4, 90, 11, true, true, true,
     Saving::recompute, 35, true},
    {"states, some projections", 4, 3, 19, 5, 21, 7, false, false, true, Saving::full, 4, true},
    {"residual links", 4, 3, 9, 5, 40, 0, false, false, true, Saving::full, 0, false, LinkKind::residual},
    {"residual links, both directions, projections, states, resets", 3, 4, 19, 5, 21, 7, true, true, true,
     Saving::recompute, 0, true, LinkKind::residual, true},
    {"skip links, widths", 4, 3, 9, 5, 60, 0, false, false, true, Saving::recompute, 10, false, LinkKind::skip},
    {"skip links, both directions, padding, resets", 3, 5, 12, 3, 24, 0, true, true, false, Saving::full, 0, false,
     LinkKind::skip, true, 3},
    {"resets, no lengths", 3, 3, 21, 5, 70, 11, false, false, false, Saving::recompute, 0, false, LinkKind::plain,
     true},
    {"padding", 3, 6, 20, 5, 20, 0, true, true, true, Saving::recompute, 0, true, LinkKind::plain, false, 2},
};

// Everything a call reads and writes.
template <typename T>
struct Problem {
  StackShape shape;
  Links links;
  std::vector<uint8_t> resets;  // of the steps that exist
  Keeping keeping;
  bool bf16_weights = false;
  std::vector<std::vector<T>> grad_h, grad_c;  // of each layer; empty without states
  std::vector<T> input, h_0, c_0, grad_output, grad_h_n, grad_c_n;
  std::vector<std::vector<T>> weights;               // five a lane
  std::vector<T> output, h_n, c_n, reserve;          // forward
  std::vector<T> inferred[2];                        // the output again, without a reserve: packs, then finds it packed
  std::vector<T> stepped;                            // and again, step by step, where that can be
  std::vector<T> grad_input[2], grad_h_0, grad_c_0;  // backward
  std::vector<std::vector<T>> gradients;

  explicit Problem(const Case& c) : keeping{c.saving, false, c.states} {
    if (c.dropout) {  // no two neighbouring links have the same rate, and one has none
      for (int64_t k = 0; k + 1 < c.layers; ++k) links.rates.each.push_back(k % 3 == 1 ? 0 : 0.4 - 0.1 * (k % 3));
      links.seed = 12345;
    }
    shape.steps = c.steps, shape.batch = c.batch, shape.directions = c.bidirectional ? 2 : 1;
    shape.link = c.link, shape.padded_steps = c.padding > 0 ? c.steps + c.padding : 0;
    for (int64_t k = 0; k < c.layers; ++k) {
      int64_t below = k ? shape.directions * shape.layers.back().output() : c.input;
      if (k > 0 && c.link == LinkKind::skip) below += c.input;
      shape.layers.push_back({below, c.hidden_of(k), c.projection_of(k)});
    }
    if (c.packed) shape.packed_rows.push_back(0);
    for (int64_t t = 0; c.packed && t < c.steps; ++t) {
      const int64_t active = std::max<int64_t>(c.batch - t * c.batch / c.steps, 1);
      shape.packed_rows.push_back(shape.packed_rows.back() + active);
    }
    std::mt19937 random(7);
    std::uniform_real_distribution<double> uniform(-1, 1);
    const auto fill = [&](std::vector<T>& v, int64_t n, double scale = 1) {
      v.resize(static_cast<size_t>(n));
      for (T& x : v) x = static_cast<T>(scale * uniform(random));
    };
    for (int64_t n = 0; c.resets && n < shape.steps * shape.batch; ++n) resets.push_back(random() % 4 == 0);
    fill(input, shape.all_rows() * c.input);
    const StateLayout states(shape);
    fill(h_0, states.h(shape.lanes())), fill(grad_h_n, states.h(shape.lanes()));
    fill(c_0, states.c(shape.lanes())), fill(grad_c_n, states.c(shape.lanes()));
    fill(grad_output, shape.all_rows() * shape.output_width());
    for (int64_t lane = 0; lane < shape.lanes(); ++lane) {
      const LayerShape& layer = shape.of_lane(lane);
      const int64_t rows = 4 * layer.hidden;
      for (const int64_t n : {rows * layer.input, rows * layer.output(), rows, rows, layer.projection * layer.hidden}) {
        fill(weights.emplace_back(), n, 1 / std::sqrt(static_cast<double>(layer.hidden)));
      }
    }
    for (int64_t k = 0; c.states && k < c.layers; ++k) {
      fill(grad_h.emplace_back(), shape.all_rows() * shape.directions * shape.layers[static_cast<size_t>(k)].output());
      fill(grad_c.emplace_back(), shape.all_rows() * shape.directions * shape.layers[static_cast<size_t>(k)].hidden);
    }
  }

  void run(const cpu::Workers& workers, Pool pool) {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    output = unwritten(shape.output_width()), h_n.assign(h_0.size(), nan), c_n.assign(c_0.size(), nan);
    reserve.assign(static_cast<size_t>(reserve_elements(shape, keeping)), nan);
    grad_h_0.assign(h_0.size(), nan), grad_c_0.assign(c_0.size(), nan);
    for (int64_t d = 0; d < shape.directions; ++d) grad_input[d] = unwritten(shape.layers[0].input);
    gradients.clear();
    for (const std::vector<T>& w : weights) gradients.emplace_back(w.size(), nan);

    PlainPlatform platform(pool);
    const Input<T> x{input.data(), shape.batch * shape.layers[0].input, shape.layers[0].input};
    std::vector<LaneWeights<T>> lane_weights;
    std::vector<LaneGradients<T>> lane_gradients;
    for (size_t n = 0; n < weights.size(); n += 5) {
      lane_weights.push_back({weights[n].data(), weights[n + 1].data(), weights[n + 2].data(), weights[n + 3].data(),
                              weights[n + 4].data()});
      lane_gradients.push_back({gradients[n].data(), gradients[n + 1].data(), gradients[n + 2].data(),
                                gradients[n + 3].data(), gradients[n + 4].data()});
    }
    const ResetLists lists(resets.empty() ? nullptr : resets.data(), shape);
    cpu::forward(ForwardCall<T>{shape, x, lane_weights, h_0.data(), c_0.data(), links, lists, keeping, output.data(),
                                h_n.data(), c_n.data(), reserve.data(), bf16_weights},
                 workers, platform);
    std::vector<cpu::Bytes> sources;
    for (const std::vector<T>& w : weights) {
      sources.push_back({w.data(), static_cast<int64_t>(w.size() * sizeof(T))});
    }
    cpu::PackedStack<T> packed(shape, bf16_weights ? cpu::Storage::bf16 : cpu::Storage::same, sources);
    for (std::vector<T>& again : inferred) {
      again = unwritten(shape.output_width());
      std::vector<T> h(h_n.size()), c(c_n.size());
      cpu::forward(ForwardCall<T>{shape,
                                  x,
                                  packed.ready() ? std::vector<LaneWeights<T>>{} : lane_weights,
                                  h_0.data(),
                                  c_0.data(),
                                  links,
                                  lists,
                                  {},
                                  again.data(),
                                  h.data(),
                                  c.data(),
                                  nullptr,
                                  bf16_weights},
                   workers, platform, &packed);
    }
    if (shape.directions == 1 && !shape.packed() && lists.empty() && links.rates == PerLayer<double>()) {
      stepped.assign(output.size(), nan);
      take_steps(packed, pool == Pool::one_thread ? 1 : workers.threads, platform);
    }
    const auto rows_of = [&](const std::vector<T>& rows, int64_t width) {
      return Input<T>{rows.data(), shape.batch * width, width};
    };
    std::vector<Input<T>> grad_of_h(shape.layers.size()), grad_of_c;
    for (size_t k = 0; k < grad_h.size(); ++k) {
      grad_of_h[k] = rows_of(grad_h[k], shape.directions * shape.layers[k].output());
      grad_of_c.push_back(rows_of(grad_c[k], shape.directions * shape.layers[k].hidden));
    }
    const int64_t columns = shape.output_width();
    for (int64_t k = 0; k < shape.depth(); ++k) {  // where there are no states: what flows in through the output
      if (!grad_h.empty() && shape.link != LinkKind::plain) continue;
      if (shape.link != LinkKind::skip && k + 1 < shape.depth()) continue;
      grad_of_h[static_cast<size_t>(k)] = {grad_output.data() + output_column(shape, k), shape.batch * columns,
                                           columns};
    }
    cpu::backward(BackwardCall<T>{shape,
                                  x,
                                  lane_weights,
                                  h_0.data(),
                                  c_0.data(),
                                  links,
                                  lists,
                                  keeping,
                                  output.data(),
                                  reserve.data(),
                                  grad_of_h,
                                  grad_of_c,
                                  rows_of(grad_output, columns),
                                  grad_h_n.data(),
                                  grad_c_n.data(),
                                  {grad_input[0].data(), shape.directions == 2 ? grad_input[1].data() : nullptr},
                                  grad_h_0.data(),
                                  grad_c_0.data(),
                                  lane_gradients,
                                  bf16_weights},
                  workers, platform);
  }

  // Rows of the caller: NaN, but for zeros in the padding, which no kernel writes.
  std::vector<T> unwritten(int64_t width) const {
    std::vector<T> rows(static_cast<size_t>(shape.all_rows() * width),
                        shape.has_lengths() ? T(0) : std::numeric_limits<T>::quiet_NaN());
    for (int64_t t = 0; shape.has_lengths() && t < shape.steps; ++t) {
      std::fill_n(rows.begin() + shape.caller_row(t) * width, shape.active(t) * width,
                  std::numeric_limits<T>::quiet_NaN());
    }
    return rows;
  }

  void take_steps(const cpu::PackedStack<T>& packed, int64_t workers, PlainPlatform& platform) {
    StackShape one = shape;
    one.steps = 1;
    const int64_t row = shape.batch * shape.layers[0].input, out = shape.batch * shape.output_width();
    std::vector<T> h = h_0, c = c_0, next_h(h.size()), next_c(c.size());
    for (int64_t t = 0; t < shape.steps; ++t) {
      cpu::step(cpu::StepCall<T>{one, packed, input.data() + t * row, shape.layers[0].input, h.data(), c.data(),
                                 stepped.data() + t * out, next_h.data(), next_c.data()},
                workers, platform);
      h.swap(next_h), c.swap(next_c);
    }
    for (size_t n = 0; n < output.size(); ++n) {
      step_error = std::max(step_error, std::abs(double{stepped[n]} - double{output[n]}));
      largest_output = std::max(largest_output, std::abs(double{output[n]}));
    }
  }
  double step_error = 0, largest_output = 0;

  // What rounding explains of a step's error, as in tests/helpers.py: two results of sums in an order of their own.
  double step_tolerance() const {
    double inner = 1;
    for (const LayerShape& layer : shape.layers) {
      inner = std::max(inner, static_cast<double>(layer.input + layer.output()));
      inner = std::max(inner, static_cast<double>(layer.hidden));
    }
    const double layers = static_cast<double>(shape.depth()), u = std::numeric_limits<T>::epsilon() / 2;
    const double rounding = 2 * 4 * 2 * layers * u * std::sqrt(inner) * largest_output;
    return rounds_inputs() ? rounding + input_tolerance() * largest_output : rounding;
  }
  // With units for bfloat16, inputs are rounded: what is off by the last bit of float32 may round to another number.
  bool rounds_inputs() const { return bf16_weights && cpu::kernels<float>().units; }
  // What that explains, as a share of a tensor's largest element, as in tests/cpu/test_bf16_weights.py.
  double input_tolerance() const { return 2 * std::sqrt(2 * static_cast<double>(shape.depth())) / 256; }

  static void round(std::vector<T>& numbers) {
    for (T& x : numbers) {
      uint32_t bits;
      const auto narrow = static_cast<float>(x);
      std::memcpy(&bits, &narrow, sizeof bits);
      bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
      float rounded;
      std::memcpy(&rounded, &bits, sizeof rounded);
      x = static_cast<T>(rounded);
    }
  }
  void round_weights() {
    for (size_t n = 0; n < weights.size(); ++n) {
      if (n % 5 != 2 && n % 5 != 3) round(weights[n]);  // all but biases
    }
  }

  std::vector<std::vector<T>> results() const {
    std::vector<std::vector<T>> all{output,        h_n,           c_n,      reserve,  inferred[0], inferred[1],
                                    grad_input[0], grad_input[1], grad_h_0, grad_c_0, stepped};
    all.insert(all.end(), gradients.begin(), gradients.end());
    return all;
  }
};

std::string describe(const Schedule& s) {
  std::string text = std::to_string(s.batch_slices) + " batch slices, chunks of " + std::to_string(s.chunk_steps);
  for (int64_t p = 0; p < s.phases; ++p) {
    text += ", " + std::to_string(s.phase[p].layer_groups) + "x" + std::to_string(s.phase[p].unit_slices);
  }
  return text;
}

int failures = 0;

template <typename T>
void compare(const Problem<T>& problem, const std::vector<std::vector<T>>& expected, const std::string& what) {
  const auto got = problem.results();
  for (size_t n = 0; n < got.size(); ++n) {
    if (got[n].empty() || std::memcmp(got[n].data(), expected[n].data(), got[n].size() * sizeof(T)) == 0) continue;
    std::printf("FAILED %s: result %zu differs from one worker's\n", what.c_str(), n);
    ++failures;
  }
}

// … to a share of each result's largest element.
template <typename T>
void compare_nearly(const Problem<T>& problem, const std::vector<std::vector<T>>& expected, double share,
                    const std::string& what) {
  const auto got = problem.results();
  for (size_t n = 0; n < got.size(); ++n) {
    double largest = 0, error = 0;
    for (size_t k = 0; k < got[n].size(); ++k) {
      largest = std::max(largest, std::abs(double{expected[n][k]}));
      error = std::max(error, std::abs(double{got[n][k]} - double{expected[n][k]}));
    }
    if (error <= share * largest) continue;
    std::printf("FAILED %s: result %zu is off by %g of its largest element, and rounding explains %g\n", what.c_str(),
                n, error / largest, share);
    ++failures;
  }
}

template <typename T>
int run_case(const Case& c, const char* type, bool bf16_weights, size_t first_schedule, size_t stride) {
  Problem<T> problem(c);
  problem.bf16_weights = bf16_weights;
  const bool rounds_inputs = problem.rounds_inputs();
  if (rounds_inputs) problem.round(problem.input);  // what is left are the inputs of the layers above
  const Schedule alone =
      cpu::plan(problem.shape, 1, sizeof(T), bf16_weights ? cpu::Storage::bf16 : cpu::Storage::same, false);
  problem.run({1, &alone}, Pool::threads);
  const auto expected = problem.results();
  for (const auto& result : expected) {
    for (const T x : result) {
      if (std::isfinite(x)) continue;
      std::printf("FAILED %s (%s): an output was left unwritten or is not finite\n", c.name, type);
      ++failures;
      break;
    }
  }
  if (problem.step_error > problem.step_tolerance()) {
    std::printf("FAILED %s (%s): a step is off by %g, and rounding explains %g\n", c.name, type, problem.step_error,
                problem.step_tolerance());
    ++failures;
  }
  if (bf16_weights) {
    Problem<T> rounded(c);
    rounded.round_weights();
    if (rounds_inputs) rounded.round(rounded.input);
    rounded.run({1, &alone}, Pool::threads);
    const std::string what = std::string(c.name) + " (" + type + "), weights rounded beforehand";
    if (rounds_inputs) {
      compare_nearly(rounded, expected, problem.input_tolerance(), what);
    } else {
      compare(rounded, expected, what);
    }
  }
  for (const std::vector<T>& again : problem.inferred) {
    if (again == problem.output) continue;
    std::printf("FAILED %s (%s): inference differs from the forward pass of training\n", c.name, type);
    ++failures;
  }
  int runs = 1;
  const int64_t depth = c.layers;
  std::vector<Schedule> schedules;
  for (const int64_t chunk : {1, 3, 64}) {
    for (const auto& [batch, groups, slices] : {std::tuple{1, 2, 1},
                                                {1, 1, 2},
                                                {1, 1, 3},
                                                {2, 1, 1},
                                                {2, 2, 1},
                                                {1, 2, 2},
                                                {3, 1, 1},
                                                {1, 4, 1},
                                                {2, 1, 2}}) {
      if (batch > c.batch) continue;
      Schedule s;
      s.batch_slices = batch, s.chunk_steps = chunk, s.phase[0] = {0, depth, groups, slices};
      schedules.push_back(s);
    }
    if (depth > 2 && !c.bidirectional) {
      Schedule s;
      s.chunk_steps = chunk, s.phases = 2, s.phase[0] = {0, depth - 1, 2, 1}, s.phase[1] = {depth - 1, depth, 1, 2};
      schedules.push_back(s);
    }
  }
  for (size_t n = first_schedule % stride; n < schedules.size(); n += stride) {
    const Schedule& s = schedules[n];
    for (const Pool pool : {Pool::threads, Pool::one_thread, Pool::one_after_another}) {
      if (pool != Pool::threads && s.chunk_steps != 3) continue;
      problem.run({s.workers(), &s}, pool);
      compare(problem, expected, std::string(c.name) + " (" + type + "), " + describe(s));
      ++runs;
    }
  }
  return runs;
}

// Several calls at once, each with a team of its own.
int run_side_by_side() {
  std::vector<std::thread> callers;
  std::atomic<int> runs{0};
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&, caller] {
      Problem<float> problem(kCases[2 + caller]);
      Schedule s;
      s.chunk_steps = 2, s.phase[0] = {0, problem.shape.depth(), 2, 1};
      problem.run({2, &s}, Pool::threads);
      const auto expected = problem.results();
      for (int n = 0; n < 5; ++n) problem.run({2, &s}, Pool::threads), ++runs;
      compare(problem, expected, "side by side");
    });
  }
  for (std::thread& caller : callers) caller.join();
  return runs;
}

}  // namespace

int main(int count, char** arguments) {
  const auto number = [&](int n, size_t otherwise) {
    return n < count ? static_cast<size_t>(std::atoi(arguments[n])) : otherwise;
  };
  const size_t stride = number(1, 1), part = number(2, 0), parts = number(3, 1);
  if (stride == 0 || part >= parts) {
    std::fprintf(stderr, "usage: %s [STRIDE [PART PARTS]]\n", arguments[0]);
    return 2;
  }
  int runs = 0;
  size_t problem = 0;
  const auto mine = [&] { return problem++ % parts == part; };
  for (const Case& c : kCases) {
    if (mine()) runs += run_case<float>(c, "float32", false, problem, stride);
    if (mine()) runs += run_case<double>(c, "float64", false, problem, stride);
    if (mine()) runs += run_case<float>(c, "float32, weights stored as bfloat16", true, problem, stride);
  }
  if (part == 0) runs += run_side_by_side();
  std::printf("%d runs, %d failures\n", runs, failures);
  return failures > 0;
}
