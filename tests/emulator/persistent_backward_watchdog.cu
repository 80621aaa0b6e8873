// tests/emulator/persistent_backward_watchdog.cu: the backward kernel in a build with STACKED_LSTM_WATCHDOG, whose waits are
// bounded. Where nobody is late nothing is recorded; where what a wait is for never comes, the launch ends all the same, and
// the record says who waited for what.
#define STACKED_LSTM_WATCHDOG

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/persistent/backward.cuh"

using namespace stacked_lstm;
using namespace stacked_lstm::persistent;

namespace {

using T = bfloat16;

// Two layers of 64 units, two blocks each.
template <Exchange exchange>
struct Launch {
  static constexpr int kSteps = 6, kBatch = 3, kHidden = 64, kLanes = 2, kBlocks = 2, kRows = kSteps * kBatch;
  BackwardArguments<T> arguments = {};
  std::vector<T> weight = std::vector<T>(4 * kHidden * kHidden, narrow<T>(0.125f));
  std::vector<T> grad_output = std::vector<T>(kRows * kHidden, narrow<T>(0.5f));
  std::vector<float> saved = std::vector<float>(kRows * 4 * kHidden, 0.5f);
  std::vector<T> grad_gates = std::vector<T>(kLanes * kRows * 4 * kHidden, T{0});
  std::vector<uint32_t> chunks_done = std::vector<uint32_t>(kLanes * kBlocks, 0);
  std::vector<uint64_t> words;
  Watchdog record = {};

  explicit Launch(uint64_t limit) {
    Cut& cut = arguments.cut;
    cut.exchange = exchange, cut.pieces = cut.groups = 4, cut.unit_tiles = 1, cut.blocks = kBlocks, cut.chunk_steps = 2;
    LaunchSizes& sizes = arguments.sizes;
    sizes.steps = sizes.last_step = kSteps, sizes.batch = kBatch, sizes.hidden = kHidden, sizes.lanes = kLanes;
    sizes.batch_groups = sizes.copies = 1, sizes.h_stride = sizes.saved_stride = kHidden;
    sizes.gates_stride = 4 * kHidden;
    words.assign(static_cast<size_t>(backward_words<T>(cut, 1, kLanes)), 0);
    arguments.chunks_done = chunks_done.data(), arguments.words = words.data(), arguments.watchdog = &record;
    record.limit = limit;
    for (int n = 0; n < kLanes; ++n) {
      BackwardLane<T>& lane = arguments.lane[n];
      lane.weight_hh = lane.weight_ih_above = weight.data();
      lane.grad_output = grad_output.data();
      lane.gates = lane.c = saved.data();
      lane.grad_gates = grad_gates.data() + n * kRows * 4 * kHidden;
      lane.over = n + 1 < kLanes ? n + 1 : -1;
    }
  }

  // Past launch_backward, which would refuse what the cases below do.
  cuda::Status run(int blocks) {
    using C = cuda::persistent::CompiledBackward<T, Product::tensor, exchange, 1, 4, 1>;
    return cuda::launch(cuda::persistent::backward_config<C>(arguments.cut, blocks, true),
                        &cuda::persistent::backward<T, Product::tensor, exchange, 1, 4, 1>, arguments);
  }

  std::string differs(const Watchdog& expected) const {
    const auto text = [](const Watchdog& w) {
      return "expired " + std::to_string(w.expired) + ", what " + std::to_string(w.what) + ", lane " +
             std::to_string(w.lane) + ", step " + std::to_string(w.step) + ", for lane " + std::to_string(w.for_lane) +
             ", for block " + std::to_string(w.for_block) + ", for count " + std::to_string(w.for_count);
    };
    const std::string is = text(record), should = text(expected);
    if (record.expired && (record.copy != 0 || record.block != record.lane * kBlocks + record.rank)) {
      return "wrong numbers: the block of the record";
    }
    return is == should ? "" : "wrong numbers: recorded \"" + is + "\", expected \"" + should + "\"";
  }
};

Watchdog expected(Watchdog::What what, int lane, int step, int for_lane, int for_block, int for_count) {
  Watchdog w = {};
  w.expired = 1, w.what = what, w.lane = lane, w.step = step;
  w.for_lane = for_lane, w.for_block = for_block, w.for_count = for_count;
  return w;
}

constexpr uint64_t kSoon = 20, kNever = std::numeric_limits<uint64_t>::max();

template <Exchange exchange>
std::string nobody_is_late() {
  Launch<exchange> launch(kNever);
  const Outcome outcome =
      cuda::persistent::launch_backward<T, Product::tensor, exchange, 1, 4, 1>(launch.arguments, nullptr);
  if (outcome.kind != Outcome::ok) return outcome.text;
  for (const T& value : launch.grad_gates) {
    if (!(widen(value) >= 0)) return "wrong numbers: a dgate";
  }
  return launch.differs({});
}

// The lane above is missing.
std::string chunks_never_come() {
  Launch<Exchange::l2> launch(kSoon);
  const cuda::Status status = launch.run(1);
  return status.ok() ? launch.differs(expected(Watchdog::hand_over, 0, 6, 1, 0, 1)) : status.text;
}

// The second block of a lane is missing.
std::string words_never_come() {
  Launch<Exchange::l2> launch(kSoon);
  launch.arguments.sizes.lanes = 1, launch.arguments.lane[0].over = -1;
  const cuda::Status status = launch.run(1);
  return status.ok() ? launch.differs(expected(Watchdog::exchange, 0, 4, 0, 0, 0)) : status.text;
}

// The warp is missing that has the units of the last of 8 blocks. (That bytes are still awaited when the block exits is for
// the emulator to say. Exact products, because what these read is NaN, and mma's operands must not be.)
std::string pushes_never_come() {
  constexpr int kSteps = 6, kHidden = 128;
  std::vector<float> ones(4 * kHidden * kHidden, 0.5f);
  BackwardArguments<float> arguments = {};
  uint32_t chunks_done = 0;
  Watchdog record = {};
  record.limit = kSoon;
  Cut& cut = arguments.cut;
  cut.product = Product::exact, cut.pieces = 4, cut.groups = 2, cut.unit_tiles = 1, cut.blocks = 8;
  LaunchSizes& sizes = arguments.sizes;
  sizes.steps = sizes.last_step = kSteps, sizes.batch = sizes.lanes = sizes.batch_groups = sizes.copies = 1;
  sizes.hidden = kHidden, sizes.h_stride = sizes.saved_stride = kHidden, sizes.gates_stride = 4 * kHidden;
  arguments.chunks_done = &chunks_done, arguments.watchdog = &record;
  std::vector<float> grad_gates(kSteps * 4 * kHidden);
  BackwardLane<float>& lane = arguments.lane[0];
  lane.weight_hh = lane.grad_output = lane.gates = lane.c = ones.data(), lane.grad_gates = grad_gates.data();
  lane.over = -1;
  using C = cuda::persistent::CompiledBackward<float, Product::exact, Exchange::cluster, 1, 4, 1>;
  cuda::LaunchConfig config = cuda::persistent::backward_config<C>(cut, cut.blocks, false);
  config.block = dim3(C::kThreads - kWarpThreads);
  const cuda::Status status =
      cuda::launch(config, &cuda::persistent::backward<float, Product::exact, Exchange::cluster, 1, 4, 1>, arguments);
  if (status.text.find("exits with a transaction outstanding") == std::string::npos) return "not ended: " + status.text;
  // That block in its second step, or one that waits for its sums, in the third.
  const bool it = record.rank == 7 && record.step == 4, peer = record.rank != 7 && record.step == 3;
  if (record.expired && record.what == Watchdog::exchange && record.for_block == -1 && (it || peer)) return "";
  return "wrong numbers: block " + std::to_string(record.rank) + " in step " + std::to_string(record.step);
}

std::string no_record() {
  Launch<Exchange::l2> launch(kNever);
  launch.arguments.watchdog = nullptr;
  const Outcome outcome =
      cuda::persistent::launch_backward<T, Product::tensor, Exchange::l2, 1, 4, 1>(launch.arguments, nullptr);
  return outcome.kind == Outcome::failed && outcome.text.find("no record") != std::string::npos ? "" : outcome.text;
}

}  // namespace

int main() {
  emulator::options().print = false;
  int failed = 0;
  const auto check = [&](const char* name, std::string (*body)()) {
    for (const emulator::Order order : {emulator::Order::forward, emulator::Order::reverse, emulator::Order::random}) {
      emulator::options().order = order;
      const std::string error = body();
      if (error.empty()) continue;
      std::printf("FAILED %s (order %s): %s\n", name, emulator::name(order), error.c_str());
      ++failed;
    }
    std::printf("done   %s\n", name);
  };
  check("nobody is late, cluster", &nobody_is_late<Exchange::cluster>);
  check("nobody is late, L2", &nobody_is_late<Exchange::l2>);
  emulator::options().unordered_reads = true;  // by launches that give up
  check("chunks never come", chunks_never_come);
  check("words never come", words_never_come);
  check("pushes never come", pushes_never_come);
  check("no record", no_record);
  return failed ? 1 : 0;
}
