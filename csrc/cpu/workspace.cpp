// csrc/cpu/workspace.cpp: see workspace.h.
#include "workspace.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace stacked_lstm::cpu {
namespace {

constexpr int64_t kAlignment = 128;
constexpr int64_t kPage = int64_t{2} << 20;  // a huge page: weights are read end to end, and TLB misses cost time
constexpr int64_t kSmallPage = 4096;
constexpr int64_t kSlack = 8192;  // products prefetch past the end of their last panel

constexpr int64_t kKept = int64_t{256} << 20;

thread_local std::unique_ptr<Workspace> kept;
std::atomic<LargeMemory*> kept_large{nullptr};

void release(LargeMemory* memory) noexcept {
  if (memory) std::free(memory->data);
  delete memory;
}

}  // namespace

LargeMemory* take_large(int64_t bytes) {
  LargeMemory* const found = kept_large.exchange(nullptr, std::memory_order_acquire);
  if (found && found->bytes >= bytes && found->bytes / 2 <= bytes) return found;
  release(found);
  const int64_t size = (std::max<int64_t>(bytes, 1) + kPage - 1) / kPage * kPage;
  auto memory = std::make_unique<LargeMemory>();
  *memory = {std::aligned_alloc(static_cast<size_t>(kPage), static_cast<size_t>(size)), size};
  if (!memory->data) {
    throw std::runtime_error("stacked_lstm_ext: out of memory: " + std::to_string(bytes) +
                             " bytes for a backward pass");
  }
  prefer_huge_pages(memory->data, size);
  return memory.release();
}

void give_back(LargeMemory* memory) noexcept {
  release(memory->bytes <= kKept ? kept_large.exchange(memory, std::memory_order_acq_rel) : memory);
}

void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  const auto start = reinterpret_cast<uintptr_t>(data), page = static_cast<uintptr_t>(kPage);
  const uintptr_t first = (start + page - 1) / page * page,
                  last = (start + static_cast<uintptr_t>(bytes)) / page * page;
  if (bytes > kPage && last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void* Workspace::take_bytes(int64_t count, int64_t element) {
  int64_t bytes, end;
  if (count < 0 || __builtin_mul_overflow(count, element, &bytes) ||
      __builtin_add_overflow(bytes, used_ + kAlignment + kSlack + kPage, &end)) {
    throw std::runtime_error("stacked_lstm_ext: a workspace of " + std::to_string(count) + " elements is too large");
  }
  void* const place = counting_ ? nullptr : data_ + used_;
  used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return place;
}

void Workspace::make_room(int64_t bytes) {
  if (data_ && size_ >= bytes) return;
  release();
  const int64_t page = pages_ == Pages::huge || bytes >= kPage / 2 ? kPage : kSmallPage;
  const int64_t size = (bytes + kSlack + page - 1) / page * page;
  data_ = static_cast<char*>(std::aligned_alloc(static_cast<size_t>(page), static_cast<size_t>(size)));
  if (!data_)
    throw std::runtime_error("stacked_lstm_ext: out of memory: a workspace of " + std::to_string(bytes) + " bytes");
  size_ = size - kSlack;
#if defined(__linux__)
  if (page == kPage) madvise(data_, static_cast<size_t>(size), MADV_HUGEPAGE);
#endif
}

void Workspace::release() {
  std::free(data_);
  data_ = nullptr, size_ = used_ = 0;
}

Workspace::~Workspace() { release(); }

int64_t workspace_bytes() { return kept ? kept->bytes() : 0; }

Workspace::Lease::Lease() : workspace_(kept ? std::move(kept) : std::make_unique<Workspace>()) {}

Workspace::Lease::~Lease() {
  if (workspace_->size() <= kKept) kept = std::move(workspace_);
}

}  // namespace stacked_lstm::cpu
