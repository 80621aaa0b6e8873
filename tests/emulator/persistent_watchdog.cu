// tests/emulator/persistent_watchdog.cu: the forward kernel in a build with STACKED_LSTM_WATCHDOG, whose waits are bounded.
// Where nobody is late nothing is recorded; where what a wait is for never comes, the launch ends all the same, and the
// record says who waited for what.
#define STACKED_LSTM_WATCHDOG

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/persistent/forward.cuh"

using namespace stacked_lstm;
using namespace stacked_lstm::persistent;

namespace {

using T = bfloat16;

// Two layers of 16 units, two groups: blocks of one group each, or one block of two.
template <Exchange exchange>
struct Launch {
  static constexpr int kSteps = 6, kBatch = 3, kHidden = 16, kLanes = 2;
  ForwardArguments<T> arguments = {};
  std::vector<T> weight = std::vector<T>(4 * kHidden * kHidden, narrow<T>(0.125f));
  std::vector<T> x = std::vector<T>(kSteps * kBatch * kHidden, narrow<T>(0.5f)), h[kLanes] = {x, x};
  std::vector<uint32_t> chunks_done;
  std::vector<uint64_t> words;
  Watchdog record = {};

  Launch(int blocks, uint64_t limit) {
    Cut& cut = arguments.cut;
    cut.exchange = exchange, cut.blocks = blocks, cut.groups = 2 / blocks, cut.chunk_steps = 2;
    LaunchSizes& sizes = arguments.sizes;
    sizes.steps = kSteps, sizes.batch = kBatch, sizes.hidden = kHidden, sizes.lanes = kLanes;
    sizes.batch_groups = sizes.copies = 1, sizes.h_stride = kHidden;
    chunks_done.assign(static_cast<size_t>(kLanes * blocks), 0);
    words.assign(static_cast<size_t>(forward_words<T>(cut, 1, kLanes)), 0);
    arguments.chunks_done = chunks_done.data(), arguments.words = words.data(), arguments.watchdog = &record;
    record.limit = limit;
    for (int n = 0; n < kLanes; ++n) {
      ForwardLane<T>& lane = arguments.lane[n];
      lane.weight_ih = lane.weight_hh = weight.data();
      lane.x = n == 0 ? x.data() : h[0].data(), lane.h = h[n].data();
      lane.x_step_stride = kBatch * kHidden, lane.x_row_stride = lane.inputs = kHidden, lane.below = n - 1;
    }
  }

  // Past launch_forward, which would refuse what the cases below do.
  cuda::Status run(int blocks, int threads) {
    cuda::LaunchConfig config = cuda::persistent::forward_config<T>(arguments.cut, kHidden, blocks);
    config.block = dim3(static_cast<unsigned>(threads));
    return cuda::launch(config, &cuda::persistent::forward<T, Product::tensor, exchange, 2, 1>, arguments);
  }

  std::string differs(const Watchdog& expected) const {
    const auto text = [](const Watchdog& w) {
      return "expired " + std::to_string(w.expired) + ", what " + std::to_string(w.what) + ", lane " +
             std::to_string(w.lane) + ", step " + std::to_string(w.step) + ", for lane " + std::to_string(w.for_lane) +
             ", for block " + std::to_string(w.for_block) + ", for count " + std::to_string(w.for_count);
    };
    const std::string is = text(record), should = text(expected);
    if (record.expired && (record.copy != 0 || record.block != record.lane * arguments.cut.blocks + record.rank)) {
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

// In looks. More than any wait for what does come takes; and soon enough not to be a live-lock to the emulator.
constexpr uint64_t kSoon = 40, kNever = std::numeric_limits<uint64_t>::max();

template <Exchange exchange, uint64_t limit>
std::string nobody_is_late() {
  Launch<exchange> launch(2, limit);
  for (auto& h : launch.h) std::memset(static_cast<void*>(h.data()), 0xFF, h.size() * sizeof(T));  // NaN
  const Outcome outcome =
      cuda::persistent::launch_forward<T, Product::tensor, exchange, 2, 1>(launch.arguments, nullptr);
  if (outcome.kind != Outcome::ok) return outcome.text;
  for (const auto& h : launch.h) {
    for (const T& value : h) {
      if (std::isnan(widen(value))) return "wrong numbers: h";
    }
  }
  return launch.differs({});
}

// Lane 1 waits for itself.
std::string chunks_never_come() {
  Launch<Exchange::l2> launch(1, kSoon);
  launch.arguments.lane[1].below = 1;
  const cuda::Status status = launch.run(2, 64);
  return status.ok() ? launch.differs(expected(Watchdog::hand_over, 1, 0, 1, 0, 1)) : status.text;
}

// The last block, of two of lane 1, is missing.
std::string words_never_come() {
  Launch<Exchange::l2> launch(2, kSoon);
  launch.arguments.cut.chunk_steps = 1;  // so that nothing else takes long
  const cuda::Status status = launch.run(3, 32);
  return status.ok() ? launch.differs(expected(Watchdog::exchange, 1, 1, 1, 1, 0)) : status.text;
}

// The warp of the second group is missing, in both blocks. (That bytes are still awaited when the blocks exit is for the emulator to say.)
std::string pushes_never_come() {
  Launch<Exchange::cluster> launch(2, kSoon);
  launch.arguments.sizes.lanes = 1, launch.arguments.cut.groups = 2;
  const cuda::Status status = launch.run(2, 32);
  if (status.text.find("exits with a transaction outstanding") == std::string::npos) return "not ended: " + status.text;
  return launch.differs(expected(Watchdog::exchange, 0, 1, 0, -1, 0));
}

std::string no_record() {
  Launch<Exchange::l2> launch(2, kNever);
  launch.arguments.watchdog = nullptr;
  const Outcome outcome =
      cuda::persistent::launch_forward<T, Product::tensor, Exchange::l2, 2, 1>(launch.arguments, nullptr);
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
  check("nobody is late, cluster", &nobody_is_late<Exchange::cluster, kNever>);
  check("nobody is late, L2", &nobody_is_late<Exchange::l2, kNever>);
  check("nobody is late, without a limit", &nobody_is_late<Exchange::l2, 0>);
  emulator::options().unordered_reads = true;  // by launches that give up
  check("chunks never come", chunks_never_come);
  check("words never come", words_never_come);
  check("pushes never come", pushes_never_come);
  check("no record", no_record);
  return failed ? 1 : 0;
}
