// csrc/torch/packed_cache.cpp: see packed_cache.h.
#include "packed_cache.h"

#include <c10/core/Storage.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace stacked_lstm {
namespace {

using at::Tensor;
using at::TensorList;

// The most notes that are kept. Notes are small, and a lost note only delays packing by a call. Without a limit,
// weights at ever new places of one storage would leave ever more notes.
constexpr int64_t kNotes = 256;

bool keepable(const Tensor& weight) { return weight.is_contiguous() && weight.numel() > 0 && weight.has_storage(); }

uint32_t version_of(const Tensor& weight) {
  return weight.is_inference() ? 0 : static_cast<uint32_t>(weight._version());
}

std::vector<cpu::Bytes> bytes_of(TensorList weights) {
  std::vector<cpu::Bytes> bytes;
  bytes.reserve(weights.size());
  for (const Tensor& weight : weights)
    bytes.push_back({weight.const_data_ptr(), static_cast<int64_t>(weight.nbytes())});
  return bytes;
}

// Where a weight is, and what torch records about its contents. It holds no weak reference to the tensor, since
// torch.utils.swap_tensors refuses tensors that have one. It holds a weak reference to the storage: meanwhile, no other
// storage can get the same address.
struct KnownWeight {
  const void* data;
  int64_t rows, elements;
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  uint32_t version;

  explicit KnownWeight(const Tensor& weight)
      : data(weight.const_data_ptr()),
        rows(weight.size(0)),
        elements(weight.numel()),
        storage(weight.storage().getWeakStorageImpl()),
        version(version_of(weight)) {}

  bool same_place(const Tensor& weight) const {
    return weight.const_data_ptr() == data && weight.size(0) == rows && weight.numel() == elements;
  }
  bool seems_unchanged(const Tensor& weight) const {
    return weight.storage().unsafeGetStorageImpl() == storage._unsafe_get_target() && version_of(weight) == version;
  }
};

// How weights are packed.
struct Form {
  int64_t width;  // of the recurrent panels
  cpu::Storage storage;

  bool operator==(const Form&) const = default;
};

Form form_of(int64_t batch, cpu::Storage storage) { return {cpu::recurrent_width(batch), storage}; }

template <typename T>
struct Entry {
  std::vector<KnownWeight> weights;
  c10::ScalarType type;
  Form form;
  std::shared_ptr<cpu::PackedStack<T>> stack;  // null: noted only

  // Takes note of weights: nothing is packed.
  Entry(TensorList tensors, const Form& wanted)
      : weights(tensors.begin(), tensors.end()), type(tensors[0].scalar_type()), form(wanted) {}

  bool about(TensorList tensors, const Form& wanted) const {
    return form == wanted && type == tensors[0].scalar_type() && weights.size() == tensors.size() &&
           std::equal(weights.begin(), weights.end(), tensors.begin(),
                      [](const KnownWeight& known, const Tensor& tensor) { return known.same_place(tensor); });
  }
  bool seems_unchanged(TensorList tensors) const {
    return std::equal(weights.begin(), weights.end(), tensors.begin(),
                      [](const KnownWeight& known, const Tensor& tensor) { return known.seems_unchanged(tensor); });
  }
  bool dead() const {
    return std::any_of(weights.begin(), weights.end(),
                       [](const KnownWeight& known) { return known.storage.expired(); });
  }
};

template <typename T>
struct Entries {
  // By the address of the first weight.
  std::unordered_map<const void*, std::vector<Entry<T>>> by_address;

  Entry<T>* find(TensorList weights, const Form& form) {
    const auto found = by_address.find(weights[0].const_data_ptr());
    if (found == by_address.end()) return nullptr;
    for (Entry<T>& entry : found->second) {
      if (entry.about(weights, form)) return &entry;
    }
    return nullptr;
  }
  void note(TensorList weights, const Form& form) {
    by_address[weights[0].const_data_ptr()].emplace_back(weights, form);
  }
  template <typename Which>
  void remove_if(Which&& which, std::vector<Entry<T>>& removed) {
    for (auto list = by_address.begin(); list != by_address.end();) {
      auto& some = list->second;
      const auto alive = std::stable_partition(some.begin(), some.end(), [&](const auto& e) { return !which(e); });
      std::move(alive, some.end(), std::back_inserter(removed));
      some.erase(alive, some.end());
      list = some.empty() ? by_address.erase(list) : std::next(list);
    }
  }
  void remove(const void* first_weight, std::vector<Entry<T>>& removed) {
    const auto found = by_address.find(first_weight);
    if (found == by_address.end()) return;
    removed = std::move(found->second);
    by_address.erase(found);
  }
  void count(PackedCounts& counts) const {
    for (const auto& [address, list] : by_address) {
      for (const Entry<T>& entry : list) {
        entry.stack ? ++counts.stacks : ++counts.noted;
        if (entry.stack) counts.bytes += entry.stack->bytes();
      }
    }
  }
};

// Entries that are taken out of the cache under the lock and destroyed after it: freeing large memory is slow.
struct Removed {
  std::vector<Entry<float>> floats;
  std::vector<Entry<double>> doubles;
};

class Cache {
 public:
  // Never destroyed: threads may outlive the end of main().
  static Cache& instance() {
    static Cache* const cache = new Cache;
    return *cache;
  }

  template <typename T>
  Entries<T>& entries() {
    if constexpr (sizeof(T) == 8) {
      return doubles;
    } else {
      return floats;
    }
  }

  void make_room(Removed& removed) {
    remove_if([](const auto& entry) { return entry.dead(); }, removed);
    PackedCounts counts{};
    floats.count(counts), doubles.count(counts);
    if (counts.noted >= kNotes) remove_if([](const auto& entry) { return !entry.stack; }, removed);
  }
  void remove(const void* first_weight, Removed& removed) {
    floats.remove(first_weight, removed.floats);
    doubles.remove(first_weight, removed.doubles);
  }

  std::mutex mutex;
  Entries<float> floats;
  Entries<double> doubles;

 private:
  template <typename Which>
  void remove_if(Which&& which, Removed& removed) {
    floats.remove_if(which, removed.floats);
    doubles.remove_if(which, removed.doubles);
  }

  Cache() {
#if defined(__unix__) || defined(__APPLE__)
    // The forking thread holds the lock during the fork. So the child's copy is complete, and its lock is free.
    pthread_atfork([] { instance().mutex.lock(); }, [] { instance().mutex.unlock(); },
                   [] { instance().mutex.unlock(); });
#endif
  }
};

std::atomic<int64_t> hits{0};

thread_local bool trusting = false;

}  // namespace

template <typename T>
std::shared_ptr<cpu::PackedStack<T>> find_packed(TensorList weights, const StackShape& shape, cpu::Storage storage) {
  if (!std::all_of(weights.begin(), weights.end(), keepable)) return {};
  const Form form = form_of(shape.batch, storage);
  Cache& cache = Cache::instance();
  Removed removed;  // outlives the lock
  std::optional<Entry<T>> replaced;
  {
    const std::lock_guard<std::mutex> lock(cache.mutex);
    Entries<T>& entries = cache.entries<T>();
    Entry<T>* entry = entries.find(weights, form);
    if (!entry) {
      cache.make_room(removed);
      entries.note(weights, form);
      return {};
    }
    if (!entry->seems_unchanged(weights)) {
      replaced = std::exchange(*entry, Entry<T>(weights, form));
      return {};
    }
    if (entry->stack) return entry->stack;
  }
  return std::make_shared<cpu::PackedStack<T>>(shape, storage, bytes_of(weights));
}
template std::shared_ptr<cpu::PackedStack<float>> find_packed(TensorList, const StackShape&, cpu::Storage);
template std::shared_ptr<cpu::PackedStack<double>> find_packed(TensorList, const StackShape&, cpu::Storage);

template <typename T>
std::shared_ptr<const cpu::PackedStack<T>> peek_packed(TensorList weights, int64_t batch, cpu::Storage storage) {
  if (!std::all_of(weights.begin(), weights.end(), keepable)) return {};
  Cache& cache = Cache::instance();
  const std::lock_guard<std::mutex> lock(cache.mutex);
  const Entry<T>* entry = cache.entries<T>().find(weights, form_of(batch, storage));
  if (!entry || !entry->stack || !entry->seems_unchanged(weights)) return {};
  return entry->stack;
}
template std::shared_ptr<const cpu::PackedStack<float>> peek_packed(TensorList, int64_t, cpu::Storage);
template std::shared_ptr<const cpu::PackedStack<double>> peek_packed(TensorList, int64_t, cpu::Storage);

template <typename T>
void keep_packed(TensorList weights, const StackShape& shape, const std::shared_ptr<cpu::PackedStack<T>>& stack) {
  if (!(cpu::fingerprint(stack->sources()) == stack->fingerprint())) return;  // weights were written while packed
  Cache& cache = Cache::instance();
  const std::lock_guard<std::mutex> lock(cache.mutex);
  Entry<T>* entry = cache.entries<T>().find(weights, form_of(shape.batch, stack->storage()));
  // Not if the weights have changed since, or if another thread has kept a stack first.
  if (entry && !entry->stack && entry->seems_unchanged(weights)) entry->stack = stack;
}
template void keep_packed(TensorList, const StackShape&, const std::shared_ptr<cpu::PackedStack<float>>&);
template void keep_packed(TensorList, const StackShape&, const std::shared_ptr<cpu::PackedStack<double>>&);

template <typename T>
void forget_packed(TensorList weights, const StackShape& shape, const std::shared_ptr<cpu::PackedStack<T>>& stack) {
  const Form form = form_of(shape.batch, stack->storage());
  Cache& cache = Cache::instance();
  std::optional<Entry<T>> replaced;  // outlives the lock
  const std::lock_guard<std::mutex> lock(cache.mutex);
  Entry<T>* entry = cache.entries<T>().find(weights, form);
  if (entry && entry->stack == stack) replaced = std::exchange(*entry, Entry<T>(weights, form));
}
template void forget_packed(TensorList, const StackShape&, const std::shared_ptr<cpu::PackedStack<float>>&);
template void forget_packed(TensorList, const StackShape&, const std::shared_ptr<cpu::PackedStack<double>>&);

void drop_packed(const void* first_weight) {
  Cache& cache = Cache::instance();
  Removed removed;  // outlives the lock
  const std::lock_guard<std::mutex> lock(cache.mutex);
  cache.remove(first_weight, removed);
}

void count_hit() { hits.fetch_add(1, std::memory_order_relaxed); }

Trust::Trust(bool frozen) : before_(std::exchange(trusting, frozen)) {}
Trust::~Trust() { trusting = before_; }
bool Trust::in_force() { return trusting; }

PackedCounts packed_counts() {
  Cache& cache = Cache::instance();
  const std::lock_guard<std::mutex> lock(cache.mutex);
  PackedCounts counts{0, 0, 0, hits.load(std::memory_order_relaxed)};
  cache.floats.count(counts);
  cache.doubles.count(counts);
  return counts;
}

}  // namespace stacked_lstm
