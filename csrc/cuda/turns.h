// csrc/cuda/turns.h: launches whose blocks wait for each other take turns if they do not fit on the device together.
//
//             turn 1                  turn 2
//   stream A  launch 1, 60 blocks ─┐   launch 4, 30 blocks      On 132 multiprocessors: 2 fits beside 1. Launch 3 does not
//   stream B  launch 2, 60 blocks ─┤                            fit beside them and waits for both. Launch 4 fits beside 3;
//   stream C                       └─► launch 3, 100 blocks     it waits for the launches of turn 1 on other streams.
//
// Hazard: if two launches are both half resident, and each has blocks that wait for a block without a place, neither
// ever ends. docs/kernels.md says what CUDA promises about this. Nothing here relies on it: for every launch of this
// process, the places that the other launches leave are enough, whichever of them run at the same time.
//
// The rule. All launches of a turn fit on the device together, wherever their blocks are placed. A launch that does not
// fit beside the newest turn opens the next turn, and waits for all of the newest. A stream's first launch in a turn
// waits for all of the turn before. So two launches that may run at the same time are of the same turn. A launch waits
// only for launches that were queued before it, so waits never go in a circle.
//
// There is no CUDA in this file: launch.cuh supplies the CUDA calls, and tests/cuda/turns.cpp supplies a simulated device.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace stacked_lstm::cuda {

// What a launch whose blocks wait for each other needs of the device.
struct Demand {
  uint64_t blocks = 0;  // all of them at the same time
  uint64_t spare = 0;   // the most blocks of other launches that leave it enough places, wherever they are
};

// `capacity`: how many blocks of such a launch the empty device holds.
//
// At worst, a block of another launch takes a whole multiprocessor. This launch then loses its places there (capacity /
// multiprocessors, rounded up), and with each place a whole cluster.
inline Demand demand_of(uint64_t blocks, uint64_t capacity, uint64_t cluster, uint64_t multiprocessors) {
  const uint64_t places = (capacity + multiprocessors - 1) / multiprocessors;
  return {blocks, blocks < capacity ? (capacity - blocks) / (places * cluster) : 0};
}

// The rule, for one device. A stream is a number that no other stream ever has. A Mark stands for a launch that others wait
// for.
template <typename Mark>
class Turns {
 public:
  // What a launch on `stream` has to wait for.
  std::vector<Mark*> before(uint64_t stream, const Demand& demand) {
    const bool joins = fits(stream, demand);
    std::vector<Mark*> marks;
    if (joins && turn_.count(stream) > 0) return marks;  // the stream's first launch in this turn has waited
    for (auto& [other, member] : joins ? previous_turn_ : turn_) {
      if (other != stream) marks.push_back(&member.mark);
    }
    return marks;
  }

  // Notes that the launch is now queued, behind everything that before() returned. `retired` gets the marks that no
  // launch will be told to wait for any more.
  void queued(uint64_t stream, const Demand& demand, Mark mark, std::vector<Mark>& retired) {
    if (!fits(stream, demand)) {
      retire(previous_turn_, retired);
      previous_turn_.swap(turn_);
    }
    const auto [known, is_new] = turn_.try_emplace(stream, Member{demand, mark});
    if (is_new) return;
    Member& member = known->second;
    member.demand = {std::max(member.demand.blocks, demand.blocks), std::min(member.demand.spare, demand.spare)};
    retired.push_back(std::exchange(member.mark, mark));
  }

  // Whether no other stream has had a launch.
  bool alone(uint64_t stream) const { return previous_turn_.empty() && turn_.size() == turn_.count(stream); }

  void forget(std::vector<Mark>& retired) {
    retire(previous_turn_, retired);
    retire(turn_, retired);
  }

 private:
  // A stream's launches in a turn. They run one at a time; which one runs is not known.
  struct Member {
    Demand demand;  // at least the demand of each launch
    Mark mark;      // of the last launch: when it is done, the stream has done the others, too
  };

  // Whether the newest turn, which fits on the device, still fits when this launch joins it.
  bool fits(uint64_t stream, const Demand& demand) const {
    uint64_t others = 0;
    for (const auto& [other, member] : turn_) others += other == stream ? 0 : member.demand.blocks;
    if (others > demand.spare) return false;
    return std::all_of(turn_.begin(), turn_.end(), [&](const auto& entry) {
      const Demand& its = entry.second.demand;
      return entry.first == stream || others - its.blocks + demand.blocks <= its.spare;
    });
  }

  static void retire(std::map<uint64_t, Member>& members, std::vector<Mark>& retired) {
    for (const auto& entry : members) retired.push_back(entry.second.mark);
    members.clear();
  }

  std::map<uint64_t, Member> turn_, previous_turn_;
};

// Makes the launches of one device follow the rule, by these members of Calls:
//
//   Error, Stream, Event                             Error{} is success, Event{} is no event
//   bool is_default(Stream)                          whether the stream always exists and is never captured
//   Error number_of(Stream, uint64_t&)               a number that no other stream of the process has, or ever had
//   Error capture_of(Stream, uint64_t&)              likewise, of the capture that the stream is part of; 0: of none
//   Error make(Event&), record(Event, Stream), wait(Stream, Event)
//
// A captured launch does not run now, but whenever its graph is replayed. So launches of one capture take turns among
// themselves: events that are recorded in a capture become edges of its graph. A launch inside a capture may not wait
// for an event from outside it, nor a launch outside for an event from inside. This class does not see replays.
template <typename Calls>
class LaunchesInTurn {
 public:
  using Error = typename Calls::Error;
  using Stream = typename Calls::Stream;
  using Event = typename Calls::Event;

  // Calls launch(), which queues the launch on `stream`, behind the waits that it needs.
  template <typename Launch>
  Error run(Stream stream, const Demand& demand, Launch&& launch) {
    // Held until the launch is queued and marked, so that a launch of another thread comes before or after all of this.
    const std::lock_guard<std::mutex> lock(mutex_);
    uint64_t number = 0, capture = 0;
    if (const Error error = Calls::number_of(stream, number); error != Error{}) return error;
    if (const Error error = Calls::capture_of(stream, capture); error != Error{}) return error;
    Turns<Event>& turns = capture == 0 ? eager_ : of_capture(capture);
    for (Event* const event : turns.before(number, demand)) {
      if (*event == Event{}) {
        if (const Error error = mark(*event, default_stream_); error != Error{}) return error;
      }
      if (const Error error = Calls::wait(stream, *event); error != Error{}) return error;
    }
    if (const Error error = launch(); error != Error{}) return error;  // nothing is queued, and nothing is noted
    // A process that uses only the default stream pays for no events: an event on it can still be recorded when a
    // second stream comes. That is not true of other streams: by then they may no longer exist, or may be captured.
    Event event{};
    if (Calls::is_default(stream) && turns.alone(number)) {
      default_stream_ = stream;
    } else if (const Error error = mark(event, stream); error != Error{}) {
      return error;
    }
    turns.queued(number, demand, event, retired_);
    reuse();
    return Error{};
  }

 private:
  // The most captures under way at the same time in a process. (It is not known here when a capture has ended.)
  static constexpr size_t kMostCaptures = 1024;

  // Records an event behind all work that the stream has been given so far.
  Error mark(Event& event, Stream stream) {
    Event made{};
    if (!unused_.empty()) {
      made = unused_.back();
      unused_.pop_back();
    } else if (const Error error = Calls::make(made); error != Error{}) {
      return error;
    }
    const Error error = Calls::record(made, stream);
    if (error == Error{}) {
      event = made;
    } else {
      unused_.push_back(made);
    }
    return error;
  }

  Turns<Event>& of_capture(uint64_t capture) {
    Turns<Event>& turns = captured_[capture];
    if (captured_.size() > kMostCaptures) {  // numbers rise: the first one is the oldest
      captured_.begin()->second.forget(retired_);
      captured_.erase(captured_.begin());
      reuse();
    }
    return turns;
  }

  // Makes retired events available again. Recording an event again does not change launches that already wait for it.
  void reuse() {
    for (const Event event : retired_) {
      if (event != Event{}) unused_.push_back(event);
    }
    retired_.clear();
  }

  std::mutex mutex_;
  Turns<Event> eager_;
  std::map<uint64_t, Turns<Event>> captured_;
  Stream default_stream_{};
  std::vector<Event> unused_, retired_;
};

}  // namespace stacked_lstm::cuda
