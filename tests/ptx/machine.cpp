// tests/ptx/machine.cpp: the schedule. A warp's lanes have a place in the code each; those that stand at the same one run together,
// for a while, then the machine picks others. So lanes part and meet as on a GPU whose threads are scheduled independently,
// and an instruction in which lanes meet waits until all of them stand there.
#include "machine.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <limits>
#include <mutex>
#include <sstream>
#include <utility>

#include "state.h"

namespace ptx {

// ------------------------------------------------------------------------------------------------------------- modules

struct Module::Impl {
  File file;
  mutable std::map<std::string, std::unique_ptr<Program>> programs;
  mutable std::mutex mutex;
};

namespace {

std::string content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file) throw Error("cannot read " + path);
  return text.str();
}

}  // namespace

Module::Module(const std::string& path) : Module(content(path), path) {}
Module::Module(std::string_view text, const std::string& name) : impl_(std::make_unique<Impl>()) {
  impl_->file = parse(text, name);
}
Module::~Module() = default;
Module::Module(Module&&) noexcept = default;

std::vector<std::string> Module::entries() const {
  std::vector<std::string> names;
  for (const Entry& entry : impl_->file.entries) names.push_back(entry.name);
  return names;
}

bool Module::has(const std::string& name) const {
  return std::any_of(impl_->file.entries.begin(), impl_->file.entries.end(),
                     [&](const Entry& e) { return e.name == name; });
}

const std::string& Module::target() const { return impl_->file.target; }
const File& Module::file() const { return impl_->file; }

const Program& Module::program(const std::string& name) const {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  auto& program = impl_->programs[name];
  if (!program) {
    const auto entry = std::find_if(impl_->file.entries.begin(), impl_->file.entries.end(),
                                    [&](const Entry& e) { return e.name == name; });
    if (entry == impl_->file.entries.end()) throw Error(impl_->file.name + " has no kernel " + name);
    program = std::make_unique<Program>(decode(impl_->file, *entry));
  }
  return *program;
}

namespace {

// ------------------------------------------------------------------------------------------------------------- reports

std::string source_of(const File& file, const Place& place) {
  const auto name = [&](int number) {
    const auto found = file.sources.find(number);
    if (found == file.sources.end()) return std::string("?");
    return found->second.substr(found->second.find_last_of('/') + 1);
  };
  if (place.source_line == 0) return "no source line";
  std::string text = name(place.file) + ":" + std::to_string(place.source_line);
  if (place.caller_source_line != 0)
    text += ", inlined at " + name(place.caller_file) + ":" + std::to_string(place.caller_source_line);
  return text;
}

std::string place_of(const Machine& machine, const Statement& statement) {
  const std::string& name = machine.file->name;
  return name.substr(name.find_last_of('/') + 1) + ":" + std::to_string(statement.place.line) + " (" +
         source_of(*machine.file, statement.place) + "): " + statement.text;
}

const Statement* statement_at(const Machine& machine, uint32_t pc) {
  return pc < machine.program->code.size() ? machine.program->code[pc].statement : nullptr;
}

// Who waits for what, a line for each place and each way of waiting.
std::string who_waits(const Machine& machine) {
  std::map<std::pair<std::string, std::string>, std::pair<int, std::string>>
      places;  // how many lanes, and the first of them
  for (const auto& block : machine.blocks) {
    for (const Warp& warp : block->warps) {
      each(warp.alive(), [&](int lane) {
        const uint32_t pc = warp.pc[static_cast<size_t>(lane)];
        std::string how = "runs";
        if (warp.waiting == Waiting::barrier) how = "waits at barrier " + std::to_string(warp.barrier) + ", before";
        if (warp.waiting == Waiting::cluster) how = "waits for its cluster, before";
        if (warp.parked >> lane & 1) how = "waits for lanes of its warp, at";
        const Statement* statement = statement_at(machine, pc);
        auto& [count, first] = places[{how, statement ? place_of(machine, *statement) : "the kernel's end"}];
        if (count++ == 0)
          first = "block " + std::to_string(block->number) + " thread " + std::to_string(warp.thread(lane));
      });
    }
  }
  std::string text;
  for (const auto& [where, who] : places) {
    text += "\n  " + std::to_string(who.first) + " threads (" + who.second + ", …) " + where.first + " " + where.second;
  }
  for (const auto& block : machine.blocks) {
    for (const auto& [offset, barrier] : block->mbarriers) {
      if (barrier.pending == barrier.count && barrier.bytes == 0) continue;
      text += "\n  block " + std::to_string(block->number) + "'s mbarrier at " + std::to_string(offset) + ": phase " +
              std::to_string(barrier.phase) + ", " + std::to_string(barrier.pending) + " of " +
              std::to_string(barrier.count) + " arrivals and " + std::to_string(barrier.bytes) + " bytes missing";
    }
  }
  return text;
}

}  // namespace

// ------------------------------------------------------------------------------------------------------------- waiting

void Machine::wake(Warp& warp) {
  if (warp.queued || warp.alive() == 0) return;
  warp.queued = true;
  queue.push_back(&warp);
}

void Machine::meet(Warp& warp, unsigned number, unsigned threads, bool waits) {
  Block& block = *warp.block;
  NamedBarrier& barrier = block.barriers[number];
  if (std::find(barrier.who.begin(), barrier.who.end(), &warp) != barrier.who.end()) {
    fault(-1, "a warp comes to barrier " + std::to_string(number) + " twice in one phase");
  }
  if (!barrier.who.empty() && barrier.threads != threads) {
    fault(-1, "barrier " + std::to_string(number) + " is for " + std::to_string(threads) + " threads here, and for " +
                  std::to_string(barrier.threads) + " of another warp (0: all of the block)");
  }
  barrier.threads = threads;
  barrier.who.push_back(&warp);
  if (order) {
    each(warp.alive(), [&](int lane) {
      barrier.known.add(order->knowledge(warp.in_grid(lane)));
      order->tick(warp.in_grid(lane));
    });
  }
  if (waits) {
    warp.waiting = Waiting::barrier;
    warp.barrier = number;
    barrier.waiting.push_back(&warp);
  }
  settle(block, barrier, threads == 0);
}

// `all`: the barrier is for all threads of the block that have not exited.
void Machine::settle(Block& block, NamedBarrier& barrier, bool all) {
  const auto arrived = static_cast<unsigned>(barrier.who.size());
  const unsigned expected = all ? block.alive : barrier.threads / kLanes;
  if (arrived == 0 || arrived < expected) return;
  if (arrived > expected) fault(-1, "more warps at a barrier than it is for");
  ++progress;
  const std::vector<Warp*> waiting = std::move(barrier.waiting);
  const Knowledge known = std::move(barrier.known);
  barrier = {};
  for (Warp* warp : waiting) {
    if (order) each(warp->alive(), [&](int lane) { order->learn(warp->in_grid(lane), known); });
    warp->waiting = Waiting::nothing;
    wake(*warp);
  }
}

void Machine::settle(Cluster& cluster) {
  if (cluster.alive == 0 || cluster.arrived < cluster.alive) return;
  ++progress;
  ++cluster.phase;
  cluster.arrived = 0;
  cluster.known = std::exchange(cluster.coming, {});
  const std::vector<Warp*> waiting = std::move(cluster.waiting);
  cluster.waiting.clear();
  for (Warp* warp : waiting) {
    if (order) each(warp->alive(), [&](int lane) { order->learn(warp->in_grid(lane), cluster.known); });
    warp->waiting = Waiting::nothing;
    wake(*warp);
  }
}

void Machine::exit(Warp& warp, uint32_t lanes) {
  warp.exited |= lanes;
  ++progress;
  if (warp.alive() != 0) return;
  Block& block = *warp.block;
  Cluster& cluster = *block.cluster;
  if (warp.cluster_arrived && warp.cluster_phase == cluster.phase) --cluster.arrived;  // it counts no more
  --block.alive;
  --cluster.alive;
  warp.storage = {};
  warp.written = {};
  settle(cluster);
  if (block.alive != 0) {
    for (NamedBarrier& barrier : block.barriers) {
      if (!barrier.who.empty() && barrier.threads == 0) settle(block, barrier, true);
    }
    return;
  }
  for (size_t n = 0; n < block.barriers.size(); ++n) {
    if (!block.barriers[n].who.empty())
      fault(-1, "the block exits, and barrier " + std::to_string(n) + " has not come to its end");
  }
  if (block.under_way != 0) {
    std::string what;
    for (const auto& [id, event] : events) {
      if (event.touches[0] == &block || event.touches[1] == &block)
        what = event.what + " of " + place_of(*this, *event.statement);
    }
    fault(-1, "the block exits, and " + std::to_string(block.under_way) +
                  " copies that touch its shared memory are under way: " + what);
  }
  for (const auto& [offset, barrier] : block.mbarriers) {
    if (barrier.bytes != 0) {
      fault(-1, "the block exits, and its mbarrier at " + std::to_string(offset) + " misses " +
                    std::to_string(barrier.bytes) + " bytes");
    }
  }
  block.gone = true;
  block.shared = {};
  block.marks = {};
}

namespace {

// ------------------------------------------------------------------------------------------------------------ execution

class Run {
 public:
  Run(Machine& machine) : machine_(machine), code_(machine.program->code) {}

  void to_the_end() {
    uint64_t idle = 0, progress = machine_.progress;
    for (;;) {
      land_some();
      if (machine_.progress != progress) {
        progress = machine_.progress;
        idle = 0;
        for (Warp* warp : machine_.pollers) machine_.wake(*warp);
        machine_.pollers.clear();
      }
      if (machine_.queue.empty()) {
        if (!machine_.event_ids.empty()) {
          land_one();
          continue;
        }
        if (machine_.pollers.empty()) break;
        // Only pollers are left. Each looks again, many times, for a warp may look at several places in turn.
        if (++idle > kLooks && !let_time_pass(idle)) {
          throw Error("live-lock: threads look again and again, and nothing changes" + who_waits(machine_));
        }
        for (Warp* warp : machine_.pollers) machine_.wake(*warp);
        machine_.pollers.clear();
      }
      run_for_a_while(*pick());
    }
    for (const auto& block : machine_.blocks) {
      if (!block->gone) throw Error("deadlock: nothing can go on" + who_waits(machine_));
    }
  }

 private:
  static constexpr uint64_t kLooks = 2048;

  // Threads that look at a clock (a watchdog) see time pass when nothing else happens.
  bool let_time_pass(uint64_t idle) {
    const bool clocks =
        std::any_of(machine_.pollers.begin(), machine_.pollers.end(), [](const Warp* w) { return w->reads_clock; });
    constexpr uint64_t kNanoseconds = 100'000'000;
    machine_.time += kNanoseconds;
    return clocks && idle < 16 * kLooks;
  }

  void land_one() {
    const auto& ids = machine_.event_ids;
    const size_t n = machine_.landing == Landing::early ? 0 : machine_.draw(ids.size());
    land(ids[n]);
  }

  void land(uint64_t id) {
    const Statement* statement = machine_.events.at(id).statement;
    try {
      machine_.land(id);
    } catch (const Fault& f) {
      throw Error(f.what + "\n  at " + place_of(machine_, *statement));
    }
  }

  void land_some() {
    if (machine_.event_ids.empty()) return;
    switch (machine_.landing) {
      case Landing::late:
        return;
      case Landing::early:
        while (!machine_.event_ids.empty()) land(machine_.event_ids.front());
        return;
      case Landing::random:
        if (machine_.draw(2) == 0) land_one();
    }
  }

  // A warp of the queue. Of many, one of the first, so that a grid larger than a GPU is worked through block by block. A warp
  // of a slow block runs only when eight draws in a row find no other.
  Warp* pick() {
    constexpr size_t kResident = 256;
    const size_t choice = std::min(machine_.queue.size(), kResident);
    size_t n = machine_.draw(choice);
    for (int draws = 1; draws < 8 && machine_.queue[n]->block->slow; ++draws) n = machine_.draw(choice);
    Warp* warp = machine_.queue[n];
    machine_.queue.erase(machine_.queue.begin() + static_cast<std::ptrdiff_t>(n));
    warp->queued = false;
    return warp;
  }

  // Lanes that can run: those at one place, the lowest or any.
  uint32_t pick_lanes(Warp& warp, uint32_t ready) {
    uint32_t pc = std::numeric_limits<uint32_t>::max();
    each(ready, [&](int lane) { pc = std::min(pc, warp.pc[static_cast<size_t>(lane)]); });
    if (machine_.draw(8) == 0) {
      auto n = static_cast<int>(machine_.draw(static_cast<uint64_t>(__builtin_popcount(ready))));
      each(ready, [&](int lane) {
        if (n-- == 0) pc = warp.pc[static_cast<size_t>(lane)];
      });
    }
    uint32_t lanes = 0;
    each(ready, [&](int lane) { lanes |= static_cast<uint32_t>(warp.pc[static_cast<size_t>(lane)] == pc) << lane; });
    // Now and then some of them alone, as if they had not been scheduled together.
    if (machine_.draw(32) == 0) {
      const uint32_t some = lanes & static_cast<uint32_t>(machine_.generator());
      if (some) lanes = some;
    }
    return lanes;
  }

  void start(Warp& warp) {
    warp.storage.assign((machine_.program->register_bytes + 7) / 8, 0);
    warp.written.assign(machine_.program->registers.size(), 0);
    warp.constants = reinterpret_cast<const char*>(machine_.program->constants.data());
  }

  void run_for_a_while(Warp& warp) {
    if (warp.storage.empty()) start(warp);
    uint64_t quantum = uint64_t{16} << machine_.draw(8);
    while (quantum > 0 && warp.waiting == Waiting::nothing) {
      const uint32_t ready = warp.alive() & ~warp.parked;
      if (ready == 0) break;
      const uint32_t lanes = pick_lanes(warp, ready);
      try {
        if (!run_lanes(warp, lanes, ready & ~lanes, quantum)) {
          machine_.pollers.push_back(&warp);
          return;
        }
      } catch (const Fault& f) {
        report(warp, f);
      }
    }
    if (warp.alive() == 0 || warp.waiting != Waiting::nothing) return;
    if ((warp.alive() & ~warp.parked) == 0)
      return;  // lanes that miss others, which have exited or wait: a deadlock, if it stays
    machine_.wake(warp);
  }

  [[noreturn]] void report(const Warp& warp, const Fault& f) {
    const Statement* statement = statement_at(machine_, warp.at);
    std::string text = f.what + "\n  at " + (statement ? place_of(machine_, *statement) : "the kernel's end") +
                       "\n  block " + std::to_string(warp.block->number) + ", warp " + std::to_string(warp.number);
    if (f.lane >= 0) text += ", thread " + std::to_string(warp.thread(f.lane));
    throw Error(text + ", of " + machine_.program->entry.name);
  }

  void set_pc(Warp& warp, uint32_t lanes, uint32_t pc) {
    each(lanes, [&](int lane) { warp.pc[static_cast<size_t>(lane)] = pc; });
  }

  // Of the lanes, those in which the result has a value.
  static uint32_t defined(const Warp& warp, const Instruction& i, uint32_t lanes) {
    const auto written = [&](size_t n) {
      return i.in[n].number < 0 ? kAllLanes : warp.written[static_cast<size_t>(i.in[n].number)];
    };
    uint32_t all = lanes;
    for (size_t n = 0; n < i.ins; ++n) all &= written(n);
    if (all == lanes || i.spread == Spread::all) return all;
    each(lanes & ~all, [&](int lane) {
      const auto has = [&](size_t n) { return (written(n) >> lane & 1) != 0; };
      const auto is = [&](size_t n) { return warp.in<uint8_t>(i.in[n])[lane] != 0; };
      const bool value = i.spread == Spread::choice        ? has(2) && has(is(2) ? 0 : 1)
                         : i.spread == Spread::conjunction ? (has(0) && !is(0)) || (has(1) && !is(1))
                                                           : (has(0) && is(0)) || (has(1) && is(1));
      all |= uint32_t{value} << lane;
    });
    return all;
  }

  // Operands that were never written are no values.
  void check_reads(const Warp& warp, const Instruction& i, uint32_t lanes) {
    const size_t sums = i.spread == Spread::sums ? i.outs : 0;  // the last ones
    for (size_t n = 0; n + sums < i.ins; ++n) {
      const int32_t number = i.in[n].number;
      if (number < 0) continue;
      const uint32_t missing = lanes & ~warp.written[static_cast<size_t>(number)];
      if (missing) {
        fault(__builtin_ctz(missing), "register " +
                                          machine_.program->entry.registers[static_cast<size_t>(number)].name +
                                          " is read, and was never written, or what was is not defined");
      }
    }
  }

  // All lanes that an instruction wants at once, if they stand at it; 0 if some do not yet.
  uint32_t gathered(Warp& warp, const Instruction& i, uint32_t lanes, uint32_t pc) {
    uint32_t wanted = kAllLanes;
    if (i.flow == Flow::membermask) {
      const Operand& mask = i.in[i.ins - 1u];
      if (mask.number >= 0 && (lanes & ~warp.written[static_cast<size_t>(mask.number)])) check_reads(warp, i, lanes);
      const uint32_t* masks = warp.in<uint32_t>(mask);
      wanted = masks[__builtin_ctz(lanes)];
      each(lanes, [&](int lane) {
        if (masks[lane] != wanted) fault(lane, "lanes of one warp with different masks");
        if (!(wanted >> lane & 1)) fault(lane, "a lane that its own mask leaves out");
      });
      if (wanted & ~warp.lanes) fault(-1, "a mask with lanes that have no thread");
      wanted &= ~warp.exited;
    } else {
      wanted = warp.lanes;
      if (warp.exited)
        fault(__builtin_ctz(warp.exited), "an instruction for all lanes of the warp, and this one has exited");
      if (warp.lanes != kAllLanes && !allows_part_of_a_warp(i))
        fault(-1, "an instruction for all 32 lanes, in a warp of fewer threads");
    }
    uint32_t there = 0;
    each(wanted, [&](int lane) { there |= static_cast<uint32_t>(warp.pc[static_cast<size_t>(lane)] == pc) << lane; });
    return there == wanted ? wanted : 0;
  }

  // The first place behind `pc` where others stand: there they go on together.
  static uint32_t next_place(const Warp& warp, uint32_t others, uint32_t pc) {
    uint32_t place = std::numeric_limits<uint32_t>::max();
    if (others == 0) return place;
    each(others, [&](int lane) {
      const uint32_t at = warp.pc[static_cast<size_t>(lane)];
      if (at > pc) place = std::min(place, at);
    });
    return place;
  }

  static bool allows_part_of_a_warp(const Instruction& i) { return i.statement->opcode.starts_with("bar"); }

  // Runs lanes that stand at one place until they part, reach one of the `others` or where lanes meet, or the quantum is
  // spent. False: they have looked, and should look again when something has changed.
  bool run_lanes(Warp& warp, uint32_t lanes, uint32_t others, uint64_t& quantum) {
    uint32_t pc = warp.pc[static_cast<size_t>(__builtin_ctz(lanes))];
    uint32_t limit = next_place(warp, others, pc);
    const uint64_t progress = machine_.progress;
    for (;;) {
      if (quantum == 0 || pc == limit) break;
      --quantum;
      warp.at = pc;
      if (pc >= code_.size()) fault(__builtin_ctz(lanes), "the code ends, and the thread has not exited");
      const Instruction& i = code_[pc];
      if (++machine_.statistics.warp_steps > machine_.options.most_steps) {
        throw Error("more than " + std::to_string(machine_.options.most_steps) + " steps" + who_waits(machine_));
      }
      ++machine_.time;
      uint32_t active = lanes;
      if (i.guarded) {
        const uint32_t missing = lanes & ~warp.written[static_cast<size_t>(i.guard.number)];
        if (missing) fault(__builtin_ctz(missing), "the guard was never written");
        const uint8_t* guard = warp.in<uint8_t>(i.guard);
        active = 0;
        each(lanes, [&](int lane) { active |= static_cast<uint32_t>((guard[lane] != 0) != i.guard_negated) << lane; });
      }
      machine_.statistics.thread_steps += static_cast<unsigned>(__builtin_popcount(active));
      switch (i.flow) {
        case Flow::branch: {
          const uint32_t stay = lanes & ~active;
          if (active && stay) {  // they part
            set_pc(warp, active, static_cast<uint32_t>(i.target));
            set_pc(warp, stay, pc + 1);
            return true;
          }
          const uint32_t to = active ? static_cast<uint32_t>(i.target) : pc + 1;
          pc = to;
          limit = next_place(warp, others, pc);
          continue;
        }
        case Flow::exit: {
          set_pc(warp, lanes, pc + 1);
          if (active) {
            machine_.exit(warp, active);
            warp.parked = 0;
          }
          return true;
        }
        case Flow::aligned:
        case Flow::membermask: {
          if (i.guarded && i.flow == Flow::aligned && active != lanes && active != 0) {
            fault(__builtin_ctz(lanes & ~active),
                  "a guard leaves lanes out of an instruction for all lanes of the warp");
          }
          if (active == 0) {
            ++pc;
            continue;
          }
          set_pc(warp, lanes, pc);
          if (active != lanes) {  // the others go on
            set_pc(warp, lanes & ~active, pc + 1);
            lanes = active;
          }
          const uint32_t together = gathered(warp, i, lanes, pc);
          if (together == 0) {
            warp.parked |= lanes;
            return true;
          }
          lanes = together;
          warp.parked &= ~lanes;
          ++machine_.statistics.collectives;
          check_reads(warp, i, lanes);
          warp.undefined = 0;
          uint32_t missing[4] = {};  // of sums
          for (size_t n = 0; n < i.outs && i.spread == Spread::sums; ++n) {
            const Operand& sum = i.in[i.ins - i.outs + n];
            if (sum.number >= 0) missing[n] = lanes & ~warp.written[static_cast<size_t>(sum.number)];
          }
          i.execute(warp, i, lanes);
          for (size_t n = 0; n < i.outs; ++n) {
            uint32_t& written = warp.written[static_cast<size_t>(i.out[n].number)];
            written = (written | lanes) & ~(missing[n] | (n == 0 ? warp.undefined : 0));
          }
          set_pc(warp, lanes, ++pc);
          if (warp.waiting != Waiting::nothing || lanes != warp.alive()) return true;
          others = 0;
          limit = std::numeric_limits<uint32_t>::max();
          continue;
        }
        case Flow::next: {
          if (active) {
            uint32_t whole = active;
            if (i.spread == Spread::none) {
              check_reads(warp, i, active);
            } else {
              whole = defined(warp, i, active);
            }
            warp.undefined = 0;
            if (whole) i.execute(warp, i, whole);
            whole &= ~warp.undefined;
            for (size_t n = 0; n < i.outs; ++n) {
              uint32_t& written = warp.written[static_cast<size_t>(i.out[n].number)];
              written = (written & ~active) | whole;
            }
          }
          ++pc;
          if (i.polls) {
            set_pc(warp, lanes, pc);
            quantum = 0;
            return machine_.progress != progress;
          }
        }
      }
    }
    set_pc(warp, lanes, pc);
    return true;
  }

  Machine& machine_;
  const std::vector<Instruction>& code_;
};

void check(const Machine& machine) {
  const Launch& launch = *machine.launch;
  const Program& program = *machine.program;
  const auto refuse = [&](const std::string& what) { throw Error("launch of " + program.entry.name + ": " + what); };
  if (machine.threads == 0 || machine.threads > 1024) refuse(std::to_string(machine.threads) + " threads a block");
  if (program.entry.max_threads != 0 && machine.threads > program.entry.max_threads) {
    refuse(std::to_string(machine.threads) + " threads a block, compiled for at most " +
           std::to_string(program.entry.max_threads));
  }
  if (launch.grid[0] == 0 || launch.grid[1] == 0 || launch.grid[2] == 0) refuse("an empty grid");
  if (launch.cluster == 0 || launch.cluster > 16 || launch.grid[0] % launch.cluster != 0) {
    refuse("clusters of " + std::to_string(launch.cluster) + " in a grid of " + std::to_string(launch.grid[0]));
  }
  if (launch.cluster > 1 && program.capability < 90) refuse("clusters on " + program.target);
  const size_t shared = program.dynamic_begin - kSharedBase + launch.shared_bytes;
  if (shared > machine.options.shared_per_block) refuse(std::to_string(shared) + " bytes of shared memory");
  if (launch.parameters.size() != program.entry.parameters.size()) {
    refuse(std::to_string(launch.parameters.size()) + " parameters for " +
           std::to_string(program.entry.parameters.size()));
  }
  for (size_t n = 0; n < launch.parameters.size(); ++n) {
    if (launch.parameters[n].size() != program.entry.parameters[n].bytes) {
      refuse("parameter " + std::to_string(n) + " of " + std::to_string(launch.parameters[n].size()) +
             " bytes, compiled as " + std::to_string(program.entry.parameters[n].bytes));
    }
  }
}

void prepare(Machine& machine) {
  const Launch& launch = *machine.launch;
  const Program& program = *machine.program;
  machine.parameters.assign(program.parameter_bytes, 0);
  for (size_t n = 0; n < launch.parameters.size(); ++n) {
    std::copy(launch.parameters[n].begin(), launch.parameters[n].end(),
              machine.parameters.begin() + static_cast<std::ptrdiff_t>(program.parameter_offsets[n]));
  }
  for (Ranges::Range& range : machine.memory->all()) range.touched.assign(range.end - range.begin, 0);
  const size_t shared = program.dynamic_begin - kSharedBase + launch.shared_bytes;
  const unsigned warps = (machine.threads + kLanes - 1) / kLanes;
  const uint64_t blocks = uint64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2];
  for (uint64_t n = 0; n < blocks; ++n) {
    auto block = std::make_unique<Block>();
    block->machine = &machine;
    block->number = static_cast<unsigned>(n);
    block->index = {static_cast<unsigned>(n % launch.grid[0]),
                    static_cast<unsigned>(n / launch.grid[0] % launch.grid[1]),
                    static_cast<unsigned>(n / launch.grid[0] / launch.grid[1])};
    block->rank = static_cast<unsigned>(n % launch.cluster);
    if (block->rank == 0) machine.clusters.push_back(std::make_unique<Cluster>());
    block->cluster = machine.clusters.back().get();
    block->cluster->blocks.push_back(block.get());
    block->cluster->alive += warps;
    block->alive = warps;
    block->shared.assign(shared, 0);
    block->marks.assign(shared, 0);
    block->warps.resize(warps);
    for (unsigned w = 0; w < warps; ++w) {
      Warp& warp = block->warps[w];
      warp.block = block.get();
      warp.number = w;
      const unsigned threads = std::min(machine.threads - w * kLanes, unsigned{kLanes});
      warp.lanes = threads == kLanes ? kAllLanes : (1u << threads) - 1;
    }
    machine.blocks.push_back(std::move(block));
  }
  // What the seed decides: when copies land, whether some blocks are slow, and the order that warps begin in.
  machine.landing = static_cast<Landing>(machine.draw(3));
  if (machine.draw(2) == 0) {
    for (const auto& block : machine.blocks) block->slow = machine.draw(2) == 0;
  }
  std::vector<Warp*> order;
  for (const auto& block : machine.blocks) {
    for (Warp& warp : block->warps) order.push_back(&warp);
  }
  if (machine.draw(2) == 0) std::shuffle(order.begin(), order.end(), machine.generator);
  for (Warp* warp : order) machine.wake(*warp);
}

}  // namespace

Statistics run(const Module& module, const std::string& entry, const Launch& launch, Ranges& memory,
               const Options& options) {
  Machine machine;
  machine.program = &module.program(entry);
  machine.file = &module.file();
  machine.launch = &launch;
  machine.memory = &memory;
  machine.options = options;
  machine.generator.seed(options.seed);
  machine.cluster_size = launch.cluster;
  machine.threads = launch.block[0] * launch.block[1] * launch.block[2];
  check(machine);
  prepare(machine);
  if (options.order) {
    machine.order =
        std::make_unique<Order>(static_cast<unsigned>(machine.blocks.size()), machine.threads, launch.cluster);
  }
  Run(machine).to_the_end();
  return machine.statistics;
}

}  // namespace ptx
