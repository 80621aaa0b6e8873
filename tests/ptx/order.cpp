// tests/ptx/order.cpp: see order.h.
#include "order.h"

#include <algorithm>

#include "machine.h"
#include "syntax.h"

namespace ptx {

namespace {

void raise(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
  if (to.empty()) to.resize(from.size());
  for (size_t n = 0; n < from.size(); ++n) to[n] = std::max(to[n], from[n]);
}

}  // namespace

void Knowledge::add(const Knowledge& other) {
  raise(seen, other.seen);
  raise(fenced, other.fenced);
  raise(over, other.over);
}

Knowledge Order::nothing() const {
  const std::vector<uint32_t> none(2 * threads_.size());
  return {none, none, none};
}

Order::Order(unsigned blocks, unsigned threads, unsigned cluster)
    : per_block_(threads), per_cluster_(threads * cluster) {
  constexpr unsigned kMost = 2048;  // what is known grows with the square
  if (blocks * threads > kMost) {
    throw Error("the order of accesses is looked at for at most " + std::to_string(kMost) + " threads, not " +
                std::to_string(blocks * threads));
  }
  threads_.resize(size_t{blocks} * threads);
  for (size_t n = 0; n < threads_.size(); ++n) {
    threads_[n].now = nothing();
    threads_[n].now.seen[n] = 1;
  }
}

// The narrowest scope in which both are.
Scope Order::distance(uint32_t a, uint32_t b) const {
  const auto count = static_cast<uint32_t>(threads_.size());
  a %= count, b %= count;  // a thread's copies are where it is
  return a / per_block_ == b / per_block_       ? Scope::block
         : a / per_cluster_ == b / per_cluster_ ? Scope::cluster
                                                : Scope::device;
}

bool Order::reaches(const Access& access, uint32_t thread, Scope scope) const {
  const Scope needed = distance(access.who, thread);
  return access.scope >= needed && scope >= needed;
}

bool Order::before(const Access& access, uint32_t thread) const {
  return access.when <= threads_[thread].now.seen[access.who];
}
bool Order::over(const Access& access, uint32_t thread) const {
  return before(access, thread) || access.when <= threads_[thread].now.over[access.who];
}

std::string Order::race(const Access& other, uint32_t thread, const char* did) const {
  const auto count = static_cast<uint32_t>(threads_.size());
  const uint32_t who = other.who % count;
  std::string text = "a race: thread " + std::to_string(who % per_block_) + " of block " +
                     std::to_string(who / per_block_) + (other.who >= count ? " had a copy made that " : " ") + did +
                     " the same byte";
  if (other.statement)
    text += ", at line " + std::to_string(other.statement->place.line) + ": " + other.statement->text;
  text += ". Nothing orders that before this access of thread " + std::to_string(thread % per_block_) + " of block " +
          std::to_string(thread / per_block_);
  if (other.scope != Scope::none) text += ", and the scopes do not reach";
  return text;
}

std::string Order::check_read(const Byte& byte, uint32_t thread, Scope scope) const {
  if (byte.write.when == 0 || before(byte.write, thread) || reaches(byte.write, thread, scope)) return "";
  return race(byte.write, thread, "wrote");
}

std::string Order::check_write(const Byte& byte, uint32_t thread, Scope scope) const {
  if (byte.write.when != 0 && !over(byte.write, thread) && !reaches(byte.write, thread, scope)) {
    return race(byte.write, thread, "wrote");
  }
  for (const Access& read : byte.reads) {
    if (!over(read, thread) && !reaches(read, thread, scope)) return race(read, thread, "read");
  }
  return "";
}

void Order::observe(uint32_t thread, const Releases& releases, How how) {
  if (how.scope == Scope::none) return;
  Thread& me = threads_[thread];
  for (const Release& release : releases) {
    const Scope needed = distance(release.who, thread);
    if (release.scope < needed || how.scope < needed) continue;
    if (!how.acquire) {
      const auto same = [&](const Release& r) {
        return r.what == release.what && r.copies_of == release.copies_of && r.up_to == release.up_to;
      };
      if (std::none_of(me.observed.begin(), me.observed.end(), same)) me.observed.push_back(release);
    } else if (release.what) {
      me.now.add(*release.what);
    }
    if (how.acquire && release.up_to != 0) {
      uint32_t& seen = me.now.seen[release.copies_of];
      seen = std::max(seen, release.up_to);
    }
  }
}

std::string Order::read(uint32_t thread, const uint8_t* at, unsigned bytes, How how, const Statement* statement) {
  const Access access{thread, threads_[thread].now.seen[thread], how.scope, statement};
  for (unsigned n = 0; n < bytes; ++n) {
    Byte& byte = bytes_[at + n];
    if (std::string wrong = check_read(byte, thread, how.scope); !wrong.empty()) return wrong;
    const auto mine =
        std::find_if(byte.reads.begin(), byte.reads.end(), [&](const Access& r) { return r.who == thread; });
    if (mine == byte.reads.end()) {
      byte.reads.push_back(access);
    } else {
      *mine = {thread, access.when, std::min(mine->scope, how.scope), statement};
    }
  }
  observe(thread, bytes_[at].releases, how);
  return "";
}

void Order::set(const uint8_t* at, unsigned bytes, Access access) {
  for (unsigned n = 0; n < bytes; ++n) {
    Byte& byte = bytes_[at + n];
    byte.write = access;
    byte.reads.clear();
    byte.releases.clear();
  }
}

std::string Order::write(uint32_t thread, const uint8_t* at, unsigned bytes, How how, const Statement* statement) {
  for (unsigned n = 0; n < bytes; ++n) {
    if (std::string wrong = check_write(bytes_[at + n], thread, how.scope); !wrong.empty()) return wrong;
  }
  set(at, bytes, {thread, threads_[thread].now.seen[thread], how.scope, statement});
  if (how.scope != Scope::none) bytes_[at].releases.push_back(release(thread, how));
  return "";
}

// A read-modify-write: those who observe it observe what the writes before it released, too.
std::string Order::update(uint32_t thread, const uint8_t* at, unsigned bytes, How how, const Statement* statement) {
  Releases before = bytes_[at].releases;
  observe(thread, before, how);
  if (std::string wrong = write(thread, at, bytes, how, statement); !wrong.empty()) return wrong;
  Releases& now = bytes_[at].releases;
  now.insert(now.end(), before.begin(), before.end());
  return "";
}

std::string Order::source(uint32_t thread, const uint8_t* at, unsigned bytes, bool proxy, const Statement* statement) {
  if (std::string wrong = read(thread, at, bytes, {}, statement); !wrong.empty()) return wrong;
  for (unsigned n = 0; proxy && n < bytes; ++n) {
    const Access& write = bytes_[at + n].write;
    if (write.who < threads_.size() && write.when > threads_[thread].now.fenced[write.who]) {
      return "no fence.proxy.async stands between this bulk copy and what it reads" +
             race(write, thread, "wrote").substr(6);
    }
  }
  return "";
}

std::string Order::destination(uint32_t thread, const uint8_t* at, unsigned bytes, bool proxy) const {
  for (unsigned n = 0; n < bytes; ++n) {
    const auto found = bytes_.find(at + n);
    if (found == bytes_.end()) continue;
    if (std::string wrong = check_write(found->second, thread, Scope::none); !wrong.empty()) return wrong;
    const Access& write = found->second.write;
    if (proxy && write.who < threads_.size() && write.when > threads_[thread].now.fenced[write.who]) {
      return "no fence.proxy.async stands between this bulk copy and what it overwrites" +
             race(write, thread, "wrote").substr(6);
    }
  }
  return "";
}

void Order::landed(uint32_t thread, const uint8_t* at, unsigned bytes, const Statement* statement) {
  set(at, bytes, {thread, threads_[thread].now.seen[thread], Scope::none, statement});
}

std::shared_ptr<const Knowledge> Order::issued(uint32_t thread) {
  Knowledge known;
  raise(known.over, threads_[thread].now.seen);
  raise(known.over, threads_[thread].now.over);
  tick(thread);
  return std::make_shared<const Knowledge>(std::move(known));
}

Release Order::copied(uint32_t thread, const uint8_t* at, unsigned bytes, const Statement* statement,
                      std::shared_ptr<const Knowledge> issued) {
  const auto copies = static_cast<uint32_t>(threads_.size()) + thread;
  const uint32_t number = ++threads_[thread].copies;
  set(at, bytes, {copies, number, Scope::none, statement});
  Release release;
  release.who = thread, release.scope = Scope::cluster, release.copies_of = copies, release.up_to = number;
  release.what = std::move(issued);
  return release;
}

void Order::wait_for_copies(uint32_t thread) {
  threads_[thread].now.seen[threads_.size() + thread] = threads_[thread].copies;
}

Release Order::release(uint32_t thread, How how) {
  Thread& me = threads_[thread];
  if (!how.release) {  // what the last fence before it released
    Release fenced = me.fenced;
    fenced.who = thread;
    fenced.scope = fenced.what ? std::min(fenced.scope, how.scope) : Scope::none;
    return fenced;
  }
  Release release;
  release.who = thread, release.scope = how.scope, release.what = std::make_shared<Knowledge>(me.now);
  tick(thread);
  return release;
}

void Order::acquire(uint32_t thread, const Releases& releases, How how) { observe(thread, releases, how); }

void Order::fence(uint32_t thread, How how) {
  Thread& me = threads_[thread];
  if (how.acquire) {
    const Releases observed = std::move(me.observed);
    me.observed.clear();
    observe(thread, observed, how);
    for (const Release& release : observed) {
      if (how.scope < distance(release.who, thread)) me.observed.push_back(release);
    }
  }
  if (how.release) me.fenced = release(thread, how);
}

void Order::proxy_fence(uint32_t thread) {
  Knowledge& now = threads_[thread].now;
  raise(now.fenced, now.seen);
  tick(thread);
}

}  // namespace ptx
