// tests/ptx/memory.cpp: loads, stores and read-modify-writes, and where they may go.
//
// A byte of shared memory that was never written has no value, and what is computed from it is an error where it can be seen.
// One that an asynchronous copy will write, or that is part of an mbarrier, may not be touched at all. Of global memory, only
// named ranges exist; what is read through the non-coherent path (.nc) may not be written in the same launch, before or after.
#include <algorithm>
#include <limits>

#include "decoder.h"

namespace ptx {

void Ranges::add(const void* begin, size_t bytes, std::string name, Access access) {
  if (bytes == 0) return;
  const auto first = reinterpret_cast<uint64_t>(begin);
  Range range{first, first + bytes, std::move(name), access, {}};
  const auto at = std::lower_bound(ranges_.begin(), ranges_.end(), range.begin,
                                   [](const Range& r, uint64_t value) { return r.begin < value; });
  if ((at != ranges_.end() && at->begin < range.end) || (at != ranges_.begin() && std::prev(at)->end > range.begin)) {
    throw Error("the ranges of " + range.name + " and of another piece of memory overlap");
  }
  ranges_.insert(at, std::move(range));
}

void Ranges::clear() { ranges_.clear(); }

namespace {

std::string hexadecimal(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

}  // namespace

uint8_t* Machine::global(int lane, uint64_t address, unsigned bytes, bool write, bool constant) {
  auto& ranges = memory->all();
  if (address % bytes != 0)
    fault(lane, "address " + hexadecimal(address) + " is no multiple of " + std::to_string(bytes));
  if (last_range >= ranges.size() || address < ranges[last_range].begin || address + bytes > ranges[last_range].end) {
    const auto behind = std::upper_bound(ranges.begin(), ranges.end(), address,
                                         [](uint64_t value, const Ranges::Range& r) { return value < r.begin; });
    if (behind == ranges.begin() || address + bytes > std::prev(behind)->end) {
      std::string near = "; no memory was named";
      if (!ranges.empty()) {
        const Ranges::Range& r = behind == ranges.begin() ? *behind : *std::prev(behind);
        near = "; the nearest below is " + r.name + ", " + std::to_string(r.end - r.begin) +
               " bytes, of which this is number " + std::to_string(static_cast<int64_t>(address - r.begin));
      }
      fault(lane, "global address " + hexadecimal(address) + " is out of bounds" + near);
    }
    last_range = static_cast<size_t>(std::prev(behind) - ranges.begin());
  }
  Ranges::Range& range = ranges[last_range];
  if (write && range.access == Ranges::Access::read) fault(lane, "a write to " + range.name + ", which is only read");
  uint8_t* touched = range.touched.data() + (address - range.begin);
  const uint8_t mark = constant ? kConstant
                       : write  ? kWritten
                                : 0,
                refused = constant ? kWritten
                          : write  ? kConstant
                                   : 0;
  if (mark) {
    for (unsigned n = 0; n < bytes; ++n) {
      if (touched[n] & refused) {
        fault(lane, "byte " + std::to_string(address + n - range.begin) + " of " + range.name +
                        " is written and read through the non-coherent path (.nc) in one launch");
      }
      touched[n] |= mark;
    }
  }
  if (write) ++progress;
  return reinterpret_cast<uint8_t*>(address);
}

// The block that an address of shared memory lies in.
Block& Machine::owner(const Warp& warp, int lane, uint32_t address, bool own) {
  const uint32_t rank = address >> kRankShift;
  if (rank == 0) return *warp.block;  // the window of the own block lies in that of the cluster
  if (own) fault(lane, "address " + hexadecimal(address) + " of shared::cluster where shared::cta is meant");
  if (rank > cluster_size) fault(lane, "address " + hexadecimal(address) + " is in no block of the cluster");
  Block& block = *warp.block->cluster->blocks[rank - 1];
  if (block.gone)
    fault(lane, "shared memory of block " + std::to_string(rank - 1) + " of the cluster, which has exited");
  return block;
}

uint8_t* Machine::shared(const Warp& warp, int lane, uint32_t address, unsigned bytes, bool write, bool own,
                         bool* whole) {
  if (address % bytes != 0)
    fault(lane, "shared address " + hexadecimal(address) + " is no multiple of " + std::to_string(bytes));
  Block& block = owner(warp, lane, address, own);
  const uint32_t offset = address & ((1u << kRankShift) - 1);
  if (offset < kSharedBase || offset - kSharedBase + bytes > block.shared.size()) {
    fault(lane, "shared address " + hexadecimal(address) + " is out of bounds: the block has " +
                    std::to_string(block.shared.size()) + " bytes from " + hexadecimal(kSharedBase) + " on");
  }
  uint8_t* marks = block.marks.data() + (offset - kSharedBase);
  for (unsigned n = 0; n < bytes; ++n) {
    if (marks[n] & (kUnderWay | kBarrier)) {
      fault(lane,
            "shared address " + hexadecimal(address + n) +
                (marks[n] & kBarrier ? " is part of an mbarrier" : " is what an asynchronous copy is about to write"));
    }
    if (write) {
      marks[n] |= kWritten;
    } else if (!(marks[n] & kWritten)) {
      if (whole) {
        *whole = false;
        break;
      }
      fault(lane, "shared address " + hexadecimal(address + n) + " is read, and was never written");
    }
  }
  if (write) ++progress;
  return block.shared.data() + (offset - kSharedBase);
}

namespace {

template <typename Address>
Address address_of(Warp& w, const Instruction& i, int lane) {
  return w.in<Address>(i.in[0])[lane] + static_cast<Address>(i.offset);
}

void check(int lane, const std::string& wrong) {
  if (!wrong.empty()) fault(lane, wrong);
}

// Where lane's access goes. `constant`: through the non-coherent path. `whole` becomes false where shared memory is read that was
// never written; without it that is an error.
uint8_t* place(Warp& w, const Instruction& i, int lane, unsigned bytes, bool write, bool constant = false,
               bool* whole = nullptr) {
  Machine& machine = w.machine();
  switch (static_cast<Space>(i.space)) {
    case Space::global: {
      const auto address = address_of<uint64_t>(w, i, lane);
      if (address >> 56 >= kParameterWindow >> 56) fault(lane, "a generic address of another state space");
      return machine.global(lane, address, bytes, write, constant);
    }
    case Space::shared_cta:
      return machine.shared(w, lane, address_of<uint32_t>(w, i, lane), bytes, write, true, whole);
    case Space::shared_cluster:
      return machine.shared(w, lane, address_of<uint32_t>(w, i, lane), bytes, write, false, whole);
    case Space::parameter: {
      const uint64_t offset = address_of<uint64_t>(w, i, lane) - kParameterWindow;
      if (write) fault(lane, "a parameter is written");
      if (offset % bytes != 0 || offset + bytes > machine.parameters.size()) {
        fault(lane, "byte " + std::to_string(static_cast<int64_t>(offset)) + " of parameters of " +
                        std::to_string(machine.parameters.size()) + " bytes: out of bounds, or misaligned");
      }
      return machine.parameters.data() + offset;
    }
    case Space::generic: {
      const auto address = address_of<uint64_t>(w, i, lane);
      if (address >> 56 == kSharedWindow >> 56) {
        return machine.shared(w, lane, static_cast<uint32_t>(address), bytes, write, false, whole);
      }
      return machine.global(lane, address, bytes, write, constant);
    }
  }
  return nullptr;
}

// `elements` of `element_bytes` each, into registers that may be wider. mode 1: non-coherent. What shared memory never got has no
// value, and is none in the register.
void load(Warp& w, const Instruction& i, uint32_t lanes) {
  const unsigned bytes = i.element_bytes;
  Order* const order = static_cast<Space>(i.space) == Space::parameter ? nullptr : w.machine().order.get();
  each(lanes, [&](int lane) {
    bool whole = true;
    const uint8_t* from = place(w, i, lane, bytes * i.elements, false, i.mode == 1, &whole);
    if (!whole) w.undefined |= uint32_t{1} << lane;
    if (order)
      check(lane, order->read(w.in_grid(lane), from, bytes * i.elements, How::unpacked(i.number), i.statement));
    for (unsigned n = 0; n < i.elements; ++n) {
      uint64_t value = 0;
      std::memcpy(&value, from + n * bytes, bytes);
      if (i.is_signed && bytes < 8 && value >> (8 * bytes - 1)) value |= ~uint64_t{0} << (8 * bytes);
      std::memcpy(w.out<char>(i.out[n]) + lane * i.out[n].bytes, &value, i.out[n].bytes);
    }
  });
}

void store(Warp& w, const Instruction& i, uint32_t lanes) {
  const unsigned bytes = i.element_bytes;
  Order* const order = w.machine().order.get();
  each(lanes, [&](int lane) {
    uint8_t* to = place(w, i, lane, bytes * i.elements, true);
    if (order) check(lane, order->write(w.in_grid(lane), to, bytes * i.elements, How::unpacked(i.number), i.statement));
    for (unsigned n = 0; n < i.elements; ++n) {
      std::memcpy(to + n * bytes, w.in<char>(i.in[1 + n]) + lane * i.in[1 + n].bytes, bytes);
    }
  });
}

enum Update : uint8_t { kAdd, kMin, kMax, kAnd, kOr, kXor, kExchange, kCompare };

template <typename T>
void update(Warp& w, const Instruction& i, uint32_t lanes) {
  Order* const order = w.machine().order.get();
  each(lanes, [&](int lane) {
    uint8_t* at = place(w, i, lane, sizeof(T), true);
    if (order) check(lane, order->update(w.in_grid(lane), at, sizeof(T), How::unpacked(i.number), i.statement));
    T old, operand = w.in<T>(i.in[1])[lane], result = 0;
    std::memcpy(&old, at, sizeof old);
    switch (static_cast<Update>(i.mode)) {
      case kAdd:
        result =
            static_cast<T>(static_cast<std::make_unsigned_t<T>>(old) + static_cast<std::make_unsigned_t<T>>(operand));
        break;
      case kMin:
        result = std::min(old, operand);
        break;
      case kMax:
        result = std::max(old, operand);
        break;
      case kAnd:
        result = old & operand;
        break;
      case kOr:
        result = old | operand;
        break;
      case kXor:
        result = old ^ operand;
        break;
      case kExchange:
        result = operand;
        break;
      case kCompare:
        result = old == operand ? w.in<T>(i.in[2])[lane] : old;
        break;
    }
    std::memcpy(at, &result, sizeof result);
    if (i.outs) w.out<T>(i.out[0])[lane] = old;
  });
}

void to_global(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int lane) {
    const uint64_t address = w.in<uint64_t>(i.in[0])[lane];
    if (address >> 56 >= kParameterWindow >> 56) fault(lane, "cvta.to.global of an address of another state space");
    w.out<uint64_t>(i.out[0])[lane] = address;
  });
}
void from_shared(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int lane) { w.out<uint64_t>(i.out[0])[lane] = w.in<uint64_t>(i.in[0])[lane] | kSharedWindow; });
}
void to_shared(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, [&](int lane) {
    const uint64_t address = w.in<uint64_t>(i.in[0])[lane];
    if (address >> 56 != kSharedWindow >> 56) fault(lane, "cvta.to.shared of an address of another state space");
    w.out<uint64_t>(i.out[0])[lane] = address & 0xFFFFFFFFu;
  });
}

// Scope::none where there is none.
Scope optional_scope(Decoder& d) {
  static const std::pair<const char*, Scope> known[] = {
      {"cta", Scope::block}, {"cluster", Scope::cluster}, {"gpu", Scope::device}, {"sys", Scope::system}};
  for (const auto& [name, which] : known) {
    if (!d.take(name)) continue;
    if (which == Scope::cluster && d.program().capability < 90) d.fail("clusters come with sm_90");
    return which;
  }
  return Scope::none;
}
// After the order of an access: the scope that it needs.
Scope scope(Decoder& d) {
  const Scope which = optional_scope(d);
  if (which == Scope::none) d.fail("a scope expected");
  return which;
}

Space state_space(Decoder& d) {
  if (d.take("global")) return Space::global;
  if (d.take("param")) return Space::parameter;
  if (d.take("shared") || d.take("shared::cta")) return Space::shared_cta;
  if (d.take("shared::cluster")) return Space::shared_cluster;
  return Space::generic;
}

uint8_t elements(Decoder& d) { return d.take("v2") ? 2 : d.take("v4") ? 4 : 1; }

// ld{.order.scope}{.space}{.cache}{.nc}{.v}.type; likewise st.
bool access(Decoder& d) {
  const bool loads = d.is("ld");
  Instruction& i = d.instruction();
  const bool is_volatile = d.take("volatile"), relaxed = !is_volatile && d.take("relaxed");
  const bool ordered = !is_volatile && !relaxed && d.take(loads ? "acquire" : "release");
  How how;
  if (is_volatile) how.scope = Scope::system;  // as relaxed
  if (relaxed || ordered) how.scope = scope(d);
  how.acquire = ordered && loads, how.release = ordered && !loads;
  i.number = how.packed();
  const Space space = state_space(d);
  if (space == Space::parameter && (!loads || relaxed || ordered)) d.fail("a parameter is read, plainly");
  bool cached = false;
  for (const char* hint : loads ? std::vector<const char*>{"ca", "cg", "cs", "lu", "cv"}
                                : std::vector<const char*>{"wb", "cg", "cs", "wt"}) {
    cached |= d.take(hint);
  }
  const bool constant = loads && d.take("nc");
  if (constant && space != Space::global) d.fail(".nc is for global memory");
  if ((relaxed || ordered || is_volatile) && (cached || constant))
    d.fail("an order and a cache hint exclude each other");
  i.elements = elements(d);
  const Type type = d.type();
  if (type.width < 8) d.fail("a type of whole bytes expected");
  d.no_more();
  d.count(2);
  i.element_bytes = static_cast<uint8_t>(type.bytes());
  if (i.element_bytes * i.elements > 16) d.fail("an access of more than 16 bytes");
  i.is_signed = type.is_signed();
  i.mode = constant;
  i.polls = loads && (relaxed || ordered || is_volatile);
  if (loads) {
    d.out_group(0, i.elements, type.width, true);
    d.address(1, space);
    d.executes(load);
  } else {
    d.address(0, space);
    d.in_group(1, i.elements, type.width, true);
    d.executes(store);
  }
  return true;
}

// atom and red{.order}{.scope}{.space}.op.type
bool read_modify_write(Decoder& d) {
  const bool returns = d.is("atom");
  How how;
  const bool both = d.take("acq_rel");
  how.release = both || d.take("release");
  how.acquire = both || (!how.release && d.take("acquire"));
  if (how.release || how.acquire || d.take("relaxed")) {
    how.scope = scope(d);
  } else {
    how.scope = optional_scope(d);
    if (how.scope == Scope::none) how.scope = Scope::device;  // relaxed, by default
  }
  d.instruction().number = how.packed();
  const Space space = state_space(d);
  static const std::pair<const char*, Update> known[] = {{"add", kAdd},       {"min", kMin},    {"max", kMax},
                                                         {"and", kAnd},       {"or", kOr},      {"xor", kXor},
                                                         {"exch", kExchange}, {"cas", kCompare}};
  d.instruction().mode = d.one_of(known, "a read-modify-write operation expected");
  const Type type = d.integer();
  const bool compares = d.instruction().mode == kCompare;
  if (!returns && d.instruction().mode >= kExchange) d.fail("red returns nothing");
  d.no_more();
  d.count(2u + returns + compares);
  if (returns) d.out(0, type.width);
  d.address(returns, space);
  d.in(1u + returns, type.width);
  if (compares) d.in(2u + returns, type.width);
  d.instruction().element_bytes = static_cast<uint8_t>(type.bytes());
  if (type.width != 32 && type.width != 64) d.fail("32 or 64 bits expected");
  d.executes(type.width == 32 ? (type.is_signed() ? Execute{update<int32_t>} : Execute{update<uint32_t>})
                              : (type.is_signed() ? Execute{update<int64_t>} : Execute{update<uint64_t>}));
  return true;
}

bool address_conversion(Decoder& d) {
  const bool to = d.take("to");
  const Space space = state_space(d);
  const Type type = d.type();
  d.no_more();
  d.count(2);
  if (type.kind != Type::unsigned_integer || type.width != 64) d.fail("u64 expected");
  d.out(0, 64);
  if (d.operand(1).kind == Written::name && d.operand(1).reg < 0) {
    d.symbol_in(1, 64);
  } else {
    d.in(1, 64);
  }
  if (space == Space::global) {
    d.executes(to_global);  // generic addresses of global memory are its addresses
  } else if (space == Space::shared_cta) {
    d.executes(to ? to_shared : from_shared);
  } else {
    d.fail("global or shared memory expected");
  }
  return true;
}

// A fence orders nothing where the order of accesses is not looked at.
enum Fence : uint8_t { kOrders, kInits, kProxy };

void fence(Warp& w, const Instruction& i, uint32_t lanes) {
  Order* const order = w.machine().order.get();
  if (!order) return;
  each(lanes, [&](int lane) {
    const uint32_t thread = w.in_grid(lane);
    switch (static_cast<Fence>(i.mode)) {
      case kOrders:
        order->fence(thread, How::unpacked(i.number));
        break;
      case kInits:
        for (auto& [at, barrier] : w.block->mbarriers) barrier.fenced |= barrier.initialised_by == thread;
        break;
      case kProxy:
        order->proxy_fence(thread);
    }
  });
}

bool decode_fence(Decoder& d) {
  d.count(0);
  How how;
  if (d.take("mbarrier_init")) {
    d.need("release");
    d.need("cluster");
    d.instruction().mode = kInits;
  } else if (d.take("proxy")) {
    d.need("async");
    d.instruction().mode = kProxy;
  } else if (d.take("acquire")) {
    d.need("sync_restrict::shared::cluster");
    d.need("cluster");
    how = {Scope::cluster, true, false};
  } else {
    if (!d.take("sc")) d.need("acq_rel");
    how = {scope(d), true, true};
  }
  d.no_more();
  d.instruction().number = how.packed();
  d.executes(fence);
  return true;
}

}  // namespace

bool decode_memory(Decoder& d) {
  if (d.is("ld") || d.is("st")) {
    return !d.next_is("async") && access(d);
  }
  if (d.is("atom") || d.is("red")) return read_modify_write(d);
  if (d.is("cvta")) return address_conversion(d);
  if (d.is("fence")) return decode_fence(d);
  return false;
}

}  // namespace ptx
