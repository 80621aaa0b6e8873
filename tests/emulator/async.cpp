// tests/emulator/async.cpp: see async.h.
#include "async.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "caches.h"

namespace stacked_lstm::emulator {
namespace {

constexpr size_t kGranule = 4;  // the smallest asynchronous copy
constexpr size_t kBarrierBytes = 8;
constexpr int64_t kLargestCount = (1 << 20) - 1;          // of arrivals, and of bytes that a phase expects or is owed
constexpr std::byte kUnwritten{0xFF};                     // every number made of these is NaN
constexpr uint64_t kBarrierMark = 0xB1A55EDBA221E25Aull;  // what the memory of an mbarrier holds here

// ------------------------------------------------------------------------------------------------------------- state

// A phase ends when no arrivals are pending and as many bytes came as were expected.
struct Mbarrier {
  Block* block = nullptr;
  uint32_t offset = 0;
  int64_t count = 0, pending = 0, transactions = 0;  // transactions: expected bytes less those that came
  uint64_t phase = 0;
  bool valid = true;
  Location made;

  // Copies and peers may signal it once its thread has fenced the init. (The release of a cluster's barrier may do for
  // peers' plain arrivals, but not for the copy engine, which is another proxy. Here it never does.)
  const Thread* initialiser = nullptr;
  bool fenced = false;

  WaitList waiting;
  char sync[2] = {};  // to ThreadSanitizer, phases are objects by turns

  char* sync_of(uint64_t n) { return &sync[n & 1]; }
};

// What is known of four bytes of shared memory.
struct Granule {
  enum State : uint8_t { idle, coming, landed, barrier };
  State state = idle;
  uint16_t readers = 0;                 // copies under way that still read these bytes
  const Mbarrier* announcer = nullptr;  // landed: the end of this phase makes them readable; without, a thread's wait
  uint64_t phase = 0;
  Location at;  // the copy's place
};

// One copy, from its instruction to its end. A side in shared memory has a block, one in global memory has none.
struct Transfer {
  const char* what = nullptr;
  Location at;
  Block* target_block = nullptr;
  uint32_t target_offset = 0;
  std::byte* target = nullptr;
  Block* source_block = nullptr;
  uint32_t source_offset = 0;
  const std::byte* source = nullptr;  // nullptr: the instruction itself brings the value
  size_t source_bytes = 0;
  std::vector<std::byte> content;  // the source at the time of the instruction, with zeros behind
  Mbarrier* barrier = nullptr;     // that counts the bytes
  bool bulk = false;               // goes through the async proxy

  EventId event = 0;
  bool announced = false;               // ThreadSanitizer has been told of its accesses
  bool covered = false;                 // an arrival on an mbarrier waits for it, so that its thread need not
  const Mbarrier* announcer = nullptr;  // the mbarrier of the first such arrival
  char sync = 0;
};
using TransferRef = std::shared_ptr<Transfer>;

// The copies of a thread that its own waits announce.
struct Groups {
  std::vector<TransferRef> open;
  std::deque<std::vector<TransferRef>> committed;

  template <typename Function>
  void for_each(Function function) const {
    for (const auto& group : committed) std::for_each(group.begin(), group.end(), function);
    std::for_each(open.begin(), open.end(), function);
  }
};

struct ThreadCopies {
  Groups loads, stores;  // cp.async; cp.async.bulk to global memory
};

struct AsyncState : BlockState {
  std::map<uint32_t, std::unique_ptr<Mbarrier>> barriers;
  std::vector<std::unique_ptr<Mbarrier>> invalidated;  // granules may still name them
  std::vector<Granule> granules;
  std::vector<ThreadCopies> threads;
  bool stores_to_peers = false;
  std::vector<std::byte> seen_by_proxy;  // shared memory as bulk copies see it; empty before it matters

  ThreadCopies& of(const Thread& thread) {
    if (threads.empty()) threads.resize(thread.block->thread.size());
    return threads[thread.number];
  }
  void thread_exits(Thread& thread) override;
  void block_exits(Block& block) override;
};

AsyncState& async_state(Block& block) { return state<AsyncState>(block); }

uint32_t offset_of(uint32_t address) { return address & kOffsetMask; }

// ---------------------------------------------------------------------------------------------------------- granules

// The granules of a range, as far as any copy or mbarrier ever was there.
template <typename Function>
void for_each_known(Block& block, uint32_t offset, size_t bytes, Function function) {
  std::vector<Granule>& granules = async_state(block).granules;
  const size_t first = offset / kGranule, end = std::min((offset + bytes + kGranule - 1) / kGranule, granules.size());
  for (size_t i = first; i < end; ++i) function(granules[i], static_cast<uint32_t>(i * kGranule));
}

template <typename Function>
void for_each_granule(Block& block, uint32_t offset, size_t bytes, Function function) {
  std::vector<Granule>& granules = async_state(block).granules;
  const size_t first = offset / kGranule, end = (offset + bytes) / kGranule;
  if (granules.size() < end) granules.resize(std::max(end, granules.size() * 2));
  for (size_t i = first; i < end; ++i) function(granules[i]);
}

// Has the copy into these bytes not been announced yet?
bool under_way(Granule& granule) {
  if (granule.state == Granule::landed && granule.announcer && granule.announcer->phase != granule.phase) {
    granule.state = Granule::idle;
  }
  return granule.state == Granule::coming || granule.state == Granule::landed;
}

const char* file_name(const Location& at) {
  const char* slash = std::strrchr(at.file_name(), '/');
  return slash ? slash + 1 : at.file_name();
}

void check_read(Block& block, uint32_t offset, size_t bytes, const char* what, Location at) {
  for_each_known(block, offset, bytes, [&](Granule& granule, uint32_t where) {
    if (granule.state == Granule::barrier) {
      fail(Kind::async_misuse, at, "%s: offset %u of block %u belongs to an mbarrier", what, where, block.number);
    }
    if (!under_way(granule)) return;
    fail(Kind::read_before_wait, at,
         "%s: reads offset %u of block %u, where the copy of %s:%u %s: read before its wait, or overwritten too early",
         what, where, block.number, file_name(granule.at), granule.at.line(),
         granule.state == Granule::coming ? "is under way" : "has landed without having been waited for");
  });
}

void check_write(Block& block, uint32_t offset, size_t bytes, const char* what, const Mbarrier* announcer,
                 Location at) {
  for_each_known(block, offset, bytes, [&](Granule& granule, uint32_t where) {
    if (granule.state == Granule::barrier) {
      fail(Kind::async_misuse, at, "%s: offset %u of block %u belongs to an mbarrier", what, where, block.number);
    }
    if (granule.readers) {
      fail(Kind::overwritten_early, at, "%s: writes offset %u of block %u, which the copy of %s:%u has still to read",
           what, where, block.number, file_name(granule.at), granule.at.line());
    }
    if (!under_way(granule)) return;
    if (announcer && granule.announcer == announcer) {
      fail(Kind::phase_overrun, at,
           "%s: block %u gets offset %u twice in phase %" PRIu64 " of the mbarrier at %u (first: %s:%u)", what,
           block.number, where, announcer->phase, announcer->offset, file_name(granule.at), granule.at.line());
    }
    fail(Kind::overwritten_early, at, "%s: writes offset %u of block %u, where the copy of %s:%u is under way", what,
         where, block.number, file_name(granule.at), granule.at.line());
  });
}

// --------------------------------------------------------------------------------------------------- the async proxy

// Copies all of a block's shared memory, red zones included: no function that a sanitizer may have replaced.
void copy_plainly(std::byte* to, const std::byte* from, size_t bytes) {
  typedef uint64_t Word __attribute__((may_alias, aligned(1)));
  for (; bytes >= sizeof(Word); bytes -= sizeof(Word), to += sizeof(Word), from += sizeof(Word)) {
    *reinterpret_cast<Word*>(to) = *reinterpret_cast<const Word*>(from);
    asm volatile("");  // keeps the compiler from making a memcpy of the loop
  }
  for (; bytes; --bytes) *to++ = *from++;
}

std::vector<std::byte>& seen_by_proxy(Block& block) {
  std::vector<std::byte>& seen = async_state(block).seen_by_proxy;
  if (seen.size() < shared_end()) seen.resize(shared_end(), kUnwritten);
  return seen;
}

// Bytes that bulk copies see otherwise than ordinary instructions were written after the last fence, by anybody.
void check_proxy(Block& block, uint32_t offset, size_t bytes, const char* what, Location at) {
  const std::vector<std::byte>& seen = seen_by_proxy(block);
  const std::byte* now = block.shared + offset;
  const size_t differs = std::mismatch(now, now + bytes, seen.begin() + offset).first - now;
  if (differs == bytes) return;
  fail(Kind::async_misuse, at,
       "%s: offset %zu of block %u was written by ordinary instructions, with no async_proxy_fence() since", what,
       offset + differs, block.number);
}

// --------------------------------------------------------------------------------------------------------- mbarriers

Block& own_block(uint32_t address, const char* what, Location at) {
  Block& block = owner(address, at);
  if (&block != &this_block()) {
    fail(Kind::async_misuse, at, "%s: address %08x lies in block %u, not in the own one", what, address, block.number);
  }
  return block;
}

// Its memory still holds what the init left there?
void check_memory(const Mbarrier& barrier, const char* what, Location at) {
  uint64_t mark;
  std::memcpy(&mark, barrier.block->shared + barrier.offset, sizeof mark);
  if (mark != kBarrierMark) {
    fail(Kind::async_misuse, at, "%s: the memory of the mbarrier at offset %u of block %u was overwritten", what,
         barrier.offset, barrier.block->number);
  }
  tsan::read(barrier.block->shared + barrier.offset, kBarrierBytes);
}

Mbarrier& find_barrier(uint32_t address, const char* what, Location at) {
  shared_pointer(address, kBarrierBytes, kBarrierBytes, what, at);
  Block& block = owner(address, at);
  auto& barriers = async_state(block).barriers;
  const auto found = barriers.find(offset_of(address));
  if (found == barriers.end()) {
    fail(Kind::async_misuse, at, "%s: the mbarrier at offset %u of block %u is used before its init", what,
         offset_of(address), block.number);
  }
  check_memory(*found->second, what, at);
  return *found->second;
}

Mbarrier& own_barrier(uint32_t address, const char* what, Location at) {
  own_block(address, what, at);
  return find_barrier(address, what, at);
}

// A barrier that is signalled from elsewhere, by another block or by a copy: its init must have been made visible.
Mbarrier& visible_barrier(uint32_t address, const char* what, Location at) {
  Mbarrier& barrier = find_barrier(address, what, at);
  if (!barrier.fenced) {
    fail(
        Kind::async_misuse, at,
        "%s: the init of the mbarrier at offset %u of block %u is not visible to the cluster: no mbarrier_init_fence()",
        what, barrier.offset, barrier.block->number);
  }
  return barrier;
}

std::string describe(const void* subject) {
  const Mbarrier& barrier = *static_cast<const Mbarrier*>(subject);
  char text[160];
  std::snprintf(text, sizeof text,
                "mbarrier at offset %u of block %u: phase %" PRIu64 ", %" PRId64 " of %" PRId64
                " arrivals pending, %" PRId64 " bytes expected",
                barrier.offset, barrier.block->number, barrier.phase, barrier.pending, barrier.count,
                barrier.transactions);
  return text;
}

// Ends the phase if it is complete.
void settle(Mbarrier& barrier, const char* what, Location at) {
  if (barrier.transactions > kLargestCount || barrier.transactions < -kLargestCount) {
    fail(Kind::phase_overrun, at, "%s: transaction count %" PRId64 " is out of range (%s)", what, barrier.transactions,
         describe(&barrier).c_str());
  }
  if (barrier.pending) return;
  if (barrier.transactions < 0) {
    fail(Kind::phase_overrun, at, "%s: %" PRId64 " bytes more than the phase expects (%s)", what, -barrier.transactions,
         describe(&barrier).c_str());
  }
  if (barrier.transactions) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.waiting.wake_all();
}

void arrive(Mbarrier& barrier, int64_t expected, const char* what, Location at) {
  if (!barrier.pending) {
    fail(Kind::phase_overrun, at, "%s: more arrivals than the phase expects (%s)", what, describe(&barrier).c_str());
  }
  tsan::release(barrier.sync_of(barrier.phase));
  --barrier.pending;
  barrier.transactions += expected;
  settle(barrier, what, at);
}

void expect(Mbarrier& barrier, uint32_t bytes, const char* what, Location at) {
  barrier.transactions += bytes;
  settle(barrier, what, at);
}

// -------------------------------------------------------------------------------------------------------------- copies

bool all_unwritten(const std::byte* bytes, size_t count) {
  return std::all_of(bytes, bytes + count, [](std::byte b) { return b == kUnwritten; });
}

void land_transfer(Transfer& transfer) {
  const char* what = transfer.what;
  const Location at = transfer.at;
  Mbarrier* barrier = transfer.barrier;
  const size_t bytes = transfer.content.size();
  if (barrier && !barrier->valid) {
    fail(Kind::async_misuse, at, "%s: the mbarrier at offset %u of block %u was invalidated before the copy landed",
         what, barrier->offset, barrier->block->number);
  }
  if (transfer.source && std::memcmp(transfer.source, transfer.content.data(), transfer.source_bytes) != 0) {
    fail(Kind::overwritten_early, at, "%s: the source of the copy was written while the copy was under way", what);
  }
  if (!all_unwritten(transfer.target, bytes)) {
    fail(Kind::overwritten_early, at, "%s: the target of the copy was written while the copy was under way", what);
  }
  std::memcpy(transfer.target, transfer.content.data(), bytes);
  if (transfer.source_block) {
    for_each_granule(*transfer.source_block, transfer.source_offset, transfer.source_bytes,
                     [](Granule& granule) { --granule.readers; });
  }
  if (!transfer.target_block) return;
  for_each_granule(*transfer.target_block, transfer.target_offset, bytes, [&](Granule& granule) {
    granule.state = Granule::landed;
    granule.announcer = barrier;
    granule.phase = barrier ? barrier->phase : 0;
  });
  if (transfer.bulk) {
    std::copy(transfer.content.begin(), transfer.content.end(),
              seen_by_proxy(*transfer.target_block).begin() + transfer.target_offset);
  }
  if (!barrier) return;
  const tsan::As engine(*transfer.target_block);
  tsan::acquire(&transfer.sync);
  if (transfer.source) tsan::read(transfer.source, transfer.source_bytes);
  tsan::write(transfer.target, bytes);
  check_memory(*barrier, what, at);
  tsan::release(barrier->sync_of(barrier->phase));
  barrier->transactions -= static_cast<int64_t>(bytes);
  settle(*barrier, what, at);
}

// The target holds NaN from now on, and the source's content is what will land.
void start(const TransferRef& transfer, size_t bytes) {
  const Location at = transfer->at;
  if (Block* block = transfer->source_block) {
    check_read(*block, transfer->source_offset, transfer->source_bytes, transfer->what, at);
    if (transfer->bulk) check_proxy(*block, transfer->source_offset, transfer->source_bytes, transfer->what, at);
    for_each_granule(*block, transfer->source_offset, transfer->source_bytes, [&](Granule& granule) {
      ++granule.readers;
      granule.at = at;
    });
  }
  if (transfer->source) {
    transfer->content.assign(transfer->source, transfer->source + transfer->source_bytes);
    transfer->content.resize(bytes);
  }
  if (Block* block = transfer->target_block) {
    check_write(*block, transfer->target_offset, bytes, transfer->what, transfer->barrier, at);
    if (transfer->bulk) check_proxy(*block, transfer->target_offset, bytes, transfer->what, at);
    for_each_granule(*block, transfer->target_offset, bytes, [&](Granule& granule) {
      granule.state = Granule::coming;
      granule.announcer = transfer->barrier;
      granule.at = at;
    });
  }
  std::fill_n(transfer->target, bytes, kUnwritten);
  tsan::release(&transfer->sync);
  Event event{transfer->what, at, [transfer] { land_transfer(*transfer); }, {}};
  event.touches[0] = transfer->target_block;
  event.touches[1] = transfer->source_block;
  transfer->event = post(std::move(event));
  preempt();
}

// The thread's wait: the copy is done, and its bytes are the thread's to use.
void complete(Transfer& transfer) {
  land(transfer.event);
  const size_t bytes = transfer.content.size();
  if (transfer.announced) {
    tsan::acquire(&transfer.sync);
  } else {
    // Whoever is not ordered after this wait races with the copy. So the accesses count as made here.
    tsan::read(transfer.source, transfer.source_bytes);
    tsan::write(transfer.target, bytes);
    tsan::release(&transfer.sync);
    transfer.announced = true;
  }
  if (!transfer.target_block) return finish_bulk_write(transfer.target, bytes);
  for_each_granule(*transfer.target_block, transfer.target_offset, bytes,
                   [](Granule& granule) { granule.state = Granule::idle; });
}

void wait_for(Groups& groups, int groups_left) {
  while (groups.committed.size() > static_cast<size_t>(groups_left)) {
    for (const TransferRef& transfer : groups.committed.front()) complete(*transfer);
    groups.committed.pop_front();
  }
}

void commit(Groups& groups) {
  groups.committed.push_back(std::move(groups.open));
  groups.open.clear();
}

void check_bulk_size(uint32_t bytes, const char* what, Location at) {
  if (!bytes || bytes % 16) fail(Kind::async_misuse, at, "%s: %u bytes is no multiple of 16", what, bytes);
}

void check_global(const void* pointer, size_t bytes, size_t alignment, const char* what, Location at) {
  check_aligned(pointer, alignment, what, at);
  if (asan::poisoned(pointer, bytes)) {
    fail(Kind::out_of_bounds, at, "%s: %zu bytes of global memory at %p are not all allocated", what, bytes, pointer);
  }
}

void set_target(Transfer& transfer, uint32_t address, size_t bytes, size_t alignment) {
  transfer.target = shared_pointer(address, bytes, alignment, transfer.what, transfer.at);
  transfer.target_block = &owner(address, transfer.at);
  transfer.target_offset = offset_of(address);
}

void set_source(Transfer& transfer, uint32_t address, size_t bytes) {
  own_block(address, transfer.what, transfer.at);
  transfer.source = shared_pointer(address, bytes, 16, transfer.what, transfer.at);
  transfer.source_block = &this_block();
  transfer.source_offset = offset_of(address);
  transfer.source_bytes = bytes;
}

void set_barrier(Transfer& transfer, uint32_t address) {
  transfer.barrier = &visible_barrier(address, transfer.what, transfer.at);
  if (transfer.barrier->block != transfer.target_block) {
    fail(Kind::async_misuse, transfer.at, "%s: the data is for block %u, and its mbarrier lies in block %u",
         transfer.what, transfer.target_block->number, transfer.barrier->block->number);
  }
}

TransferRef make_transfer(const char* what, bool bulk, Location at) {
  const TransferRef transfer = std::make_shared<Transfer>();
  transfer->what = what;
  transfer->at = at;
  transfer->bulk = bulk;
  return transfer;
}

// -------------------------------------------------------------------------------------------------------------- exits

void AsyncState::thread_exits(Thread& thread) {
  if (threads.empty()) return;
  const auto check = [&](const TransferRef& transfer) {
    if (transfer->covered) return;
    fail(Kind::outstanding_at_exit, transfer->at, "%s: the thread that made the copy exits without a wait for it",
         transfer->what);
  };
  threads[thread.number].loads.for_each(check);
  threads[thread.number].stores.for_each(check);
}

void AsyncState::block_exits(Block&) {
  for (const auto& [offset, barrier] : barriers) {
    if (!barrier->transactions) continue;
    fail(Kind::outstanding_at_exit, barrier->made, "a block exits with a transaction outstanding (%s)",
         describe(barrier.get()).c_str());
  }
}

}  // namespace

// ------------------------------------------------------------------------------ for primitives that access at once

void before_shared_read(uint32_t address, size_t bytes, const char* what, Location at) {
  check_read(owner(address, at), offset_of(address), bytes, what, at);
}

void before_shared_write(uint32_t address, size_t bytes, const char* what, Location at) {
  Block& block = owner(address, at);
  if (&block != &this_block()) async_state(this_block()).stores_to_peers = true;
  check_write(block, offset_of(address), bytes, what, nullptr, at);
}

// ---------------------------------------------------------------------------------------------------------- cp.async

// PTX ISA, cp.async: src-size must be less than cp-size. Whole copies are given none.
void check_source_bytes(int source_bytes, int bytes, Location at) {
  if (source_bytes >= 0 && source_bytes < bytes) return;
  fail(Kind::async_misuse, at, "cp.async: %d of %d bytes to read; a size that is given must be 0 to %d", source_bytes,
       bytes, bytes - 1);
}

void copy_async(uint32_t target, const void* global, int bytes, int source_bytes, Location at) {
  const TransferRef transfer = make_transfer("cp.async", false, at);
  own_block(target, transfer->what, at);
  set_target(*transfer, target, static_cast<size_t>(bytes), static_cast<size_t>(bytes));
  check_global(global, static_cast<size_t>(source_bytes), static_cast<size_t>(bytes), transfer->what, at);
  // 16 bytes go past the L1.
  (bytes == 16 ? read_global_past_l1 : read_global)(global, static_cast<size_t>(source_bytes), transfer->what, at);
  transfer->source = static_cast<const std::byte*>(global);
  transfer->source_bytes = static_cast<size_t>(source_bytes);
  start(transfer, static_cast<size_t>(bytes));
  async_state(this_block()).of(this_thread()).loads.open.push_back(transfer);
}

void copy_async_commit(Location) { commit(async_state(this_block()).of(this_thread()).loads); }

void copy_async_wait(int groups_left, Location) {
  wait_for(async_state(this_block()).of(this_thread()).loads, groups_left);
}

void copy_async_arrive(uint32_t address, Location at) {
  static constexpr const char* kWhat = "cp.async.mbarrier.arrive";
  Mbarrier& barrier = own_barrier(address, kWhat, at);
  std::vector<TransferRef> transfers;
  async_state(this_block()).of(this_thread()).loads.for_each([&](const TransferRef& transfer) {
    if (!transfer->covered) transfer->announcer = &barrier;  // a later arrival may land first: this one announces
    transfer->covered = true;
    transfers.push_back(transfer);
  });
  const auto sync = std::make_shared<char>();
  tsan::release(sync.get());
  Block* block = &this_block();
  Event event{kWhat, at, {}, {block, nullptr}};
  event.land = [transfers = std::move(transfers), sync, block, &barrier, at] {
    if (!barrier.valid) fail(Kind::async_misuse, at, "%s: the mbarrier was invalidated before", kWhat);
    for (const TransferRef& transfer : transfers) land(transfer->event);
    const tsan::As engine(*block);
    tsan::acquire(sync.get());
    for (const TransferRef& transfer : transfers) {
      if (transfer->announced) {
        tsan::acquire(&transfer->sync);
        continue;
      }
      tsan::read(transfer->source, transfer->source_bytes);
      tsan::write(transfer->target, transfer->content.size());
      tsan::release(&transfer->sync);
      transfer->announced = true;
      for_each_granule(*block, transfer->target_offset, transfer->content.size(), [&](Granule& granule) {
        if (granule.state != Granule::landed) return;
        granule.announcer = transfer->announcer;
        granule.phase = transfer->announcer->phase;
      });
    }
    check_memory(barrier, kWhat, at);
    arrive(barrier, 0, kWhat, at);
  };
  post(std::move(event));
  preempt();
}

// ---------------------------------------------------------------------------------------------------------- mbarrier

void mbarrier_init(uint32_t address, uint32_t count, Location at) {
  static constexpr const char* kWhat = "mbarrier.init";
  Block& block = own_block(address, kWhat, at);
  std::byte* memory = shared_pointer(address, kBarrierBytes, kBarrierBytes, kWhat, at);
  const uint32_t offset = offset_of(address);
  if (!count || count > kLargestCount) fail(Kind::async_misuse, at, "mbarrier.init: a count of %u", count);
  std::unique_ptr<Mbarrier>& barrier = async_state(block).barriers[offset];
  if (barrier) {
    fail(Kind::async_misuse, at, "mbarrier.init: the mbarrier at offset %u of block %u is initialised twice", offset,
         block.number);
  }
  check_write(block, offset, kBarrierBytes, kWhat, nullptr, at);
  barrier = std::make_unique<Mbarrier>();
  barrier->block = &block;
  barrier->offset = offset;
  barrier->made = at;
  barrier->count = barrier->pending = count;
  barrier->initialiser = &this_thread();
  tsan::write(memory, kBarrierBytes);
  std::memcpy(memory, &kBarrierMark, sizeof kBarrierMark);
  for_each_granule(block, offset, kBarrierBytes, [&](Granule& granule) {
    granule.state = Granule::barrier;
    granule.at = at;
  });
}

void mbarrier_init_fence(Location) {
  for (const auto& [offset, barrier] : async_state(this_block()).barriers) {
    if (barrier->initialiser == &this_thread()) barrier->fenced = true;
  }
}

void mbarrier_invalidate(uint32_t address, Location at) {
  Mbarrier& barrier = own_barrier(address, "mbarrier.inval", at);
  if (!barrier.waiting.threads.empty() || barrier.transactions) {
    fail(Kind::async_misuse, at, "mbarrier.inval: still in use (%s)", describe(&barrier).c_str());
  }
  AsyncState& state = async_state(this_block());
  std::byte* memory = this_block().shared + barrier.offset;
  tsan::write(memory, kBarrierBytes);
  std::fill_n(memory, kBarrierBytes, kUnwritten);
  for_each_granule(this_block(), barrier.offset, kBarrierBytes,
                   [](Granule& granule) { granule.state = Granule::idle; });
  barrier.valid = false;
  const auto entry = state.barriers.find(barrier.offset);
  state.invalidated.push_back(std::move(entry->second));
  state.barriers.erase(entry);
}

void mbarrier_arrive(uint32_t address, Location at) {
  arrive(own_barrier(address, "mbarrier.arrive", at), 0, "mbarrier.arrive", at);
  progress();
}

void mbarrier_arrive_expect(uint32_t address, uint32_t bytes, Location at) {
  static constexpr const char* kWhat = "mbarrier.arrive.expect_tx";
  Mbarrier& barrier = own_barrier(address, kWhat, at);
  if (bytes > kLargestCount) fail(Kind::async_misuse, at, "%s: %u bytes", kWhat, bytes);
  arrive(barrier, bytes, kWhat, at);
  progress();
}

void mbarrier_expect(uint32_t address, uint32_t bytes, Location at) {
  static constexpr const char* kWhat = "mbarrier.expect_tx";
  Mbarrier& barrier = own_barrier(address, kWhat, at);
  if (bytes > kLargestCount) fail(Kind::async_misuse, at, "%s: %u bytes", kWhat, bytes);
  expect(barrier, bytes, kWhat, at);
  progress();
}

void mbarrier_arrive_peer(uint32_t address, Location at) {
  arrive(visible_barrier(address, "mbarrier.arrive (peer)", at), 0, "mbarrier.arrive (peer)", at);
  progress();
}

bool mbarrier_test(uint32_t address, uint32_t parity, Location at) {
  static constexpr const char* kWhat = "mbarrier.test_wait";
  Mbarrier& barrier = own_barrier(address, kWhat, at);
  if (parity > 1) fail(Kind::async_misuse, at, "%s: parity %u", kWhat, parity);
  const std::byte* memory = barrier.block->shared + barrier.offset;
  if ((barrier.phase & 1) == parity && looks_like_polling(memory, barrier.phase)) poll(kWhat, at);
  if ((barrier.phase & 1) == parity) return false;
  tsan::acquire(barrier.sync_of(parity));
  return true;
}

void mbarrier_wait(uint32_t address, uint32_t parity, Location at) {
  static constexpr const char* kWhat = "mbarrier.try_wait";
  Mbarrier& barrier = own_barrier(address, kWhat, at);
  if (parity > 1) fail(Kind::async_misuse, at, "%s: parity %u", kWhat, parity);
  if ((barrier.phase & 1) == parity) {
    const uint64_t awaited = barrier.phase;
    barrier.waiting.wait({"mbarrier_wait", at, describe, &barrier});
    if (barrier.phase != awaited + 1) {
      fail(Kind::phase_overrun, at,
           "%s: phase %" PRIu64 " ended, and the next one too before this thread looked: it would wait for ever (%s)",
           kWhat, awaited, describe(&barrier).c_str());
    }
  }
  tsan::acquire(barrier.sync_of(parity));
}

// ------------------------------------------------------------------- copies that an mbarrier, or a bulk group, counts

void store_async(uint32_t target, const void* value, size_t bytes, uint32_t barrier, Location at) {
  const TransferRef transfer = make_transfer("st.async", false, at);
  // PTX ISA, st.async.weak. (Of bulk copies and of arrivals at a peer it asks no such thing.)
  if (this_block().cluster->blocks.size() < 2) {
    fail(Kind::cluster_misuse, at,
         "st.async in a cluster of one block is undefined: %%cluster_nctarank must be above 1");
  }
  set_target(*transfer, target, bytes, bytes);
  set_barrier(*transfer, barrier);
  const std::byte* content = static_cast<const std::byte*>(value);
  transfer->content.assign(content, content + bytes);
  start(transfer, bytes);
}

void bulk_load(uint32_t target, const void* global, uint32_t bytes, uint32_t barrier, Location at) {
  const TransferRef transfer = make_transfer("cp.async.bulk to shared memory", true, at);
  check_bulk_size(bytes, transfer->what, at);
  set_target(*transfer, target, bytes, 16);
  check_global(global, bytes, 16, transfer->what, at);
  read_global_in_bulk(global, bytes, transfer->what, at);
  set_barrier(*transfer, barrier);
  transfer->source = static_cast<const std::byte*>(global);
  transfer->source_bytes = bytes;
  start(transfer, bytes);
}

void bulk_push(uint32_t target, uint32_t source, uint32_t bytes, uint32_t barrier, Location at) {
  const TransferRef transfer = make_transfer("cp.async.bulk to a peer", true, at);
  check_bulk_size(bytes, transfer->what, at);
  set_source(*transfer, source, bytes);
  set_target(*transfer, target, bytes, 16);
  set_barrier(*transfer, barrier);
  start(transfer, bytes);
}

void bulk_store(void* global, uint32_t source, uint32_t bytes, Location at) {
  const TransferRef transfer = make_transfer("cp.async.bulk to global memory", true, at);
  check_bulk_size(bytes, transfer->what, at);
  set_source(*transfer, source, bytes);
  check_global(global, bytes, 16, transfer->what, at);
  transfer->target = static_cast<std::byte*>(global);
  start_bulk_write(global, bytes, transfer->what, at);
  start(transfer, bytes);
  async_state(this_block()).of(this_thread()).stores.open.push_back(transfer);
}

void bulk_commit(Location) { commit(async_state(this_block()).of(this_thread()).stores); }

void bulk_wait(int groups_left, Location) { wait_for(async_state(this_block()).of(this_thread()).stores, groups_left); }

void async_proxy_fence(Location at) {
  mbarrier_init_fence(at);
  fence_proxy();
  const bool peers_too = async_state(this_block()).stores_to_peers;
  for (Block* block : this_block().cluster->blocks) {
    if (block != &this_block() && (!peers_too || !block->alive)) continue;
    std::vector<std::byte>& seen = seen_by_proxy(*block);
    copy_plainly(seen.data() + kSharedBase, block->shared + kSharedBase, seen.size() - kSharedBase);
  }
}

}  // namespace stacked_lstm::emulator
