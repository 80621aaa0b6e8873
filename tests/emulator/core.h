// tests/emulator/core.h: CUDA kernels on the host. What the emulated primitives are built from.
//
// Every CUDA thread is a fiber, and one OS thread runs them all, so that a run is a function of (order, seed) alone. A
// thread runs until a primitive makes it wait; then the scheduler picks another. The first error ends the launch, with
// a report of its kind, its place in the kernel's source, and of what every other thread waits for.
//
//   Kernel source ──> primitives.cuh ──> device.h, device_matrix.h, device_async.h ──> core.h
//
// Kernels' files may be instrumented by a sanitizer; the emulator's own never are, and what they do on a kernel's behalf
// they announce (namespace tsan, namespace asan below).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <span>
#include <string>
#include <vector>

#include "vectors.h"

namespace stacked_lstm::emulator {

// A place in a kernel. A primitive's last parameter is `Location at = Location::current()`: its caller's place.
using Location = std::source_location;

struct Block;
struct Cluster;
struct Warp;
struct Stack;

// ---------------------------------------------------------------------------------------------------------- errors

enum class Kind {
  none,
  deadlock,             // every thread waits, and nothing is under way that could wake one
  live_lock,            // threads poll, and nothing changes any more
  divergent_barrier,    // threads of a block meet at different barriers
  barrier_misuse,       // named barriers: counts that differ, a bad number, one warp twice in a phase
  warp_mismatch,        // lanes of one warp in different operations, or with different masks
  lane_outside_mask,    // a lane takes part in an operation whose mask leaves it out
  misaligned,           // an address that is not a multiple of the access's size
  out_of_bounds,        // an address outside the block's shared memory
  not_written,          // shared memory is read that nobody has written
  cluster_misuse,       // the cluster's barrier out of turn; a rank that does not exist
  peer_gone,            // shared memory of a block that has exited
  scope_too_narrow,     // released or acquired at a scope that does not reach the other thread
  async_misuse,         // asynchronous copies and mbarriers: a wrong size, a missing init, a wrong place
  read_before_wait,     // the target of an asynchronous copy is read before its arrival was waited for
  stale,                // what another block wrote is read with no acquire since: a cache may hold older bytes
  not_constant,         // what the launch writes is read through the read-only path
  overwritten_early,    // an asynchronous copy lands on data that is still to be read
  phase_overrun,        // an mbarrier's phase gets more arrivals or bytes than it was meant to
  outstanding_at_exit,  // a block exits, and copies, transactions or barriers are not finished
  not_a_number,         // a matrix operand is NaN
  trap,                 // the kernel called __trap(), or used what the architecture lacks
  bad_launch,           // sizes no device accepts
  co_residency,         // a launch that must be resident at once is larger than the device
};
const char* name(Kind);

struct Report {
  Kind kind = Kind::none;
  std::string text;     // the first line: kind, message, place, block and thread
  std::string waiting;  // further lines: where all other threads are
  std::string file;
  int line = 0;
  bool ok() const { return kind == Kind::none; }
};

// Ends the launch with an error of the current thread, or of the event that is landing. Never returns.
[[noreturn]] void fail(Kind, Location, const char* format, ...) __attribute__((format(printf, 3, 4)));

// ------------------------------------------------------------------------------------------------- what is running

// What a waiting thread waits for. `describe`, if any, adds a detail when a report is written.
struct Wait {
  const char* what = nullptr;
  Location at = {};
  std::string (*describe)(const void* subject) = nullptr;
  const void* subject = nullptr;
};

struct Thread {
  uint3 index = {};     // threadIdx
  unsigned number = 0;  // linear in the block
  unsigned lane = 0;
  Block* block = nullptr;
  Warp* warp = nullptr;
  Wait wait;  // while it waits
  bool exited = false;

  // The scheduler's own.
  Stack* stack = nullptr;  // from its first instruction to its exit
  void* tsan = nullptr;
  bool started = false, polling = false;
  bool cluster_arrived = false;
  uint64_t cluster_phase = 0;
  const void* polled = nullptr;  // the address and the value of the last load that may be a polling loop's
  uint64_t polled_value = 0;
  bool fenced = false;                      // a fence came before the next relaxed store (kept for TSan only)
  std::vector<const void*> loaded_relaxed;  // since the last fence (kept for TSan only)
};

// State that a part of the emulator keeps for a block: derive from it, and take it by state<Derived>(block). It is made
// at the first use in each block, and dies with the block.
struct BlockState {
  virtual ~BlockState() = default;
  virtual void thread_exits(Thread&) {}  // as the thread's last act: fail() may be called
  virtual void block_exits(Block&) {}    // after the last thread's exit: fail() may be called
};

struct Block {
  uint3 index = {};     // blockIdx
  dim3 threads, grid;   // blockDim, gridDim
  unsigned number = 0;  // linear in the grid
  unsigned rank = 0;    // in its cluster
  unsigned alive = 0;   // threads that have not exited
  Cluster* cluster = nullptr;
  std::vector<Thread> thread;
  std::vector<Warp> warp;
  std::byte* shared = nullptr;  // offset 0 of its shared memory; addresses start at kSharedBase
  size_t dynamic_bytes = 0;
  std::vector<std::unique_ptr<BlockState>> states;
  void* engine = nullptr;  // to ThreadSanitizer, the unit that lands copies is a thread of its own (see tsan::Engine)
  struct Barriers;
  std::unique_ptr<Barriers> barriers;
  void* mapping = nullptr;
  bool slow = false;       // order `priorities`: events of this block land only when nothing else can run
  uint32_t refreshed = 0;  // when its L1 last held nothing older; see caches.h

  Block();
  ~Block();
  Block(Block&&) noexcept;
};

struct Cluster {
  std::vector<Block*> blocks;  // by rank
  unsigned alive = 0;          // threads that have not exited
  unsigned arrived = 0;
  uint64_t phase = 0;
  uint32_t met = 0;  // when the last phase ended; see caches.h
  std::vector<Thread*> waiting;
  char sync[2] = {};  // alternating objects for tsan: phase n + 1 must not see phase n's release as its own
};

extern constinit thread_local Thread* current;  // nullptr outside a kernel
inline Thread& this_thread() { return *current; }
inline Block& this_block() { return *current->block; }

size_t allocate_state_id();
template <typename State>
State& state(Block& block) {
  static const size_t id = allocate_state_id();
  if (block.states.size() <= id) block.states.resize(id + 1);
  if (!block.states[id]) block.states[id] = std::make_unique<State>();
  return static_cast<State&>(*block.states[id]);
}

// --------------------------------------------------------------------------------------------------- waiting, waking

// The current thread waits until wake(thread). Check the condition again afterwards if somebody else may also wake it.
void park(const Wait&);
void wake(Thread&);

// For loops that ask again and again (mbarrier_test, flags): others run first. Returns when anything may have changed;
// if nothing ever does, the launch fails with a live-lock.
void poll(const char* what, Location);

// Something changed that a polling thread may look for (memory, a phase). Others may overtake the caller here.
void progress();

// In the random orders, others may go first. A place where nothing but the schedule is meant to change.
void preempt();

// A number from the run's seed, below `bound`.
unsigned draw(unsigned bound);

struct WaitList {
  std::vector<Thread*> threads;
  void wait(const Wait&);  // parks the current thread
  void wake_all();
};

// ------------------------------------------------------------------------------------------------- warp operations

// What one lane brings to an operation of its warp. The last lane of `mask` to come calls `combine` once, for all;
// arguments[i] is lane i's `argument`, or nullptr if i is outside the mask or has exited. Lanes in `mask` that have
// exited are not waited for, as in CUDA. Different names, masks or lines within one operation are errors. Only an operation
// without `combine`, a warp's barrier, orders memory.
using Combine = void (*)(void* const* arguments, unsigned mask, Location);
void warp_operation(const char* name, unsigned mask, void* argument, Combine combine, Location);

// What shuffles and votes bring, and how they are combined.
struct Shuffle {
  uint64_t value;
  unsigned source;  // lane
  uint64_t result;
};
struct Vote {
  bool predicate;
  unsigned ballot;
};
void combine_shuffle(void* const* arguments, unsigned mask, Location);
void combine_vote(void* const* arguments, unsigned mask, Location);

// The same, and all 32 lanes must be there (the .aligned instructions: mma, ldmatrix).
void whole_warp_operation(const char* name, void* argument, Combine combine, Location);

// --------------------------------------------------------------------------------------------------- shared memory

// A 32-bit shared address is an offset from kSharedBase on for the own block, and has rank + 1 above bit 24 for a
// block of the cluster. Address 0 is never valid.
constexpr uint32_t kSharedBase = 1024;
constexpr unsigned kRankShift = 24;
constexpr uint32_t kOffsetMask = (1u << kRankShift) - 1;
constexpr size_t kStaticBytes = 48 << 10;  // what CUDA allows without asking

Block& owner(uint32_t address, Location);  // the block an address lies in; an error if it has exited
// Checked for alignment, bounds, red zones and exited blocks; `what` names the primitive in the report.
std::byte* shared_pointer(uint32_t address, size_t bytes, size_t alignment, const char* what, Location);
uint32_t shared_address_of(const void* pointer, Location);  // of the current block's shared memory
uint32_t map_to_rank(uint32_t address, uint32_t rank, Location);
void* dynamic_shared_memory(size_t bytes, Location);
void* static_shared_memory(const void* type_id, size_t bytes, size_t alignment, Location);
bool in_shared_memory(const void* pointer);  // of the current block
uint32_t shared_end();  // no object in any block's shared memory has a greater offset (until the next static one comes)
// Alignment of an ordinary pointer.
void check_aligned(const void* pointer, size_t alignment, const char* what, Location);

// --------------------------------------------------------------------------------------------- asynchronous events

// Something that happens later: a copy, an arrival. The scheduler lands it: as late as possible (nothing else can run)
// in order `forward`, at the next opportunity in `reverse`, at random in between else. A wait that promises its
// completion calls land() itself. Events may land in any order; one that must follow another lands that one first.
//
// `land` runs on some thread's stack, between that thread's instructions: `current` means nothing in it. Take what
// you need by value. fail() in it reports the event's own place and the thread that posted it.
struct Event {
  const char* what;  // for reports: "cp.async", "st.async"
  Location at;
  std::function<void()> land;
  Block* touches[2] = {};  // blocks whose shared memory it reads or writes: they must not exit before
};
using EventId = uint64_t;  // never 0
EventId post(Event);
bool pending(EventId);
void land(EventId);  // now; nothing if it has landed

// -------------------------------------------------------------------------------------- sanitizers (no-ops without)

namespace tsan {
bool active();
void acquire(void* object);
void release(void* object);
void read(const void* pointer, size_t bytes);  // an access by the current identity
void write(void* pointer, size_t bytes);
// As long as it lives, accesses, acquire and release count as those of the unit that carries out the block's
// asynchronous copies, or of a given thread's fiber.
class As {
 public:
  explicit As(Block& engine_of);
  explicit As(const Thread& thread);
  ~As();
  As(const As&) = delete;
  As& operator=(const As&) = delete;

 private:
  void* before_ = nullptr;
};
}  // namespace tsan

namespace asan {
// Is any byte of the range poisoned (red zones, freed memory)? For what the uninstrumented emulator touches.
bool poisoned(const void* pointer, size_t bytes);
}  // namespace asan

// ------------------------------------------------------------------------- the primitives of device.h, out of line

void block_barrier(Location);
void named_barrier(int id, int threads, bool waits, Location);
void cluster_arrive(Location);
void cluster_wait(Location);
unsigned cluster_rank();
unsigned cluster_size();
enum class Reach { block, cluster, device, system };
// Called around the accesses by which threads communicate.
void check_word(const void* address, size_t bytes, Reach, const char* what, Location);  // alignment, state space
void before_release(const void* address, Reach, Location);
void after_acquire(const void* address, Reach, Location);
bool looks_like_polling(const void* address, uint64_t value);  // this thread's last look found the same
void before_relaxed_write(const void* address);
void after_relaxed_read(const void* address);
void after_write(bool changed);
void fence(Reach, Location);
[[noreturn]] void trap(Location);

// ----------------------------------------------------------------------------------------------- device and launch

enum class Order { forward, reverse, random, priorities };
const char* name(Order);

// The GPU that is played. Its sizes bound what may be resident at once; the defaults are an H100's.
struct Device {
  unsigned multiprocessors = 132;
  unsigned threads_per_multiprocessor = 2048;
  unsigned blocks_per_multiprocessor = 32;
  size_t shared_per_multiprocessor = 228 << 10;
  size_t shared_per_block = 227 << 10;
  size_t shared_reserved_per_block = 1 << 10;
  unsigned largest_cluster = 16;
  unsigned cluster_slots = 0;  // clusters that fit at once, of any size; 0: as many as the multiprocessors hold
};

struct Options {
  Order order = Order::forward;
  uint64_t seed = 1;
  uint64_t first_block = 0;  // blocks before it are left out: what indices of 2³¹ and more do, without the threads
  unsigned resident = 0;     // blocks at once of a launch that is not co-resident; 0: a few, as the order sees fit
  bool print = true;         // reports go to stderr too
  bool unordered_reads =
      false;  // past the L1 are let pass: by launches that have given up waiting, and go on in no order
  Device device;
};
Options& options();  // process-wide

struct Shape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
  bool co_resident = false;
};

// How many blocks of this shape the device holds at once (whole clusters).
uint64_t resident_capacity(const Shape&);

// A kernel and its arguments, for a launcher that does not call it.
struct Kernel {
  const void* function = nullptr;
  std::vector<std::span<const std::byte>> arguments;
};

// Runs the kernel; `body` is one thread's work. Never throws, never exits: the report tells.
Report run(const Shape&, const std::function<void()>& body, const Kernel& = {});

// What run() does with a launch that has passed its checks, in place of emulating it; tests/ptx sets one. `emulate` does
// what would have been done.
using Launcher = std::function<Report(const Shape&, const Kernel&, const std::function<Report()>& emulate)>;
Launcher& launcher();  // process-wide; empty at first

// Memory that the next launch may touch, by name: for a launcher that can tell, everything else is out of bounds. The
// emulator does not look at it. See lend.h.
enum class Access { read, read_write };
struct Piece {
  const void* begin;
  size_t bytes;
  std::string name;
  Access access;
  size_t width;                   // of an element, in bytes
  double (*number)(const void*);  // an element's; null where elements are no numbers
  double epsilon;                 // from 1 to the next number
};
std::vector<Piece>& device_memory();  // process-wide

// The last run's statistics, of this OS thread.
struct Statistics {
  uint64_t switches = 0, threads = 0, events = 0;
};
const Statistics& statistics();

}  // namespace stacked_lstm::emulator
