// tests/emulator/persistent.cpp: runs the persistent forward kernel and checks every h, c and gate of every layer.
//
//   persistent [--order O] [--seed N] [--exact] [name ...]     all cases whose name begins like one of these; default: all
//
// The reference computes every step in float64 from the h that the kernel itself has left for the step before and the layer
// below. So roundings are the kernel's own, errors do not add up, and the tolerance is that of one step. It shares no
// equation with the kernel. All memory that the kernel gets lies between guard zones of NaN: outputs start as NaN too,
// and a zone that is read makes a matrix operand NaN, which the emulator reports. --exact: no zones, for AddressSanitizer.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "persistent_instances.h"

using namespace stacked_lstm;
using namespace stacked_lstm::cuda;
using namespace stacked_lstm::cuda::persistent;

namespace {

bool exact = false;
std::mt19937 generator;

float uniform(float bound) { return std::uniform_real_distribution<float>(-bound, bound)(generator); }

// Memory between two zones. All bits set is NaN in every format.
template <typename T>
class Guarded {
 public:
  explicit Guarded(size_t count) : zone_(exact ? 0 : 256 / sizeof(T)), all_(count + 2 * zone_) {
    std::memset(static_cast<void*>(all_.data()), 0xFF, all_.size() * sizeof(T));
  }
  T* data() { return all_.data() + zone_; }
  T& operator[](size_t n) { return data()[n]; }
  size_t size() const { return all_.size() - 2 * zone_; }
  bool intact() const { return all_set(0, zone_) && all_set(all_.size() - zone_, zone_); }
  bool untouched() const { return all_set(0, all_.size()); }

 private:
  bool all_set(size_t first, size_t count) const {
    const auto* bytes = reinterpret_cast<const unsigned char*>(all_.data() + first);
    return std::all_of(bytes, bytes + count * sizeof(T), [](unsigned char byte) { return byte == 0xFF; });
  }
  size_t zone_;
  std::vector<T> all_;
};

enum : unsigned { kInitial = 1, kBias = 2, kSaves = 4, kLast = 8, kShared = 16, kAll = 31 };

struct Case {
  const char* name;
  bool half;  // float16, else bfloat16
  int k_steps, splits, tiles;
  Exchange exchange;
  int layers, steps, batch, inputs, hidden;
  int blocks, groups, chunk_steps;
  unsigned options;
};

constexpr Exchange kCluster = Exchange::cluster, kL2 = Exchange::l2;
const Case kCases[] = {
    //                 cut               L   T   B    I    H   blocks groups chunk
    {"one", false, 2, 1, 1, kCluster, 1, 1, 1, 1, 1, 1, 1, 4, kAll},             // nothing to exchange
    {"one_block", false, 2, 1, 1, kCluster, 4, 9, 3, 17, 8, 1, 1, 2, kBias},     // pushes to itself
    {"ones_deep", false, 2, 1, 1, kCluster, 8, 3, 1, 1, 1, 1, 1, 1, kAll},       // fewer steps than layers
    {"two_steps", false, 2, 1, 1, kCluster, 2, 2, 8, 17, 30, 2, 2, 4, kAll},     // one push, one unit group half empty
    {"ragged", false, 2, 1, 1, kCluster, 3, 19, 3, 17, 20, 3, 1, 4, kSaves},     // last chunk short; no bias, no states
    {"forty", true, 4, 2, 1, kCluster, 3, 9, 8, 128, 40, 2, 3, 3, kAll},         // float16
    {"wide_batch", false, 4, 2, 2, kCluster, 2, 5, 9, 64, 96, 4, 3, 2, kAll},    // two batch tiles, one nearly empty
    {"full_batch", false, 2, 4, 4, kCluster, 2, 4, 32, 40, 128, 8, 2, 3, kAll},  // four splits
    {"odd_batch", false, 2, 4, 4, kCluster, 2, 3, 17, 17, 100, 8, 2, 2, kBias},
    {"two_hundred", false, 8, 2, 1, kCluster, 2, 4, 3, 128, 200, 7, 4, 3, kAll},        // 224 units of K = 256
    {"layer_256", false, 8, 2, 1, kCluster, 1, 3, 8, 64, 256, 8, 4, 8, kBias | kLast},  // inference
    {"layer_512", false, 16, 2, 1, kCluster, 1, 2, 8, 17, 512, 16, 4, 2, kBias},        // the largest cluster
    {"l2_one", false, 2, 1, 1, kL2, 3, 3, 1, 1, 1, 1, 1, 2, kAll},
    {"l2_ragged", false, 2, 1, 1, kL2, 3, 19, 3, 17, 20, 3, 1, 4, kSaves},
    {"l2_forty", true, 4, 2, 1, kL2, 3, 9, 8, 64, 40, 2, 3, 3, kAll},
    {"l2_batch", false, 4, 2, 2, kL2, 2, 5, 13, 64, 96, 4, 3, 2, kAll},
    {"l2_two_hundred", false, 8, 2, 1, kL2, 2, 3, 3, 33, 200, 25, 1, 2, kBias},  // more blocks than a cluster has
};

// A stack, and the memory that the kernel gets.
template <typename T>
struct Stack {
  struct Memory {
    int inputs;
    Guarded<T> weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, h, h_n, c_n;
    Guarded<uint4> w_ih, w_hh;
    Guarded<float4> bias;
    Guarded<float> saved_c, saved_gates;
  };
  const Case& c;
  Arguments<T> arguments = {};
  Guarded<T> x;
  std::vector<Memory> layers;
  std::vector<uint32_t> chunks_done;
  std::vector<uint64_t> words;

  explicit Stack(const Case& with) : c(with), x(static_cast<size_t>(c.steps * c.batch * c.inputs)) {
    generator.seed(static_cast<unsigned>(c.hidden * 7 + c.layers));
    const auto count = [](int64_t n) { return static_cast<size_t>(n); };
    Sizes& sizes = arguments.sizes;
    sizes = {c.layers, c.steps, c.batch, c.hidden, c.blocks, c.groups, c.chunk_steps, has(kShared)};
    const int64_t state = int64_t{c.batch} * c.hidden, depth = 16 * c.splits * c.k_steps;
    const float bound = 1.5f / std::sqrt(static_cast<float>(c.hidden));
    fill(x, 1);
    for (int n = 0; n < c.layers; ++n) {
      const int inputs = n == 0 ? c.inputs : c.hidden, k_steps_ih = input_k_steps(inputs);
      const int64_t groups = sizes.units() / kGroupUnits;
      layers.push_back({inputs, Guarded<T>(count(4 * c.hidden * inputs)), Guarded<T>(count(4 * c.hidden * c.hidden)),
                        Guarded<T>(count(4 * c.hidden)), Guarded<T>(count(4 * c.hidden)), Guarded<T>(count(state)),
                        Guarded<T>(count(state)), Guarded<T>(count(state * c.steps)), Guarded<T>(count(state)),
                        Guarded<T>(count(state)), Guarded<uint4>(count(groups * k_steps_ih * 2 * kLanes)),
                        Guarded<uint4>(count(groups * depth / 16 * 2 * kLanes)), Guarded<float4>(count(sizes.units())),
                        Guarded<float>(count(state * c.steps)), Guarded<float>(count(4 * state * c.steps))});
      Memory& m = layers.back();
      fill(m.weight_ih, bound), fill(m.weight_hh, bound), fill(m.bias_ih, 0.5f), fill(m.bias_hh, 0.5f);
      fill(m.h_0, 0.9f), fill(m.c_0, 1.5f);
      for (size_t word = 0; word < m.w_ih.size(); ++word) {
        m.w_ih[word] =
            packed_word(m.weight_ih.data(), c.hidden, inputs, k_steps_ih, Order::paired, static_cast<int64_t>(word));
      }
      for (size_t word = 0; word < m.w_hh.size(); ++word) {
        m.w_hh[word] = packed_word(m.weight_hh.data(), c.hidden, c.hidden, static_cast<int>(depth / 16), Order::natural,
                                   static_cast<int64_t>(word));
      }
      for (size_t unit = 0; unit < m.bias.size(); ++unit) {
        m.bias[unit] = packed_bias<T>(has(kBias) ? m.bias_ih.data() : nullptr, has(kBias) ? m.bias_hh.data() : nullptr,
                                      c.hidden, static_cast<int>(unit));
      }
    }
    for (int n = 0; n < c.layers; ++n) {
      Memory& m = layers[count(n)];
      arguments.layer[n] = {m.w_hh.data(),
                            m.w_ih.data(),
                            m.bias.data(),
                            n == 0 ? x.data() : layers[count(n - 1)].h.data(),
                            m.h.data(),
                            has(kInitial) ? m.h_0.data() : nullptr,
                            has(kInitial) ? m.c_0.data() : nullptr,
                            has(kLast) ? m.h_n.data() : nullptr,
                            has(kLast) ? m.c_n.data() : nullptr,
                            has(kSaves) ? m.saved_c.data() : nullptr,
                            has(kSaves) ? m.saved_gates.data() : nullptr,
                            m.inputs};
    }
    chunks_done.assign(count(c.layers * c.blocks), 0);
    words.assign(count(c.layers * 2 * 8 * c.tiles * depth / 2), 0);
    arguments.chunks_done = chunks_done.data();
    arguments.words = c.exchange == kL2 ? words.data() : nullptr;
  }

  bool has(unsigned option) const { return (c.options & option) != 0; }

  static void fill(Guarded<T>& values, float bound) {
    for (size_t n = 0; n < values.size(); ++n) values[n] = narrow<T>(uniform(bound));
  }

  bool untouched() const {
    return std::all_of(layers.begin(), layers.end(), [](const Memory& m) {
      return m.h.untouched() && m.h_n.untouched() && m.c_n.untouched() && m.saved_c.untouched() &&
             m.saved_gates.untouched();
    });
  }

  // Of all that the kernel has written.
  std::string bits() {
    std::string all;
    const auto append = [&](auto& values) {
      all.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(values[0]));
    };
    for (Memory& m : layers) append(m.h), append(m.h_n), append(m.c_n), append(m.saved_c), append(m.saved_gates);
    return all;
  }

  const Instance<T>* instance() const {
    for (const Instance<T>& i : instances<T>()) {
      if (i.k_steps == c.k_steps && i.splits == c.splits && i.tiles == c.tiles && i.exchange == c.exchange) return &i;
    }
    return nullptr;
  }

  // What is wrong with the numbers, or "".
  std::string judge() {
    const double unit = std::is_same_v<T, bfloat16> ? 0x1p-8 : 0x1p-11;  // of T's rounding
    const double fp32 = 3e-5;  // sums of some hundred products, FastMaths, c over some steps: about a tenth of this
    const int chunks = (c.steps + c.chunk_steps - 1) / c.chunk_steps;
    for (int layer = 0; layer < c.layers; ++layer) {
      Memory& m = layers[static_cast<size_t>(layer)];
      const T* below = layer == 0 ? x.data() : layers[static_cast<size_t>(layer - 1)].h.data();
      const bool read = layer + 1 < c.layers;  // by a layer above
      for (int block = 0; block < c.blocks; ++block) {
        if (chunks_done[static_cast<size_t>(layer * c.blocks + block)] != static_cast<uint32_t>(read ? chunks : 0)) {
          return "wrong numbers: the counter of block " + std::to_string(block) + ", layer " + std::to_string(layer);
        }
      }
      if (!(m.h.intact() && m.h_n.intact() && m.c_n.intact() && m.saved_c.intact() && m.saved_gates.intact())) {
        return "wrong numbers: a guard zone of layer " + std::to_string(layer) + " was written";
      }
      if ((!has(kSaves) && !(m.saved_c.untouched() && m.saved_gates.untouched())) ||
          (!has(kLast) && !(m.h_n.untouched() && m.c_n.untouched()))) {
        return "wrong numbers: an output of layer " + std::to_string(layer) + " that nobody asked for was written";
      }
      const size_t state = static_cast<size_t>(c.batch * c.hidden), hidden = static_cast<size_t>(c.hidden);
      std::vector<double> cell(state, 0.0), before(state, 0.0);
      for (size_t n = 0; n < state && has(kInitial); ++n) cell[n] = widen(m.c_0[n]), before[n] = widen(m.h_0[n]);
      const auto sigmoid = [](double v) { return 1 / (1 + std::exp(-v)); };
      for (int t = 0; t < c.steps; ++t) {
        const size_t from = static_cast<size_t>(t) * state;
        for (size_t n = 0; n < state; ++n) {
          const size_t b = n / hidden, j = n % hidden, inputs = static_cast<size_t>(m.inputs);
          const T* row = below + (static_cast<size_t>(t * c.batch) + b) * inputs;
          double gate[4];
          for (size_t g = 0; g < 4; ++g) {
            double sum = has(kBias) ? double{widen(m.bias_ih[g * hidden + j])} + widen(m.bias_hh[g * hidden + j]) : 0;
            const T* w_ih = m.weight_ih.data() + (g * hidden + j) * inputs;
            const T* w_hh = m.weight_hh.data() + (g * hidden + j) * hidden;
            for (size_t k = 0; k < inputs; ++k) sum += double{widen(w_ih[k])} * widen(row[k]);
            for (size_t k = 0; k < hidden; ++k) sum += double{widen(w_hh[k])} * before[b * hidden + k];
            gate[g] = g == 2 ? std::tanh(sum) : sigmoid(sum);
          }
          cell[n] = gate[1] * cell[n] + gate[0] * gate[2];
          const double h = gate[3] * std::tanh(cell[n]);
          const auto wrong = [&](const char* what, double got, double expected, double tolerance) -> std::string {
            if (std::fabs(got - expected) <= tolerance) return "";
            return "wrong numbers: " + std::string(what) + " of unit " + std::to_string(j) + ", row " +
                   std::to_string(b) + " at layer " + std::to_string(layer) + ", step " + std::to_string(t) + " is " +
                   std::to_string(got) + ", expected " + std::to_string(expected);
          };
          std::string error = wrong("h", widen(m.h[from + n]), h, unit * std::fabs(h) + fp32);
          if (error.empty() && has(kSaves)) {
            error = wrong("c", m.saved_c[from + n], cell[n], fp32);
            for (size_t g = 0; g < 4 && error.empty(); ++g) {
              error = wrong("a gate", m.saved_gates[4 * from + (4 * b + g) * hidden + j], gate[g], fp32);
            }
          }
          if (error.empty() && has(kLast) && t + 1 == c.steps) {
            if (m.h_n[n].bits != m.h[from + n].bits) error = wrong("h_n", widen(m.h_n[n]), h, 0);
            if (error.empty()) error = wrong("c_n", widen(m.c_n[n]), cell[n], unit * std::fabs(cell[n]) + fp32);
          }
          if (!error.empty()) return error;
        }
        for (size_t n = 0; n < state; ++n) before[n] = widen(m.h[from + n]);
      }
    }
    return "";
  }
};

template <typename T>
std::string run(const Case& c) {
  Stack<T> stack(c);
  const Instance<T>* instance = stack.instance();
  if (!instance) return "no such kernel was compiled";
  const Status status = instance->forward(stack.arguments, nullptr);
  const std::string error = status.ok() ? stack.judge() : status.text;
  if (!error.empty()) return error;
  // In every order of the threads the same bits.
  static std::map<std::string, std::string> first;
  const std::string bits = stack.bits();
  return first.emplace(c.name, bits).first->second == bits ? "" : "wrong numbers: other bits than in the first order";
}

// A launch of which `piece` is in the refusal; then nothing has been written.
template <typename Change>
std::string refused(const Case& c, const std::string& piece, Change change) {
  Stack<bfloat16> stack(c);
  const emulator::Device before = emulator::options().device;
  change(stack.arguments.sizes, emulator::options().device);
  const Status status = stack.instance()->forward(stack.arguments, nullptr);
  emulator::options().device = before;
  if (status.text.find(piece) == std::string::npos) return "instead of \"" + piece + "\": \"" + status.text + "\"";
  return stack.untouched() ? "" : "refused, and something was written: " + status.text;
}

const Case& named(const std::string& name) {
  for (const Case& c : kCases) {
    if (c.name == name) return c;
  }
  std::abort();
}

std::string refusals() {
  const Case &cluster = named("ragged"), &l2 = named("l2_ragged");
  using emulator::Device;
  const std::string errors[] = {
      refused(cluster, "9 (in clusters of 3) have to be resident at once, the device holds 6",
              [](Sizes&, Device& d) { d.cluster_slots = 2; }),
      refused(l2, "9 have to be resident at once, the device holds 8",
              [](Sizes&, Device& d) { d.multiprocessors = 4, d.blocks_per_multiprocessor = 2; }),
      refused(cluster, "batch 9 of at most 8", [](Sizes& s, Device&) { s.batch = 9; }),
      refused(cluster, "hidden 20, units 16, K 32", [](Sizes& s, Device&) { s.blocks = 2; }),
      refused(cluster, "hidden 20, units 40, K 32", [](Sizes& s, Device&) { s.blocks = 5; }),
      refused(cluster, "16 groups of 1 warps", [](Sizes& s, Device&) { s.groups = 16; }),
      refused(cluster, "33 layers: a launch takes 1 to 32", [](Sizes& s, Device&) { s.layers = 33; }),
      refused(cluster, "no steps", [](Sizes& s, Device&) { s.steps = 0; }),
  };
  for (const std::string& error : errors) {
    if (!error.empty()) return error;
  }
  return "";
}

// The device packs what the host does.
std::string packing() {
  const int hidden = 20, depth = 17, units = 24, k_steps = input_k_steps(depth);
  Guarded<bfloat16> weight(4 * hidden * depth), bias(4 * hidden);
  Stack<bfloat16>::fill(weight, 1), Stack<bfloat16>::fill(bias, 1);
  Guarded<uint4> packed(static_cast<size_t>(units / kGroupUnits * k_steps * 2 * kLanes));
  Guarded<float4> packed_biases(units);
  for (const Order order : {Order::natural, Order::paired}) {
    const Status status =
        pack(weight.data(), hidden, depth, k_steps, order, packed.data(), static_cast<int64_t>(packed.size()));
    if (!status.ok()) return status.text;
    for (size_t n = 0; n < packed.size(); ++n) {
      const uint4 word = packed_word(weight.data(), hidden, depth, k_steps, order, static_cast<int64_t>(n));
      if (std::memcmp(&word, &packed[n], sizeof word) != 0) return "wrong numbers: word " + std::to_string(n);
    }
  }
  const bfloat16* none = nullptr;
  const Status status = pack(bias.data(), none, hidden, packed_biases.data(), units);
  if (!status.ok()) return status.text;
  for (int n = 0; n < units; ++n) {
    const float4 word = packed_bias(bias.data(), none, hidden, n);
    if (std::memcmp(&word, &packed_biases[static_cast<size_t>(n)], sizeof word) != 0) return "wrong numbers: a bias";
  }
  return packed.intact() && packed_biases.intact() ? "" : "wrong numbers: a guard zone was written";
}

// As good as FastMaths says.
std::string maths() {
  for (double x = -30; x <= 30; x += 0x1p-8) {
    const auto v = static_cast<float>(x);
    const double errors[] = {std::fabs(fast_sigmoid(v) - 1 / (1 + std::exp(-x))),
                             std::fabs(fast_tanh(v) - std::tanh(x))};
    if (!(std::max(errors[0], errors[1]) < 0x1p-20)) return "wrong numbers: σ or tanh of " + std::to_string(x);
  }
  const float huge = std::numeric_limits<float>::max();
  const bool ends =
      fast_sigmoid(-huge) == 0 && fast_sigmoid(huge) == 1 && fast_tanh(-huge) == -1 && fast_tanh(huge) == 1;
  return ends && std::isnan(fast_tanh(std::nanf(""))) ? "" : "wrong numbers: σ or tanh at its ends";
}

struct Schedule {
  emulator::Order order;
  uint64_t seed;
};

std::vector<Schedule> schedules(const char* order, uint64_t seed) {
  using emulator::Order;
  if (!order)
    return {
        {Order::forward, 1}, {Order::reverse, 1}, {Order::random, 1}, {Order::priorities, 1}, {Order::priorities, 2}};
  for (const Order known : {Order::forward, Order::reverse, Order::random, Order::priorities}) {
    if (std::strcmp(order, emulator::name(known)) == 0) return {{known, seed}};
  }
  std::fprintf(stderr, "no such order: %s\n", order);
  std::exit(2);
}

}  // namespace

int main(int count, char** arguments) {
  const char* order = nullptr;
  uint64_t seed = 1;
  std::vector<std::string> names;
  for (int n = 1; n < count; ++n) {
    const std::string argument = arguments[n];
    if (argument == "--exact") {
      exact = true;
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
  const auto check = [&](const char* name, auto body) {
    if (!wanted(name)) return;
    any = true;
    for (const Schedule& schedule : schedules(order, seed)) {
      emulator::options().order = schedule.order;
      emulator::options().seed = schedule.seed;
      const std::string error = body();
      if (error.empty()) continue;
      std::printf("FAILED %s (order %s, seed %llu): %s\n", name, emulator::name(schedule.order),
                  static_cast<unsigned long long>(schedule.seed), error.c_str());
      std::exit(1);
    }
    std::printf("ok     %s\n", name);
  };
  for (const Case& c : kCases) check(c.name, [&] { return c.half ? run<float16>(c) : run<bfloat16>(c); });
  check("refusals", refusals);
  check("packing", packing);
  check("maths", maths);
  if (!any) std::printf("FAILED: nothing has such a name\n");
  return any ? 0 : 1;
}
