// tests/emulator/core.cpp: fibers, the scheduler, barriers, warps, shared memory, clusters; see core.h.
//
// One launch is one object, Run. A thread that must wait calls park(), which picks the next thread and switches to it:
// no scheduler stands between two fibers. A thread that has not started has no stack yet. When one exits and the next has
// not started, that one runs on the very same stack, so that a kernel that never waits costs a function call a thread.
#include "core.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "caches.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// The sanitizers' runtimes: weak, so that one object serves programs with either or neither.
extern "C" {
__attribute__((weak)) void* __tsan_create_fiber(unsigned);
__attribute__((weak)) void __tsan_destroy_fiber(void*);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void __tsan_switch_to_fiber(void*, unsigned);
__attribute__((weak)) void __tsan_set_fiber_name(void*, const char*);
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
__attribute__((weak)) void __tsan_read_range(void*, unsigned long);
__attribute__((weak)) void __tsan_write_range(void*, unsigned long);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void*, size_t);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void*, size_t);
__attribute__((weak)) void* __asan_region_is_poisoned(void*, size_t);
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);

// What the emulator allocates in one fiber it may free in another; the allocator's interceptors see that, and not why.
const char* __tsan_default_suppressions();
const char* __tsan_default_suppressions() { return "race:operator new\nrace:operator delete\n"; }
}

// ----------------------------------------------------------------------------------------------- switching of stacks

#if defined(__x86_64__)
// Pushes what a call must preserve, leaves the stack pointer in *from, and does the reverse with `to`.
extern "C" void stacked_lstm_emulator_switch(void** from, void* to);
asm(R"(
.text
.globl stacked_lstm_emulator_switch
.hidden stacked_lstm_emulator_switch
.type stacked_lstm_emulator_switch, @function
stacked_lstm_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size stacked_lstm_emulator_switch, .-stacked_lstm_emulator_switch
)");
#endif

namespace stacked_lstm::emulator {

namespace {

class Context {
 public:
#if defined(__x86_64__)
  void prepare(std::byte* bottom, size_t size, size_t stagger, void (*entry)()) {
    // As after a call: the return address leaves the stack 8 bytes off a multiple of 16. The stagger keeps the frames of
    // different fibers out of each other's cache sets.
    auto** top = reinterpret_cast<void**>(bottom + size - 64 - stagger);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    stack_pointer_ = top;
  }
  void switch_to(Context& to) { stacked_lstm_emulator_switch(&stack_pointer_, to.stack_pointer_); }

 private:
  void* stack_pointer_ = nullptr;
#else
  void prepare(std::byte* bottom, size_t size, size_t, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom;
    context_.uc_stack.ss_size = size;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void switch_to(Context& to) { swapcontext(&context_, &to.context_); }

 private:
  ucontext_t context_;
#endif
};

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 128 << 10;                   // only what is touched is ever backed by memory
constexpr size_t kRedZone = 128;                            // around the dynamic shared memory and each static object
constexpr size_t kAlignment = 128;                          // of the dynamic shared memory
constexpr size_t kStaticArena = kStaticBytes + (16 << 10);  // with room for the red zones
constexpr std::byte kGuard{0xA5}, kUnwritten{0xFF};         // 0xFF: not a number, in every floating-point type
constexpr unsigned kLanes = 32, kNamedBarriers = 16, kMostThreads = 1024;
constexpr unsigned kIdleRounds = 100;            // rounds of polling without any progress before that is a live-lock
constexpr uint64_t kPollingRounds = 20'000'000;  // the same, where something does change but nobody gets anywhere

size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

std::byte* map_memory(size_t bytes, void* at = nullptr) {
  void* memory = mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | (at ? MAP_FIXED : 0), -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory");
  return static_cast<std::byte*>(memory);
}

std::string text_of(const char* format, va_list arguments) {
  char buffer[1024];
  vsnprintf(buffer, sizeof buffer, format, arguments);
  return buffer;
}

__attribute__((format(printf, 1, 2))) std::string print(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string text = text_of(format, arguments);
  va_end(arguments);
  return text;
}

std::string place(const Location& at) {
  const char* slash = strrchr(at.file_name(), '/');
  return print("%s:%u", slash ? slash + 1 : at.file_name(), static_cast<unsigned>(at.line()));
}

bool same_place(const Location& a, const Location& b) {
  return a.line() == b.line() && (a.file_name() == b.file_name() || !strcmp(a.file_name(), b.file_name()));
}

}  // namespace

struct Stack {
  std::byte* memory = nullptr;
  Context context;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

struct Warp {
  Thread* first = nullptr;
  unsigned there = 0;   // lanes that exist
  unsigned exited = 0;  // of those
  unsigned ready = 0;   // lanes that can run
  bool listed = false;  // in Run::live_
  int priority = 0;

  // The operation that lanes wait in: an entry for each of `arrived`.
  struct Arrival {
    const char* name;
    unsigned mask;
    Location at;
    void* argument;
    Combine combine;
  };
  unsigned arrived = 0;
  Arrival arrival[kLanes];
  uint64_t phase = 0;
  char sync[2] = {};

  unsigned gone() const { return exited | ~there; }
};

struct Barrier {
  unsigned arrived = 0;         // threads; at a named barrier whole warps count, as 32
  unsigned expected = 0;        // of a named barrier
  std::vector<unsigned> lanes;  // that have arrived, by warp
  std::vector<bool> counted;    // in `arrived`, by warp
  std::vector<Location> place;  // where, by warp
  Location first;
  WaitList waiting;
  uint64_t phase = 0;
  char sync[2] = {};

  bool touched() const {
    return std::any_of(lanes.begin(), lanes.end(), [](unsigned mask) { return mask != 0; });
  }
};

struct Block::Barriers {
  Barrier whole;                  // block_barrier
  Barrier named[kNamedBarriers];  // [0] is not used
  bool any_named = false;
};

Block::Block() = default;
Block::~Block() = default;
Block::Block(Block&&) noexcept = default;

constinit thread_local Thread* current = nullptr;

namespace {

struct StaticObject {
  const void* type;
  size_t offset, bytes;
};

// One kernel launch.
class Run {
 public:
  Run(const Shape& shape, const std::function<void()>& body);
  ~Run();
  Report go();

  [[noreturn]] void fail(Kind, Location, const std::string& message);
  void park(const Wait&);
  void wake(Thread&);
  void poll(const char* what, Location);
  void progress();
  void preempt();
  unsigned draw(unsigned bound);
  [[noreturn]] void thread_main();

  EventId post(Event);
  bool pending(EventId id) const;
  void land(EventId);

  // Shared memory.
  size_t dynamic_offset() const { return kSharedBase; }
  size_t static_offset() const { return kSharedBase + round_up(shape_.shared_bytes, kRedZone) + kRedZone; }
  size_t shared_bytes() const { return static_offset() + kStaticArena + kRedZone; }
  size_t shared_end() const {
    return static_used_ ? static_offset() + static_used_ : kSharedBase + shape_.shared_bytes;
  }
  bool inside_shared(size_t offset, size_t bytes) const;
  size_t static_object(const void* type, size_t bytes, size_t alignment, Location);

  void block_barrier(Location);
  void named_barrier(int id, int threads, bool waits, Location);
  void cluster_arrive(Location);
  void cluster_wait(Location);
  void warp_operation(const char* what, unsigned mask, void* argument, Combine, bool whole, Location);

  void* main_identity() const { return main_tsan_; }
  void* last_identity = nullptr;  // TSan's current fiber

  Statistics statistics;

  struct Released {
    Reach reach;
    unsigned block, cluster;
  };
  std::unordered_map<const void*, Released> released;  // by address: the last release

 private:
  struct PostedEvent {
    Event event;
    EventId id = 0;
    size_t position = 0;  // in order_
    unsigned block = 0, thread = 0;
  };

  Thread* next();
  Thread* take();
  void start_clusters();
  void start_cluster(unsigned number);
  void start_block(unsigned number, unsigned rank, Cluster&);
  void prepare_shared(Block&);
  void check_guards(const Block&);
  void exit_thread();
  void retire(Block&);
  void switch_to(Thread*);
  Stack* take_stack();
  void give_back(Stack*);
  void note_progress() { ++progress_; }
  void finish_barrier(Barrier&);
  void count_warp(Barrier&, const Warp&, size_t w, Location);
  void finish_cluster_barrier(Cluster&);
  bool finish_warp_operation(Warp&, unsigned mask);
  void finish_warp_operations(Warp&);
  void land_some();
  void land_at(size_t position);
  void wake_pollers();
  void change_priorities();
  void report_stuck(Kind);
  std::string waiting_threads() const;
  void set_report(Kind, Location, const std::string& message, const std::string& who);
  std::string warp_conflict(Location*) const;

  const Shape shape_;
  const std::function<void()>& body_;
  const Options options_;
  Report report_;

  std::vector<unsigned> to_start_;  // clusters, the next one last
  size_t resident_limit_ = 0;       // clusters
  std::vector<std::unique_ptr<Cluster>> clusters_;
  std::vector<std::unique_ptr<Block>> blocks_, idle_blocks_;
  std::vector<StaticObject> static_objects_;
  size_t static_used_ = 0;  // of the arena

  std::vector<Warp*> live_;  // warps with a lane that can run; the part before head_ is taken already
  size_t head_ = 0;
  std::vector<Thread*> pollers_;
  uint64_t progress_ = 0, polled_at_ = ~uint64_t{0}, polling_rounds_ = 0;
  unsigned idle_rounds_ = 0;
  unsigned until_change_ = 0;

  std::vector<PostedEvent> events_;  // by slot
  std::vector<size_t> free_slots_, order_;
  uint64_t generation_ = 0;
  unsigned lateness_ = 0;
  const PostedEvent* landing_ = nullptr;

  uint64_t random_;
  Context main_context_;
  void* main_fake_stack_ = nullptr;
  const void* main_bottom_ = nullptr;
  size_t main_size_ = 0;
  void* main_tsan_ = nullptr;
  std::vector<void*> dead_tsan_;
  std::vector<Stack*> used_stacks_;  // with ThreadSanitizer
  Thread leaving_;                   // stands for a thread that has exited, until its fiber is left
  char all_done_[1] = {};            // every thread releases it at its exit, the host acquires it
};

thread_local Run* running = nullptr;
thread_local Statistics last_statistics;

// Stacks and shared memory outlive a launch: mapping them anew would cost more than most launches.
struct Pools {
  std::vector<std::unique_ptr<Stack>> stacks;
  std::vector<Stack*> free;
  std::multimap<size_t, void*> shared;
  ~Pools() {
    for (auto& stack : stacks) munmap(stack->memory - kPage, kStackBytes + kPage);
    for (auto& [bytes, memory] : shared) munmap(memory, bytes);
  }
};
thread_local Pools pools;

void enter_fiber() { running->thread_main(); }

}  // namespace

// ------------------------------------------------------------------------------------------------------- sanitizers

namespace tsan {

bool active() { return __tsan_switch_to_fiber != nullptr; }
void acquire(void* object) {
  if (active()) __tsan_acquire(object);
}
void release(void* object) {
  if (active()) __tsan_release(object);
}
void read(const void* pointer, size_t bytes) {
  if (active()) __tsan_read_range(const_cast<void*>(pointer), bytes);
}
void write(void* pointer, size_t bytes) {
  if (active()) __tsan_write_range(pointer, bytes);
}

namespace {

void become(void* identity) {
  running->last_identity = identity;
  __tsan_switch_to_fiber(identity, 1);  // 1: no happens-before from one to the other
}

// New identities inherit what their maker has seen, so all are made by the host, which has seen no thread of the launch.
void* make_identity() {
  void* before = running->last_identity;
  become(running->main_identity());
  void* made = __tsan_create_fiber(0);
  become(before);
  return made;
}

}  // namespace

As::As(Block& block) {
  if (!active()) return;
  before_ = running->last_identity;
  if (!block.engine) {
    block.engine = make_identity();
    __tsan_set_fiber_name(block.engine, print("copies of block %u", block.number).c_str());
  }
  become(block.engine);
}
As::As(const Thread& thread) {
  if (!active()) return;
  before_ = running->last_identity;
  become(thread.tsan);
}
As::~As() {
  if (active()) become(before_);
}

}  // namespace tsan

namespace asan {

bool poisoned(const void* pointer, size_t bytes) {
  return __asan_region_is_poisoned && __asan_region_is_poisoned(const_cast<void*>(pointer), bytes);
}

namespace {
void poison(const void* pointer, size_t bytes) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(pointer, bytes);
}
void unpoison(const void* pointer, size_t bytes) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(pointer, bytes);
}
}  // namespace

}  // namespace asan

// --------------------------------------------------------------------------------------------------- start and stop

namespace {

Run::Run(const Shape& shape, const std::function<void()>& body)
    : shape_(shape), body_(body), options_(options()), random_(options_.seed * 0x9E3779B97F4A7C15u + 1) {
  const unsigned lateness[] = {0, 2, 16, 256};  // one event lands early in so many switches; 0: none does
  lateness_ = lateness[draw(4)];
  const size_t clusters = static_cast<size_t>(shape.grid.x) * shape.grid.y * shape.grid.z / shape.cluster;
  const size_t first = options_.first_block / shape.cluster;
  to_start_.resize(clusters - std::min(first, clusters));
  std::iota(to_start_.begin(), to_start_.end(), static_cast<unsigned>(first));
  if (options_.order == Order::forward) std::reverse(to_start_.begin(), to_start_.end());
  if (options_.order >= Order::random) {
    for (size_t i = to_start_.size(); i > 1; --i)
      std::swap(to_start_[i - 1], to_start_[draw(static_cast<unsigned>(i))]);
  }
  // Blocks of a plain launch may not rely on each other: few at once show it, and are cheap.
  const unsigned few = options_.order >= Order::random ? 1 + draw(8) : 2;
  const size_t resident = options_.resident ? std::max(1u, options_.resident / shape.cluster) : few;
  resident_limit_ = shape.co_resident ? clusters : std::min(clusters, resident);
  if (tsan::active()) last_identity = main_tsan_ = __tsan_get_current_fiber();
}

Run::~Run() {
  // What a failed launch left behind: its fibers are never resumed.
  for (auto& block : blocks_) {
    for (Thread& thread : block->thread) {
      if (thread.stack) pools.free.push_back(thread.stack);
      if (thread.tsan) dead_tsan_.push_back(thread.tsan);
    }
    if (block->engine) dead_tsan_.push_back(block->engine);
    idle_blocks_.push_back(std::move(block));
  }
  if (leaving_.stack) pools.free.push_back(leaving_.stack);
  pools.free.insert(pools.free.end(), used_stacks_.begin(), used_stacks_.end());
  if (leaving_.tsan) dead_tsan_.push_back(leaving_.tsan);
  for (void* identity : dead_tsan_) __tsan_destroy_fiber(identity);
  for (auto& block : idle_blocks_) {
    asan::unpoison(block->mapping, shared_bytes());
    pools.shared.emplace(round_up(shared_bytes(), kPage), block->mapping);
  }
}

Report Run::go() {
  running = this;
  if (Thread* first = next()) switch_to(first);
  if (tsan::active()) {
    // Threads that a failed launch left where they were have not released it: to the host, they are done too.
    for (auto& block : blocks_) {
      for (const Thread& thread : block->thread) {
        if (!thread.tsan) continue;
        const tsan::As left(thread);
        __tsan_release(all_done_);
      }
    }
    __tsan_acquire(all_done_);
  }
  if (report_.ok() && (!blocks_.empty() || !to_start_.empty())) report_stuck(Kind::deadlock);
  running = nullptr;
  last_statistics = statistics;
  return report_;
}

void Run::start_clusters() {
  while (clusters_.size() < resident_limit_ && !to_start_.empty()) {
    const unsigned number = to_start_.back();
    to_start_.pop_back();
    start_cluster(number);
  }
}

void Run::start_cluster(unsigned number) {
  Cluster& cluster = *clusters_.emplace_back(std::make_unique<Cluster>());
  for (unsigned rank = 0; rank < shape_.cluster; ++rank) start_block(number * shape_.cluster + rank, rank, cluster);
}

void Run::start_block(unsigned number, unsigned rank, Cluster& cluster) {
  if (idle_blocks_.empty()) {
    idle_blocks_.push_back(std::make_unique<Block>());
    const auto found = pools.shared.find(round_up(shared_bytes(), kPage));
    if (found == pools.shared.end()) {
      idle_blocks_.back()->mapping = map_memory(round_up(shared_bytes(), kPage));
    } else {
      idle_blocks_.back()->mapping = found->second;
      pools.shared.erase(found);
    }
  }
  Block& block = *blocks_.emplace_back(std::move(idle_blocks_.back()));
  idle_blocks_.pop_back();
  const dim3 threads = shape_.block, grid = shape_.grid;
  const unsigned count = threads.x * threads.y * threads.z;
  block.number = number, block.rank = rank, block.cluster = &cluster;
  block.index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
  block.threads = threads, block.grid = grid, block.alive = count, block.slow = false, block.refreshed = 0;
  block.dynamic_bytes = shape_.shared_bytes;
  block.barriers = nullptr;
  block.thread.clear(), block.thread.resize(count);
  block.warp.clear(), block.warp.resize(round_up(count, kLanes) / kLanes);
  prepare_shared(block);
  cluster.blocks.push_back(&block), cluster.alive += count;
  statistics.threads += count;

  uint3 index = {0, 0, 0};
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block.thread[i];
    thread.index = index;
    if (++index.x == threads.x) index.x = 0, ++index.y;
    if (index.y == threads.y) index.y = 0, ++index.z;
    thread.number = i, thread.lane = i % kLanes, thread.block = &block, thread.warp = &block.warp[i / kLanes];
  }
  for (size_t w = 0; w < block.warp.size(); ++w) {
    Warp& warp = block.warp[w];
    const unsigned lanes = std::min<unsigned>(kLanes, count - static_cast<unsigned>(w) * kLanes);
    warp.first = &block.thread[w * kLanes];
    warp.there = warp.ready = lanes == kLanes ? ~0u : (1u << lanes) - 1;
    warp.priority = options_.order == Order::priorities ? static_cast<int>(draw(1000)) : 0;
    warp.listed = true;
    live_.push_back(&warp);
  }
}

// Not a number everywhere, red zones around what the kernel may touch.
void Run::prepare_shared(Block& block) {
  auto* memory = static_cast<std::byte*>(block.mapping);
  if (tsan::active()) {
    // To ThreadSanitizer this is memory that the last block's threads have written: new pages have no history.
    void* before = last_identity;
    tsan::become(main_tsan_);
    map_memory(round_up(shared_bytes(), kPage), memory);
    tsan::become(before);
  }
  asan::unpoison(memory, shared_bytes());
  block.shared = memory;
  memset(memory, static_cast<int>(kGuard), kSharedBase);
  memset(memory + kSharedBase, static_cast<int>(kUnwritten), shape_.shared_bytes);
  memset(memory + kSharedBase + shape_.shared_bytes, static_cast<int>(kGuard),
         static_offset() - kSharedBase - shape_.shared_bytes);
  memset(memory + static_offset(), static_cast<int>(kGuard), static_used_ + kRedZone);
  asan::poison(memory, kSharedBase);
  asan::poison(memory + kSharedBase + shape_.shared_bytes, shared_bytes() - kSharedBase - shape_.shared_bytes);
  for (const StaticObject& object : static_objects_) {
    asan::unpoison(memory + object.offset, object.bytes);
    memset(memory + object.offset, static_cast<int>(kUnwritten), object.bytes);
  }
}

// Raw pointers can run out of their object where no primitive sees it. AddressSanitizer does; without it, at least a
// write into a red zone is noticed when the block ends.
void Run::check_guards(const Block& block) {
  if (__asan_poison_memory_region) return;
  const auto intact = [&](size_t from, size_t to) {
    for (size_t offset = from; offset < to; ++offset) {
      if (block.shared[offset] == kGuard) continue;
      fail(Kind::out_of_bounds, {},
           print("block %u wrote outside its shared memory: a red zone is overwritten at offset %zu (dynamic memory "
                 "lies in "
                 "[%u, %zu))",
                 block.number, offset, kSharedBase, kSharedBase + shape_.shared_bytes));
    }
  };
  intact(kSharedBase - kRedZone, kSharedBase);
  const size_t end = kSharedBase + shape_.shared_bytes;
  intact(end, std::min(end + kRedZone, static_offset()));
  size_t at = static_offset();
  for (const StaticObject& object : static_objects_) {
    intact(at, object.offset);
    at = object.offset + object.bytes;
  }
  if (!static_objects_.empty()) intact(at, at + kRedZone);
}

// To ThreadSanitizer a stack that another thread of this launch has used is memory that both write to. So it is used once
// a launch, after which the host has seen all; or, when there are very many, given new pages, which is slow.
Stack* Run::take_stack() {
  constexpr size_t kManyStacks = 4096;
  const bool renew = used_stacks_.size() >= kManyStacks;
  if (renew) {
    pools.free.push_back(used_stacks_.back());
    used_stacks_.pop_back();
  }
  if (pools.free.empty()) {
    auto stack = std::make_unique<Stack>();
    std::byte* memory = map_memory(kStackBytes + kPage);
    mprotect(memory, kPage, PROT_NONE);  // a stack that is too small must not run into its neighbour
    stack->memory = memory + kPage;
    pools.free.push_back(stack.get());
    pools.stacks.push_back(std::move(stack));
  }
  Stack* stack = pools.free.back();
  pools.free.pop_back();
  if (renew) map_memory(kStackBytes, stack->memory);
  asan::unpoison(stack->memory, kStackBytes);
  const size_t stagger = reinterpret_cast<uintptr_t>(stack->memory) / kStackBytes * 192 % 4096 / 64 * 64;
  stack->context.prepare(stack->memory, kStackBytes, stagger, &enter_fiber);
  stack->fake_stack = nullptr;
  return stack;
}

void Run::give_back(Stack* stack) { (tsan::active() ? used_stacks_ : pools.free).push_back(stack); }

// Leaves the running fiber, if one runs, for `to`; nullptr is the host.
void Run::switch_to(Thread* to) {
  Thread* from = current;
  if (to == from) return;
  ++statistics.switches;
  Context& here = from ? from->stack->context : main_context_;
  void*& fake_stack = from ? from->stack->fake_stack : main_fake_stack_;
  if (tsan::active()) {
    tsan::become(main_tsan_);
    if (to && !to->started) {
      to->tsan = __tsan_create_fiber(0);
      __tsan_set_fiber_name(to->tsan, print("block %u, thread %u", to->block->number, to->number).c_str());
    }
  }
  if (to && !to->started) {
    to->started = true;
    to->stack = take_stack();
  }
  if (tsan::active()) {
    if (from == &leaving_) dead_tsan_.push_back(std::exchange(leaving_.tsan, nullptr));
    for (void* identity : dead_tsan_) __tsan_destroy_fiber(identity);
    dead_tsan_.clear();
    if (to) tsan::become(to->tsan);
  }
  current = to;
  if (__sanitizer_start_switch_fiber) {
    const void* bottom = to ? to->stack->memory : main_bottom_;
    __sanitizer_start_switch_fiber(from && from->exited ? nullptr : &fake_stack, bottom, to ? kStackBytes : main_size_);
  }
  // The stack of a thread that has exited is free, but still in use until the very switch: it is given back only here.
  if (from == &leaving_) give_back(std::exchange(leaving_.stack, nullptr));
  here.switch_to(to ? to->stack->context : main_context_);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

// What a fiber does: its thread's work, then that of threads that have not started, as long as there are any.
void Run::thread_main() {
  if (__sanitizer_finish_switch_fiber) {
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (!main_bottom_) main_bottom_ = bottom, main_size_ = size;  // the first fiber is entered from the host
  }
  for (;;) {
    body_();
    exit_thread();
    Thread* thread = next();
    if (thread && !thread->started && !tsan::active()) {
      thread->started = true;
      thread->stack = std::exchange(leaving_.stack, nullptr);
      current = thread;
      continue;
    }
    switch_to(thread);
    abort();
  }
}

// After this, `current` is leaving_: the block, and the thread in it, may have gone.
void Run::exit_thread() {
  Thread& thread = *current;
  Block& block = *thread.block;
  Cluster& cluster = *block.cluster;
  Warp& warp = *thread.warp;
  for (auto& state : block.states) {
    if (state) state->thread_exits(thread);
  }
  if (tsan::active()) __tsan_release(all_done_);
  thread.exited = true;
  warp.exited |= 1u << thread.lane;
  --block.alive, --cluster.alive;
  if (thread.cluster_arrived) --cluster.arrived;
  note_progress();

  leaving_.index = thread.index, leaving_.number = thread.number, leaving_.lane = thread.lane;
  leaving_.block = &block, leaving_.warp = &warp, leaving_.exited = true;
  leaving_.stack = std::exchange(thread.stack, nullptr);
  leaving_.tsan = std::exchange(thread.tsan, nullptr);
  current = &leaving_;

  // Those that have exited count as arrived: some may have waited for this thread alone.
  if (block.barriers) {
    Block::Barriers& barriers = *block.barriers;
    if (barriers.whole.arrived && barriers.whole.arrived == block.alive) finish_barrier(barriers.whole);
    const size_t w = static_cast<size_t>(&warp - block.warp.data());
    for (Barrier& barrier : barriers.named) {
      if (barriers.any_named && !barrier.lanes.empty() && barrier.lanes[w]) count_warp(barrier, warp, w, {});
    }
  }
  if (warp.arrived) finish_warp_operations(warp);
  if (cluster.alive && cluster.arrived == cluster.alive) finish_cluster_barrier(cluster);
  if (!block.alive) retire(block);
}

void Run::retire(Block& block) {
  for (auto& state : block.states) {
    if (state) state->block_exits(block);
  }
  for (const size_t slot : order_) {
    const PostedEvent& posted = events_[slot];
    if (posted.event.touches[0] != &block && posted.event.touches[1] != &block) continue;
    fail(Kind::outstanding_at_exit, posted.event.at,
         print("block %u exits while %s of block %u, thread %u, is still under way", block.number, posted.event.what,
               posted.block, posted.thread));
  }
  if (block.barriers) {
    for (unsigned id = 0; id < kNamedBarriers; ++id) {
      const Barrier& barrier = block.barriers->named[id];
      if (!barrier.touched()) continue;
      fail(Kind::outstanding_at_exit, barrier.first,
           print("block %u exits while named barrier %u has %u of %u arrivals", block.number, id, barrier.arrived,
                 barrier.expected));
    }
  }
  check_guards(block);
  // Peers may still ask for this block (and are told that it has gone), so a cluster goes as a whole.
  Cluster& cluster = *block.cluster;
  if (cluster.alive) return;
  for (Block* member : cluster.blocks) {
    member->states.clear();
    if (member->engine) dead_tsan_.push_back(std::exchange(member->engine, nullptr));
    const auto found = std::find_if(blocks_.begin(), blocks_.end(), [&](auto& b) { return b.get() == member; });
    idle_blocks_.push_back(std::move(*found));
    *found = std::move(blocks_.back());
    blocks_.pop_back();
  }
  const auto found = std::find_if(clusters_.begin(), clusters_.end(), [&](auto& c) { return c.get() == &cluster; });
  *found = std::move(clusters_.back());
  clusters_.pop_back();
}

// -------------------------------------------------------------------------------------------------------- scheduler

// The thread to run now; nullptr: back to the host, since all is done or nothing can go on.
Thread* Run::next() {
  for (;;) {
    if (!to_start_.empty() && clusters_.size() < resident_limit_) start_clusters();
    if (!order_.empty()) land_some();
    if (head_ < live_.size()) return take();
    if (!order_.empty()) {
      land_at(options_.order >= Order::random ? draw(static_cast<unsigned>(order_.size())) : 0);
      continue;
    }
    if (pollers_.empty()) return nullptr;
    // Only threads that poll are left. Each may look again, but not for ever.
    idle_rounds_ = polled_at_ == progress_ ? idle_rounds_ + 1 : 0;
    polled_at_ = progress_;
    if (idle_rounds_ > kIdleRounds || ++polling_rounds_ > kPollingRounds) {
      report_stuck(Kind::live_lock);
      return nullptr;
    }
    wake_pollers();
  }
}

Thread* Run::take() {
  size_t k = head_;
  switch (options_.order) {
    case Order::forward:
      break;
    case Order::reverse:
      k = live_.size() - 1;
      break;
    case Order::random:
      k = draw(static_cast<unsigned>(live_.size()));
      break;
    case Order::priorities:
      if (until_change_-- == 0) change_priorities();
      for (size_t i = 1; i < live_.size(); ++i) {
        if (live_[i]->priority > live_[k]->priority) k = i;
      }
      break;
  }
  Warp& warp = *live_[k];
  unsigned lane = 0;
  if (options_.order == Order::forward) {
    lane = static_cast<unsigned>(__builtin_ctz(warp.ready));
  } else if (options_.order == Order::reverse) {
    lane = 31 - static_cast<unsigned>(__builtin_clz(warp.ready));
  } else {
    unsigned left = warp.ready;
    for (unsigned skip = draw(static_cast<unsigned>(__builtin_popcount(left))); skip; --skip) left &= left - 1;
    lane = static_cast<unsigned>(__builtin_ctz(left));
  }
  warp.ready &= ~(1u << lane);
  if (!warp.ready) {
    warp.listed = false;
    if (options_.order == Order::forward) {
      if (++head_ == live_.size() || head_ > 4096)
        live_.erase(live_.begin(), live_.begin() + static_cast<long>(head_)), head_ = 0;
    } else {
      live_[k] = live_.back();
      live_.pop_back();
    }
  }
  return warp.first + lane;
}

// Now and then a warp or a whole block becomes faster or slower than the rest, also in receiving. Threads drawn one by
// one at random keep all blocks about in step, and miss what happens when one lags far behind.
void Run::change_priorities() {
  until_change_ = draw(1u << (4 + draw(10)));
  Block& block = *blocks_[draw(static_cast<unsigned>(blocks_.size()))];
  block.slow = draw(2);
  const int priority = static_cast<int>(draw(1000));
  if (draw(2)) {
    for (Warp& warp : block.warp) warp.priority = priority;
  } else {
    block.warp[draw(static_cast<unsigned>(block.warp.size()))].priority = priority;
  }
}

void Run::wake(Thread& thread) {
  Warp& warp = *thread.warp;
  thread.wait.what = nullptr;
  warp.ready |= 1u << thread.lane;
  if (!warp.listed) {
    warp.listed = true;
    live_.push_back(&warp);
  }
}

void Run::park(const Wait& wait) {
  current->wait = wait;
  switch_to(next());
}

void Run::wake_pollers() {
  for (Thread* thread : pollers_) wake(*thread);
  pollers_.clear();
}

void Run::poll(const char* what, Location at) {
  pollers_.push_back(current);
  park({what, at});
}

void Run::progress() {
  note_progress();
  if (options_.order < Order::random) return;
  if (!pollers_.empty()) wake_pollers();
  if (!landing_) preempt();
}

void Run::preempt() {
  if (options_.order == Order::reverse && !order_.empty()) land_some();
  if (options_.order < Order::random || draw(2)) return;
  wake(*current);
  switch_to(next());
}

unsigned Run::draw(unsigned bound) {
  // splitmix64, and the multiplication that maps 32 bits to [0, bound)
  uint64_t z = random_ += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return static_cast<unsigned>(((z ^ z >> 31) >> 32) * bound >> 32);
}

// ----------------------------------------------------------------------------------------------------------- events

EventId Run::post(Event event) {
  size_t slot = events_.size();
  if (free_slots_.empty()) {
    events_.emplace_back();
  } else {
    slot = free_slots_.back();
    free_slots_.pop_back();
  }
  PostedEvent& posted = events_[slot];
  posted.event = std::move(event);
  posted.id = ++generation_ << 32 | slot;
  posted.position = order_.size();
  posted.block = current->block->number, posted.thread = current->number;
  order_.push_back(slot);
  ++statistics.events;
  return posted.id;
}

bool Run::pending(EventId id) const {
  const size_t slot = id & 0xFFFFFFFF;
  return id && slot < events_.size() && events_[slot].id == id;
}

void Run::land(EventId id) {
  if (pending(id)) land_at(events_[id & 0xFFFFFFFF].position);
}

void Run::land_at(size_t position) {
  const size_t slot = order_[position];
  PostedEvent posted = std::move(events_[slot]);
  events_[slot] = {};
  free_slots_.push_back(slot);
  if (options_.order == Order::forward) {  // the oldest first
    order_.erase(order_.begin() + static_cast<long>(position));
    for (size_t i = position; i < order_.size(); ++i) events_[order_[i]].position = i;
  } else {
    order_[position] = order_.back();
    order_.pop_back();
    if (position < order_.size()) events_[order_[position]].position = position;
  }
  note_progress();
  const PostedEvent* outer = std::exchange(landing_, &posted);
  posted.event.land();
  landing_ = outer;
}

// Events that come earlier than they must.
void Run::land_some() {
  if (landing_) return;
  if (options_.order == Order::reverse) {
    while (!order_.empty()) land_at(order_.size() - 1);
  } else if (options_.order >= Order::random && lateness_ && draw(lateness_) == 0) {
    const size_t position = draw(static_cast<unsigned>(order_.size()));
    const Event& event = events_[order_[position]].event;
    const bool slow = (event.touches[0] && event.touches[0]->slow) || (event.touches[1] && event.touches[1]->slow);
    if (!slow) land_at(position);
  }
}

// ---------------------------------------------------------------------------------------------------------- reports

// "0-6, 8-31"
std::string ranges(const std::vector<unsigned>& sorted) {
  std::string text;
  for (size_t i = 0; i < sorted.size();) {
    size_t j = i;
    while (j + 1 < sorted.size() && sorted[j + 1] == sorted[j] + 1) ++j;
    text += print(i == j ? "%s%u" : "%s%u-%u", text.empty() ? "" : ", ", sorted[i], sorted[j]);
    i = j + 1;
  }
  return text;
}

std::string Run::waiting_threads() const {
  std::map<std::string, std::map<unsigned, std::vector<unsigned>>> groups;  // by what they wait for: block, threads
  for (const auto& block : blocks_) {
    for (const Thread& thread : block->thread) {
      if (thread.exited || (&thread == current && !thread.wait.what)) continue;
      std::string group = "can run";
      if (!thread.started) {
        group = "have not started";
      } else if (thread.wait.what) {
        group = "wait in " + std::string(thread.wait.what) + " at " + place(thread.wait.at);
        if (thread.wait.describe) group += " (" + thread.wait.describe(thread.wait.subject) + ")";
      }
      groups[group][block->number].push_back(thread.number);
    }
  }
  std::string text;
  constexpr size_t kMostGroups = 16, kMostParts = 6;
  size_t groups_left = kMostGroups;
  for (const auto& [what, members] : groups) {
    if (groups_left-- == 0) {
      text += print("  and %zu more groups\n", groups.size() - kMostGroups);
      break;
    }
    std::map<std::string, std::vector<unsigned>> blocks;  // by the threads that they have in this group
    size_t count = 0;
    for (const auto& [block, threads] : members) blocks[ranges(threads)].push_back(block), count += threads.size();
    text += print("  %zu thread%s %s:", count, count == 1 ? "" : "s", what.c_str());
    size_t parts_left = kMostParts;
    for (const auto& [threads, numbers] : blocks) {
      if (parts_left-- == 0) {
        text += " ...";
        break;
      }
      text += print("%s block%s %s threads %s", &threads == &blocks.begin()->first ? "" : ";",
                    numbers.size() == 1 ? "" : "s", ranges(numbers).c_str(), threads.c_str());
    }
    text += "\n";
  }
  if (!to_start_.empty()) {
    text += print("  %zu blocks have not started: the launch does not ask for all to be resident at once\n",
                  to_start_.size() * shape_.cluster);
  }
  return text;
}

void Run::set_report(Kind kind, Location at, const std::string& message, const std::string& who) {
  if (!report_.ok()) return;
  report_.kind = kind;
  report_.file = at.file_name();
  report_.line = static_cast<int>(at.line());
  std::string where = at.line() ? place(at) : "";
  if (!who.empty()) where += (where.empty() ? "" : "; ") + who;
  report_.text = std::string(name(kind)) + ": " + message + (where.empty() ? "" : " (" + where + ")");
  report_.waiting = waiting_threads();
  if (options_.print) {
    fprintf(stderr, "emulator, order %s, seed %llu: %s\n%s", name(options_.order),
            static_cast<unsigned long long>(options_.seed), report_.text.c_str(), report_.waiting.c_str());
  }
}

void Run::fail(Kind kind, Location at, const std::string& message) {
  const unsigned block = landing_ ? landing_->block : current->block->number;
  const unsigned thread = landing_ ? landing_->thread : current->number;
  set_report(kind, at, message, print("block %u, thread %u", block, thread));
  switch_to(nullptr);
  abort();
}

// Nothing can go on. A warp whose lanes wait for each other in different operations is the likelier cause.
void Run::report_stuck(Kind kind) {
  Location at;
  const std::string conflict = warp_conflict(&at);
  if (!conflict.empty()) return set_report(Kind::warp_mismatch, at, conflict, "");
  for (const auto& block : blocks_) {
    for (const Thread& thread : block->thread) {
      if (!thread.exited && thread.wait.what && !at.line()) at = thread.wait.at;
    }
  }
  const char* message = kind == Kind::deadlock ? "every thread waits, and nothing is left that could wake one"
                                               : "threads poll, the others wait, and nothing changes";
  set_report(kind, at, message, "");
}

std::string Run::warp_conflict(Location* at) const {
  for (const auto& block : blocks_) {
    for (const Warp& warp : block->warp) {
      for (unsigned lane = 0; lane < kLanes; ++lane) {
        if (!(warp.arrived >> lane & 1)) continue;
        const Warp::Arrival& here = warp.arrival[lane];
        for (unsigned other = 0; other < kLanes; ++other) {
          if (!(here.mask >> other & 1) || warp.gone() >> other & 1) continue;
          const Thread& thread = warp.first[other];
          const bool in_operation = warp.arrived >> other & 1;
          if (in_operation && warp.arrival[other].mask == here.mask) continue;
          if (!in_operation && !thread.wait.what) continue;
          *at = here.at;
          return print("block %u, warp %u: lane %u waits in %s with mask %08x for lane %u, which waits in %s%s at %s",
                       block->number, warp.first->number / kLanes, lane, here.name, here.mask, other, thread.wait.what,
                       in_operation ? print(" with mask %08x", warp.arrival[other].mask).c_str() : "",
                       place(thread.wait.at).c_str());
        }
      }
    }
  }
  return "";
}

// --------------------------------------------------------------------------------------------------- block barriers

void Run::finish_barrier(Barrier& barrier) {
  barrier.arrived = barrier.expected = 0;
  std::fill(barrier.lanes.begin(), barrier.lanes.end(), 0u);
  std::fill(barrier.counted.begin(), barrier.counted.end(), false);
  ++barrier.phase;
  note_progress();
  barrier.waiting.wake_all();
}

// A warp arrives at a named barrier when all its lanes have, and counts as 32 threads.
void Run::count_warp(Barrier& barrier, const Warp& warp, size_t w, Location at) {
  if ((barrier.lanes[w] | warp.exited) != warp.there || barrier.counted[w]) return;
  barrier.counted[w] = true;
  barrier.arrived += kLanes;
  if (barrier.arrived > barrier.expected) {
    fail(Kind::barrier_misuse, at,
         print("a named barrier gets more threads than the %u it was given", barrier.expected));
  }
  if (barrier.arrived == barrier.expected) finish_barrier(barrier);
}

void Run::block_barrier(Location at) {
  Block& block = this_block();
  if (!block.barriers) block.barriers = std::make_unique<Block::Barriers>();
  Barrier& barrier = block.barriers->whole;
  if (barrier.arrived == 0) barrier.first = at;
  if (!same_place(barrier.first, at)) {
    fail(Kind::divergent_barrier, at,
         print("this thread is at a block barrier while others of its block wait at the one at %s",
               place(barrier.first).c_str()));
  }
  char* sync = &barrier.sync[barrier.phase & 1];
  tsan::release(sync);
  if (++barrier.arrived == block.alive) {
    finish_barrier(barrier);
    preempt();
  } else {
    barrier.waiting.wait({"block_barrier", at});
  }
  tsan::acquire(sync);
}

void Run::named_barrier(int id, int threads, bool waits, Location at) {
  Block& block = this_block();
  Thread& thread = *current;
  const char* what = waits ? "named_barrier_sync" : "named_barrier_arrive";
  if (id < 1 || id >= static_cast<int>(kNamedBarriers)) {
    fail(Kind::barrier_misuse, at, print("%s: there is no named barrier %d; they are 1 to 15", what, id));
  }
  const auto most = static_cast<int>(block.warp.size() * kLanes);
  if (threads <= 0 || threads % static_cast<int>(kLanes) || threads > most) {
    fail(Kind::barrier_misuse, at,
         print("%s: %d threads at barrier %d; it must be a multiple of 32, at most the block's %d", what, threads, id,
               most));
  }
  if (!block.barriers) block.barriers = std::make_unique<Block::Barriers>();
  block.barriers->any_named = true;
  Barrier& barrier = block.barriers->named[id];
  if (barrier.lanes.empty()) {
    barrier.lanes.resize(block.warp.size());
    barrier.counted.resize(block.warp.size());
    barrier.place.resize(block.warp.size());
  }
  if (!barrier.touched()) barrier.first = at, barrier.expected = static_cast<unsigned>(threads);
  if (barrier.expected != static_cast<unsigned>(threads)) {
    fail(Kind::barrier_misuse, at,
         print("%s: barrier %d is given %d threads here and %u at %s", what, id, threads, barrier.expected,
               place(barrier.first).c_str()));
  }
  const size_t w = static_cast<size_t>(thread.warp - block.warp.data());
  if (barrier.lanes[w] >> thread.lane & 1) {
    fail(Kind::barrier_misuse, at, print("%s: this thread arrives at barrier %d twice in one phase", what, id));
  }
  if (barrier.lanes[w] && !same_place(barrier.place[w], at)) {
    fail(Kind::divergent_barrier, at,
         print("%s: other lanes of this warp are at barrier %d at %s", what, id, place(barrier.place[w]).c_str()));
  }
  barrier.place[w] = at;
  barrier.lanes[w] |= 1u << thread.lane;
  char* sync = &barrier.sync[barrier.phase & 1];
  tsan::release(sync);
  const uint64_t phase = barrier.phase;
  count_warp(barrier, *thread.warp, w, at);
  if (!waits) return preempt();
  if (barrier.phase == phase) {
    barrier.waiting.wait({what, at});
  } else {
    preempt();
  }
  tsan::acquire(sync);
}

// ---------------------------------------------------------------------------------------------------------- cluster

void Run::finish_cluster_barrier(Cluster& cluster) {
  cluster.arrived = 0;
  ++cluster.phase;
  cluster.met = next_moment();
  note_progress();
  for (Thread* thread : cluster.waiting) wake(*thread);
  cluster.waiting.clear();
}

void Run::cluster_arrive(Location at) {
  Thread& thread = *current;
  Cluster& cluster = *thread.block->cluster;
  if (thread.cluster_arrived)
    fail(Kind::cluster_misuse, at, "cluster_arrive a second time, with no cluster_wait in between");
  tsan::release(&cluster.sync[cluster.phase & 1]);
  thread.cluster_arrived = true;
  thread.cluster_phase = cluster.phase;
  if (++cluster.arrived == cluster.alive) finish_cluster_barrier(cluster);
  preempt();
}

void Run::cluster_wait(Location at) {
  Thread& thread = *current;
  Cluster& cluster = *thread.block->cluster;
  if (!thread.cluster_arrived) fail(Kind::cluster_misuse, at, "cluster_wait without a cluster_arrive");
  const uint64_t phase = thread.cluster_phase;
  if (cluster.phase == phase) {
    cluster.waiting.push_back(&thread);
    park({"cluster_wait", at});
  }
  thread.cluster_arrived = false;
  tsan::acquire(&cluster.sync[phase & 1]);
  refresh_l1(
      cluster.met);  // what was written before the arrivals: the next phase has not ended, this thread not arrived
}

// ------------------------------------------------------------------------------------------------- warp operations

void Run::warp_operation(const char* what, unsigned mask, void* argument, Combine combine, bool whole, Location at) {
  Thread& thread = *current;
  Warp& warp = *thread.warp;
  if (!(mask >> thread.lane & 1)) {
    fail(Kind::lane_outside_mask, at, print("%s: lane %u is not in its own mask %08x", what, thread.lane, mask));
  }
  if (whole && warp.gone()) {
    fail(Kind::warp_mismatch, at,
         print("%s needs all 32 lanes; lanes %08x have exited or do not exist", what, warp.gone()));
  }
  // Those that are here with the same mask are alike, so one of them will do.
  for (unsigned left = warp.arrived & mask; left; left &= left - 1) {
    const unsigned lane = static_cast<unsigned>(__builtin_ctz(left));
    const Warp::Arrival& other = warp.arrival[lane];
    if (other.mask != mask) continue;
    if (same_place(other.at, at) && !strcmp(other.name, what)) break;
    fail(Kind::warp_mismatch, at,
         print("lane %u is in %s, lane %u in %s at %s, both with mask %08x", thread.lane, what, lane, other.name,
               place(other.at).c_str(), mask));
  }
  warp.arrival[thread.lane] = {what, mask, at, argument, combine};
  warp.arrived |= 1u << thread.lane;
  char* sync = combine ? nullptr : &warp.sync[warp.phase & 1];
  if (sync) tsan::release(sync);
  if (!finish_warp_operation(warp, mask)) {
    // The others of the mask are here, or have gone, and yet it is not complete?
    for (unsigned lane = 0; (warp.arrived & mask) == (mask & ~warp.gone()) && lane < kLanes; ++lane) {
      if (!((warp.arrived & mask) >> lane & 1)) continue;
      const Warp::Arrival& other = warp.arrival[lane];
      if (other.mask == mask || (other.mask & ~warp.gone() & ~warp.arrived)) continue;
      fail(Kind::warp_mismatch, at,
           print("%s with mask %08x, while lane %u is in %s with mask %08x at %s", what, mask, lane, other.name,
                 other.mask, place(other.at).c_str()));
    }
    park({what, at});
  }
  if (sync) tsan::acquire(sync);
}

// Completes the operation of the lanes in `mask` if all of them that have not exited have come with that mask.
bool Run::finish_warp_operation(Warp& warp, unsigned mask) {
  const unsigned lanes = mask & ~warp.gone();
  if ((warp.arrived & lanes) != lanes || !lanes) return false;
  void* arguments[kLanes] = {};
  const Warp::Arrival* one = nullptr;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    if (warp.arrival[lane].mask != mask) return false;
    one = &warp.arrival[lane];
    arguments[lane] = one->argument;
  }
  if (one->combine) one->combine(arguments, mask, one->at);
  warp.arrived &= ~lanes;
  ++warp.phase;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (lanes >> lane & 1 && warp.first + lane != current) wake(warp.first[lane]);
  }
  return true;
}

// A lane has exited; others may have waited for it alone.
void Run::finish_warp_operations(Warp& warp) {
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (warp.arrived >> lane & 1) finish_warp_operation(warp, warp.arrival[lane].mask);
  }
}

// ---------------------------------------------------------------------------------------------------- shared memory

bool Run::inside_shared(size_t offset, size_t bytes) const {
  if (offset >= kSharedBase && offset + bytes <= kSharedBase + shape_.shared_bytes) return true;
  return std::any_of(static_objects_.begin(), static_objects_.end(), [&](const StaticObject& object) {
    return offset >= object.offset && offset + bytes <= object.offset + object.bytes;
  });
}

// One object a type, at the same offset in all blocks. The first thread that asks for it lays it out.
size_t Run::static_object(const void* type, size_t bytes, size_t alignment, Location at) {
  for (const StaticObject& object : static_objects_) {
    if (object.type == type) return object.offset;
  }
  const size_t first = static_offset();
  const size_t offset = round_up(first + static_used_ + kRedZone, std::max<size_t>(alignment, 16));
  size_t total = bytes;
  for (const StaticObject& object : static_objects_) total += object.bytes;
  if (total > kStaticBytes || offset + bytes + kRedZone > shared_bytes()) {
    fail(Kind::out_of_bounds, at,
         print("static shared memory of %zu bytes; at most %zu are allowed", total, kStaticBytes));
  }
  static_used_ = offset + bytes - first;
  static_objects_.push_back({type, offset, bytes});
  for (auto& block : blocks_) {
    asan::unpoison(block->shared + offset, bytes);
    memset(block->shared + offset, static_cast<int>(kUnwritten), bytes);
    if (__asan_poison_memory_region) continue;
    memset(block->shared + offset + bytes, static_cast<int>(kGuard), kRedZone);
  }
  return offset;
}

Run& run_of(const char* what) {
  if (!running || !current) {
    fprintf(stderr, "emulator: %s outside a kernel\n", what);
    abort();
  }
  return *running;
}

}  // namespace

// ------------------------------------------------------------------------------------------------- what core.h offers

const char* name(Kind kind) {
  static const char* const names[] = {"no error",
                                      "deadlock",
                                      "live-lock",
                                      "divergent barrier",
                                      "barrier misuse",
                                      "warp mismatch",
                                      "lane outside its mask",
                                      "misaligned access",
                                      "out of bounds",
                                      "read of what nobody wrote",
                                      "cluster misuse",
                                      "peer has exited",
                                      "scope too narrow",
                                      "misuse of an asynchronous operation",
                                      "read before the wait",
                                      "stale read",
                                      "read as constant, and written",
                                      "overwritten too early",
                                      "phase overrun",
                                      "outstanding at exit",
                                      "not a number",
                                      "trap",
                                      "bad launch",
                                      "not co-resident"};
  static_assert(std::size(names) == static_cast<size_t>(Kind::co_residency) + 1);
  return names[static_cast<size_t>(kind)];
}

const char* name(Order order) {
  static const char* const names[] = {"forward", "reverse", "random", "priorities"};
  return names[static_cast<size_t>(order)];
}

Options& options() {
  static Options all;
  return all;
}

const Statistics& statistics() { return last_statistics; }

void fail(Kind kind, Location at, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const std::string message = text_of(format, arguments);
  va_end(arguments);
  run_of("fail").fail(kind, at, message);
}

void park(const Wait& wait) { run_of("park").park(wait); }
void wake(Thread& thread) { run_of("wake").wake(thread); }
void poll(const char* what, Location at) { run_of(what).poll(what, at); }
void progress() { run_of("progress").progress(); }
void preempt() { run_of("preempt").preempt(); }
unsigned draw(unsigned bound) { return run_of("draw").draw(bound); }

void WaitList::wait(const Wait& wait) {
  threads.push_back(current);
  park(wait);
}

void WaitList::wake_all() {
  for (Thread* thread : threads) wake(*thread);
  threads.clear();
}

size_t allocate_state_id() {
  static size_t next = 0;
  return next++;
}

void warp_operation(const char* what, unsigned mask, void* argument, Combine combine, Location at) {
  run_of(what).warp_operation(what, mask, argument, combine, false, at);
}
void whole_warp_operation(const char* what, void* argument, Combine combine, Location at) {
  run_of(what).warp_operation(what, ~0u, argument, combine, true, at);
}

void combine_shuffle(void* const* arguments, unsigned mask, Location at) {
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (!arguments[lane]) continue;
    auto& shuffle = *static_cast<Shuffle*>(arguments[lane]);
    const auto* source = static_cast<const Shuffle*>(arguments[shuffle.source]);
    if (!source && mask >> shuffle.source & 1) {
      fail(Kind::warp_mismatch, at, "lane %u shuffles from lane %u, which has exited or does not exist", lane,
           shuffle.source);
    }
    shuffle.result = source ? source->value : ~uint64_t{0};  // from outside the mask: not defined
  }
}

void combine_vote(void* const* arguments, unsigned, Location) {
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (arguments[lane] && static_cast<const Vote*>(arguments[lane])->predicate) ballot |= 1u << lane;
  }
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (arguments[lane]) static_cast<Vote*>(arguments[lane])->ballot = ballot;
  }
}

Block& owner(uint32_t address, Location at) {
  Block& block = this_block();
  const unsigned rank = address >> kRankShift;
  if (rank == 0) return block;
  const Cluster& cluster = *block.cluster;
  if (rank > cluster.blocks.size()) {
    fail(Kind::out_of_bounds, at, "shared address %08x: the cluster has no block of rank %u", address, rank - 1);
  }
  Block& peer = *cluster.blocks[rank - 1];
  if (!peer.alive) fail(Kind::peer_gone, at, "shared memory of block %u, which has exited", peer.number);
  return peer;
}

std::byte* shared_pointer(uint32_t address, size_t bytes, size_t alignment, const char* what, Location at) {
  Block& block = owner(address, at);
  const size_t offset = address & kOffsetMask;
  if (offset % alignment) {
    fail(Kind::misaligned, at, "%s: shared address %u is no multiple of %zu", what, static_cast<unsigned>(offset),
         alignment);
  }
  if (!run_of(what).inside_shared(offset, bytes)) {
    fail(Kind::out_of_bounds, at,
         "%s: bytes [%zu, %zu) are outside the shared memory of block %u (dynamic memory lies in [%u, %zu))", what,
         offset, offset + bytes, block.number, kSharedBase, kSharedBase + block.dynamic_bytes);
  }
  return block.shared + offset;
}

uint32_t shared_address_of(const void* pointer, Location at) {
  const Block& block = this_block();
  const std::ptrdiff_t offset = static_cast<const std::byte*>(pointer) - block.shared;
  // One past the end is an address that one may compute.
  if (offset < 0 || offset > static_cast<std::ptrdiff_t>(kOffsetMask) ||
      (!run_of("shared_address").inside_shared(static_cast<size_t>(offset), 0))) {
    fail(Kind::out_of_bounds, at, "shared_address of a pointer that is not into this block's shared memory");
  }
  return static_cast<uint32_t>(offset);
}

uint32_t map_to_rank(uint32_t address, uint32_t rank, Location at) {
  if (rank >= this_block().cluster->blocks.size()) {
    fail(Kind::cluster_misuse, at, "peer_address: the cluster has no block of rank %u", rank);
  }
  if (address >> kRankShift) fail(Kind::cluster_misuse, at, "peer_address of %08x, which is a peer's already", address);
  return (rank + 1) << kRankShift | address;
}

void* dynamic_shared_memory(size_t bytes, Location at) {
  const Block& block = this_block();
  if (bytes > block.dynamic_bytes) {
    fail(Kind::out_of_bounds, at, "dynamic_shared: an object of %zu bytes, but the launch gives %zu", bytes,
         block.dynamic_bytes);
  }
  return block.shared + kSharedBase;
}

void* static_shared_memory(const void* type, size_t bytes, size_t alignment, Location at) {
  return this_block().shared + run_of("static_shared").static_object(type, bytes, alignment, at);
}

bool in_shared_memory(const void* pointer) {
  const auto* from = static_cast<const std::byte*>(pointer);
  const std::byte* shared = this_block().shared;
  return from >= shared && from < shared + run_of("an access").shared_bytes();
}

uint32_t shared_end() { return static_cast<uint32_t>(run_of("shared_end").shared_end()); }

void check_aligned(const void* pointer, size_t alignment, const char* what, Location at) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment == 0) return;
  fail(Kind::misaligned, at, "%s: address %p is no multiple of %zu", what, pointer, alignment);
}

EventId post(Event event) { return run_of(event.what).post(std::move(event)); }
bool pending(EventId id) { return run_of("pending").pending(id); }
void land(EventId id) { run_of("land").land(id); }

void block_barrier(Location at) { run_of("block_barrier").block_barrier(at); }
void named_barrier(int id, int threads, bool waits, Location at) {
  run_of("named_barrier").named_barrier(id, threads, waits, at);
}
void cluster_arrive(Location at) { run_of("cluster_arrive").cluster_arrive(at); }
void cluster_wait(Location at) { run_of("cluster_wait").cluster_wait(at); }
unsigned cluster_rank() { return this_block().rank; }
unsigned cluster_size() { return static_cast<unsigned>(this_block().cluster->blocks.size()); }
void trap(Location at) { fail(Kind::trap, at, "__trap"); }

// ------------------------------------------------------------------------------------------------ the memory model

// Orders among threads come from the atomics themselves, which ThreadSanitizer sees in the instrumented kernel. Here are
// the scheduling, the scopes, and the fences, which ThreadSanitizer does not know.

bool looks_like_polling(const void* address, uint64_t value) {
  Thread& thread = this_thread();
  const bool same = thread.polled == address && thread.polled_value == value;
  thread.polled = address;
  thread.polled_value = value;
  return same;
}

namespace {

const char* name(Reach reach) {
  static const char* const names[] = {"block", "cluster", "device", "system"};
  return names[static_cast<size_t>(reach)];
}

unsigned cluster_number(const Block& block) { return block.number - block.rank; }

}  // namespace

void check_word(const void* address, size_t bytes, Reach reach, const char* what, Location at) {
  check_aligned(address, bytes, what, at);
  const std::ptrdiff_t offset = static_cast<const std::byte*>(address) - this_block().shared;
  if (reach < Reach::device || offset < 0 || !run_of(what).inside_shared(static_cast<size_t>(offset), bytes)) return;
  fail(Kind::out_of_bounds, at, "%s at scope %s takes an address in global memory, this is in shared memory", what,
       name(reach));
}

void before_release(const void* address, Reach reach, Location) {
  Run& run = run_of("a release");
  const Block& block = this_block();
  run.preempt();
  run.released[address] = {reach, block.number, cluster_number(block)};
}

void after_acquire(const void* address, Reach reach, Location at) {
  Run& run = run_of("an acquire");
  const Block& block = this_block();
  if (reach >= Reach::cluster) refresh_l1(next_moment());
  const auto found = run.released.find(address);
  if (found == run.released.end() || found->second.block == block.number) return;
  const Run::Released& release = found->second;
  const Reach needed = release.cluster == cluster_number(block) ? Reach::cluster : Reach::device;
  if (release.reach < needed || reach < needed) {
    fail(Kind::scope_too_narrow, at,
         "block %u released this at scope %s, block %u acquires it at scope %s: both must be %s", release.block,
         name(release.reach), block.number, name(reach), name(needed));
  }
}

// A fence, then a relaxed store, is a release of what came before the fence, and not of what came between. So what the
// fence has seen is kept in an object of the thread, and handed on by an identity that has seen nothing else.
void before_relaxed_write(const void* address) {
  Thread& thread = this_thread();
  if (!tsan::active() || !thread.fenced) return;
  Run& run = run_of("a relaxed store");
  void* before = run.last_identity;
  void* courier = tsan::make_identity();
  tsan::become(courier);
  tsan::acquire(&thread.fenced);
  tsan::release(const_cast<void*>(address));
  tsan::become(before);
  __tsan_destroy_fiber(courier);
}

void after_relaxed_read(const void* address) {
  if (tsan::active()) this_thread().loaded_relaxed.push_back(address);
}

void fence(Reach reach, Location) {
  Thread& thread = this_thread();
  if (reach >= Reach::cluster) refresh_l1(next_moment());
  if (tsan::active()) {
    for (const void* address : thread.loaded_relaxed) tsan::acquire(const_cast<void*>(address));
    thread.loaded_relaxed.clear();
    tsan::release(&thread.fenced);
    thread.fenced = true;
  }
  preempt();
}

void after_write(bool changed) {
  if (changed) progress();
}

// ----------------------------------------------------------------------------------------------------------- launch

uint64_t resident_capacity(const Shape& shape) {
  const Device& device = options().device;
  const size_t threads = round_up(static_cast<size_t>(shape.block.x) * shape.block.y * shape.block.z, kLanes);
  const size_t shared = shape.shared_bytes + device.shared_reserved_per_block;
  size_t blocks = std::min<size_t>(device.blocks_per_multiprocessor, device.threads_per_multiprocessor / threads);
  blocks = std::min(blocks, device.shared_per_multiprocessor / shared) * device.multiprocessors;
  if (shape.cluster <= 1) return blocks;
  size_t clusters = blocks / shape.cluster;
  if (device.cluster_slots) clusters = std::min<size_t>(clusters, device.cluster_slots);
  return clusters * shape.cluster;
}

namespace {

std::string launch_obstacle(const Shape& shape) {
  const Device& device = options().device;
  const dim3 grid = shape.grid, block = shape.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMostThreads || block.z > 64)
    return print("a block of %u x %u x %u threads", block.x, block.y, block.z);
  if (blocks == 0 || grid.x > 0x7FFFFFFF || grid.y > 0xFFFF || grid.z > 0xFFFF || blocks > 0xFFFFFFFF) {
    return print("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  }
  if (shape.shared_bytes > device.shared_per_block) {
    return print("%zu bytes of shared memory a block; the device has %zu", shape.shared_bytes, device.shared_per_block);
  }
  if (shape.cluster == 0 || shape.cluster > device.largest_cluster || grid.x % shape.cluster) {
    return print("clusters of %u blocks in a grid of %u", shape.cluster, grid.x);
  }
  if (running) return "a launch from inside a kernel";
  return "";
}

}  // namespace

Launcher& launcher() {
  static Launcher none;
  return none;
}

std::vector<Piece>& device_memory() {
  static std::vector<Piece> pieces;
  return pieces;
}

Report run(const Shape& shape, const std::function<void()>& body, const Kernel& kernel) {
  Report report;
  const std::string obstacle = launch_obstacle(shape);
  if (!obstacle.empty()) {
    report.kind = Kind::bad_launch;
    report.text = std::string(name(report.kind)) + ": " + obstacle;
    return report;
  }
  const uint64_t blocks = uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z, capacity = resident_capacity(shape);
  if (shape.co_resident && blocks > capacity) {
    report.kind = Kind::co_residency;
    report.text = print("%s: %llu blocks must be resident at once, %llu fit", name(report.kind),
                        static_cast<unsigned long long>(blocks), static_cast<unsigned long long>(capacity));
    return report;
  }
  const auto emulate = [&] {
    forget_global_memory();
    return std::make_unique<Run>(shape, body)->go();
  };
  return launcher() ? launcher()(shape, kernel, emulate) : emulate();
}

}  // namespace stacked_lstm::emulator
