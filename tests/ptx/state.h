// tests/ptx/state.h: what a running launch consists of: warps, blocks, clusters, what is under way.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "machine.h"
#include "order.h"
#include "program.h"

namespace ptx {

struct Machine;
struct Block;
struct Cluster;

// What is wrong with an instruction, and in which lane. The machine adds where that is.
struct Fault {
  int lane;
  std::string what;
};
[[noreturn]] inline void fault(int lane, std::string what) { throw Fault{lane, std::move(what)}; }

// What a warp waits for as a whole.
enum class Waiting : uint8_t { nothing, barrier, cluster };

struct Warp {
  Block* block = nullptr;
  unsigned number = 0;  // in the block
  uint32_t lanes = 0;   // that have a thread
  uint32_t exited = 0;  // of these
  uint32_t parked = 0;  // at a meeting of lanes that some have not reached
  std::array<uint32_t, kLanes> pc = {};
  std::vector<uint64_t> storage;  // registers; made when the warp starts
  std::vector<uint32_t> written;  // of each register, by lane
  Waiting waiting = Waiting::nothing;
  unsigned barrier = 0;  // where it waits
  bool cluster_arrived = false;
  uint64_t cluster_phase = 0;  // of its arrival
  bool queued = false;         // it is in the machine's queue
  bool reads_clock = false;    // since something last happened
  uint32_t at = 0;             // instruction that runs
  uint32_t undefined = 0;      // lanes in which what it wrote is not defined

  uint32_t alive() const { return lanes & ~exited; }
  unsigned thread(int lane) const { return number * kLanes + static_cast<unsigned>(lane); }
  Machine& machine() const;
  uint32_t in_grid(int lane) const;  // the thread's number

  template <typename T>
  T* out(const Operand& operand) {
    return reinterpret_cast<T*>(reinterpret_cast<char*>(storage.data()) + operand.at);
  }
  template <typename T>
  const T* in(const Operand& operand) const {
    const char* from = operand.number < 0 ? constants : reinterpret_cast<const char*>(storage.data());
    return reinterpret_cast<const T*>(from + operand.at);
  }
  const char* constants = nullptr;
};

template <typename F>
inline void each(uint32_t lanes, F f) {
  if (lanes == kAllLanes) {
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
  }
}

// An mbarrier object. A phase ends when no arrival and no byte is missing.
struct MBarrier {
  uint32_t count = 0, pending = 0;
  int64_t bytes = 0;  // expected, less those that have come
  uint32_t phase = 0;
  // With Options::order: who initialised it, whether a fence.mbarrier_init followed, what the arrivals of this phase and of
  // the one before released.
  uint32_t initialised_by = 0;
  bool fenced = false;
  Releases coming, done;
};
constexpr int64_t kMostBytes = (1 << 20) - 1;  // of an mbarrier's transaction count, either way
constexpr uint32_t kMostArrivals = (1 << 20) - 1;

// A barrier of bar.sync and bar.arrive.
struct NamedBarrier {
  unsigned threads = 0;  // that this phase is for
  unsigned arrived = 0;
  std::vector<Warp*> who, waiting;
  Knowledge known;  // to those who have come
};

// What marks say of a byte.
enum : uint8_t {
  kWritten = 1,
  kUnderWay = 2,  // shared: an asynchronous copy will write it
  kBarrier = 4,   // shared: of an mbarrier object
  kConstant = 8,  // global: read through the non-coherent path in this launch
};

// The asynchronous copies of one thread.
struct ThreadCopies {
  std::vector<uint64_t> open;                // since the last commit
  std::deque<std::vector<uint64_t>> groups;  // oldest first
};

struct Block {
  Machine* machine = nullptr;
  Cluster* cluster = nullptr;
  unsigned number = 0, rank = 0;
  std::array<unsigned, 3> index = {};
  std::vector<Warp> warps;
  unsigned alive = 0;                      // warps
  std::vector<uint8_t> shared, marks;      // from kSharedBase on
  std::map<uint32_t, MBarrier> mbarriers;  // by offset
  std::array<NamedBarrier, 16> barriers;
  std::map<unsigned, ThreadCopies> copies, bulk_copies;  // by thread
  int under_way = 0;                                     // copies that touch its shared memory
  bool gone = false, slow = false;
};

struct Cluster {
  std::vector<Block*> blocks;
  unsigned alive = 0, arrived = 0;  // warps
  uint64_t phase = 0;
  std::vector<Warp*> waiting;
  Knowledge coming, known;  // to those who have come, in this phase and in the one before
};

// Something that happens later.
struct Event {
  std::string what;
  const Statement* statement = nullptr;
  std::function<void()> land;
  std::array<Block*, 2> touches = {};
};

// When asynchronous copies land.
enum class Landing { late, early, random };

struct Machine {
  const File* file = nullptr;
  const Program* program = nullptr;
  const Launch* launch = nullptr;
  Ranges* memory = nullptr;
  Options options;
  Statistics statistics;
  std::mt19937_64 generator;
  unsigned cluster_size = 1, threads = 0;
  std::vector<uint8_t> parameters;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::deque<Warp*> queue;     // warps that can run
  std::vector<Warp*> pollers;  // warps whose last look found nothing new
  std::unordered_map<uint64_t, Event> events;
  std::vector<uint64_t> event_ids;
  uint64_t next_event = 1;
  Landing landing = Landing::random;
  uint64_t progress = 0;  // counts what a polling thread may be waiting for
  uint64_t time = 0;      // nanoseconds, and clock cycles
  size_t last_range = 0;

  std::unique_ptr<Order> order;

  uint64_t draw(uint64_t bound) { return generator() % bound; }

  // ---- memory
  uint8_t* global(int lane, uint64_t address, unsigned bytes, bool write, bool constant);
  // `own`: by the window shared::cta. `whole`: see place() of memory.cpp.
  uint8_t* shared(const Warp& warp, int lane, uint32_t address, unsigned bytes, bool write, bool own,
                  bool* whole = nullptr);
  Block& owner(const Warp& warp, int lane, uint32_t address, bool own);

  // ---- mbarriers and copies
  MBarrier& mbarrier(Block& block, int lane, uint32_t address);
  void arrive(MBarrier& barrier, int lane, uint32_t arrivals);
  void expect(MBarrier& barrier, int lane, int64_t bytes);
  void settle(MBarrier& barrier);
  uint64_t post(Event event);
  void land(uint64_t id);
  void under_way(Block& block, int lane, uint32_t address, unsigned bytes);
  void landed(Block& block, uint32_t address, const uint8_t* data, unsigned bytes);

  // ---- waiting
  void wake(Warp& warp);
  void meet(Warp& warp, unsigned barrier, unsigned threads, bool waits);
  void settle(Block& block, NamedBarrier& barrier, bool all);
  void settle(Cluster& cluster);
  void exit(Warp& warp, uint32_t lanes);
};

inline Machine& Warp::machine() const { return *block->machine; }
inline uint32_t Warp::in_grid(int lane) const { return block->number * machine().threads + thread(lane); }

}  // namespace ptx
