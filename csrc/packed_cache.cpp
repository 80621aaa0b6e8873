// csrc/packed_cache.cpp: see packed_cache.h.
#include "packed_cache.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/Storage.h>
#include <c10/core/TensorImpl.h>

#include <algorithm>
#include <cstring>
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

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15;  // 2^64 / φ: its multiples spread evenly, whatever the row length
constexpr int64_t kSample = 32;                   // elements of a weight in its fingerprint

bool keepable(const Tensor& weight) {
  return !weight.is_inference() && weight.is_contiguous() && weight.numel() > 0 && weight.has_storage() &&
         weight.storage().data_ptr().get_deleter() == c10::GetCPUAllocator()->raw_deleter();
}

template <typename Bits>
uint64_t sample(const void* data, uint64_t elements) {
  uint64_t sum = 0;
  for (uint64_t n = 1; n <= kSample; ++n) {
    const uint64_t spread = n * kGolden;
    const auto at = static_cast<uint64_t>(static_cast<unsigned __int128>(spread) * elements >> 64);
    Bits bits;
    std::memcpy(&bits, static_cast<const char*>(data) + at * sizeof bits, sizeof bits);
    sum += (spread | 1) * bits;  // no load waits for another
  }
  return sum;
}

uint64_t fingerprint_of(TensorList weights) {
  uint64_t all = 0;
  for (const Tensor& weight : weights) {
    const void* data = weight.const_data_ptr();
    const auto elements = static_cast<uint64_t>(weight.numel());
    const uint64_t one = weight.element_size() == 8   ? sample<uint64_t>(data, elements)
                         : weight.element_size() == 4 ? sample<uint32_t>(data, elements)
                                                      : sample<uint16_t>(data, elements);
    all = (all ^ one) * kGolden;
    all ^= all >> 32;
  }
  return all;
}

// Which counter it is. torch compares no two of them, but a VariableVersion is a pointer to what tensors share.
const void* identity(const c10::VariableVersion& version) {
  const void* counter;
  static_assert(sizeof version == sizeof counter);
  std::memcpy(&counter, static_cast<const void*>(&version), sizeof counter);
  return counter;
}

// The cache holds one reference to a weight's version counter, however many entries know the weight, so that torch's
// `unique` tells when nobody else has one: the weight and its views are gone. And as long as it is held, no tensor that
// comes to stand at the weight's address has a counter at the same address.
using Counter = std::shared_ptr<const c10::VariableVersion>;

class Counters {
 public:
  Counter of(const Tensor& weight) {
    const c10::VariableVersion& version = weight.unsafeGetTensorImpl()->version_counter();
    std::weak_ptr<const c10::VariableVersion>& known = counters_[identity(version)];
    Counter counter = known.lock();
    if (!counter) known = counter = std::make_shared<const c10::VariableVersion>(version);
    return counter;
  }
  void forget_expired() {
    std::erase_if(counters_, [](const auto& known) { return known.second.expired(); });
  }

 private:
  std::unordered_map<const void*, std::weak_ptr<const c10::VariableVersion>> counters_;
};

// A weight as it was. No weak reference to it: torch.utils.swap_tensors refuses tensors that have one. But one to its
// storage: setting `.data` raises no version, and as long as this is held, no other storage has the same address.
struct Known {
  const c10::TensorImpl* tensor;
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  const void* data;
  int64_t rows, elements;
  Counter counter;
  uint32_t version;

  Known(const Tensor& weight, Counters& counters)
      : tensor(weight.unsafeGetTensorImpl()),
        storage(weight.storage().getWeakStorageImpl()),
        data(weight.const_data_ptr()),
        rows(weight.size(0)),
        elements(weight.numel()),
        counter(counters.of(weight)),
        version(counter->current_version()) {}

  bool same_tensor(const Tensor& weight) const { return tensor == weight.unsafeGetTensorImpl(); }
  bool unchanged(const Tensor& weight) const {
    const c10::VariableVersion& now = weight.unsafeGetTensorImpl()->version_counter();
    return identity(now) == identity(*counter) && now.current_version() == version &&
           weight.storage().unsafeGetStorageImpl() == storage._unsafe_get_target() && weight.const_data_ptr() == data &&
           weight.size(0) == rows && weight.numel() == elements && weight.is_contiguous();
  }
  bool dead() const { return counter->unique() || storage.expired(); }
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
  std::vector<Known> weights;
  c10::ScalarType type;
  Form form;
  uint64_t fingerprint;
  std::shared_ptr<cpu::PackedStack<T>> stack;  // null: noted only

  bool about(TensorList tensors, const Form& wanted) const {
    return form == wanted && type == tensors[0].scalar_type() && weights.size() == tensors.size() &&
           std::equal(weights.begin(), weights.end(), tensors.begin(),
                      [](const Known& known, const Tensor& tensor) { return known.same_tensor(tensor); });
  }
  bool unchanged(TensorList tensors) const {
    return std::equal(weights.begin(), weights.end(), tensors.begin(),
                      [](const Known& known, const Tensor& tensor) { return known.unchanged(tensor); });
  }
  bool dead() const {
    return std::any_of(weights.begin(), weights.end(), [](const Known& known) { return known.dead(); });
  }
};

template <typename T>
struct Table {
  // By the address of the first weight.
  std::unordered_map<const void*, std::vector<Entry<T>>> entries;

  Entry<T>* find(TensorList weights, const Form& form) {
    const auto found = entries.find(weights[0].unsafeGetTensorImpl());
    if (found == entries.end()) return nullptr;
    for (Entry<T>& entry : found->second) {
      if (entry.about(weights, form)) return &entry;
    }
    return nullptr;
  }
  void remove_dead(std::vector<Entry<T>>& removed) {
    for (auto list = entries.begin(); list != entries.end();) {
      auto& some = list->second;
      const auto alive = std::stable_partition(some.begin(), some.end(), [](const auto& e) { return !e.dead(); });
      std::move(alive, some.end(), std::back_inserter(removed));
      some.erase(alive, some.end());
      list = some.empty() ? entries.erase(list) : std::next(list);
    }
  }
  void remove(const void* first_weight, std::vector<Entry<T>>& removed) {
    const auto found = entries.find(first_weight);
    if (found == entries.end()) return;
    removed = std::move(found->second);
    entries.erase(found);
  }
  void count(PackedCounts& counts) const {
    for (const auto& [address, list] : entries) {
      for (const Entry<T>& entry : list) {
        entry.stack ? ++counts.stacks : ++counts.noted;
        if (entry.stack) counts.bytes += entry.stack->bytes();
      }
    }
  }
};

// Taken out of the tables under the lock, destroyed after it: freeing large memory takes its time.
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
  Table<T>& table() {
    if constexpr (sizeof(T) == 8) {
      return doubles;
    } else {
      return floats;
    }
  }

  // Takes note of weights: an entry without packed ones.
  template <typename T>
  Entry<T> noted(TensorList weights, const Form& form, uint64_t fingerprint) {
    Entry<T> entry{{}, weights[0].scalar_type(), form, fingerprint, nullptr};
    entry.weights.reserve(weights.size());
    for (const Tensor& weight : weights) entry.weights.emplace_back(weight, counters);
    return entry;
  }

  void remove_dead(Removed& removed) {
    counters.forget_expired();
    floats.remove_dead(removed.floats);
    doubles.remove_dead(removed.doubles);
  }
  void remove(const void* first_weight, Removed& removed) {
    floats.remove(first_weight, removed.floats);
    doubles.remove(first_weight, removed.doubles);
  }

  std::mutex mutex;
  Counters counters;
  Table<float> floats;
  Table<double> doubles;
  int64_t hits = 0;

 private:
  Cache() {
#if defined(__unix__) || defined(__APPLE__)
    // Whoever forks holds the lock meanwhile, so that the child's copy is whole and its lock is free.
    pthread_atfork([] { instance().mutex.lock(); }, [] { instance().mutex.unlock(); },
                   [] { instance().mutex.unlock(); });
#endif
  }
};

}  // namespace

template <typename T>
KeptWeights<T> find_packed(TensorList weights, const StackShape& shape, cpu::Storage storage) {
  if (!std::all_of(weights.begin(), weights.end(), keepable)) return {};
  const Form form = form_of(shape.batch, storage);
  const uint64_t fingerprint = fingerprint_of(weights);
  Cache& cache = Cache::instance();
  Removed removed;  // outlives the lock
  std::optional<Entry<T>> replaced;
  {
    const std::lock_guard<std::mutex> lock(cache.mutex);
    Table<T>& table = cache.table<T>();
    Entry<T>* entry = table.find(weights, form);
    if (!entry) {
      cache.remove_dead(removed);
      table.entries[weights[0].unsafeGetTensorImpl()].push_back(cache.noted<T>(weights, form, fingerprint));
      return {};
    }
    if (!entry->unchanged(weights) || entry->fingerprint != fingerprint) {
      replaced = std::move(*entry);
      *entry = cache.noted<T>(weights, form, fingerprint);
      return {};
    }
    if (entry->stack) {
      ++cache.hits;
      return {entry->stack, fingerprint};
    }
  }
  return {std::make_shared<cpu::PackedStack<T>>(shape, storage), fingerprint};
}
template KeptWeights<float> find_packed(TensorList, const StackShape&, cpu::Storage);
template KeptWeights<double> find_packed(TensorList, const StackShape&, cpu::Storage);

template <typename T>
std::shared_ptr<const cpu::PackedStack<T>> peek_packed(TensorList weights, int64_t batch, cpu::Storage storage) {
  Cache& cache = Cache::instance();
  const std::lock_guard<std::mutex> lock(cache.mutex);
  const Entry<T>* entry = cache.table<T>().find(weights, form_of(batch, storage));
  if (!entry || !entry->stack || !entry->unchanged(weights) || entry->fingerprint != fingerprint_of(weights)) return {};
  ++cache.hits;
  return entry->stack;
}
template std::shared_ptr<const cpu::PackedStack<float>> peek_packed(TensorList, int64_t, cpu::Storage);
template std::shared_ptr<const cpu::PackedStack<double>> peek_packed(TensorList, int64_t, cpu::Storage);

template <typename T>
void keep_packed(TensorList weights, const StackShape& shape, const KeptWeights<T>& packed) {
  Cache& cache = Cache::instance();
  const std::lock_guard<std::mutex> lock(cache.mutex);
  Entry<T>* entry = cache.table<T>().find(weights, form_of(shape.batch, packed.stack->storage()));
  // Unless they have changed since, or another thread was first.
  if (entry && !entry->stack && entry->unchanged(weights) && entry->fingerprint == packed.fingerprint) {
    entry->stack = packed.stack;
  }
}
template void keep_packed(TensorList, const StackShape&, const KeptWeights<float>&);
template void keep_packed(TensorList, const StackShape&, const KeptWeights<double>&);

void drop_packed(const void* first_weight) {
  Cache& cache = Cache::instance();
  Removed removed;  // outlives the lock
  const std::lock_guard<std::mutex> lock(cache.mutex);
  cache.remove(first_weight, removed);
}

PackedCounts packed_counts() {
  Cache& cache = Cache::instance();
  const std::lock_guard<std::mutex> lock(cache.mutex);
  PackedCounts counts{0, 0, 0, cache.hits};
  cache.floats.count(counts);
  cache.doubles.count(counts);
  return counts;
}

}  // namespace stacked_lstm
