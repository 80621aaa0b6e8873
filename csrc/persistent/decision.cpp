// csrc/persistent/decision.cpp: whether the persistent kernels run a call, and by what plan. Tests can replace the
// device, the kernels and the plan.
#include <ATen/Context.h>

#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/architectures.h"
#include "../stack/obstacle.h"
#include "driver.h"
#include "planner.h"

#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

namespace stacked_lstm::persistent {
namespace {

#if defined(STACKED_LSTM_WATCHDOG)
constexpr bool kWatchdogBuilt = true;
#else
constexpr bool kWatchdogBuilt = false;
#endif

// ---- What tests replace ---------------------------------------------------------------------------------------------

struct Replaced {
  const PersistentTable* host_kernels = nullptr;
  bool host_watchdog = false;
  std::optional<Device> device;
  std::optional<std::vector<Pass>> passes[2];  // forward, backward
};
// Guards `replaced` and `decided`. When anything is replaced, all kept decisions are dropped.
std::mutex mutex;
Replaced replaced;
std::map<std::vector<int64_t>, std::shared_ptr<const Decision>> decided;
constexpr size_t kMostDecided = 1024;  // calls may bring sequences of ever new lengths

const PersistentTable* table_for(const at::Device& device) {
#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
  if (device.is_cuda()) return &cuda_persistent_kernels();
#endif
  return device.is_cpu() ? replaced.host_kernels : nullptr;
}

// ---- The decision ---------------------------------------------------------------------------------------------------

#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
// Devices do not change while a process runs.
const Device& cuda_device(c10::DeviceIndex index) {
  static std::map<int, Device> known;  // under `mutex`
  if (index < 0) index = c10::cuda::current_device();
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  const cudaDeviceProp* p = at::cuda::getDeviceProperties(index);
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    if (cudaDeviceGetAttribute(&value, attribute, index) != cudaSuccess) {
      cudaGetLastError();
      return 0;
    }
    return value;
  };
  DeviceProperties properties{};
  properties.name = p->name;
  properties.major = p->major;
  properties.minor = p->minor;
  properties.sms = p->multiProcessorCount;
  properties.registers_sm = p->regsPerMultiprocessor;
  properties.shared_block = static_cast<int>(p->sharedMemPerBlockOptin);
  properties.shared_sm = static_cast<int>(p->sharedMemPerMultiprocessor);
  properties.l2_bytes = p->l2CacheSize;
  properties.clock_khz = ask(cudaDevAttrClockRate);
  properties.memory_clock_khz = ask(cudaDevAttrMemoryClockRate);
  properties.memory_bus_bits = ask(cudaDevAttrGlobalMemoryBusWidth);
  return known.emplace(index, device_from(properties)).first->second;
}
#endif

// For float32: how torch's own products are computed on a GPU. (For 16 bits there is only one way.)
Product product_for(at::ScalarType type) {
  if (type != at::kFloat) return Product::tensor;
  // allowTF32CuBLAS() is not used: it raises if the switch was set by torch's newer interface.
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::TF32 ? Product::tensor : Product::exact;
}

// Why the kernels cannot run this, if that is known without a plan, or "".
std::string known_obstacle(const Question& q) {
  const auto number = [](int64_t n) { return std::to_string(n); };
  const CallParts parts{q.shape.has_lengths(), q.resets, q.states, q.saving != Saving::none};
  if (std::string why = obstacle(Path::persistent, q.options, element_type(q.type), parts); !why.empty()) {
    return why;
  }
  if (q.shape.batch == 0) return "the batch is empty";
  int64_t largest = std::max(q.shape.steps, q.shape.batch);
  for (const LayerShape& layer : q.shape.layers) largest = std::max({largest, layer.hidden, layer.input});
  if (largest > std::numeric_limits<int>::max() / 2) return "a size of " + number(largest) + " is too large";
  return "";
}

// Says what is wrong with the passes for a stack, or returns "". Planned and forced passes run only if nothing is
// wrong.
template <typename T>
std::string misfit(const Plan& plan, const StackShape& shape, const PersistentKernels<T>& kernels, bool backward) {
  const auto number = [](int64_t n) { return std::to_string(n); };
  int64_t layer = 0;
  for (const Pass& pass : plan.passes) {
    const Cut& cut = pass.cut;
    const std::string who = "layers " + number(pass.first_layer) + " to " + number(pass.last_layer - 1) + ": ";
    if (pass.first_layer != layer || pass.last_layer <= layer || pass.last_layer > shape.depth()) {
      return who + "the passes do not take the layers in order";
    }
    layer = pass.last_layer;
    const int64_t layers = pass.last_layer - pass.first_layer, lanes = layers * shape.directions;
    if (shape.directions == 2 && layers > 1) return who + "a bidirectional layer needs the whole layer below it";
    if (lanes > kMaxLanes) return who + number(lanes) + " lanes, and a launch takes " + number(kMaxLanes);
    const int64_t hidden = shape.layers[static_cast<size_t>(pass.first_layer)].hidden;
    for (int64_t k = pass.first_layer; k < pass.last_layer; ++k) {
      const int64_t other = shape.layers[static_cast<size_t>(k)].hidden;
      if (other != hidden) {
        return who + "layers of " + number(hidden) + " and of " + number(other) + " units, and a pass has one width";
      }
    }
    if (std::string error = blocks_misfit(cut); !error.empty()) return who + error;
    if (cut.groups < 1 || cut.batch_tiles < 1 || cut.chunk_steps < 1 || cut.units() < hidden) {
      return who + number(cut.units()) + " units in blocks of " + number(cut.block_units()) + ", and there are " +
             number(hidden);
    }
    if (pass.batch_groups < 1 || pass.copies < 1 || pass.copies > pass.batch_groups ||
        pass.rounds != (pass.batch_groups + pass.copies - 1) / pass.copies) {
      return who + number(pass.rounds) + " rounds of " + number(pass.copies) + " of " + number(pass.batch_groups) +
             " batch groups";
    }
    if ((shape.batch + pass.batch_groups - 1) / pass.batch_groups > cut.columns()) {
      return who + "a batch group has more sequences than " + number(cut.columns());
    }
    const Instance* first = backward ? kernels.backward_instances : kernels.forward_instances;
    const int count = backward ? kernels.backward_count : kernels.forward_count;
    if (std::none_of(first, first + count, [&](const Instance& i) { return i.runs(cut); })) {
      return who + "there is no kernel of " + number(cut.pieces) + " pieces and " + number(cut.batch_tiles) + " tiles";
    }
    if (backward &&
        (pass.segment_steps < 1 || (pass.segment_steps < shape.steps && pass.segment_steps % cut.chunk_steps != 0))) {
      return who + "segments of " + number(pass.segment_steps) + " steps are not whole chunks";
    }
    int64_t inputs = 0;
    for (int64_t k = pass.first_layer; k < pass.last_layer; ++k) {
      inputs = std::max(inputs, shape.layers[static_cast<size_t>(k)].input);
    }
    const int64_t needed = pass.copies * lanes * cut.blocks;
    const int64_t holds =
        backward ? kernels.backward_capacity(cut, static_cast<int>(hidden), shape.directions == 1 && layers > 1)
                 : kernels.forward_capacity(cut, static_cast<int>(inputs), static_cast<int>(hidden));
    if (needed > holds) {
      return who + "the launch has " + number(needed) + " blocks that wait for each other, and the device holds " +
             number(holds) + " of them at once";
    }
  }
  return layer == shape.depth() ? "" : "the passes do not take all layers";
}

// Called under `mutex`.
template <typename T>
Decision make_decision(const Question& q, const PersistentTable& table, const Device& device) {
  const PersistentKernels<T>& kernels = table.of<T>();
  Decision decision;
  decision.product = product_for(q.type);
  Ask ask;
  ask.bytes = sizeof(T);
  ask.product = decision.product;
  ask.saving = q.saving;
  ask.states = q.states;
  ask.forward = kernels.forward_instances, ask.forward_count = kernels.forward_count;
  ask.backward = kernels.backward_instances, ask.backward_count = kernels.backward_count;
  ask.capacity = [&](bool backward, const Cut& cut, int most_inputs, int hidden, bool over) {
    return backward ? kernels.backward_capacity(cut, hidden, over) : kernels.forward_capacity(cut, most_inputs, hidden);
  };
  decision.choice = choose(q.shape, device, Costs{}, ask);
  const bool trains = q.saving != Saving::none;
  for (const bool backward : {false, true}) {
    if (backward && !trains) continue;
    Plan& plan = backward ? decision.choice.backward : decision.choice.forward;
    if (replaced.passes[backward]) {
      plan = Plan{};
      plan.backward = backward;
      plan.passes = *replaced.passes[backward];
    }
    if (plan.why_not.empty()) plan.why_not = misfit(plan, q.shape, kernels, backward);
    if (decision.why_not.empty() && !plan.why_not.empty()) {
      decision.why_not = (backward ? "backward: " : "") + plan.why_not;
    }
  }
  if (!decision.why_not.empty() && decision.choice.persistent) {
    decision.choice.persistent = false;
    decision.choice.reason = decision.why_not;
  }
  return decision;
}

}  // namespace

bool watchdog_on(const at::Device& device) {
  if (!device.is_cpu()) return kWatchdogBuilt;
  const std::lock_guard<std::mutex> lock(mutex);
  return replaced.host_watchdog;
}

const PersistentTable& kernels_of(const Call& call) {
  const std::lock_guard<std::mutex> lock(mutex);
  const PersistentTable* const table = table_for(call.input.device());
  TORCH_CHECK(table, "there are no persistent kernels for tensors on ", call.input.device());
  return *table;
}

std::shared_ptr<const Decision> decide(const Question& q) {
  const auto cannot = [](std::string why) {
    Decision decision;
    decision.choice.persistent = false;
    decision.choice.reason = decision.choice.forward.why_not = decision.why_not = std::move(why);
    return std::make_shared<const Decision>(std::move(decision));
  };
  if (std::string why = known_obstacle(q); !why.empty()) return cannot(std::move(why));

  const std::lock_guard<std::mutex> lock(mutex);
  const PersistentTable* table = table_for(q.device);
  if (!table) return cannot("there are no persistent kernels for tensors on " + q.device.str());
  // The key has no packed lengths: a packed batch is divided like a padded one.
  std::vector<int64_t> key = {static_cast<int64_t>(q.device.type()),
                              q.device.index(),
                              static_cast<int64_t>(q.type),
                              static_cast<int64_t>(product_for(q.type)),
                              static_cast<int64_t>(q.saving),
                              q.states,
                              q.resets,
                              static_cast<int64_t>(q.shape.link),
                              q.options.drops(),
                              q.shape.directions,
                              q.shape.steps,
                              q.shape.batch};
  for (const LayerShape& layer : q.shape.layers) key.push_back(layer.input), key.push_back(layer.hidden);
  if (const auto found = decided.find(key); found != decided.end()) return found->second;

  const Device* device = replaced.device ? &*replaced.device : nullptr;
#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
  if (!device && q.device.is_cuda()) device = &cuda_device(q.device.index());
#endif
  if (!device) return cannot(q.device.str() + " is no device that the persistent kernels are planned for");
  const c10::DeviceGuard guard(q.device);  // the capacity functions ask the current device
  auto decision = std::make_shared<const Decision>(
      with_storage(q.type, [&](auto zero) { return make_decision<decltype(zero)>(q, *table, *device); }));
  if (decided.size() >= kMostDecided) decided.clear();
  return decided[std::move(key)] = std::move(decision);
}

int64_t launches(const Plan& plan, const StackShape& shape) {
  int64_t sum = 0;
  for (const Pass& pass : plan.passes) {
    const int64_t segments = plan.backward ? (shape.steps + pass.segment_steps - 1) / pass.segment_steps : 1;
    sum += pass.rounds * segments;
  }
  return sum;
}

void use_host_kernels(const PersistentTable* table, bool watchdog) {
  const std::lock_guard<std::mutex> lock(mutex);
  replaced.host_kernels = table;
  replaced.host_watchdog = watchdog;
  decided.clear();
}

void force_device(std::optional<Device> device) {
  const std::lock_guard<std::mutex> lock(mutex);
  replaced.device = std::move(device);
  decided.clear();
}

void force_passes(bool backward, std::optional<std::vector<Pass>> passes) {
  const std::lock_guard<std::mutex> lock(mutex);
  replaced.passes[backward] = std::move(passes);
  decided.clear();
}

}  // namespace stacked_lstm::persistent
