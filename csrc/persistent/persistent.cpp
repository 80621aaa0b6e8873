// csrc/persistent/persistent.cpp: the persistent kernels' driver: what a plan says, as launches; and the large products
// around them.
//
//   forward    pass 0 (layers 0 … 4)   →   pass 1 (layers 5 … 7)   → …        a launch each, or, where not all batch groups
//   backward   … ←  products of pass 0  ←  pass 0  ←  products of pass 1  ←  pass 1     find room, a round of them each
//
// Between passes h of the lower one's top layer lies in memory; back comes W_ihᵀ·dgates, one product over all steps. What
// weights get are products over all steps too, as soon as a pass has its gradients of gates.
//
// Saving::recompute: the gates are made again from h, before their activation: W_ih·x + W_hh·h(t-1), two products over a
// segment of steps. So that this buffer stays small beside what is saved, a pass then runs in several launches, segment after
// segment from the last steps to the first; dh and dc go from one to the next through memory.
//
// Where a launch leaves SMs idle and the products are large, the plan has backward run in segments too, and a segment's
// weight gradients are made while the next one runs, on a second stream (Beside):
//
//   current stream   segment 2 → segment 1 → segment 0 → gradients of the input  ⤵
//   beside it                  ↘ products 2 → products 1 → products 0  →  →  →  → joined
//
// They are added up in one order, segment after segment: the same bits every time.
//
// Nothing here waits for the device or looks at a tensor's contents: the same calls are queued every time, so that a CUDA
// graph can hold them.
#include "persistent.h"

#include <ATen/Context.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "../cuda/architectures.h"
#include "../driver/driver.h"
#include "../driver/gate_kernels.h"

#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

namespace stacked_lstm::persistent {
namespace {

using namespace driver;

#if defined(STACKED_LSTM_WATCHDOG)
constexpr bool kWatchdogBuilt = true;
#else
constexpr bool kWatchdogBuilt = false;
#endif

// ---- What tests replace ---------------------------------------------------------------------------------------------

struct Replaced {
  const Table* host_kernels = nullptr;
  bool host_watchdog = false;
  std::optional<Device> device;
  std::optional<std::vector<Pass>> passes[2];  // forward, backward
};
// Guards both. What was decided is kept only as long as nothing is replaced anew.
std::mutex mutex;
Replaced replaced;
std::map<std::vector<int64_t>, std::shared_ptr<const Decision>> decided;
constexpr size_t kMostDecided = 1024;  // sequences of every length come along

const Table* table_for(const at::Device& device) {
#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
  if (device.is_cuda()) return &cuda_kernels();
#endif
  return device.is_cpu() ? replaced.host_kernels : nullptr;
}

bool watchdog_on(const at::Device& device) {
  if (!device.is_cpu()) return kWatchdogBuilt;
  const std::lock_guard<std::mutex> lock(mutex);
  return replaced.host_watchdog;
}

template <typename Run>
auto with_storage(at::ScalarType type, Run&& run) {
  if (type == at::kBFloat16) return run(bfloat16{});
  if (type == at::kHalf) return run(float16{});
  return run(float{});
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

// Of float32: what torch's own products do on a GPU. (16 bits have but one way.)
Product product_for(at::ScalarType type) {
  if (type != at::kFloat) return Product::tensor;
  // Not allowTF32CuBLAS(), which raises where the switch was set by torch's newer interface.
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::TF32 ? Product::tensor : Product::exact;
}

// Why no plan needs to be made.
std::string obstacle(const Question& q) {
  const auto number = [](int64_t n) { return std::to_string(n); };
  if (q.type == at::kDouble) return "it computes in float32, and these tensors are float64";
  if (q.options.proj_size > 0) {
    return "it exchanges h as it leaves the cell, and there is a projection (proj_size " + number(q.options.proj_size) +
           ")";
  }
  if (q.shape.batch == 0) return "the batch is empty";
  for (const int64_t size : {q.shape.steps, q.shape.batch, q.shape.layers[0].hidden, q.shape.layers[0].input}) {
    if (size > std::numeric_limits<int>::max() / 2) return "a size of " + number(size) + " is too large";
  }
  return "";
}

// What is wrong with passes for a stack, in words, or "". Plans and forced passes alike are run only if nothing is.
template <typename T>
std::string misfit(const Plan& plan, const StackShape& shape, const Kernels<T>& kernels, bool backward) {
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
    const int64_t hidden = shape.layers[0].hidden;
    if (std::string error = blocks_misfit(cut); !error.empty()) return who + error;
    if (cut.groups < 1 || cut.tiles < 1 || cut.chunk_steps < 1 || cut.units() < hidden) {
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
      return who + "there is no kernel of " + number(cut.pieces) + " pieces and " + number(cut.tiles) + " tiles";
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

// Under `mutex`.
template <typename T>
Decision make_decision(const Question& q, const Table& table, const Device& device) {
  const Kernels<T>& kernels = table.of<T>();
  Decision decision;
  decision.product = product_for(q.type);
  Ask ask;
  ask.bytes = sizeof(T);
  ask.product = decision.product;
  ask.saving = q.options.saving;
  ask.forward = kernels.forward_instances, ask.forward_count = kernels.forward_count;
  ask.backward = kernels.backward_instances, ask.backward_count = kernels.backward_count;
  ask.capacity = [&](bool backward, const Cut& cut, int most_inputs, int hidden, bool over) {
    return backward ? kernels.backward_capacity(cut, hidden, over) : kernels.forward_capacity(cut, most_inputs, hidden);
  };
  decision.choice = choose(q.shape, device, Costs{}, ask);
  const bool trains = q.options.saving != Saving::none;
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

std::shared_ptr<const Decision> decide(const Question& q) {
  const auto cannot = [](std::string why) {
    Decision decision;
    decision.choice.persistent = false;
    decision.choice.reason = decision.choice.forward.why_not = decision.why_not = std::move(why);
    return std::make_shared<const Decision>(std::move(decision));
  };
  if (std::string why = obstacle(q); !why.empty()) return cannot(std::move(why));

  const std::lock_guard<std::mutex> lock(mutex);
  const Table* table = table_for(q.device);
  if (!table) return cannot("there are no persistent kernels for tensors on " + q.device.str());
  // Packed lengths do not count: a packed batch is cut up as a padded one.
  std::vector<int64_t> key = {static_cast<int64_t>(q.device.type()),
                              q.device.index(),
                              static_cast<int64_t>(q.type),
                              static_cast<int64_t>(product_for(q.type)),
                              static_cast<int64_t>(q.options.saving),
                              q.options.dropout > 0,
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
  const c10::DeviceGuard guard(q.device);  // capacity is the current device's
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

void use_host_kernels(const Table* table, bool watchdog) {
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

namespace {

// ---- What forward and backward have in common -----------------------------------------------------------------------

// first_row of every step, and of none, on the device of `input`.
//
// Hazard: a copy from the host reads its source when the stream comes to it, and in a CUDA graph again at every replay, when
// the source may be gone. So the numbers travel as arguments of a kernel, which are read when it is queued or captured.
Tensor rows_on_device(const StackShape& shape, const Tensor& input) {
  if (!shape.packed()) return {};
  const at::Device device = input.device();
  const auto count = static_cast<int64_t>(shape.packed_rows.size());
  const Tensor rows = at::empty({count}, input.options().dtype(at::kLong));
  const std::string error =
      gate_kernels(device).numbers(shape.packed_rows.data(), count, data<int64_t>(rows), stream_for(device));
  TORCH_CHECK(error.empty(), "stacked_lstm_ext: a kernel could not be launched on ", device, ": ", error);
  return rows;
}

// What may run beside what the current stream gets after it: on a stream of its own, or, without streams, at once.
//
// Hazard: a tensor that was allocated for the current stream and is used here goes back to torch's allocator when its last
// reference goes, and from there to whoever comes next on the current stream, who does not wait. So it is kept until join().
// What is allocated inside run() belongs to this stream, and may go at any time.
class Beside {
 public:
  explicit Beside(const at::Device& device) : device_(device) {}
  Beside(const Beside&) = delete;
  // Also when something is thrown between: what is freed then must not be in use.
  ~Beside() {
    try {
      join();
    } catch (...) {  // the device is lost: it says so to whoever asks next
    }
  }

  void keep(const Tensor& tensor) { kept_.push_back(tensor); }

  // After what the current stream has got so far.
  template <typename Work>
  void run(Work&& work) {
    if (!device_.is_cuda()) return work();
    const c10::impl::VirtualGuardImpl streams(device_.type());
    if (!stream_) stream_ = other_than(streams.getStream(device_));
    order(streams.getStream(device_), *stream_);
    const c10::StreamGuard guard(*stream_);
    work();
  }

  // What the current stream gets from now on comes after all of it.
  void join() {
    if (stream_) order(*stream_, c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
    stream_.reset();
    kept_.clear();
  }

 private:
  static void order(const c10::Stream& first, const c10::Stream& then) {
    c10::Event event(first.device_type());
    event.record(first);
    event.block(then);
  }

  // The same for every call on a device, as torch's allocator keeps memory for each stream that has ever asked; but, while a
  // graph is captured, one for this call alone: whoever else used it would be captured with it.
  static c10::Stream other_than(const c10::Stream& current) {
    const c10::impl::VirtualGuardImpl streams(current.device_type());
    const auto another = [&](const c10::Stream& taken) {
      c10::Stream found = streams.getStreamFromGlobalPool(current.device());
      while (found == taken || found == current) found = streams.getStreamFromGlobalPool(current.device());
      return found;
    };
    static std::mutex guard;
    static std::map<c10::DeviceIndex, c10::Stream> usual;
    const std::lock_guard<std::mutex> lock(guard);
    auto known = usual.find(current.device_index());
    if (known == usual.end()) known = usual.emplace(current.device_index(), another(current)).first;
    bool captured = false;
#if defined(STACKED_LSTM_EXT_CUDA_VERSION)
    captured = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
#endif
    return captured || known->second == current ? another(known->second) : known->second;
  }

  const at::Device device_;
  std::optional<c10::Stream> stream_;  // while there is something to join
  std::vector<Tensor> kept_;
};

template <typename T>
class Driver {
 protected:
  Driver(const Call& call, const Plan& plan, const Table& table, Counts& counts)
      : call_(call),
        shape_(call.shape),
        plan_(plan),
        kernels_(table.of<T>()),
        counts_(counts),
        products_(counts.products),
        storage_(call.input.options().dtype(scalar_type<T>())),
        floats_(call.input.options().dtype(at::kFloat)),
        directions_(call.shape.directions),
        depth_(call.shape.depth()),
        lanes_(call.shape.lanes()),
        batch_(call.shape.batch),
        rows_(call.shape.rows()),
        hidden_(call.shape.layers[0].hidden),
        padded_(call.shape.layers[0].padded_hidden()),
        width_(call.shape.directions * call.shape.layers[0].hidden),
        mask_(mask_of(call)),
        first_rows_(rows_on_device(call.shape, call.input)) {
    for (const Tensor& weight : call.weights) weights_.push_back(weight.contiguous());
    if (watchdog_on(call.input.device())) {
      watchdog_ = at::empty({static_cast<int64_t>(sizeof(Watchdog))}, call.input.options().dtype(at::kByte)).zero_();
    }
  }

  const Tensor& weight(int64_t lane, int64_t which) const {
    return weights_[static_cast<size_t>(lane * call_.options.weights_a_lane() + which)];
  }
  const T* bias(int64_t lane, int64_t which) const {
    return call_.options.bias ? const_data<T>(weight(lane, 2 + which)) : nullptr;
  }
  int64_t column_of(int64_t lane) const { return lane % directions_ * hidden_; }

  // The rows of W_ih of both directions of a layer, one below the other: (D·4H, input).
  Tensor input_weights(int64_t layer) const {
    const int64_t lane = layer * directions_;
    return directions_ == 2 ? at::cat({weight(lane, 0), weight(lane + 1, 0)}) : weight(lane, 0);
  }

  // The arguments of all launches of a pass, but for the rounds and what is a lane's.
  template <typename Arguments>
  void describe(Arguments& arguments, const Pass& pass) const {
    arguments.cut = pass.cut;
    Sizes& s = arguments.sizes;
    s.steps = s.last_step = static_cast<int>(shape_.steps);
    s.first_step = 0;
    s.batch = static_cast<int>(batch_);
    s.hidden = static_cast<int>(hidden_);
    s.lanes = static_cast<int>((pass.last_layer - pass.first_layer) * directions_);
    s.batch_groups = static_cast<int>(pass.batch_groups);
    s.h_stride = width_;
    s.saved_stride = padded_;
    s.gates_stride = directions_ * 4 * hidden_;
    s.first_row = const_data<int64_t>(first_rows_);
    arguments.mask = mask_;
    arguments.watchdog = data<Watchdog>(watchdog_);
  }

  // All rounds of a pass. The counters and words of a round are cleared by one memset before it.
  template <typename Arguments>
  void launch_rounds(Arguments& arguments, const Pass& pass, Outcome (*kernel)(const Arguments&, void*),
                     int64_t (*words_of)(const Cut&, int, int)) {
    const auto workspace = [&](int copies) {
      const int64_t words = pass.cut.exchange == Exchange::l2 ? words_of(pass.cut, copies, arguments.sizes.lanes) : 0;
      const int64_t counters = int64_t{copies} * arguments.sizes.lanes * pass.cut.blocks;
      return std::pair<int64_t, int64_t>{words, (counters + 1) / 2};  // in 64-bit words
    };
    const auto [most_words, most_counters] = workspace(static_cast<int>(pass.copies));
    const Tensor space = at::empty({most_words + most_counters}, storage_.dtype(at::kLong));
    for (int64_t group = 0; group < pass.batch_groups; group += pass.copies) {
      const auto copies = static_cast<int>(std::min(pass.copies, pass.batch_groups - group));
      const auto [words, counters] = workspace(copies);
      space.narrow(0, 0, words + counters).zero_();
      arguments.sizes.first_group = static_cast<int>(group);
      arguments.sizes.copies = copies;
      arguments.words = words > 0 ? data<uint64_t>(space) : nullptr;
      arguments.chunks_done = reinterpret_cast<uint32_t*>(data<uint64_t>(space) + words);
      const Outcome outcome = kernel(arguments, stream_for(call_.input.device()));
      if (outcome.kind != Outcome::ok) fail(outcome);
      ++counts_.launches;
      if (watchdog_.defined()) read_watchdog();
    }
  }

  // Copies of rows, in as few launches as they take.
  class Copies {
   public:
    Copies(const Driver& driver, int64_t width) : driver_(driver), width_(width) {}
    void add(const gates::CopyCell<T>& cell) {
      cells_.push_back(cell);
      if (static_cast<int64_t>(cells_.size()) == kCopiesALaunch) flush();
    }
    void flush() {
      if (cells_.empty()) return;
      const gates::Sizes sizes{width_, driver_.width_, driver_.padded_, driver_.directions_ * 4 * driver_.hidden_,
                               driver_.mask_};
      const at::Device device = driver_.call_.input.device();
      const std::string error = gate_kernels(device).of<T>().copy(
          sizes, cells_.data(), static_cast<int64_t>(cells_.size()), stream_for(device));
      TORCH_CHECK(error.empty(), "stacked_lstm_ext: a kernel could not be launched on ", device, ": ", error);
      cells_.clear();
    }

   private:
    const Driver& driver_;
    int64_t width_;
    std::vector<gates::CopyCell<T>> cells_;
  };

  const Call& call_;
  const StackShape& shape_;
  const Plan& plan_;
  const Kernels<T>& kernels_;
  Counts& counts_;
  const Products<T> products_;
  const at::TensorOptions storage_, floats_;
  const int64_t directions_, depth_, lanes_, batch_, rows_, hidden_, padded_;
  const int64_t width_;  // of a layer's output
  const gates::Mask mask_;
  const Tensor first_rows_;
  std::vector<Tensor> weights_;
  Tensor watchdog_;

 private:
  [[noreturn]] void fail(const Outcome& outcome) const {
    const at::Device device = call_.input.device();
    TORCH_CHECK(outcome.kind != Outcome::refused, "stacked_lstm_ext: the persistent kernel was refused on ", device,
                ": ", outcome.text, ". All of its blocks have to be on the device at once, which it had room for when ",
                "the call was planned: something else is running there now, another process perhaps. ",
                "backend('diagonal') needs no such room");
    TORCH_CHECK(false, "stacked_lstm_ext: the persistent kernel could not be launched on ", device, ": ", outcome.text);
  }

  // A build to find errors with: it waits for every launch.
  void read_watchdog() const {
    const Tensor here = watchdog_.cpu();
    Watchdog w;
    std::memcpy(&w, here.const_data_ptr(), sizeof(w));
    if (w.expired == 0) return;
    const std::string what = w.what == Watchdog::hand_over
                                 ? "chunk " + std::to_string(w.for_count - 1) + " of block " +
                                       std::to_string(w.for_block) + " of lane " + std::to_string(w.for_lane)
                             : w.what == Watchdog::exchange ? std::string("what its peers send for that step")
                                                            : std::string("something unknown");
    TORCH_CHECK(false, "stacked_lstm_ext: a wait of the persistent kernel on ", call_.input.device(),
                " took too long. Block ", w.block, " (copy ", w.copy, ", lane ", w.lane, ", block ", w.rank,
                " of the lane), thread ", w.thread, ", at step ", w.step, ", waited for ", what);
  }
};

// ---- Forward --------------------------------------------------------------------------------------------------------

template <typename T>
class Forward : Driver<T> {
  using Base = Driver<T>;
  using Base::batch_;
  using Base::call_;
  using Base::depth_;
  using Base::directions_;
  using Base::hidden_;
  using Base::kernels_;
  using Base::lanes_;
  using Base::mask_;
  using Base::padded_;
  using Base::plan_;
  using Base::rows_;
  using Base::shape_;
  using Base::storage_;
  using Base::width_;

 public:
  Forward(const Call& call, const Plan& plan, const Table& table, Counts& counts) : Base(call, plan, table, counts) {}

  Results run() {
    const Saving saving = call_.options.saving;
    result_.output = at::empty(call_.output_sizes(), storage_);
    result_.h_n = at::empty({lanes_, batch_, hidden_}, storage_);
    result_.c_n = at::empty({lanes_, batch_, hidden_}, storage_);
    const int64_t kept = reserve_elements(shape_, saving, sizeof(T), sizeof(float));
    result_.reserve = at::empty({kept}, Base::floats_);
    // Padding is written by nobody; zeros there make a reserve the same bits every time.
    if (hidden_ != padded_) result_.reserve.zero_();
    // A row of the input stands where it is as long as it is without gaps.
    input_ = call_.input.stride(-1) == 1 || call_.input.size(-1) == 1 ? call_.input : call_.input.contiguous();
    h_0_ = call_.h_0.contiguous();
    c_0_ = call_.c_0.contiguous();
    for (const Pass& pass : plan_.passes) run(pass);
    return std::move(result_);
  }

 private:
  struct Source {
    const T* x;
    int64_t step_stride, row_stride;
  };

  void run(const Pass& pass) {
    ForwardArguments<T> arguments{};
    Base::describe(arguments, pass);
    Source source = below_.defined() ? Source{const_data<T>(below_), batch_ * width_, width_} : stack_input();
    std::vector<Tensor> kept;  // until the launches are queued; then whatever is the stream's may be written over
    Tensor above;              // what the layer above reads
    for (int64_t layer = pass.first_layer; layer < pass.last_layer; ++layer) {
      const Tensor h = output_of(layer);
      above = h;
      if (mask_.seed && layer + 1 < depth_) above = at::empty({rows_, width_}, storage_);
      for (int64_t direction = 0; direction < directions_; ++direction) {
        const int64_t lane = layer * directions_ + direction, number = lane - pass.first_layer * directions_;
        ForwardLane<T>& l = arguments.lane[number];
        l.weight_ih = const_data<T>(Base::weight(lane, 0));
        l.weight_hh = const_data<T>(Base::weight(lane, 1));
        l.bias_ih = Base::bias(lane, 0);
        l.bias_hh = Base::bias(lane, 1);
        l.x = source.x;
        l.x_step_stride = source.step_stride;
        l.x_row_stride = source.row_stride;
        l.h_column = Base::column_of(lane);
        l.h = data<T>(h) + l.h_column;
        l.above = above.is_same(h) ? nullptr : data<T>(above) + l.h_column;
        const int64_t states = lane * batch_ * hidden_;
        l.h_0 = const_data<T>(h_0_) + states;
        l.c_0 = const_data<T>(c_0_) + states;
        l.h_n = data<T>(result_.h_n) + states;
        l.c_n = data<T>(result_.c_n) + states;
        if (call_.options.saving != Saving::none) {
          float* const c = data<float>(result_.reserve);
          l.saved_c = c + lane * rows_ * padded_;
          if (call_.options.saving == Saving::full) l.saved_gates = c + (lanes_ + 4 * lane) * rows_ * padded_;
        }
        l.inputs = static_cast<int>(shape_.layers[static_cast<size_t>(layer)].input);
        l.below = layer > pass.first_layer ? static_cast<int>(number - 1) : -1;
        l.reverse = static_cast<int>(direction);
        l.layer = static_cast<int>(layer);
      }
      kept.push_back(h);
      kept.push_back(above);
      source = {const_data<T>(above), batch_ * width_, width_};
    }
    Base::launch_rounds(arguments, pass, kernels_.forward, &forward_words<T>);
    below_ = above;
  }

  Source stack_input() const {
    if (call_.packed) return {const_data<T>(input_), 0, input_.stride(0)};
    return {const_data<T>(input_), input_.stride(0), input_.stride(1)};
  }

  // Where h of a layer goes: to the caller, for backward, or no further than the layer above.
  Tensor output_of(int64_t layer) const {
    if (layer + 1 == depth_) return result_.output;
    if (call_.options.saving == Saving::none) return at::empty({rows_, width_}, storage_);
    return h_in_reserve<T>(result_.reserve, shape_, call_.options.saving, layer);
  }

  Results result_;
  Tensor input_, h_0_, c_0_;
  Tensor below_;  // (rows, D·H): what the next pass begins with; undefined before the first
};

// ---- Backward -------------------------------------------------------------------------------------------------------

template <typename T>
class Backward : Driver<T> {
  using Base = Driver<T>;
  using Base::batch_;
  using Base::call_;
  using Base::depth_;
  using Base::directions_;
  using Base::floats_;
  using Base::hidden_;
  using Base::kernels_;
  using Base::lanes_;
  using Base::mask_;
  using Base::padded_;
  using Base::plan_;
  using Base::products_;
  using Base::rows_;
  using Base::shape_;
  using Base::storage_;
  using Base::width_;
  using typename Base::Copies;

 public:
  Backward(const Call& call, const Plan& plan, const Table& table, Counts& counts, const Kept& kept,
           const IncomingGradients& incoming, bool input_grad, bool weight_grad)
      : Base(call, plan, table, counts),
        reserve_(kept.reserve.contiguous()),
        parts_(reserve_, call.shape, call.options.saving),
        top_(kept.output.contiguous()),
        grad_output_(contiguous(incoming.output)),
        grad_h_n_(contiguous(incoming.h_n)),
        grad_c_n_(contiguous(incoming.c_n)),
        h_0_(call.h_0.contiguous()),
        c_0_(call.c_0.contiguous()),
        input_grad_(input_grad),
        weight_grad_(weight_grad),
        recompute_(call.options.saving == Saving::recompute),
        beside_(call.input.device()) {}

  Gradients run() {
    result_.h_0 = at::empty({lanes_, batch_, hidden_}, storage_);
    result_.c_0 = at::empty({lanes_, batch_, hidden_}, storage_);
    if (!input_grad_) result_.input = at::empty({0}, storage_);
    if (weight_grad_) {
      for (const Tensor& w : call_.weights) result_.weights.push_back(at::empty(w.sizes(), storage_));
    }
    for (auto pass = plan_.passes.rbegin(); pass != plan_.passes.rend(); ++pass) run(*pass);
    beside_.join();
    return std::move(result_);
  }

 private:
  void run(const Pass& pass) {
    const int64_t layers = pass.last_layer - pass.first_layer, lanes = layers * directions_;
    first_layer_ = pass.first_layer;
    grad_gates_ = at::empty({layers, rows_, directions_ * 4 * hidden_}, storage_);
    const bool segments = pass.segment_steps < shape_.steps;
    Tensor carried = segments ? at::empty({2, lanes_, batch_, hidden_}, floats_) : Tensor();
    // Of the pass's layers and lanes: what the products read.
    inputs_.assign(static_cast<size_t>(layers), Tensor());
    previous_.assign(static_cast<size_t>(lanes), Tensor());
    if (recompute_) {
      make_operands(pass);
      const int64_t most_rows = shape_.first_row(std::min(pass.segment_steps, shape_.steps));
      preactivations_ = at::empty({lanes, most_rows, 4 * hidden_}, floats_);
      recurrent_part_ = at::empty({1, most_rows, 4 * hidden_}, floats_);
    }
    const bool beside = weight_grad_ && pass.products_beside;
    if (beside) {
      beside_.keep(grad_gates_);
      if (!recompute_) beside_.run([&] { make_operands(pass); });
      if (recompute_) {
        for (const Tensor& operand : inputs_) beside_.keep(operand);
        for (const Tensor& operand : previous_) beside_.keep(operand);
      }
    }

    const int64_t last_segment = (shape_.steps - 1) / pass.segment_steps;
    for (int64_t segment = last_segment; segment >= 0; --segment) {
      BackwardArguments<T> arguments{};
      Base::describe(arguments, pass);
      const int64_t first_step = segment * pass.segment_steps;
      const int64_t last_step = std::min(first_step + pass.segment_steps, shape_.steps);
      arguments.sizes.first_step = static_cast<int>(first_step);
      arguments.sizes.last_step = static_cast<int>(last_step);
      for (int64_t n = 0; n < lanes; ++n) {
        // From the top layer down, so that no lane waits for a later one.
        const int64_t layer = pass.last_layer - 1 - n / directions_, lane = layer * directions_ + n % directions_;
        BackwardLane<T>& l = arguments.lane[n];
        describe_lane(l, lane);
        if (layer + 1 < pass.last_layer) {
          l.over = static_cast<int>(n - 1);
          l.weight_ih_above = const_data<T>(Base::weight(lane + directions_, 0));
        } else if (layer + 1 < depth_) {
          l.grad_above = const_data<float>(grad_above_) + l.h_column;
        }
        if (recompute_) {
          const int64_t number = lane - first_layer_ * directions_;
          l.preactivations = make_preactivations(lane, number, first_step, last_step);
        }
        float* const state = segments ? data<float>(carried) + lane * batch_ * hidden_ : nullptr;
        const int64_t half = lanes_ * batch_ * hidden_;
        if (last_step < shape_.steps) l.carried_h = state, l.carried_c = state + half;
        if (first_step > 0) l.carry_h = state, l.carry_c = state + half;
        if (first_step == 0) {
          l.grad_h_0 = data<T>(result_.h_0) + lane * batch_ * hidden_;
          l.grad_c_0 = data<T>(result_.c_0) + lane * batch_ * hidden_;
        }
      }
      Base::launch_rounds(arguments, pass, kernels_.backward, &backward_words<T>);
      if (beside) {
        beside_.run([&] {
          for (int64_t n = 0; n < lanes; ++n) add_gradients(first_layer_ * directions_ + n, first_step, last_step);
        });
      }
    }
    preactivations_ = recurrent_part_ = Tensor();

    const Tensor lowest = single(grad_gates_.select(0, 0));
    if (first_layer_ > 0) {
      grad_above_ = at::empty({1, rows_, width_}, floats_);
      products_.multiply(grad_above_, lowest, single(Base::input_weights(first_layer_)));
    } else if (input_grad_) {
      result_.input = at::empty(call_.input.sizes(), storage_);
      products_.multiply_and_round(single(result_.input.view({rows_, call_.input.size(-1)})), lowest,
                                   single(Base::input_weights(0)));
    }
    if (!weight_grad_ || beside) return;
    for (int64_t lane = first_layer_ * directions_; lane < first_layer_ * directions_ + lanes; ++lane) {
      const auto layer = static_cast<size_t>(lane / directions_ - first_layer_);
      if (!inputs_[layer].defined()) inputs_[layer] = input_of(lane / directions_);
      Tensor& previous = previous_[static_cast<size_t>(lane - first_layer_ * directions_)];
      if (!previous.defined()) previous = previous_of(lane);
      add_gradients(lane, 0, shape_.steps);
      previous = Tensor();  // nor does the next lane need the input of the layers before its own
      if (layer > 0) inputs_[layer - 1] = Tensor();
    }
  }

  void make_operands(const Pass& pass) {
    for (size_t n = 0; n < inputs_.size(); ++n) inputs_[n] = input_of(pass.first_layer + static_cast<int64_t>(n));
    for (size_t n = 0; n < previous_.size(); ++n) {
      previous_[n] = previous_of(pass.first_layer * directions_ + static_cast<int64_t>(n));
    }
  }

  void describe_lane(BackwardLane<T>& l, int64_t lane) const {
    const int64_t layer = lane / directions_, states = lane * batch_ * hidden_;
    l.weight_hh = const_data<T>(Base::weight(lane, 1));
    l.h_column = Base::column_of(lane);
    if (layer + 1 == depth_ && grad_output_.defined()) l.grad_output = const_data<T>(grad_output_) + l.h_column;
    if (!recompute_) l.gates = parts_.gates + 4 * lane * rows_ * padded_;
    l.c = parts_.c + lane * rows_ * padded_;
    if (recompute_) l.bias_ih = Base::bias(lane, 0), l.bias_hh = Base::bias(lane, 1);
    l.c_0 = const_data<T>(c_0_) + states;
    if (grad_h_n_.defined()) l.grad_h_n = const_data<T>(grad_h_n_) + states;
    if (grad_c_n_.defined()) l.grad_c_n = const_data<T>(grad_c_n_) + states;
    l.grad_gates = data<T>(grad_gates_of(lane));
    l.over = -1;
    l.reverse = static_cast<int>(lane % directions_);
    l.layer = static_cast<int>(layer);
  }

  struct Rows {
    int64_t first, count;
    Tensor of(const Tensor& all) const { return all.narrow(0, first, count); }
  };
  // Of a lane, in its steps from one to before the other.
  Rows rows_of(int64_t lane, int64_t first_step, int64_t last_step) const {
    const int64_t one = shape_.time(lane, first_step), other = shape_.time(lane, last_step - 1);
    const int64_t first = shape_.first_row(std::min(one, other));
    return {first, shape_.first_row(std::max(one, other) + 1) - first};
  }
  const Tensor& input_at(int64_t lane) const { return inputs_[static_cast<size_t>(lane / directions_ - first_layer_)]; }
  const Tensor& previous_at(int64_t lane) const {
    return previous_[static_cast<size_t>(lane - first_layer_ * directions_)];
  }

  // Of one lane and the steps of a segment. The pointer is where row 0 would be.
  const float* make_preactivations(int64_t lane, int64_t number, int64_t first_step, int64_t last_step) {
    const Rows rows = rows_of(lane, first_step, last_step);
    const Tensor sum = preactivations_.narrow(0, number, 1).narrow(1, 0, rows.count);
    const Tensor recurrent = recurrent_part_.narrow(1, 0, rows.count);
    products_.multiply(sum, single(rows.of(input_at(lane))), single(Base::weight(lane, 0).t()));
    products_.multiply(recurrent, single(rows.of(previous_at(lane))), single(Base::weight(lane, 1).t()));
    sum.add_(recurrent);
    return const_data<float>(sum) - rows.first * 4 * hidden_;
  }

  // h of a layer, all rows: (rows, D·H).
  Tensor h_of(int64_t layer) const {
    if (layer + 1 == depth_) return top_.view({rows_, width_});
    return h_in_reserve<T>(reserve_, shape_, call_.options.saving, layer);
  }

  // h(t-1) of every row of a lane: (rows, H).
  Tensor previous_of(int64_t lane) const {
    const Tensor previous = at::empty({rows_, hidden_}, storage_);
    Copies copies(*this, hidden_);
    copies_of_previous(shape_, lane, const_data<T>(h_of(lane / directions_)) + Base::column_of(lane),
                       const_data<T>(h_0_) + lane * batch_ * hidden_, data<T>(previous),
                       [&](const gates::CopyCell<T>& cell) { copies.add(cell); });
    copies.flush();
    return previous;
  }

  // What a layer reads, all rows: (rows, input).
  Tensor input_of(int64_t layer) const {
    if (layer == 0) return call_.input.reshape({rows_, call_.input.size(-1)}).contiguous();
    const Tensor h = h_of(layer - 1);
    if (!mask_.seed) return h;
    const Tensor masked = at::empty({rows_, width_}, storage_);
    Copies copies(*this, width_);
    copies_of_masked(shape_, layer - 1, const_data<T>(h), data<T>(masked),
                     [&](const gates::CopyCell<T>& cell) { copies.add(cell); });
    copies.flush();
    return masked;
  }

  // Gradients of all steps of a lane's gates: (rows, 4H), rows D·4H apart.
  Tensor grad_gates_of(int64_t lane) const {
    return grad_gates_.select(0, lane / directions_ - first_layer_)
        .narrow(1, lane % directions_ * 4 * hidden_, 4 * hidden_);
  }

  // What the steps of a segment, or all of them, give to a lane's weight gradients: a product each. Segments come from the
  // last to the first; their sums are float32 until all are there.
  void add_gradients(int64_t lane, int64_t first_step, int64_t last_step) {
    const auto place = static_cast<size_t>(lane * call_.options.weights_a_lane());
    Tensor* const grad = &result_.weights[place];
    const Rows rows = rows_of(lane, first_step, last_step);
    const Tensor gates = rows.of(grad_gates_of(lane)), gates_t = single(gates.t());
    const Tensor operands[] = {rows.of(input_at(lane)), rows.of(previous_at(lane))};
    const bool begins = last_step == shape_.steps, ends = first_step == 0;
    if (begins && ends) {
      for (int n : {0, 1}) products_.multiply_and_round(single(grad[n]), gates_t, single(operands[n]));
      if (call_.options.bias) at::sum_out(grad[2], gates, at::IntArrayRef{0});
    } else {
      sums_.resize(result_.weights.size());
      Tensor* const sum = &sums_[place];
      for (int n : {0, 1}) {
        const Tensor part = at::empty(grad[n].sizes(), floats_);
        products_.multiply(single(part), gates_t, single(operands[n]));
        sum[n] = begins ? part : sum[n].add_(part);
      }
      if (call_.options.bias) {
        const Tensor part = at::sum(gates, at::IntArrayRef{0}, /*keepdim=*/false, at::kFloat);
        sum[2] = begins ? part : sum[2].add_(part);
      }
      if (!ends) return;
      for (int n = 0; n < (call_.options.bias ? 3 : 2); ++n) grad[n].copy_(sum[n]), sum[n] = Tensor();
    }
    if (call_.options.bias) grad[3].copy_(grad[2]);
  }

  const Tensor reserve_;
  const Parts<T> parts_;
  const Tensor top_, grad_output_, grad_h_n_, grad_c_n_, h_0_, c_0_;
  const bool input_grad_, weight_grad_, recompute_;
  Gradients result_;
  int64_t first_layer_ = 0;                // of the pass
  Tensor grad_gates_;                      // (layers of the pass, rows, D·4H)
  Tensor grad_above_;                      // (1, rows, D·H): W_ihᵀ·dgates of the pass above
  Tensor preactivations_;                  // (lanes of the pass, rows of a segment, 4H), to recompute
  Tensor recurrent_part_;                  // (1, rows of a segment, 4H)
  std::vector<Tensor> inputs_, previous_;  // of the pass's layers, (rows, input), and lanes, (rows, H): h(t-1)
  std::vector<Tensor> sums_;               // of weight gradients, where only some segments are done
  Beside beside_;                          // last: it has to be joined before anything above is freed
};

const Table& kernels_of(const Call& call) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Table* const table = table_for(call.input.device());
  TORCH_CHECK(table, "there are no persistent kernels for tensors on ", call.input.device());
  return *table;
}

}  // namespace

Results forward(const Call& call, std::shared_ptr<const Decision> decision, Counts& counts) {
  const Guards guards(call.input.device());
  counts.decision = std::move(decision);
  return with_storage(call.input.scalar_type(), [&](auto zero) {
    return Forward<decltype(zero)>(call, counts.decision->choice.forward, kernels_of(call), counts).run();
  });
}

Gradients backward(const Call& call, const Kept& kept, const IncomingGradients& incoming, bool input_grad,
                   bool weight_grad, std::shared_ptr<const Decision> decision, Counts& counts) {
  const Guards guards(call.input.device());
  counts.decision = std::move(decision);
  return with_storage(call.input.scalar_type(), [&](auto zero) {
    return Backward<decltype(zero)>(call, counts.decision->choice.backward, kernels_of(call), counts, kept, incoming,
                                    input_grad, weight_grad)
        .run();
  });
}

}  // namespace stacked_lstm::persistent
