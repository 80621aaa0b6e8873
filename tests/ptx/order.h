// tests/ptx/order.h: which accesses are ordered: PTX's memory model, as far as one execution shows it.
//
// Each thread knows, for every other, up to where that thread's accesses come before its own next one (a vector clock). What
// makes it know more are the synchronisations of the ISA: a release that is observed by an acquire, where the scopes of both
// reach the other thread; fences with relaxed accesses around them; barriers; the phases of mbarriers. Two accesses of the same
// byte, one of which writes, by threads of which neither knows of the other's, are a race, unless both are strong and their
// scopes reach each other. It is an error even where the schedule hides it.
//
// A push or a bulk copy is sent when what its thread did before is done. So the phase of the mbarrier that counts it says that
// this is over: it may be overwritten. It does not make it visible: of that, there are only the copy's own bytes.
//
// Bulk copies read and write through another proxy: what threads wrote there before has to be known to a fence.proxy.async
// as well.
//
// What is not here: fence.sc's total order, volatile's, and that a restricted fence orders accesses of shared memory alone.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

struct Statement;

// Each includes those before it. `none`: of a weak access.
enum class Scope : uint8_t { none, block, cluster, device, system };

// What an access, a fence or an arrival says of order. In an instruction: its `number`.
struct How {
  Scope scope = Scope::none;
  bool acquire = false, release = false;
  uint32_t packed() const { return static_cast<uint32_t>(scope) | acquire << 3 | release << 4; }
  static How unpacked(uint32_t n) { return {static_cast<Scope>(n & 7), (n >> 3 & 1) != 0, (n >> 4 & 1) != 0}; }
};

// Which accesses come before, of each thread: up to that number. Behind the threads' own come their asynchronous copies'.
// Empty: none of anyone's.
struct Knowledge {
  std::vector<uint32_t> seen, fenced;  // fenced: and are known to a fence of the other proxy
  std::vector<uint32_t> over;          // so far they are over, at least: not visible, but they may be overwritten
  void add(const Knowledge& other);
};

// What a release hands over.
struct Release {
  uint32_t who = 0;
  Scope scope = Scope::none;
  std::shared_ptr<const Knowledge> what;
  // Of a copy that has landed: it, too.
  uint32_t copies_of = 0, up_to = 0;
};
using Releases = std::vector<Release>;

class Order {
 public:
  // `threads` a block, blocks in clusters.
  Order(unsigned blocks, unsigned threads, unsigned cluster);

  // ---- accesses of a thread (its number in the grid) to memory of the host. Each returns what is wrong, or "".
  std::string read(uint32_t thread, const uint8_t* at, unsigned bytes, How how, const Statement* statement);
  std::string write(uint32_t thread, const uint8_t* at, unsigned bytes, How how, const Statement* statement);
  std::string update(uint32_t thread, const uint8_t* at, unsigned bytes, How how, const Statement* statement);

  // ---- copies. `proxy`: through the other one
  std::string source(uint32_t thread, const uint8_t* at, unsigned bytes, bool proxy, const Statement* statement);
  std::string destination(uint32_t thread, const uint8_t* at, unsigned bytes, bool proxy) const;
  // It has landed: as the thread's own write, or as one of its copies', which counts them.
  void landed(uint32_t thread, const uint8_t* at, unsigned bytes, const Statement* statement);
  std::shared_ptr<const Knowledge> issued(uint32_t thread);  // what a copy hands over besides, when it has landed
  Release copied(uint32_t thread, const uint8_t* at, unsigned bytes, const Statement* statement,
                 std::shared_ptr<const Knowledge> issued);
  void wait_for_copies(uint32_t thread);

  // ---- synchronisation
  void fence(uint32_t thread, How how);
  void proxy_fence(uint32_t thread);
  // What the thread hands over at a barrier or an mbarrier; relaxed: what its last fence did.
  Release release(uint32_t thread, How how);
  void acquire(uint32_t thread, const Releases& releases, How how);
  const Knowledge& knowledge(uint32_t thread) const { return threads_[thread].now; }
  void learn(uint32_t thread, const Knowledge& what) { threads_[thread].now.add(what); }
  void tick(uint32_t thread) { ++threads_[thread].now.seen[thread]; }
  Knowledge nothing() const;

 private:
  struct Access {
    uint32_t who = 0, when = 0;  // 0: never
    Scope scope = Scope::none;
    const Statement* statement = nullptr;
  };
  struct Byte {
    Access write;
    std::vector<Access> reads;  // since
    Releases releases;          // of the word that begins here
  };
  struct Thread {
    Knowledge now;
    Release fenced;     // by its last fence
    Releases observed;  // by relaxed reads, not yet by a fence
    uint32_t copies = 0;
  };

  Scope distance(uint32_t a, uint32_t b) const;
  bool reaches(const Access& access, uint32_t thread, Scope scope) const;
  bool before(const Access& access, uint32_t thread) const;
  bool over(const Access& access, uint32_t thread) const;
  std::string race(const Access& other, uint32_t thread, const char* did) const;
  std::string check_read(const Byte& byte, uint32_t thread, Scope scope) const;
  std::string check_write(const Byte& byte, uint32_t thread, Scope scope) const;
  void observe(uint32_t thread, const Releases& releases, How how);
  void set(const uint8_t* at, unsigned bytes, Access access);

  unsigned per_block_, per_cluster_;
  std::vector<Thread> threads_;
  std::unordered_map<const uint8_t*, Byte> bytes_;
};

}  // namespace ptx
