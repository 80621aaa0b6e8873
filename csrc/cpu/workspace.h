// csrc/cpu/workspace.h: memory that a call needs and its caller does not: packed weights, chunks, states.
//
// Fresh pages cost more than the arithmetic of a small call, so a thread keeps its workspace from call to call, up to
// kKept bytes.
#pragma once

#include <cstdint>
#include <memory>

namespace stacked_lstm::cpu {

// For large memory that is about to be written for the first time: small pages, one fault each, would cost a training
// step a good part of its time. Whole huge pages inside the range only, so that nothing grows.
void prefer_huge_pages(void* data, int64_t bytes);

// Memory of a call's results that is large, and asked for again at the next call: what a forward pass saves. The process
// keeps the piece that was given back last, up to 256 MiB of it, for the next one of about its size. Any thread may take and
// give back; there is no lock that a fork could leave locked.
struct LargeMemory {
  void* data;
  int64_t bytes;
};
// At least `bytes`, holding anything. Throws std::runtime_error when there is no memory.
LargeMemory* take_large(int64_t bytes);
void give_back(LargeMemory* memory) noexcept;

class Workspace {
 public:
  // The calling thread's. One call at a time: a nested one gets its own.
  class Lease;

  // Runs `takes` twice: once to count, and once to give it parts of one piece that holds them all. So a workspace is never
  // larger than the largest call has asked for, nor is a smaller piece there beside it. What was taken before is lost.
  // Throws std::runtime_error when there is no memory.
  template <typename Takes>
  void lay_out(Takes&& takes) {
    counting_ = true, used_ = 0;
    takes();
    make_room(used_);
    counting_ = false, used_ = 0;
    takes();
  }
  // `count` elements, aligned to a pair of cache lines, holding anything; null while `lay_out` counts. Valid until the
  // lease ends.
  template <typename T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(count, sizeof(T)));
  }
  int64_t bytes() const { return used_; }  // taken
  int64_t size() const { return size_; }   // of the piece

  // Where a workspace is used again and again, every block is huge pages; one that is kept for long takes them only
  // where it fills them.
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

// What the calling thread's last call took; 0 where that is not kept.
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
