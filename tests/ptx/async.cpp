// tests/ptx/async.cpp: mbarriers, and copies that go on while their thread goes on: cp.async, st.async, cp.async.bulk.
//
// A copy is under way from its instruction until it lands, which the machine makes happen early, late or at random. Until
// then nothing may touch where it goes, and a block that it reads or writes must not exit.
#include <algorithm>
#include <utility>

#include "decoder.h"

namespace ptx {

namespace {

uint32_t offset_of(uint32_t address) { return address & ((1u << kRankShift) - 1); }

template <typename T>
T address_of(Warp& w, const Instruction& i, size_t source, int lane, bool other = false) {
  return w.in<T>(i.in[source])[lane] + static_cast<T>(other ? i.other_offset : i.offset);
}

const uint8_t* bytes_at(const Block& block, uint32_t address) {
  return block.shared.data() + (offset_of(address) - kSharedBase);
}

void check(int lane, const std::string& wrong) {
  if (!wrong.empty()) fault(lane, wrong);
}

// A thread uses an mbarrier, itself or by a copy that will count there. `needs_fence`: from another block, or by a copy.
void check_use(Warp& w, int lane, const Block& block, uint32_t address, const MBarrier& barrier, bool needs_fence,
               const Statement* statement) {
  Order* const order = w.machine().order.get();
  if (!order) return;
  if (needs_fence && !barrier.fenced) {
    fault(lane,
          "an mbarrier is used by another block or by a copy, and no fence.mbarrier_init followed its initialisation");
  }
  check(lane, order->read(w.in_grid(lane), bytes_at(block, address), 8, {Scope::system}, statement));
}

}  // namespace

// ------------------------------------------------------------------------------------------------------------ mbarriers

MBarrier& Machine::mbarrier(Block& block, int lane, uint32_t address) {
  const auto found = block.mbarriers.find(offset_of(address));
  if (found == block.mbarriers.end()) fault(lane, "there is no mbarrier at shared address " + std::to_string(address));
  return found->second;
}

void Machine::settle(MBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.done = std::exchange(barrier.coming, {});
  ++progress;
}

void Machine::arrive(MBarrier& barrier, int lane, uint32_t arrivals) {
  if (arrivals > barrier.pending) {
    fault(lane, "an mbarrier gets " + std::to_string(arrivals) + " arrivals, and " + std::to_string(barrier.pending) +
                    " of " + std::to_string(barrier.count) + " are missing in this phase");
  }
  barrier.pending -= arrivals;
  settle(barrier);
}

void Machine::expect(MBarrier& barrier, int lane, int64_t bytes) {
  barrier.bytes += bytes;
  if (barrier.bytes > kMostBytes || barrier.bytes < -kMostBytes) {
    fault(lane, "an mbarrier's transaction count of " + std::to_string(barrier.bytes) + " is out of range");
  }
}

// ------------------------------------------------------------------------------------------------------ under way, landed

void Machine::under_way(Block& block, int lane, uint32_t address, unsigned bytes) {
  const uint32_t offset = offset_of(address);
  if (offset < kSharedBase || offset - kSharedBase + bytes > block.shared.size()) {
    fault(lane, "a copy of " + std::to_string(bytes) + " bytes to shared address " + std::to_string(address) +
                    " is out of bounds");
  }
  for (unsigned n = 0; n < bytes; ++n) {
    uint8_t& mark = block.marks[offset - kSharedBase + n];
    if (mark & (kUnderWay | kBarrier)) {
      fault(lane, "a copy to shared address " + std::to_string(address) +
                      (mark & kBarrier ? ", which is part of an mbarrier" : ", where another one is under way to"));
    }
    mark = kUnderWay;
  }
}

void Machine::landed(Block& block, uint32_t address, const uint8_t* data, unsigned bytes) {
  const uint32_t at = offset_of(address) - kSharedBase;
  std::memcpy(block.shared.data() + at, data, bytes);
  std::fill_n(block.marks.begin() + at, bytes, uint8_t{kWritten});
  ++progress;
}

uint64_t Machine::post(Event event) {
  for (Block* block : event.touches) {
    if (block) ++block->under_way;
  }
  ++statistics.copies;
  const uint64_t id = next_event++;
  events.emplace(id, std::move(event));
  event_ids.push_back(id);
  return id;
}

void Machine::land(uint64_t id) {
  const auto found = events.find(id);
  if (found == events.end()) return;  // it has landed
  Event event = std::move(found->second);
  events.erase(found);
  event_ids.erase(std::find(event_ids.begin(), event_ids.end(), id));
  for (Block* block : event.touches) {
    if (block) --block->under_way;
  }
  try {
    event.land();
  } catch (const Fault& f) {
    throw Fault{f.lane, "when " + event.what + " of line " + std::to_string(event.statement->place.line) +
                            " landed: " + f.what};
  }
}

namespace {

// ----------------------------------------------------------------------------------------------------- mbarriers, in PTX

// The mbarrier of a source address; `own`: it has to be named by the window of the own block.
MBarrier& barrier_of(Warp& w, const Instruction& i, size_t source, int lane, bool own = true, bool other = false) {
  const auto address = address_of<uint32_t>(w, i, source, lane, other);
  Block& block = w.machine().owner(w, lane, address, own);
  MBarrier& barrier = w.machine().mbarrier(block, lane, address);
  check_use(w, lane, block, address, barrier, &block != w.block, i.statement);
  return barrier;
}

// The state that an arrive returns: the package never uses it.
void set_state(Warp& w, const Instruction& i, int lane) {
  if (i.outs) w.out<uint64_t>(i.out[0])[lane] = 0;
}

void initialise(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int lane) {
    const auto address = address_of<uint32_t>(w, i, 0, lane);
    const uint32_t count = w.in<uint32_t>(i.in[1])[lane];
    Block& block = *w.block;
    w.machine().owner(w, lane, address, true);
    if (address % 8 != 0)
      fault(lane, "an mbarrier at shared address " + std::to_string(address) + ", no multiple of 8");
    if (count == 0 || count > kMostArrivals) fault(lane, "an mbarrier for " + std::to_string(count) + " arrivals");
    if (address < kSharedBase || address - kSharedBase + 8 > block.shared.size()) {
      fault(lane, "an mbarrier at shared address " + std::to_string(address) + " is out of bounds");
    }
    for (unsigned n = 0; n < 8; ++n) {
      uint8_t& mark = block.marks[address - kSharedBase + n];
      if (mark & (kBarrier | kUnderWay)) fault(lane, "an mbarrier is initialised where one is, or a copy goes");
      mark = kBarrier;
    }
    MBarrier& barrier = block.mbarriers[address];
    barrier = {};
    barrier.count = barrier.pending = count;
    barrier.initialised_by = w.in_grid(lane);
    if (Order* const order = w.machine().order.get()) {
      check(lane, order->write(w.in_grid(lane), bytes_at(block, address), 8, {}, i.statement));
    }
    ++w.machine().progress;
  });
}

void invalidate(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int lane) {
    const auto address = address_of<uint32_t>(w, i, 0, lane);
    if (barrier_of(w, i, 0, lane).bytes != 0) fault(lane, "an mbarrier is invalidated whose bytes are on their way");
    if (Order* const order = w.machine().order.get()) {
      check(lane, order->write(w.in_grid(lane), bytes_at(*w.block, address), 8, {}, i.statement));
    }
    w.block->mbarriers.erase(address);
    std::fill_n(w.block->marks.begin() + (address - kSharedBase), 8, uint8_t{0});
  });
}

// `mode`: kRemote, kExpect; a count of arrivals may be the last source.
enum : uint8_t { kRemote = 1, kExpect = 2, kArrive = 4 };

void arrive(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int lane) {
    MBarrier& barrier = barrier_of(w, i, 0, lane, !(i.mode & kRemote));
    if (i.mode & kExpect) w.machine().expect(barrier, lane, w.in<uint32_t>(i.in[1])[lane]);
    if ((i.mode & kArrive) && w.machine().order) {
      barrier.coming.push_back(w.machine().order->release(w.in_grid(lane), How::unpacked(i.number)));
    }
    if (i.mode & kArrive)
      w.machine().arrive(barrier, lane, !(i.mode & kExpect) && i.ins == 2 ? w.in<uint32_t>(i.in[1])[lane] : 1);
    if (!(i.mode & kArrive)) w.machine().settle(barrier);
    set_state(w, i, lane);
  });
}

void test_phase(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int lane) {
    const uint32_t parity = w.in<uint32_t>(i.in[1])[lane];
    if (parity > 1) fault(lane, "the parity of a phase is 0 or 1, not " + std::to_string(parity));
    const MBarrier& barrier = barrier_of(w, i, 0, lane);
    const bool over = (barrier.phase & 1) != parity;
    w.out<uint8_t>(i.out[0])[lane] = over;
    if (over && w.machine().order) w.machine().order->acquire(w.in_grid(lane), barrier.done, How::unpacked(i.number));
  });
}

bool shared_window(Decoder& d, bool may_be_remote) {  // whether it is the cluster's
  if (d.take("shared") || d.take("shared::cta")) return false;
  if (!may_be_remote || !d.take("shared::cluster")) d.fail("a state space of shared memory expected");
  if (d.program().capability < 90) d.fail("clusters come with sm_90");
  return true;
}

void eight_bytes(Decoder& d) {
  const Type type = d.type();
  if (type.kind != Type::bits || type.width != 64) d.fail("an mbarrier is .b64");
  d.no_more();
}

// By default .acquire or .release, and .cta.
void order_and_scope(Decoder& d, const char* order) {
  const bool acquires = std::string(order) == "acquire";
  How how = {Scope::block, acquires, !acquires};
  const bool relaxed = !d.take(order) && d.take("relaxed");
  if (relaxed) how.acquire = how.release = false;
  if (d.take("cluster")) {
    how.scope = Scope::cluster;
  } else if (!d.take("cta") && relaxed) {
    d.fail("a scope expected");
  }
  d.instruction().number = how.packed();
}

bool decode_mbarrier(Decoder& d) {
  Instruction& i = d.instruction();
  if (d.take("init")) {
    shared_window(d, false);
    eight_bytes(d);
    d.count(2);
    d.address(0, Space::shared_cta);
    d.in(1, 32);
    d.executes(initialise);
  } else if (d.take("inval")) {
    shared_window(d, false);
    eight_bytes(d);
    d.count(1);
    d.address(0, Space::shared_cta);
    d.executes(invalidate);
  } else if (d.next_is("test_wait") || d.next_is("try_wait")) {
    const bool tries = d.take("try_wait");
    if (!tries) d.need("test_wait");
    if (tries && d.program().capability < 90) d.fail("try_wait comes with sm_90");
    d.need("parity");
    order_and_scope(d, "acquire");
    shared_window(d, false);
    eight_bytes(d);
    d.count(3);
    d.out(0, 1);
    d.address(1, Space::shared_cta);
    d.in(2, 32);
    i.polls = true;
    d.executes(test_phase);
  } else if (d.take("expect_tx")) {
    d.need("relaxed");
    if (!d.take("cta")) d.need("cluster");
    i.mode = kExpect | (shared_window(d, true) ? kRemote : 0);
    eight_bytes(d);
    d.count(2);
    d.address(0, i.mode & kRemote ? Space::shared_cluster : Space::shared_cta);
    d.in(1, 32);
    d.executes(arrive);
  } else {
    d.need("arrive");
    i.mode = kArrive | (d.take("expect_tx") ? kExpect : 0);
    if ((i.mode & kExpect) && d.program().capability < 90) d.fail("transaction counts come with sm_90");
    order_and_scope(d, "release");
    if (shared_window(d, true)) i.mode |= kRemote;
    eight_bytes(d);
    if (d.operands() != 3) d.count(i.mode & kExpect ? 3 : 2);
    if (d.operand(0).text == "_") {
      if (d.program().capability < 90) d.fail("an arrive without a state comes with sm_90");
    } else {
      if (i.mode & kRemote) d.fail("a peer's mbarrier has no state to return");
      d.out(0, 64);
    }
    d.address(1, i.mode & kRemote ? Space::shared_cluster : Space::shared_cta);
    if (d.operands() == 3) d.in(2, 32);
    d.executes(arrive);
  }
  return true;
}

// ------------------------------------------------------------------------------------------------- cp.async, of a thread

// in: shared address, global address, and how many bytes to read where that is said.
void copy(Warp& w, const Instruction& i, uint32_t lanes) {
  Machine& machine = w.machine();
  each(lanes, [&](int lane) {
    const unsigned bytes = i.number;
    unsigned from_source = bytes;
    if (i.ins == 3) {
      from_source = w.in<uint32_t>(i.in[2])[lane];
      if (from_source >= bytes) {
        fault(lane, "cp.async of " + std::to_string(bytes) + " bytes with a source of " + std::to_string(from_source) +
                        ": less is expected where it is given");
      }
    }
    const auto to = address_of<uint32_t>(w, i, 0, lane);
    const auto from = address_of<uint64_t>(w, i, 1, lane, true);
    if (to % bytes != 0)
      fault(lane, "cp.async to shared address " + std::to_string(to) + ", no multiple of " + std::to_string(bytes));
    if (from % bytes != 0)
      fault(lane, "cp.async from a global address that is no multiple of " + std::to_string(bytes));
    Block& block = machine.owner(w, lane, to, true);
    for (unsigned n = 0; n < from_source; ++n) machine.global(lane, from + n, 1, false, false);
    machine.under_way(block, lane, to, bytes);
    const uint32_t thread = w.in_grid(lane);
    if (Order* const order = machine.order.get()) {
      check(lane, order->source(thread, reinterpret_cast<const uint8_t*>(from), from_source, false, i.statement));
      check(lane, order->destination(thread, bytes_at(block, to), bytes, false));
    }
    const auto land = [&machine, &block, to, from, from_source, bytes, thread, statement = i.statement] {
      uint8_t data[16] = {};
      std::memcpy(data, reinterpret_cast<const void*>(from), from_source);
      machine.landed(block, to, data, bytes);
      if (machine.order) machine.order->landed(thread, bytes_at(block, to), bytes, statement);
    };
    block.copies[w.thread(lane)].open.push_back(machine.post({"cp.async", i.statement, land, {&block, nullptr}}));
  });
}

std::map<unsigned, ThreadCopies>& copies_of(Block& block, bool bulk) { return bulk ? block.bulk_copies : block.copies; }

void commit(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int lane) {
    ThreadCopies& thread = copies_of(*w.block, i.mode != 0)[w.thread(lane)];
    thread.groups.push_back(std::move(thread.open));
    thread.open.clear();
  });
}

void wait(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int lane) {
    ThreadCopies& thread = copies_of(*w.block, i.mode != 0)[w.thread(lane)];
    while (thread.groups.size() > i.number) {
      for (const uint64_t id : thread.groups.front()) w.machine().land(id);
      thread.groups.pop_front();
      if (i.mode && w.machine().order) w.machine().order->wait_for_copies(w.in_grid(lane));
    }
  });
}

// Arrives when all copies of the thread so far have landed.
void arrive_after_copies(Warp& w, const Instruction& i, uint32_t lanes) {
  Machine& machine = w.machine();
  each(lanes, [&](int lane) {
    MBarrier& barrier = barrier_of(w, i, 0, lane);
    const ThreadCopies& thread = w.block->copies[w.thread(lane)];
    std::vector<uint64_t> before = thread.open;
    for (const auto& group : thread.groups) before.insert(before.end(), group.begin(), group.end());
    const auto land = [&machine, &barrier, before, thread = w.in_grid(lane)] {
      for (const uint64_t id : before) machine.land(id);
      if (machine.order) barrier.coming.push_back(machine.order->release(thread, {Scope::block, false, true}));
      machine.arrive(barrier, -1, 1);
    };
    machine.post({"cp.async.mbarrier.arrive", i.statement, land, {w.block, nullptr}});
  });
}

// ------------------------------------------------------------------------------------------------------ pushes to a peer

// in: shared address, `elements` values of 32 bits, the mbarrier's address.
void push(Warp& w, const Instruction& i, uint32_t lanes) {
  Machine& machine = w.machine();
  if (machine.cluster_size < 2) {
    fault(__builtin_ctz(lanes),
          "st.async in a cluster of one block: %cluster_nctarank must be above 1 (PTX ISA, st.async)");
  }
  each(lanes, [&](int lane) {
    const auto to = address_of<uint32_t>(w, i, 0, lane);
    const size_t last = i.ins - 1u;
    const auto at = address_of<uint32_t>(w, i, last, lane, true);
    const unsigned bytes = i.elements * i.element_bytes;
    Block& peer = machine.owner(w, lane, to, false);
    if (&machine.owner(w, lane, at, false) != &peer)
      fault(lane, "st.async to one block, and the mbarrier of another one");
    if (to % bytes != 0)
      fault(lane, "st.async to shared address " + std::to_string(to) + ", no multiple of " + std::to_string(bytes));
    check_use(w, lane, peer, at, machine.mbarrier(peer, lane, at), true, i.statement);
    machine.under_way(peer, lane, to, bytes);
    if (machine.order) check(lane, machine.order->destination(w.in_grid(lane), bytes_at(peer, to), bytes, false));
    std::array<uint8_t, 32> data;
    for (unsigned n = 0; n < i.elements; ++n) {
      std::memcpy(data.data() + n * i.element_bytes, w.in<char>(i.in[1 + n]) + lane * i.element_bytes, i.element_bytes);
    }
    const auto land = [&machine, &peer, to, at, bytes, data, thread = w.in_grid(lane), statement = i.statement,
                       issued = machine.order ? machine.order->issued(w.in_grid(lane)) : nullptr] {
      machine.landed(peer, to, data.data(), bytes);
      MBarrier& barrier = machine.mbarrier(peer, -1, at);
      if (machine.order)
        barrier.coming.push_back(machine.order->copied(thread, bytes_at(peer, to), bytes, statement, issued));
      machine.expect(barrier, -1, -int64_t{bytes});
      machine.settle(barrier);
    };
    machine.post(
        {"st.async", i.statement, land, {&peer, nullptr}});  // the sender may exit: its values are on their way
  });
}

bool decode_push(Decoder& d) {
  if (d.program().capability < 90) d.fail("st.async comes with sm_90");
  Instruction& i = d.instruction();
  d.need("async");
  d.take("weak");
  d.need("shared::cluster");
  d.need("mbarrier::complete_tx::bytes");
  i.elements = d.take("v2") ? 2 : d.take("v4") ? 4 : 1;
  const Type type = d.type();
  d.no_more();
  if (type.width < 32 || (type.width == 64 && i.elements == 4))
    d.fail("a type of 32 or 64 bits, of 16 bytes at most, expected");
  i.element_bytes = static_cast<uint8_t>(type.bytes());
  d.count(3);
  d.address(0, Space::shared_cluster);
  d.in_group(1, i.elements, type.width);
  d.address(2, Space::shared_cluster, true);
  d.executes(push);
  return true;
}

// ----------------------------------------------------------------------------------------------------------- bulk copies

enum Bulk : uint8_t { kLoad, kPush, kStore };

// in: where to, where from, how many bytes, and the mbarrier of the first two.
void bulk(Warp& w, const Instruction& i, uint32_t lanes) {
  Machine& machine = w.machine();
  const auto kind = static_cast<Bulk>(i.mode);
  each(lanes, [&](int lane) {
    const uint32_t bytes = w.in<uint32_t>(i.in[2])[lane];
    if (bytes == 0 || bytes % 16 != 0)
      fault(lane, "a bulk copy of " + std::to_string(bytes) + " bytes: a multiple of 16 is expected");
    Order* const order = machine.order.get();
    const uint32_t thread = w.in_grid(lane);
    const auto check_global = [&](uint64_t address, bool write) {
      if (address % 16 != 0) fault(lane, "a bulk copy at a global address that is no multiple of 16");
      for (uint32_t n = 0; n < bytes; n += 16) machine.global(lane, address + n, 16, write, false);
      const auto* at = reinterpret_cast<const uint8_t*>(address);
      if (order)
        check(lane, write ? order->destination(thread, at, bytes, true)
                          : order->source(thread, at, bytes, true, i.statement));
    };
    const auto check_shared = [&](uint32_t address) {
      if (address % 16 != 0) fault(lane, "a bulk copy at a shared address that is no multiple of 16");
      for (uint32_t n = 0; n < bytes; n += 16) machine.shared(w, lane, address + n, 16, false, true);
      if (order) check(lane, order->source(thread, bytes_at(*w.block, address), bytes, true, i.statement));
    };
    if (kind == kStore) {
      const auto to = address_of<uint64_t>(w, i, 0, lane);
      const auto from = address_of<uint32_t>(w, i, 1, lane, true);
      check_global(to, true);
      check_shared(from);
      Block& block = *w.block;
      const auto land = [&machine, &block, to, from, bytes, thread, statement = i.statement] {
        std::memcpy(reinterpret_cast<void*>(to), block.shared.data() + (from - kSharedBase), bytes);
        if (machine.order)
          machine.order->copied(thread, reinterpret_cast<const uint8_t*>(to), bytes, statement, nullptr);
        ++machine.progress;
      };
      block.bulk_copies[w.thread(lane)].open.push_back(
          machine.post({"a bulk store", i.statement, land, {&block, nullptr}}));
      return;
    }
    const auto to = address_of<uint32_t>(w, i, 0, lane);
    const uint32_t at = w.in<uint32_t>(i.in[3])[lane];
    Block& target = machine.owner(w, lane, to, false);
    if (&machine.owner(w, lane, at, false) != &target)
      fault(lane, "a bulk copy to one block, and the mbarrier of another one");
    if (to % 16 != 0) fault(lane, "a bulk copy to a shared address that is no multiple of 16");
    check_use(w, lane, target, at, machine.mbarrier(target, lane, at), true, i.statement);
    machine.under_way(target, lane, to, bytes);
    if (order) check(lane, order->destination(thread, bytes_at(target, to), bytes, true));
    Block* source = nullptr;
    std::function<const uint8_t*()> data;
    if (kind == kLoad) {
      const auto from = address_of<uint64_t>(w, i, 1, lane, true);
      check_global(from, false);
      data = [from] { return reinterpret_cast<const uint8_t*>(from); };
    } else {
      const auto from = address_of<uint32_t>(w, i, 1, lane, true);
      check_shared(from);
      source = w.block;
      data = [source, from] { return source->shared.data() + (from - kSharedBase); };
    }
    const auto land = [&machine, &target, to, at, bytes, data, thread, statement = i.statement,
                       issued = order ? order->issued(thread) : nullptr] {
      machine.landed(target, to, data(), bytes);
      MBarrier& barrier = machine.mbarrier(target, -1, at);
      if (machine.order)
        barrier.coming.push_back(machine.order->copied(thread, bytes_at(target, to), bytes, statement, issued));
      machine.expect(barrier, -1, -int64_t{bytes});
      machine.settle(barrier);
    };
    machine.post({"a bulk copy", i.statement, land, {&target, source == &target ? nullptr : source}});
  });
}

bool decode_bulk(Decoder& d) {
  if (d.program().capability < 90) d.fail("bulk copies come with sm_90");
  Instruction& i = d.instruction();
  if (d.take("global")) {
    d.need("shared::cta");
    d.need("bulk_group");
    d.no_more();
    d.count(3);
    i.mode = kStore;
    d.address(0, Space::global);
    d.address(1, Space::shared_cta, true);
    d.in(2, 32);
  } else {
    d.need("shared::cluster");
    i.mode = d.take("global") ? kLoad : kPush;
    if (i.mode == kPush) d.need("shared::cta");
    d.need("mbarrier::complete_tx::bytes");
    d.no_more();
    d.count(4);
    d.address(0, Space::shared_cluster);
    d.address(1, i.mode == kLoad ? Space::global : Space::shared_cta, true);
    d.in(2, 32);
    Written barrier = d.operand(3);
    if (barrier.kind != Written::address || barrier.value != 0)
      d.fail("the address of an mbarrier, without an offset, expected");
    barrier.kind = Written::name;
    d.in(barrier, 32);
  }
  d.executes(bulk);
  return true;
}

bool decode_copy(Decoder& d) {
  Instruction& i = d.instruction();
  d.need("async");
  const bool in_bulk = d.take("bulk");
  if (d.take("commit_group")) {
    d.no_more();
    d.count(0);
    i.mode = in_bulk;
    d.executes(commit);
    return true;
  }
  if (d.take("wait_group")) {
    d.no_more();
    d.count(1);
    i.mode = in_bulk;
    i.number = static_cast<uint32_t>(d.immediate(0));
    d.executes(wait);
    return true;
  }
  if (in_bulk) return decode_bulk(d);
  if (d.take("mbarrier")) {
    d.need("arrive");
    d.need("noinc");
    shared_window(d, false);
    eight_bytes(d);
    d.count(1);
    d.address(0, Space::shared_cta);
    d.executes(arrive_after_copies);
    return true;
  }
  const bool past_l1 = d.take("cg");
  if (!past_l1) d.need("ca");
  if (!d.take("shared")) d.need("shared::cta");
  d.need("global");
  d.no_more();
  if (d.operands() != 3) d.count(4);
  d.address(0, Space::shared_cta);
  d.address(1, Space::global, true);
  i.number = static_cast<uint32_t>(d.immediate(2));
  if (i.number != 16 && (past_l1 || (i.number != 4 && i.number != 8))) d.fail("16 bytes, or 4 or 8 with .ca, expected");
  if (d.operands() == 4) d.in(3, 32);
  d.executes(copy);
  return true;
}

// ------------------------------------------------------------------------------------------------------------- addresses

void map_address(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int lane) {
    const uint32_t address = w.in<uint32_t>(i.in[0])[lane], rank = w.in<uint32_t>(i.in[1])[lane];
    if (rank >= w.machine().cluster_size) {
      fault(lane,
            "mapa to rank " + std::to_string(rank) + " of a cluster of " + std::to_string(w.machine().cluster_size));
    }
    const uint32_t offset = offset_of(address);
    if (address >> kRankShift || offset < kSharedBase || offset - kSharedBase >= w.block->shared.size()) {
      fault(lane, "mapa of " + std::to_string(address) + ", which is no address in the own block's shared memory");
    }
    w.out<uint32_t>(i.out[0])[lane] = offset | (rank + 1) << kRankShift;
  });
}

bool decode_map(Decoder& d) {
  d.need("shared::cluster");
  const Type type = d.type();
  if (type.kind != Type::unsigned_integer || type.width != 32) d.fail("u32 expected");
  d.no_more();
  d.count(3);
  if (d.program().capability < 90) d.fail("clusters come with sm_90");
  d.out(0, 32);
  d.in(1, 32);
  d.in(2, 32);
  d.executes(map_address);
  return true;
}

}  // namespace

bool decode_asynchronous(Decoder& d) {
  if (d.is("mbarrier")) return decode_mbarrier(d);
  if (d.is("cp")) return decode_copy(d);
  if (d.is("st") && d.next_is("async")) return decode_push(d);
  if (d.is("mapa")) return decode_map(d);
  return false;
}

}  // namespace ptx
