// csrc/cpu/workspace.h: memory that only the call itself needs, not its caller: packed weights, chunks, states.
//
// Fresh pages cost more than the arithmetic of a small call, so a thread keeps its workspace from call to call, up to
// kKept bytes.
#pragma once

#include <cstdint>
#include <memory>

namespace stacked_lstm::cpu {

// For large memory that is about to be written for the first time: with small pages, one fault each, the faults would
// take a good part of a training step's time. Asks for whole huge pages inside the range only, so that no memory grows.
void prefer_huge_pages(void* data, int64_t bytes);

// Large memory for results that every call needs again: what a forward pass saves. The process keeps the allocation
// that was given back last, if it has at most 256 MiB, for the next request of about its size. Any thread may take and
// give back. There is no lock, so a fork cannot leave one locked.
struct LargeMemory {
  void* data;
  int64_t bytes;
};
// At least `bytes` bytes, with undefined contents. Throws std::runtime_error when there is no memory.
LargeMemory* take_large(int64_t bytes);
void give_back(LargeMemory* memory) noexcept;

class Workspace {
 public:
  // The calling thread's workspace, for one call at a time: a nested call gets its own.
  class Lease;

  // Runs `takes` twice: first to count the bytes, then to give it parts of one allocation that holds them all. So a
  // workspace is never larger than its largest call has asked for, and has no smaller allocation beside that. What was
  // taken before is lost.
  // Throws std::runtime_error when there is no memory.
  template <typename Takes>
  void lay_out(Takes&& takes) {
    counting_ = true, used_ = 0;
    takes();
    make_room(used_);
    counting_ = false, used_ = 0;
    takes();
  }
  // `count` elements with undefined contents, aligned to a pair of cache lines; null while `lay_out` counts. Valid
  // until the lease ends.
  template <typename T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(count, sizeof(T)));
  }
  int64_t bytes() const { return used_; }  // taken
  int64_t size() const { return size_; }   // of the allocation

  // `huge`, for a workspace that is used again and again: it always has huge pages. `as_needed`, for a workspace that
  // is kept for long: it has huge pages only if it fills at least half of one.
  enum class Pages { huge, as_needed };
  explicit Workspace(Pages pages = Pages::huge) : pages_(pages) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace();

 private:
  void* take_bytes(int64_t count, int64_t element);
  void make_room(int64_t bytes);
  void release();

  const Pages pages_;
  char* data_ = nullptr;
  int64_t size_ = 0, used_ = 0;
  bool counting_ = false;
};

// Bytes that the calling thread's last call took; 0 if its workspace is not kept.
int64_t workspace_bytes();

class Workspace::Lease {
 public:
  Lease();
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  Workspace* operator->() { return workspace_.get(); }

 private:
  std::unique_ptr<Workspace> workspace_;
};

}  // namespace stacked_lstm::cpu
