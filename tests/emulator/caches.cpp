// tests/emulator/caches.cpp: see caches.h.
//
// Time is counted in acquires and fences: a write bears the number of those before it, and a block that has made a later one
// may see it. What is known stands in shadow pages, two bytes at a time, the smallest access that a primitive makes.
#include "caches.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <vector>

namespace stacked_lstm::emulator {
namespace {

constexpr uintptr_t kPageBytes = 4096, kGranuleBytes = 2, kGranules = kPageBytes / kGranuleBytes;
constexpr uint32_t kUnderWay = ~0u;  // the time of a write that has not been waited for

// Where an access stands. A place is known by a number, 0 is none.
struct Site {
  const char* what;
  Location at;
};

enum class Way : uint8_t { ordinary, strong, bulk };

// The last write to two bytes.
struct Write {
  uint32_t block = 0;  // number + 1; 0: nobody wrote them
  uint32_t time = 0;
  uint16_t site = 0;
  Way way = Way::ordinary;
};

struct Page {
  std::array<uint16_t, kGranules> constant = {};  // the first read of .nc: its site
  std::unique_ptr<std::array<Write, kGranules>> written;
};

class GlobalMemory {
 public:
  // Of places, too: a library may have been unloaded, and another one lie where it was.
  void forget() {
    pages_.clear(), recent_ = {};
    numbers_.clear(), known_ = {}, sites_.resize(1);
    fenced_.clear(), time_ = 0;
  }

  uint32_t now() const { return time_; }
  uint32_t next() { return ++time_; }
  void fence_proxy(unsigned block) { fenced_[block] = next(); }
  uint32_t fenced(unsigned block) const {
    const auto found = fenced_.find(block);
    return found == fenced_.end() ? 0 : found->second;
  }

  uint16_t number_of(const char* what, const Location& at) {
    // Every call in the source has a static object of its own, to which its Location points.
    static_assert(sizeof(Location) == sizeof(uintptr_t));
    const auto key = std::bit_cast<uintptr_t>(at);
    Known& known = known_[key / 8 % known_.size()];
    if (known.key != key) {
      auto [found, is_new] = numbers_.try_emplace(key, static_cast<uint16_t>(sites_.size()));
      if (is_new) sites_.push_back({what, at});
      known = {key, found->second};
    }
    return known.number;
  }
  const Site& site(uint16_t number) const { return sites_[number]; }

  // The page that holds an address; nullptr where nothing is known of it.
  Page* find(uintptr_t address) {
    Recent& recent = recent_[address / kPageBytes % recent_.size()];
    if (recent.page != address / kPageBytes) {
      const auto found = pages_.find(address / kPageBytes);
      recent = {address / kPageBytes, found == pages_.end() ? nullptr : found->second.get()};
    }
    return recent.known;
  }
  Page& make(uintptr_t address) {
    if (Page* known = find(address)) return *known;
    std::unique_ptr<Page>& page = pages_[address / kPageBytes];
    page = std::make_unique<Page>();
    recent_[address / kPageBytes % recent_.size()].known = page.get();
    return *page;
  }

 private:
  struct Known {
    uintptr_t key = 0;
    uint16_t number = 0;
  };
  struct Recent {
    uintptr_t page = 0;
    Page* known = nullptr;
  };
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  std::array<Recent, 64> recent_ = {};
  std::array<Known, 256> known_ = {};
  std::unordered_map<uintptr_t, uint16_t> numbers_;
  std::vector<Site> sites_ = {Site{}};
  std::unordered_map<unsigned, uint32_t> fenced_;  // by block: its last proxy fence
  uint32_t time_ = 0;
};

thread_local GlobalMemory memory;

// Calls f(page, granule) for those that hold a byte of the range, on pages of which something is known.
template <typename Function>
void for_each_known(const void* pointer, size_t bytes, Function f) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  for (uintptr_t at = address / kGranuleBytes * kGranuleBytes; at < address + bytes;) {
    const uintptr_t end = std::min(address + bytes, (at / kPageBytes + 1) * kPageBytes);
    if (Page* page = memory.find(at)) {
      for (uintptr_t here = at; here < end; here += kGranuleBytes) f(*page, here % kPageBytes / kGranuleBytes);
    }
    at = end;
  }
}
template <typename Function>
void for_each(const void* pointer, size_t bytes, Function f) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  for (uintptr_t at = address / kGranuleBytes * kGranuleBytes; at < address + bytes;) {
    const uintptr_t end = std::min(address + bytes, (at / kPageBytes + 1) * kPageBytes);
    Page& page = memory.make(at);
    for (uintptr_t here = at; here < end; here += kGranuleBytes) f(page, here % kPageBytes / kGranuleBytes);
    at = end;
  }
}

struct Place {
  const char* what;
  const char* file;
  unsigned line;
};
Place place_of(uint16_t number) {
  const Site& site = memory.site(number);
  const char* slash = std::strrchr(site.at.file_name(), '/');
  return {site.what, slash ? slash + 1 : site.at.file_name(), static_cast<unsigned>(site.at.line())};
}

[[noreturn]] void fail_not_constant(const char* what, const Location& at, const char* does, const char* other_does,
                                    uint16_t other) {
  const Place place = place_of(other);
  fail(Kind::not_constant, at,
       "%s %s bytes that %s of %s:%u %s: a launch must not write what it reads as constant, at any time", what, does,
       place.what, place.file, place.line, other_does);
}

void check_arrived(const Write& write, const char* what, const Location& at) {
  if (write.time != kUnderWay) return;
  const Place place = place_of(write.site);
  fail(Kind::read_before_wait, at, "%s reads what %s of %s:%u, of block %u, writes: it has not been waited for", what,
       place.what, place.file, place.line, write.block - 1);
}

// Bytes that another block has written, and this one has acquired nothing since.
void check_acquired(const Write& write, const char* why, const char* what, const Location& at) {
  const Block& block = this_block();
  check_arrived(write, what, at);
  if (write.block == block.number + 1 || block.refreshed > write.time) return;
  const Place place = place_of(write.site);
  fail(
      Kind::stale, at,
      "%s reads bytes that block %u wrote (%s of %s:%u), and block %u has made no acquire and no fence since, of scope "
      "cluster or wider: %s",
      what, write.block - 1, place.what, place.file, place.line, block.number, why);
}

void read(const void* pointer, size_t bytes, const char* why, const char* what, const Location& at) {
  if (in_shared_memory(pointer)) return;
  for_each_known(pointer, bytes, [&](Page& page, uintptr_t granule) {
    if (!page.written) return;
    const Write& write = (*page.written)[granule];
    if (write.block) check_acquired(write, why, what, at);
  });
}

void write(const void* pointer, size_t bytes, const char* what, const Location& at, uint32_t time, Way way) {
  if (in_shared_memory(pointer)) return;
  const uint16_t site = memory.number_of(what, at);
  const uint32_t block = this_block().number + 1;
  for_each(pointer, bytes, [&](Page& page, uintptr_t granule) {
    if (const uint16_t reader = page.constant[granule]) fail_not_constant(what, at, "writes", "has read", reader);
    if (!page.written) page.written = std::make_unique<std::array<Write, kGranules>>();
    (*page.written)[granule] = {block, time, site, way};
  });
}

}  // namespace

void read_global(const void* pointer, size_t bytes, const char* what, Location at) {
  read(pointer, bytes, "its L1 may hold what was there before", what, at);
}

void read_global_past_l1(const void* pointer, size_t bytes, const char* what, Location at) {
  if (options().unordered_reads) return;
  read(pointer, bytes, "nothing orders the load after the write", what, at);
}

void read_global_strongly(const void* pointer, size_t bytes, const char* what, Location at) {
  if (in_shared_memory(pointer)) return;
  for_each_known(pointer, bytes, [&](Page& page, uintptr_t granule) {
    if (!page.written) return;
    const Write& write = (*page.written)[granule];
    if (!write.block || write.way == Way::strong) return;
    check_acquired(write, "nothing orders the load after that ordinary write", what, at);
  });
}

void read_constant(const void* pointer, size_t bytes, const char* what, Location at) {
  const uint16_t site = memory.number_of(what, at);
  for_each(pointer, bytes, [&](Page& page, uintptr_t granule) {
    if (page.written) {
      const Write& write = (*page.written)[granule];
      if (write.block) fail_not_constant(what, at, "reads", "has written", write.site);
    }
    if (!page.constant[granule]) page.constant[granule] = site;
  });
}

void write_global(const void* pointer, size_t bytes, const char* what, Location at) {
  write(pointer, bytes, what, at, memory.now(), Way::ordinary);
}

void write_global_strongly(const void* pointer, size_t bytes, const char* what, Location at) {
  write(pointer, bytes, what, at, memory.now(), Way::strong);
}

void read_global_in_bulk(const void* pointer, size_t bytes, const char* what, Location at) {
  for_each_known(pointer, bytes, [&](Page& page, uintptr_t granule) {
    if (!page.written) return;
    const Write& write = (*page.written)[granule];
    if (!write.block) return;
    check_acquired(write, "nothing orders the copy after the write", what, at);
    if (write.way == Way::bulk || memory.fenced(write.block - 1) > write.time ||
        memory.fenced(this_block().number) > write.time)
      return;
    const Place place = place_of(write.site);
    fail(Kind::async_misuse, at, "%s reads bytes that %s of %s:%u wrote, with no async_proxy_fence() since", what,
         place.what, place.file, place.line);
  });
}

void start_bulk_write(const void* pointer, size_t bytes, const char* what, Location at) {
  write(pointer, bytes, what, at, kUnderWay, Way::bulk);
}

void finish_bulk_write(const void* pointer, size_t bytes) {
  for_each_known(pointer, bytes, [](Page& page, uintptr_t granule) {
    if (page.written) (*page.written)[granule].time = memory.now();
  });
}

uint32_t next_moment() { return memory.next(); }

void refresh_l1(uint32_t moment) {
  Block& block = this_block();
  block.refreshed = std::max(block.refreshed, moment);
}

void fence_proxy() { memory.fence_proxy(this_block().number); }

void forget_global_memory() { memory.forget(); }

}  // namespace stacked_lstm::emulator
