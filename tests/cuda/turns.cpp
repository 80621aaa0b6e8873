// tests/cuda/turns.cpp: csrc/cuda/turns.h on a device that is played: who waits for whom; and that launches never get stuck,
// even on a device that places the blocks of all launches one at a time, anywhere.
//
//   turns table | calls | threads | device [programs]
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cuda/turns.h"

using namespace stacked_lstm::cuda;

namespace {

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

// ---- What was queued ------------------------------------------------------------------------------------------------

// A launch of blocks that wait for each other. `per_sm`: so many of them share a multiprocessor.
struct Kind {
  uint64_t blocks = 0, cluster = 1, per_sm = 1;
};

struct Operation {
  Kind kind;                  // no blocks: an event
  std::vector<size_t> after;  // operations that have to be over: all of them earlier ones
};

// The calls, and what they leave in the streams. A stream is a letter; 'A' is the default stream where `default_a` says so.
struct Played {
  std::vector<Operation> operations;
  std::map<char, std::vector<size_t>> next_after;  // of a stream: what its next operation comes after
  std::map<int, size_t> recorded;                  // event → operation
  std::map<char, uint64_t> captures;
  std::map<char, uint64_t> renamed;  // streams with other numbers than their letters'
  std::map<int, char> recorded_on;
  std::string waits;  // of the launch that is being queued: letters of the streams
  int made = 0, records = 0;
  bool default_a = false;
  enum Fails { nothing, launching, waiting, recording, numbering } fails = nothing;

  size_t add(char stream, const Kind& kind) {
    operations.push_back({kind, next_after[stream]});
    next_after[stream] = {operations.size() - 1};
    return operations.size() - 1;
  }
};
Played played;

struct PlayedCalls {
  using Error = int;
  using Stream = char;
  using Event = int;
  static bool is_default(char stream) { return played.default_a && stream == 'A'; }
  static int number_of(char stream, uint64_t& number) {
    number = played.renamed.count(stream) ? played.renamed[stream] : static_cast<uint64_t>(stream);
    return played.fails == Played::numbering;
  }
  static int capture_of(char stream, uint64_t& capture) {
    capture = played.captures.count(stream) ? played.captures[stream] : 0;
    return 0;
  }
  static int make(int& event) {
    event = ++played.made;
    return 0;
  }
  static int record(int event, char stream) {
    ++played.records;
    if (played.fails == Played::recording) return 1;
    played.recorded[event] = played.add(stream, {});
    played.recorded_on[event] = stream;
    return 0;
  }
  static int wait(char stream, int event) {
    if (played.fails == Played::waiting) return 1;
    expect(played.recorded.count(event) > 0, "a wait for an event that was never recorded");
    played.waits += played.recorded_on[event];
    played.next_after[stream].push_back(played.recorded[event]);
    return 0;
  }
};

// ---- The device -----------------------------------------------------------------------------------------------------

constexpr int kClusterMultiprocessors[] = {16, 16, 18, 18, 16, 16, 18, 14};  // of a GPC
constexpr uint64_t kMultiprocessors = 132;
constexpr int kUnits = 2;  // of a multiprocessor: two blocks that are one each, or one that takes both

uint64_t capacity_of(const Kind& kind) {
  uint64_t blocks = 0;
  for (const int size : kClusterMultiprocessors) {
    blocks += static_cast<uint64_t>(size) * kind.per_sm / kind.cluster * kind.cluster;
  }
  return blocks;
}

Demand demand_of(const Kind& kind) {
  return stacked_lstm::cuda::demand_of(kind.blocks, capacity_of(kind), kind.cluster, kMultiprocessors);
}

// A driver without mercy: of the launches whose turn has come it places a cluster of blocks of any, anywhere, and again. A
// launch ends, some time, once all of its blocks have been placed. Returns how many launches were still waiting when nothing
// could be placed any more.
template <typename Random>
int run_all(const std::vector<Operation>& operations, Random& random) {
  std::vector<std::vector<int>> unused;  // units, of a multiprocessor of a GPC
  for (const int size : kClusterMultiprocessors) unused.emplace_back(static_cast<size_t>(size), kUnits);
  struct Placed {
    size_t gpc, multiprocessor;
  };
  std::vector<std::vector<Placed>> placed(operations.size());
  std::vector<char> over(operations.size(), 0);
  const auto ready = [&](size_t n) {
    return !over[n] &&
           std::all_of(operations[n].after.begin(), operations[n].after.end(), [&](size_t m) { return over[m]; });
  };
  const auto place_cluster = [&](size_t n) {
    const Kind& kind = operations[n].kind;
    const int units = kUnits / static_cast<int>(kind.per_sm);
    std::vector<size_t> gpcs(unused.size());
    for (size_t g = 0; g < gpcs.size(); ++g) gpcs[g] = g;
    std::shuffle(gpcs.begin(), gpcs.end(), random);
    for (const size_t g : gpcs) {
      std::vector<size_t> places;
      for (size_t m = 0; m < unused[g].size(); ++m)
        places.insert(places.end(), static_cast<size_t>(unused[g][m] / units), m);
      if (places.size() < kind.cluster) continue;
      std::shuffle(places.begin(), places.end(), random);
      for (uint64_t b = 0; b < kind.cluster; ++b) {
        unused[g][places[b]] -= units;
        placed[n].push_back({g, places[b]});
      }
      return true;
    }
    return false;
  };
  while (true) {
    std::vector<size_t> launches;
    for (bool more = true; more;) {
      more = false;
      launches.clear();
      for (size_t n = 0; n < operations.size(); ++n) {
        if (!ready(n)) continue;
        if (operations[n].kind.blocks == 0) {
          over[n] = more = true;
        } else {
          launches.push_back(n);
        }
      }
    }
    if (launches.empty()) return 0;
    std::shuffle(launches.begin(), launches.end(), random);
    bool moved = false;
    for (const size_t n : launches) {
      const bool whole = placed[n].size() == operations[n].kind.blocks;
      if (!whole && !place_cluster(n)) continue;
      moved = true;
      if (!whole) break;
      for (const Placed& p : placed[n])
        unused[p.gpc][p.multiprocessor] += kUnits / static_cast<int>(operations[n].kind.per_sm);
      over[n] = 1;
      break;
    }
    if (!moved) return static_cast<int>(launches.size());
  }
}

template <typename Random>
Kind random_kind(Random& random) {
  static constexpr uint64_t kClusters[] = {1, 1, 1, 2, 4, 8, 16};
  Kind kind;
  kind.cluster = kClusters[random() % 7];
  kind.per_sm = 1 + random() % 2;
  const uint64_t clusters = capacity_of(kind) / kind.cluster;
  const bool small = random() % 3 != 0;  // so that many fit together
  kind.blocks = kind.cluster * (1 + random() % (small ? (clusters + 5) / 6 : clusters));
  return kind;
}

enum class Rule { in_turn, none, forgetful, crowded };

// How many of the programs get stuck.
int stuck(Rule rule, int programs) {
  int count = 0;
  for (int program = 0; program < programs; ++program) {
    std::mt19937 random(static_cast<unsigned>(program));
    played = Played{};
    played.default_a = program % 2 == 0;
    LaunchesInTurn<PlayedCalls> turns;
    const auto streams = static_cast<unsigned>(2 + random() % 4);
    const unsigned launches = 4 + random() % 24;
    for (unsigned n = 0; n < launches; ++n) {
      const auto stream = static_cast<char>('A' + random() % streams);
      const Kind kind = random_kind(random);
      Demand demand = demand_of(kind);
      if (rule == Rule::crowded) demand.spare = 2 * demand.spare + 16;
      const auto launch = [&] {
        if (rule == Rule::forgetful && random() % 2 == 0 && played.next_after[stream].size() > 1) {
          played.next_after[stream].resize(1);
        }
        played.add(stream, kind);
        return 0;
      };
      if (rule == Rule::none) {
        launch();
      } else {
        expect(turns.run(stream, demand, launch) == 0, "a launch was refused");
      }
    }
    for (size_t n = 0; n < played.operations.size(); ++n) {
      for (const size_t before : played.operations[n].after) expect(before < n, "a wait for what was queued later");
    }
    count += run_all(played.operations, random) > 0;
  }
  return count;
}

// ---- Who waits for whom ---------------------------------------------------------------------------------------------

struct Launch {
  char stream;
  Kind kind;
  const char* waits;
  uint64_t capture = 0;
};
struct Row {
  const char* name;
  std::vector<Launch> launches;
};

const std::vector<Row> kTable = {
    {"one stream never waits", {{'A', {132}, ""}, {'A', {40}, ""}, {'A', {132}, ""}}},
    {"two that fill the device alternate", {{'A', {132}, ""}, {'B', {132}, "A"}, {'A', {132}, "B"}, {'B', {132}, "A"}}},
    {"two that fit run together", {{'A', {60}, ""}, {'B', {60}, ""}, {'A', {60}, ""}, {'B', {72}, ""}}},
    {"the picture in turns.h", {{'A', {60}, ""}, {'B', {60}, ""}, {'C', {100}, "AB"}, {'A', {30}, "B"}}},
    {"one multiprocessor too many", {{'A', {60}, ""}, {'B', {73}, "A"}}},
    {"three fit in pairs, not all", {{'A', {50}, ""}, {'B', {50}, ""}, {'C', {50}, "AB"}, {'D', {50}, "AB"}}},
    {"a stream counts with the largest of its launches", {{'A', {100}, ""}, {'A', {10}, ""}, {'B', {60}, "A"}}},
    {"whichever it is", {{'A', {10}, ""}, {'A', {100}, ""}, {'B', {60}, "A"}}},
    {"and with the one that is easiest to disturb", {{'A', {16}, ""}, {'A', {16, 16}, ""}, {'B', {7}, "A"}}},
    {"and once that is over, with the others", {{'A', {100}, ""}, {'B', {60}, "A"}, {'A', {60}, ""}, {'B', {60}, ""}}},
    {"two blocks a multiprocessor, yet one on each", {{'A', {132, 1, 2}, ""}, {'B', {1}, "A"}}},
    {"a block may cost two places", {{'A', {100, 1, 2}, ""}, {'B', {83, 1, 2}, "A"}}},
    {"and no more", {{'A', {100, 1, 2}, ""}, {'B', {64, 1, 2}, ""}}},
    {"a few blocks beside clusters", {{'A', {64, 16}, ""}, {'B', {3, 1}, ""}}},
    {"each of them may cost a cluster", {{'A', {64, 16}, ""}, {'B', {4, 1}, "A"}}},
    {"a late stream waits for the turn before", {{'A', {132}, ""}, {'B', {70}, "A"}, {'C', {5}, "A"}, {'C', {5}, ""}}},
    {"captures are apart",
     {{'A', {132}, ""},
      {'B', {132}, "", 1},
      {'C', {132}, "B", 1},
      {'D', {132}, "", 2},
      {'E', {132}, "A"},
      {'B', {132}, "C", 1}}},
};

void table() {
  for (const Row& row : kTable) {
    played = Played{};
    LaunchesInTurn<PlayedCalls> turns;
    for (size_t n = 0; n < row.launches.size(); ++n) {
      const Launch& launch = row.launches[n];
      played.waits.clear();
      played.captures[launch.stream] = launch.capture;
      const int error = turns.run(launch.stream, demand_of(launch.kind), [&] {
        played.add(launch.stream, launch.kind);
        return 0;
      });
      std::sort(played.waits.begin(), played.waits.end());
      expect(error == 0 && played.waits == launch.waits, std::string(row.name) + ": launch " + std::to_string(n + 1) +
                                                             " waits for '" + played.waits + "', not '" + launch.waits +
                                                             "'");
    }
  }
}

// ---- Events and errors ----------------------------------------------------------------------------------------------

void calls() {
  const Demand all = demand_of(Kind{132});
  const auto queue = [](LaunchesInTurn<PlayedCalls>& turns, char stream, const Demand& demand) {
    played.waits.clear();
    return turns.run(stream, demand, [&] {
      if (played.fails == Played::launching) return 1;
      played.add(stream, {demand.blocks});
      return 0;
    });
  };
  {
    played = Played{};
    played.default_a = true;
    LaunchesInTurn<PlayedCalls> turns;
    for (int n = 0; n < 5; ++n) queue(turns, 'A', all);
    expect(played.made == 0 && played.records == 0, "the default stream alone pays for no events");
    queue(turns, 'B', all);
    expect(played.waits == "A" && played.records == 2, "a second stream waits for what the default stream was given");
    for (int n = 3; n <= 6; ++n) {
      queue(turns, n < 5 ? 'A' : 'B', all);
      expect(played.records == n, "from then on every launch is marked when it is queued");
    }
  }
  {
    played = Played{};
    played.default_a = true;
    LaunchesInTurn<PlayedCalls> turns;
    for (const char stream : {'A', 'B', 'A'}) queue(turns, stream, demand_of(Kind{20}));
    expect(played.records == 2, "also where the second stream's launch fits beside the first");
  }
  {
    played = Played{};
    LaunchesInTurn<PlayedCalls> turns;
    for (int n = 0; n < 1000; ++n) queue(turns, n % 2 ? 'A' : 'B', all);
    for (int n = 0; n < 1000; ++n) queue(turns, n % 2 ? 'A' : 'B', demand_of(Kind{20}));
    expect(played.made <= 5, "events are used again, and " + std::to_string(played.made) + " were made");
  }
  {
    played = Played{};
    LaunchesInTurn<PlayedCalls> turns;
    for (uint64_t n = 1; n <= 3000; ++n) {
      played.captures['A'] = played.captures['B'] = n;
      queue(turns, 'A', all);
      queue(turns, 'B', all);
      expect(played.waits == "A", "captures that have ended are not mixed up");
    }
    expect(played.made < 3000, "events of captures long past are used again");
  }
  {
    played = Played{};
    LaunchesInTurn<PlayedCalls> turns;
    queue(turns, 'A', all);
    played.renamed['A'] = 1000;  // destroyed, and a new stream has its handle
    queue(turns, 'A', all);
    expect(played.waits == "A", "a new stream with an old handle waits for the old stream");
  }
  for (const auto fails : {Played::launching, Played::waiting, Played::recording, Played::numbering}) {
    played = Played{};
    LaunchesInTurn<PlayedCalls> turns;
    queue(turns, 'A', all);
    const size_t before = played.operations.size();
    played.fails = fails;
    expect(queue(turns, 'B', all) != 0, "an error is returned");
    expect(fails == Played::recording || played.operations.size() == before, "nothing is queued after an error");
    played.fails = Played::nothing;
    expect(queue(turns, 'C', all) == 0 && played.waits == "A", "a launch that was not queued is not waited for");
    expect(played.made == 2, "the event of an error is used again");
  }
}

void threads() {
  played = Played{};
  LaunchesInTurn<PlayedCalls> turns;
  std::vector<std::thread> all;
  for (char stream = 'A'; stream < 'E'; ++stream) {
    all.emplace_back([&turns, stream] {
      std::mt19937 random(static_cast<unsigned>(stream));
      for (int n = 0; n < 200; ++n) {
        const Kind kind = random_kind(random);
        turns.run(stream, demand_of(kind), [&] {
          played.add(stream, kind);
          return 0;
        });
      }
    });
  }
  for (std::thread& thread : all) thread.join();
  std::mt19937 random(1);
  expect(run_all(played.operations, random) == 0, "launches of four threads get stuck");
}

void device(int programs) {
  const int in_turn = stuck(Rule::in_turn, programs), none = stuck(Rule::none, programs);
  const int forgetful = stuck(Rule::forgetful, programs), crowded = stuck(Rule::crowded, programs);
  std::printf(
      "%d programs, stuck: %d in turn, %d without waits, %d with half of them, %d where twice as many may be there\n",
      programs, in_turn, none, forgetful, crowded);
  expect(in_turn == 0, "launches in turn get stuck");
  // Else the device would be too kind to show anything.
  expect(none > 0 && forgetful > 0 && crowded > 0, "launches that break the rule never get stuck");
}

}  // namespace

int main(int count, char** words) {
  const std::string what = count > 1 ? words[1] : "";
  if (what == "table")
    table();
  else if (what == "calls")
    calls();
  else if (what == "threads")
    threads();
  else if (what == "device")
    device(count > 2 ? std::atoi(words[2]) : 1000);
  else
    expect(false, "turns table | calls | threads | device [programs]");
  std::printf("%s: %d failures\n", what.c_str(), failures);
  return failures > 0;
}
