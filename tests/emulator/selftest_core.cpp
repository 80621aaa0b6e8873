// tests/emulator/selftest_core.cpp: does the emulator accept what CUDA allows, and find what it promises to find?
//
//   selftest_core            a table of small kernels, in every order and with several seeds
//   selftest_core legal      the legal ones alone, in few runs: for the sanitizers
//   selftest_core races      how many races there are that only ThreadSanitizer can see
//   selftest_core race N     the N-th of them
//   selftest_core overruns   how many overruns of memory only AddressSanitizer can see; selftest_core overrun N
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda/launch.cuh"

namespace {

using namespace stacked_lstm;
using namespace stacked_lstm::cuda;
using emulator::Kind;
using emulator::Order;

// Global memory of a case. All is 0 at first.
struct Memory {
  alignas(128) float number[8][64];
  alignas(128) unsigned count[1024];
  unsigned flag[16];
  int64_t large[16];
  uint64_t mask[16];
};

enum class Expect {
  right,      // no error, and right values, always
  error,      // the error, always
  sometimes,  // the error, in some order
  wrong,      // no error, but wrong values in some order: what a missing barrier does
};

struct Case {
  const char* name;
  void (*kernel)(Memory*);
  unsigned blocks = 1, threads = 64, cluster = 1;
  bool co_resident = false;
  Expect expect = Expect::right;
  Kind kind = Kind::none;
  Kind also = Kind::none;                  // what it may come to in some orders
  bool (*holds)(const Memory&) = nullptr;  // are the values right?
  size_t shared_bytes = 1024;
};

unsigned lane() { return threadIdx.x % 32; }
float* row() { return &dynamic_shared<float>(); }

bool counts_are_one(const Memory& m, unsigned n) {
  for (unsigned i = 0; i < n; ++i) {
    if (m.count[i] != 1) return false;
  }
  return true;
}

// number[block][thread] == thread + 1 + extra, cyclically
template <int Extra>
bool neighbours(const Memory& m) {
  for (unsigned t = 0; t < 64; ++t) {
    if (m.number[0][t] != static_cast<float>((t + 1 + Extra) % 64)) return false;
  }
  return true;
}

template <bool Barrier>
void pass_to_neighbour(Memory* m) {
  row()[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (Barrier) block_barrier();
  m->number[0][threadIdx.x] = row()[(threadIdx.x + 1) % 64];
}

template <bool Barrier>
void pass_to_lane(Memory* m) {
  row()[threadIdx.x] = static_cast<float>(lane());
  if (Barrier) {
    warp_barrier();
  } else {
    shuffle(kFullWarp, 1, 0);  // no barrier: it orders no memory
  }
  m->number[0][threadIdx.x] = row()[threadIdx.x ^ 1];
}
bool lanes_crossed(const Memory& m) {
  for (unsigned t = 0; t < 64; ++t) {
    if (m.number[0][t] != static_cast<float>(t % 32 ^ 1)) return false;
  }
  return true;
}

// A producer warp fills a buffer, a consumer warp empties it, three times over.
void named_barriers(Memory* m) {
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x < 32) {
      if (round) named_barrier_sync(2, 64);  // the buffer is empty
      row()[lane()] = static_cast<float>(round * 100 + static_cast<int>(lane()));
      named_barrier_arrive(1, 64);  // and full
    } else {
      named_barrier_sync(1, 64);
      m->number[round][lane()] = row()[lane() ^ 5];
      if (round < 2) named_barrier_arrive(2, 64);
    }
  }
}
bool all_rounds(const Memory& m) {
  for (int round = 0; round < 3; ++round) {
    for (unsigned i = 0; i < 32; ++i) {
      if (m.number[round][i] != static_cast<float>(round * 100 + static_cast<int>(i ^ 5))) return false;
    }
  }
  return true;
}

void shuffles(Memory* m) {
  const int i = static_cast<int>(lane());
  bool good = shuffle(kFullWarp, i, 7) == 7 && shuffle_xor(kFullWarp, i, 3) == (i ^ 3);
  good &= shuffle_up(kFullWarp, i, 4) == (i < 4 ? i : i - 4) && shuffle_down(kFullWarp, i, 4) == (i > 27 ? i : i + 4);
  good &= shuffle(kFullWarp, 1.5 * i, 9) == 13.5 && shuffle(kFullWarp, int64_t{i} << 40, 3) == int64_t{3} << 40;
  good &= shuffle_xor(kFullWarp, static_cast<float>(i), 16) == static_cast<float>(i ^ 16);
  good &= ballot(kFullWarp, i % 4 == 1) == 0x22222222u && any(kFullWarp, i == 5) && !any(kFullWarp, i == 32);
  good &= all(kFullWarp, i < 32) && !all(kFullWarp, i < 31);
  // The halves go their own ways, and meet again.
  int sum = i;
  if (i < 16) {
    for (int step = 8; step; step /= 2) sum += shuffle_xor(0x0000FFFFu, sum, step);
  } else {
    for (int step = 8; step; step /= 2) sum += shuffle_xor(0xFFFF0000u, sum, step);
  }
  good &= sum == (i < 16 ? 120 : 376);
  good &= shuffle_xor(kFullWarp, sum, 16) == (i < 16 ? 376 : 120);
  m->count[threadIdx.x] = good;
}

// One half takes part in an operation of its own before it joins the warp's.
void half_is_late(Memory* m) {
  int value = static_cast<int>(lane());
  if (lane() < 16) value += shuffle_xor(0xFFFFu, value, 1) - shuffle_xor(0xFFFFu, value, 1);
  m->count[threadIdx.x] = shuffle(kFullWarp, value, 31 - static_cast<int>(lane())) == 31 - static_cast<int>(lane());
}

void part_of_a_warp(Memory* m) {  // blocks of 40: the second warp has 8 lanes
  int sum = 1;
  for (int step = 4; step; step /= 2) sum += shuffle_xor(kFullWarp, sum, step);
  warp_barrier();
  block_barrier();
  m->count[threadIdx.x] = sum == 8;
}

struct Pair {
  float a[64];
};
struct Other {
  int b[64];
};
void static_objects(Memory* m) {
  const unsigned i = threadIdx.x;
  bool good = std::isnan(static_shared<Pair>().a[i]) && static_shared<Other>().b[i] == -1 && std::isnan(row()[i]);
  block_barrier();
  static_shared<Pair>().a[i] = static_cast<float>(i);
  static_shared<Other>().b[i] = static_cast<int>(2 * i);
  row()[i] = -1;
  block_barrier();
  good &= static_shared<Pair>().a[63 - i] == static_cast<float>(63 - i) &&
          static_shared<Other>().b[63 - i] == static_cast<int>(126 - 2 * i);
  if (good) atomic_add(&m->count[blockIdx.x * 64 + i], 1);
}

template <int Order>
void hand_over(Memory* m) {  // 0: release, acquire; 1: relaxed accesses and fences; 2: nothing; 3, 4: one side missing
  const unsigned peer = blockIdx.x ^ 1;
  m->number[blockIdx.x][threadIdx.x] = static_cast<float>(100 * blockIdx.x + threadIdx.x);
  block_barrier();
  if (threadIdx.x == 0) {
    if (Order == 0 || Order == 4) store_release<Scope::device>(&m->flag[blockIdx.x], 1);
    if (Order == 1) fence<Scope::device>();
    if (Order == 1 || Order == 2 || Order == 3) store_relaxed<Scope::device>(&m->flag[blockIdx.x], 1);
    if (Order == 0 || Order == 3) {
      while (!load_acquire<Scope::device>(&m->flag[peer])) {
      }
    } else {
      while (!load_relaxed<Scope::device>(&m->flag[peer])) {
      }
    }
    if (Order == 1) fence<Scope::device>();
  }
  block_barrier();
  m->count[blockIdx.x * 64 + threadIdx.x] =
      load_l2(&m->number[peer][threadIdx.x]) == static_cast<float>(100 * peer + threadIdx.x);
}

// The block that comes last adds up what all have left.
template <bool Fences>
void last_block(Memory* m) {
  if (threadIdx.x == 0) {
    m->number[blockIdx.x][0] = static_cast<float>(blockIdx.x + 1);
    if (Fences) fence<Scope::device>();
    const bool last = atomic_add(&m->flag[0], 1) == gridDim.x - 1;
    if (Fences) fence<Scope::device>();
    float sum = 0;
    for (unsigned b = 0; last && b < gridDim.x; ++b) sum += load_l2(&m->number[b][0]);
    if (last) m->number[7][1] = sum;
  }
}

void spin_lock(Memory* m) {
  if (lane()) return;
  for (int round = 0; round < 3; ++round) {
    while (atomic_compare_exchange(&m->flag[0], 0, 1)) nanosleep(50);
    fence<Scope::device>();
    m->count[0] += 1;
    fence<Scope::device>();
    atomic_exchange(&m->flag[0], 0);
  }
}

// ---- global memory, as caches see it. Block 0 writes, block 1 reads ----

enum class How { ordinary, past_l1, read_only };
template <How how>
float load(const float* from) {
  if (how == How::ordinary) return load_ordinary(from);
  if (how == How::past_l1) return load_l2(from);
  return load_readonly(from);
}
void raise(Memory* m) { store_relaxed<Scope::device>(&m->flag[0], 1); }
void await(Memory* m) {
  while (!load_relaxed<Scope::device>(&m->flag[0])) {
  }
}

// One thread acquires, all threads read.
template <How how>
void read_behind_an_acquire(Memory* m) {
  if (blockIdx.x == 0) {
    stored(&m->number[0][threadIdx.x]) = static_cast<float>(threadIdx.x);
    block_barrier();
    if (threadIdx.x == 0) store_release<Scope::device>(&m->flag[0], 1);
  } else {
    while (threadIdx.x == 0 && !load_acquire<Scope::device>(&m->flag[0])) {
    }
    block_barrier();
    m->count[threadIdx.x] = load<how>(&m->number[0][threadIdx.x]) == static_cast<float>(threadIdx.x);
  }
}

// Block 1 has the old number in its L1. What is between the flag and its second load?
template <How how, typename Between>
void read_again(Memory* m, Between between) {
  if (blockIdx.x == 0) {
    while (!load_acquire<Scope::device>(&m->flag[1])) {
    }
    stored(&m->number[0][0]) = 1.0f;
    fence<Scope::device>();
    raise(m);
  } else {
    const float before = load<how>(&m->number[0][0]);
    store_release<Scope::device>(&m->flag[1], 1);
    await(m);
    between();
    m->count[0] = before == 0 && load<how>(&m->number[0][0]) == 1;
  }
}

// Two blocks write, and read, each its half of one sector of 32 bytes; of the other half they know nothing.
void share_a_sector(Memory* m) {
  float* mine = &m->number[0][blockIdx.x * 4];
  for (int round = 1; round < 4; ++round) {
    stored(mine + threadIdx.x) = static_cast<float>(round);
    stored(reinterpret_cast<ushort2*>(mine + 2 + threadIdx.x)) = ushort2{1, static_cast<unsigned short>(round)};
    block_barrier();
    const auto two = load_ordinary(reinterpret_cast<const float2*>(mine));
    if (two.x == static_cast<float>(round) && two.y == two.x) atomic_add(&m->count[blockIdx.x], 1);
    block_barrier();
  }
}

// Block 0 is in another cluster than 2 and 3. Block 2 acquires what it wrote, block 3 meets block 2.
void hand_on_in_the_cluster(Memory* m) {
  if (blockIdx.x == 0) {
    stored(&m->number[0][0]) = 7.0f;
    store_release<Scope::device>(&m->flag[0], 1);
  }
  while (blockIdx.x == 2 && !load_acquire<Scope::device>(&m->flag[0])) {
  }
  cluster_barrier();
  if (blockIdx.x == 3) m->count[0] = load_ordinary(&m->number[0][0]) == 7;
}

void atomics(Memory* m) {
  atomic_add(&m->large[0], int64_t{1} << 33);
  atomic_max(&m->large[1], static_cast<int64_t>(threadIdx.x) - 100);
  add_release<Scope::system>(&m->mask[0], 2);
  add_release<Scope::block>(&m->mask[1], 1);
  atomic_max(&m->count[0], threadIdx.x);
}

void in_cluster(Memory* m) {
  float* mine = row();
  mine[threadIdx.x] = static_cast<float>(cluster_rank() * 64 + threadIdx.x);
  const uint32_t next = peer_address(shared_address(mine), (cluster_rank() + 1) % cluster_size());
  cluster_barrier();
  const float seen = load_peer<float>(next + threadIdx.x * 4);
  store_peer(next + 256 + threadIdx.x * 4, seen + 1);
  cluster_arrive();
  const float four = load_peer<float>(peer_address(shared_address(mine), cluster_rank()));  // the own rank is one, too
  cluster_wait();
  const unsigned neighbour = blockIdx.x / 4 * 4 + (blockIdx.x + 1) % 4;
  const bool good = seen == static_cast<float>(neighbour % 4 * 64 + threadIdx.x) &&
                    four == static_cast<float>(cluster_rank() * 64) &&
                    mine[64 + threadIdx.x] == static_cast<float>(cluster_rank() * 64 + threadIdx.x + 1);
  m->count[blockIdx.x * 64 + threadIdx.x] = good;
}

void shape_of_the_grid(Memory* m) {
  const unsigned block = blockIdx.x;
  atomic_add(&m->count[block], 1);
  m->number[block % 8][threadIdx.x] = 1;
}

constexpr unsigned kMany = 1000;

const Case kCases[] = {
    // ---- legal ----
    {.name = "an ordinary load behind another thread's acquire",
     .kernel = read_behind_an_acquire<How::ordinary>,
     .blocks = 2,
     .co_resident = true,
     .holds = [](const Memory& m) { return counts_are_one(m, 64); }},
    {.name = "a load past the L1, the same",
     .kernel = read_behind_an_acquire<How::past_l1>,
     .blocks = 2,
     .co_resident = true,
     .holds = [](const Memory& m) { return counts_are_one(m, 64); }},
    {.name = "a number read again behind a fence",
     .kernel = [](Memory* m) { read_again<How::ordinary>(m, [] { fence<Scope::device>(); }); },
     .blocks = 2,
     .threads = 1,
     .co_resident = true,
     .holds = [](const Memory& m) { return counts_are_one(m, 1); }},
    {.name = "a sector of which each block has a part",
     .kernel = share_a_sector,
     .blocks = 2,
     .threads = 2,
     .holds = [](const Memory& m) { return m.count[0] == 6 && m.count[1] == 6; }},
    {.name = "the read-only path beside what is written",
     .kernel =
         [](Memory* m) {
           stored(&m->number[0][2 * threadIdx.x]) = 1.0f;
           m->count[threadIdx.x] = load_readonly(&m->number[0][2 * threadIdx.x + 1]) == 0;
         },
     .threads = 32,
     .holds = [](const Memory& m) { return counts_are_one(m, 32); }},
    {.name = "acquired by a block of the cluster, handed on by its barrier",
     .kernel = hand_on_in_the_cluster,
     .blocks = 4,
     .threads = 1,
     .cluster = 2,
     .co_resident = true,
     .holds = [](const Memory& m) { return counts_are_one(m, 1); }},
    {.name = "written before the barrier of the cluster, read after it",
     .kernel =
         [](Memory* m) {
           stored(&m->number[blockIdx.x][threadIdx.x]) = 1.0f;
           cluster_barrier();
           m->count[blockIdx.x * 64 + threadIdx.x] = load_ordinary(&m->number[blockIdx.x ^ 1][threadIdx.x]) == 1;
         },
     .blocks = 2,
     .cluster = 2,
     .holds = [](const Memory& m) { return counts_are_one(m, 128); }},
    {.name = "block barrier", .kernel = pass_to_neighbour<true>, .holds = neighbours<0>},
    {.name = "threads that have exited count as arrived",
     .kernel =
         [](Memory* m) {
           if (threadIdx.x >= 40) return;
           row()[threadIdx.x] = 1;
           block_barrier();
           m->count[threadIdx.x] = row()[39 - threadIdx.x] == 1;
         },
     .holds = [](const Memory& m) { return counts_are_one(m, 40) && m.count[40] == 0; }},
    {.name = "warp barrier", .kernel = pass_to_lane<true>, .holds = lanes_crossed},
    {.name = "named barriers", .kernel = named_barriers, .holds = all_rounds},
    {.name = "a named barrier with a warp of which lanes have exited",
     .kernel =
         [](Memory* m) {
           if (threadIdx.x == 3) return;
           named_barrier_sync(5, 64);
           m->count[threadIdx.x] = 1;
         },
     .holds = [](const Memory& m) { return m.count[63] == 1; }},
    {.name = "arrive and exit, others sync later",
     .kernel =
         [](Memory* m) {
           if (threadIdx.x < 32) {
             row()[lane()] = 1;
             return named_barrier_arrive(3, 64);
           }
           named_barrier_sync(3, 64);
           m->count[lane()] = row()[lane()] == 1;
         },
     .holds = [](const Memory& m) { return counts_are_one(m, 32); }},
    {.name = "shuffles and votes", .kernel = shuffles, .holds = [](const Memory& m) { return counts_are_one(m, 64); }},
    {.name = "half a warp joins late",
     .kernel = half_is_late,
     .holds = [](const Memory& m) { return counts_are_one(m, 64); }},
    {.name = "a warp of 8 lanes",
     .kernel = part_of_a_warp,
     .threads = 40,
     .holds = [](const Memory& m) { return counts_are_one(m, 40); }},
    {.name = "lanes that have exited are not waited for",
     .kernel =
         [](Memory* m) {
           if (lane() >= 16) return;
           m->count[threadIdx.x] = shuffle_xor(kFullWarp, static_cast<int>(lane()), 8) == static_cast<int>(lane() ^ 8);
         },
     .threads = 32,
     .holds = [](const Memory& m) { return counts_are_one(m, 16); }},
    {.name = "static objects of two types, fresh in every block",
     .kernel = static_objects,
     .blocks = 12,
     .holds = [](const Memory& m) { return counts_are_one(m, 12 * 64); }},
    {.name = "hand-over by release and acquire",
     .kernel = hand_over<0>,
     .blocks = 4,
     .co_resident = true,
     .holds = [](const Memory& m) { return counts_are_one(m, 256); }},
    {.name = "hand-over by fences",
     .kernel = hand_over<1>,
     .blocks = 4,
     .co_resident = true,
     .holds = [](const Memory& m) { return counts_are_one(m, 256); }},
    {.name = "the last block adds up",
     .kernel = last_block<true>,
     .blocks = 6,
     .holds = [](const Memory& m) { return m.number[7][1] == 21; }},
    {.name = "spin lock",
     .kernel = spin_lock,
     .blocks = 3,
     .co_resident = true,
     .holds = [](const Memory& m) { return m.count[0] == 18; }},
    {.name = "atomics of 64 bits",
     .kernel = atomics,
     .blocks = 2,
     .holds =
         [](const Memory& m) {
           return m.large[0] == int64_t{128} << 33 && m.large[1] == 0 && m.mask[0] == 256 && m.mask[1] == 128 &&
                  m.count[0] == 63;
         }},
    {.name = "clusters of four",
     .kernel = in_cluster,
     .blocks = 8,
     .cluster = 4,
     .holds = [](const Memory& m) { return counts_are_one(m, 512); }},
    {.name = "the cluster's barrier does not wait for those that have exited",
     .kernel =
         [](Memory* m) {
           if (threadIdx.x > 5) return;
           cluster_barrier();
           m->count[blockIdx.x * 6 + threadIdx.x] = 1;
           cluster_barrier();
         },
     .blocks = 4,
     .cluster = 4,
     .holds = [](const Memory& m) { return counts_are_one(m, 24); }},
    {.name = "many blocks",
     .kernel = shape_of_the_grid,
     .blocks = kMany,
     .threads = 8,
     .holds =
         [](const Memory& m) {
           for (unsigned b = 0; b < kMany; ++b) {
             if (m.count[b] != 8) return false;
           }
           return true;
         }},
    {.name = "a wait for something that comes late",
     .kernel =
         [](Memory* m) {
           if (threadIdx.x == 0) {
             emulator::post({"a test's event",
                             Location::current(),
                             [m] { __atomic_store_n(&m->flag[1], 1u, __ATOMIC_RELEASE); },
                             {}});
             while (!load_acquire<Scope::device>(&m->flag[1])) {
             }
             m->count[0] = 1;
           }
         },
     .holds = [](const Memory& m) { return m.count[0] == 1; }},

    // ---- barriers ----
    {.name = "a block barrier is missing",
     .kernel = pass_to_neighbour<false>,
     .expect = Expect::wrong,
     .holds = neighbours<0>},
    {.name = "a warp barrier is missing",
     .kernel =
         [](Memory* m) {
           row()[threadIdx.x] = static_cast<float>(lane());
           m->number[0][threadIdx.x] = row()[threadIdx.x ^ 1];
         },
     .expect = Expect::wrong,
     .holds = lanes_crossed},
    {.name = "two block barriers for one",
     .kernel =
         [](Memory*) {
           if (threadIdx.x < 5) {
             block_barrier();
           } else {
             block_barrier();
           }
         },
     .expect = Expect::error,
     .kind = Kind::divergent_barrier},
    {.name = "a block barrier in a loop that some leave early",
     .kernel =
         [](Memory*) {
           for (unsigned i = 0; i < 3 + threadIdx.x / 32; ++i) block_barrier();
           named_barrier_sync(1, 64);
         },
     .expect = Expect::error,
     .kind = Kind::deadlock},
    {.name = "lanes of a warp at two named barriers of one number",
     .kernel =
         [](Memory*) {
           if (lane() < 7) {
             named_barrier_sync(1, 64);
           } else {
             named_barrier_sync(1, 64);
           }
         },
     .expect = Expect::error,
     .kind = Kind::divergent_barrier},
    {.name = "named barrier: counts differ",
     .kernel = [](Memory*) { named_barrier_sync(1, threadIdx.x < 32 ? 64 : 32); },
     .expect = Expect::error,
     .kind = Kind::barrier_misuse,
     .also = Kind::deadlock},
    {.name = "named barrier: no multiple of 32",
     .kernel = [](Memory*) { named_barrier_sync(1, 48); },
     .expect = Expect::error,
     .kind = Kind::barrier_misuse},
    {.name = "named barrier: more threads than the block has",
     .kernel = [](Memory*) { named_barrier_sync(1, 96); },
     .expect = Expect::error,
     .kind = Kind::barrier_misuse},
    {.name = "named barrier: number 16",
     .kernel = [](Memory*) { named_barrier_sync(16, 64); },
     .expect = Expect::error,
     .kind = Kind::barrier_misuse},
    {.name = "named barrier: number 0 is the block's own",
     .kernel = [](Memory*) { named_barrier_sync(0, 64); },
     .expect = Expect::error,
     .kind = Kind::barrier_misuse},
    {.name = "named barrier: a warp arrives twice",
     .kernel =
         [](Memory*) {
           if (threadIdx.x >= 32) return;
           named_barrier_arrive(1, 64);
           named_barrier_arrive(1, 64);
         },
     .expect = Expect::error,
     .kind = Kind::barrier_misuse},
    {.name = "named barrier: the other warp never comes",
     .kernel =
         [](Memory*) {
           if (threadIdx.x < 32) named_barrier_sync(1, 64);
         },
     .expect = Expect::error,
     .kind = Kind::deadlock},
    {.name = "named barrier: arrivals are left over",
     .kernel =
         [](Memory*) {
           if (threadIdx.x < 32) named_barrier_arrive(1, 64);
         },
     .expect = Expect::error,
     .kind = Kind::outstanding_at_exit},
    {.name = "trap",
     .kernel =
         [](Memory*) {
           if (threadIdx.x == 63) __trap();
         },
     .expect = Expect::error,
     .kind = Kind::trap},

    // ---- waiting for ever ----
    {.name = "a flag that nobody sets",
     .kernel =
         [](Memory* m) {
           if (threadIdx.x == 0) {
             while (!load_acquire<Scope::device>(&m->flag[0])) {
             }
           }
           block_barrier();
         },
     .expect = Expect::error,
     .kind = Kind::live_lock},
    {.name = "a lock that nobody opens",
     .kernel =
         [](Memory* m) {
           while (atomic_exchange(&m->flag[0], 1)) {
           }
         },
     .expect = Expect::error,
     .kind = Kind::live_lock},
    {.name = "sleeping for ever",
     .kernel =
         [](Memory* m) {
           while (!*const_cast<volatile unsigned*>(&m->flag[0])) nanosleep(100);
         },
     .expect = Expect::error,
     .kind = Kind::live_lock},
    {.name = "blocks wait for blocks that are not resident",
     .kernel =
         [](Memory* m) {
           add_release<Scope::device>(&m->flag[0], 1);
           while (load_acquire<Scope::device>(&m->flag[0]) < 64) {
           }
         },
     .blocks = 64,
     .threads = 1,
     .expect = Expect::error,
     .kind = Kind::live_lock},

    // ---- warps ----
    {.name = "a lane is missing from a shuffle",
     .kernel =
         [](Memory* m) {
           if (lane() != 7) m->count[threadIdx.x] = shuffle(kFullWarp, 1u, 0);
           block_barrier();
         },
     .expect = Expect::error,
     .kind = Kind::warp_mismatch},
    {.name = "a shuffle from a lane that has exited",
     .kernel =
         [](Memory* m) {
           if (lane() == 7) return;
           m->count[threadIdx.x] = shuffle(kFullWarp, 1u, 7);
         },
     .expect = Expect::error,
     .kind = Kind::warp_mismatch},
    {.name = "a lane outside its mask",
     .kernel = [](Memory* m) { m->count[threadIdx.x] = shuffle(0xFFFFu, 1u, 0); },
     .expect = Expect::error,
     .kind = Kind::lane_outside_mask},
    {.name = "masks that differ",
     .kernel = [](Memory* m) { m->count[threadIdx.x] = ballot(lane() < 16 ? kFullWarp : 0xFFFF0001u, true); },
     .expect = Expect::error,
     .kind = Kind::warp_mismatch},
    {.name = "one lane votes while the others shuffle",
     .kernel =
         [](Memory* m) { m->count[threadIdx.x] = lane() == 9 ? ballot(kFullWarp, true) : shuffle(kFullWarp, 1u, 0); },
     .expect = Expect::error,
     .kind = Kind::warp_mismatch},
    {.name = "shuffles in two lines",
     .kernel =
         [](Memory* m) {
           if (lane() == 9) {
             m->count[threadIdx.x] = shuffle(kFullWarp, 1u, 0);
           } else {
             m->count[threadIdx.x] = shuffle(kFullWarp, 1u, 0);
           }
         },
     .expect = Expect::error,
     .kind = Kind::warp_mismatch},
    {.name = "an instruction for the whole warp, with a part of it",
     .kernel =
         [](Memory*) {
           if (lane() == 9) return;
           block_barrier();
           emulator::whole_warp_operation("a test's instruction", nullptr, nullptr, Location::current());
         },
     .expect = Expect::error,
     .kind = Kind::warp_mismatch},

    // ---- addresses ----
    {.name = "a vector load that is not aligned",
     .kernel = [](Memory* m) { m->number[0][0] = load_streaming(reinterpret_cast<const float4*>(&m->number[1][1])).x; },
     .expect = Expect::error,
     .kind = Kind::misaligned},
    {.name = "a vector store that is not aligned",
     .kernel = [](Memory* m) { store_streaming(reinterpret_cast<float2*>(&m->number[1][1]), float2{1, 2}); },
     .expect = Expect::error,
     .kind = Kind::misaligned},
    {.name = "a peer's address that is not aligned",
     .kernel = [](Memory*) { store_peer(shared_address(row()) + 4, 1.0); },
     .expect = Expect::error,
     .kind = Kind::misaligned},
    {.name = "past the end of the dynamic memory",
     .kernel = [](Memory*) { store_peer(shared_address(row()) + 1024, 1); },
     .expect = Expect::error,
     .kind = Kind::out_of_bounds},
    {.name = "past the end of a static object",
     .kernel = [](Memory*) { store_peer(shared_address(&static_shared<Pair>()) + sizeof(Pair), 1); },
     .expect = Expect::error,
     .kind = Kind::out_of_bounds},
    {.name = "the shared address of a local variable",
     .kernel =
         [](Memory* m) {
           int here = 0;
           m->count[0] = shared_address(&here);
         },
     .expect = Expect::error,
     .kind = Kind::out_of_bounds},
    {.name = "a dynamic object larger than what was asked for",
     .kernel = [](Memory*) { dynamic_shared<float[257]>()[0] = 1; },
     .expect = Expect::error,
     .kind = Kind::out_of_bounds},
    {.name = "too much static memory",
     .kernel = [](Memory*) { static_shared<char[48 * 1024 + 1]>()[0] = 1; },
     .expect = Expect::error,
     .kind = Kind::out_of_bounds},
    {.name = "a flag of device scope in shared memory",
     .kernel = [](Memory*) { store_release<Scope::device>(&dynamic_shared<unsigned>(), 1u); },
     .expect = Expect::error,
     .kind = Kind::out_of_bounds},
    {.name = "a pointer past the end of the dynamic memory",
     .kernel = [](Memory*) { row()[256] = 1; },
     .expect = Expect::error,
     .kind = Kind::out_of_bounds},
    {.name = "a pointer past the end of a static object",
     .kernel = [](Memory*) { *reinterpret_cast<char*>(&static_shared<Pair>() + 1) = 1; },
     .expect = Expect::error,
     .kind = Kind::out_of_bounds},

    // ---- clusters, scopes, events ----
    {.name = "cluster_arrive twice",
     .kernel =
         [](Memory*) {
           cluster_arrive();
           cluster_arrive();
         },
     .blocks = 2,
     .cluster = 2,
     .expect = Expect::error,
     .kind = Kind::cluster_misuse},
    {.name = "cluster_wait without an arrive",
     .kernel = [](Memory*) { cluster_wait(); },
     .blocks = 2,
     .cluster = 2,
     .expect = Expect::error,
     .kind = Kind::cluster_misuse},
    {.name = "one thread never comes to the cluster's barrier",
     .kernel =
         [](Memory*) {
           if (blockIdx.x == 1 && threadIdx.x == 9) named_barrier_sync(1, 64);
           cluster_barrier();
         },
     .blocks = 2,
     .cluster = 2,
     .expect = Expect::error,
     .kind = Kind::deadlock},
    {.name = "a rank that does not exist",
     .kernel = [](Memory*) { peer_address(shared_address(row()), 2); },
     .blocks = 2,
     .cluster = 2,
     .expect = Expect::error,
     .kind = Kind::cluster_misuse},
    {.name = "a read from a peer that has exited",
     .kernel =
         [](Memory* m) {
           row()[threadIdx.x] = 1;
           cluster_barrier();
           if (cluster_rank() == 0)
             m->number[0][threadIdx.x] = load_peer<float>(peer_address(shared_address(row()), 1));
         },
     .blocks = 2,
     .cluster = 2,
     .expect = Expect::sometimes,
     .kind = Kind::peer_gone},
    {.name = "a read from a peer before it has written",
     .kernel =
         [](Memory* m) {
           row()[threadIdx.x] = 1;
           const float seen = load_peer<float>(peer_address(shared_address(&row()[threadIdx.x]), cluster_rank() ^ 1));
           m->count[blockIdx.x * 64 + threadIdx.x] = seen == 1;
           cluster_barrier();
         },
     .blocks = 2,
     .cluster = 2,
     .expect = Expect::wrong,
     .holds = [](const Memory& m) { return counts_are_one(m, 128); }},
    {.name = "a release that reaches the block alone",
     .kernel =
         [](Memory* m) {
           if (blockIdx.x == 0) store_release<Scope::block>(&m->flag[0], 1);
           while (blockIdx.x == 1 && !load_acquire<Scope::device>(&m->flag[0])) {
           }
         },
     .blocks = 2,
     .threads = 1,
     .co_resident = true,
     .expect = Expect::sometimes,
     .kind = Kind::scope_too_narrow},
    {.name = "an acquire at the scope of the cluster, across clusters",
     .kernel =
         [](Memory* m) {
           if (blockIdx.x == 0) store_release<Scope::device>(&m->flag[0], 1);
           while (blockIdx.x == 2 && !load_acquire<Scope::cluster>(&m->flag[0])) {
           }
         },
     .blocks = 4,
     .threads = 1,
     .cluster = 2,
     .co_resident = true,
     .expect = Expect::sometimes,
     .kind = Kind::scope_too_narrow},
    {.name = "exit while something is under way to the block",
     .kernel =
         [](Memory*) {
           emulator::post({"a test's event", Location::current(), [] {}, {&emulator::this_block(), nullptr}});
         },
     .threads = 1,
     .expect = Expect::sometimes,
     .kind = Kind::outstanding_at_exit},
    {.name = "an event that fails",
     .kernel =
         [](Memory*) {
           const Location at = Location::current();
           emulator::post(
               {"a test's event", at, [at] { emulator::fail(Kind::phase_overrun, at, "the event's own"); }, {}});
           block_barrier();
         },
     .expect = Expect::error,
     .kind = Kind::phase_overrun},

    // ---- global memory that a cache may show otherwise ----
    {.name = "the read-only path to what another block has written",
     .kernel = read_behind_an_acquire<How::read_only>,
     .blocks = 2,
     .co_resident = true,
     .expect = Expect::error,
     .kind = Kind::not_constant},
    {.name = "written after it was read as constant",
     .kernel =
         [](Memory* m) {
           const float before = load_readonly(&m->number[0][threadIdx.x]);
           block_barrier();
           stored(&m->number[0][threadIdx.x ^ 1]) = before + 1;
         },
     .expect = Expect::error,
     .kind = Kind::not_constant},
    {.name = "one of four words that are read as constant is an atomic",
     .kernel =
         [](Memory* m) {
           atomic_add(&m->count[3], 1);
           m->count[4] = load_readonly(reinterpret_cast<const uint4*>(m->count)).x;
         },
     .threads = 1,
     .expect = Expect::error,
     .kind = Kind::not_constant},
    {.name = "a number that the L1 holds, read again without an acquire",
     .kernel = [](Memory* m) { read_again<How::ordinary>(m, [] {}); },
     .blocks = 2,
     .threads = 1,
     .co_resident = true,
     .expect = Expect::error,
     .kind = Kind::stale},
    {.name = "a fence of the block alone before it is read again",
     .kernel = [](Memory* m) { read_again<How::ordinary>(m, [] { fence<Scope::block>(); }); },
     .blocks = 2,
     .threads = 1,
     .co_resident = true,
     .expect = Expect::error,
     .kind = Kind::stale},
    {.name = "a load past the L1 without an acquire",
     .kernel = [](Memory* m) { read_again<How::past_l1>(m, [] {}); },
     .blocks = 2,
     .threads = 1,
     .co_resident = true,
     .expect = Expect::error,
     .kind = Kind::stale},
    {.name = "a word that is polled by ordinary loads",
     .kernel =
         [](Memory* m) {
           if (blockIdx.x == 0) return raise(m);
           while (!load_ordinary(&m->flag[0])) cuda::pause();
         },
     .blocks = 2,
     .threads = 1,
     .co_resident = true,
     .expect = Expect::error,
     .kind = Kind::stale},
    {.name = "a word that is raised by an ordinary store",
     .kernel =
         [](Memory* m) {
           if (blockIdx.x == 0) stored(&m->flag[0]) = 1u;
           while (blockIdx.x == 1 && !load_acquire<Scope::device>(&m->flag[0])) {
           }
         },
     .blocks = 2,
     .threads = 1,
     .co_resident = true,
     .expect = Expect::sometimes,
     .kind = Kind::stale},
    {.name = "one of eight elements is another block's",
     .kernel =
         [](Memory* m) {
           if (blockIdx.x == 0) {
             store_streaming(reinterpret_cast<unsigned short*>(m->count) + 5, static_cast<unsigned short>(1));
             return raise(m);
           }
           await(m);
           m->count[4] = load_streaming(reinterpret_cast<const uint4*>(m->count)).x;
         },
     .blocks = 2,
     .threads = 1,
     .co_resident = true,
     .expect = Expect::error,
     .kind = Kind::stale},
    {.name = "the block before has written it, and ended",
     .kernel =
         [](Memory* m) {
           const float before = load_whole<float>(&m->number[0][0]);
           store_whole<float>(&m->number[0][0], before + 1);
         },
     .blocks = 2,
     .threads = 1,
     .expect = Expect::error,
     .kind = Kind::stale},

    // ---- launches ----
    {.name = "1025 threads",
     .kernel = shape_of_the_grid,
     .threads = 1025,
     .expect = Expect::error,
     .kind = Kind::bad_launch},
    {.name = "no block", .kernel = shape_of_the_grid, .blocks = 0, .expect = Expect::error, .kind = Kind::bad_launch},
    {.name = "a grid that is no multiple of the cluster",
     .kernel = shape_of_the_grid,
     .blocks = 3,
     .cluster = 2,
     .expect = Expect::error,
     .kind = Kind::bad_launch},
    {.name = "too much shared memory",
     .kernel = shape_of_the_grid,
     .expect = Expect::error,
     .kind = Kind::bad_launch,
     .shared_bytes = (227 << 10) + 1},
    {.name = "co-resident, and one block too many",
     .kernel = shape_of_the_grid,
     .blocks = 132 * 2 + 1,
     .threads = 1024,
     .co_resident = true,
     .expect = Expect::error,
     .kind = Kind::co_residency},
    {.name = "co-resident, and one cluster too many",
     .kernel = shape_of_the_grid,
     .blocks = 136,
     .threads = 32,
     .cluster = 4,
     .co_resident = true,
     .expect = Expect::error,
     .kind = Kind::co_residency,
     .shared_bytes = 200 << 10},
};

// Wrong only in the order of memory: every value is right in most orders. ThreadSanitizer has to find them.
const Case kRaces[] = {
    {.name = "no block barrier", .kernel = pass_to_neighbour<false>},
    {.name = "a shuffle for a warp barrier", .kernel = pass_to_lane<false>},
    {.name = "a flag without release or acquire", .kernel = hand_over<2>, .blocks = 2, .co_resident = true},
    {.name = "a flag without release", .kernel = hand_over<3>, .blocks = 2, .co_resident = true},
    {.name = "a flag without acquire", .kernel = hand_over<4>, .blocks = 2, .co_resident = true},
    {.name = "a write between the fence and the flag",
     .kernel =
         [](Memory* m) {
           if (blockIdx.x == 0) {
             fence<Scope::device>();
             m->number[0][0] = 1;
             store_relaxed<Scope::device>(&m->flag[0], 1);
           } else {
             while (!load_relaxed<Scope::device>(&m->flag[0])) {
             }
             fence<Scope::device>();
             m->number[1][0] = m->number[0][0];
           }
         },
     .blocks = 2,
     .threads = 1,
     .co_resident = true},
    {.name = "the last block adds up without fences", .kernel = last_block<false>, .blocks = 6},
    {.name = "blocks that run one after another write the same place",
     .kernel = [](Memory* m) { m->number[0][0] = 1; },
     .blocks = 6,
     .threads = 1},
    {.name = "threads of a warp write the same place", .kernel = [](Memory* m) { m->number[0][0] = 1; }, .threads = 2},
    {.name = "arrive where sync is needed",
     .kernel =
         [](Memory* m) {
           if (threadIdx.x < 32) row()[lane()] = 1;
           named_barrier_arrive(1, 64);
           if (threadIdx.x >= 32) m->number[0][lane()] = row()[lane()];
         }},
    {.name = "a peer's memory before the wait",
     .kernel =
         [](Memory* m) {
           row()[threadIdx.x] = 1;
           cluster_arrive();
           m->number[blockIdx.x][threadIdx.x] =
               load_peer<float>(peer_address(shared_address(&row()[threadIdx.x]), cluster_rank() ^ 1));
           cluster_wait();
         },
     .blocks = 2,
     .cluster = 2},
    {.name = "a buffer is filled anew while others still read it",
     .kernel =
         [](Memory* m) {
           for (int round = 0; round < 2; ++round) {
             row()[threadIdx.x] = 1;
             block_barrier();
             m->number[round][threadIdx.x] = row()[63 - threadIdx.x];
           }
         }},
    {.name = "a lock without fences",
     .kernel =
         [](Memory* m) {
           while (atomic_exchange(&m->flag[0], 1)) {
           }
           m->count[0] += 1;
           atomic_exchange(&m->flag[0], 0);
         },
     .blocks = 2,
     .threads = 1,
     .co_resident = true},
};

const Case kOverruns[] = {
    {.name = "a read past the dynamic memory", .kernel = [](Memory* m) { m->number[0][0] = row()[256]; }},
    {.name = "a read before it", .kernel = [](Memory* m) { m->number[0][0] = row()[-1]; }},
    {.name = "a read past a static object",
     .kernel = [](Memory* m) { m->number[0][0] = *reinterpret_cast<const float*>(&static_shared<Pair>() + 1); }},
    {.name = "a read past global memory",
     .kernel = [](Memory* m) { m->number[0][0] = reinterpret_cast<const float*>(m + 1)[threadIdx.x]; }},
    {.name = "a local array",
     .kernel =
         [](Memory* m) {
           volatile float here[4] = {};
           m->number[0][0] = here[threadIdx.x];
         }},
};

int failures = 0;

emulator::Report run_once(const Case& c, Memory& m, Order order, uint64_t seed) {
  std::memset(static_cast<void*>(&m), 0, sizeof m);
  emulator::options().order = order;
  emulator::options().seed = seed;
  emulator::options().print = false;
  const emulator::Shape shape = {dim3(c.blocks), dim3(c.threads), c.shared_bytes, c.cluster, c.co_resident};
  return emulator::run(shape, [&] { c.kernel(&m); });
}

// `seeds` 0: two runs. (A thread costs ThreadSanitizer half a millisecond.)
void try_case(const Case& c, unsigned seeds) {
  auto memory = std::make_unique<Memory>();
  unsigned runs = 0, found = 0, wrong = 0;
  std::string fault, example;
  for (const Order order : {Order::forward, Order::reverse, Order::random, Order::priorities}) {
    if (seeds == 0 && (order == Order::reverse || order == Order::random)) continue;
    for (unsigned seed = 1; seed <= (order < Order::random ? 1 : std::max(seeds, 1u)); ++seed, ++runs) {
      const emulator::Report report = run_once(c, *memory, order, seed);
      const std::string run = std::string(name(order)) + ", seed " + std::to_string(seed) + ": ";
      if (report.ok()) {
        wrong += c.holds && !c.holds(*memory);
      } else {
        ++found;
        if (report.kind != c.kind && report.kind != c.also) fault = run + report.text;
        const bool launched = report.kind != Kind::bad_launch && report.kind != Kind::co_residency;
        const bool placed = report.file.find("selftest_core") != std::string::npos && report.line > 0;
        // A pointer that overwrites a red zone has left no trace of where.
        if (launched && !placed && report.text.find("red zone") == std::string::npos)
          fault = run + "no place: " + report.text;
        if (example.empty()) example = report.text;
      }
    }
  }
  if (c.expect == Expect::right && wrong) fault = "wrong values";
  if (c.expect == Expect::wrong && !wrong) fault = "right values in all orders";
  if (c.expect == Expect::error && found != runs)
    fault = "found in " + std::to_string(found) + " of " + std::to_string(runs) + " runs";
  if (c.expect == Expect::sometimes && !found) fault = "never found";
  failures += !fault.empty();
  std::printf("%s %s: %s", fault.empty() ? "ok    " : "FAILED", c.name, fault.c_str());
  if (fault.empty() && c.expect == Expect::right) std::printf("%u runs", runs);
  if (fault.empty() && c.expect == Expect::wrong) std::printf("wrong values in %u of %u runs", wrong, runs);
  if (fault.empty() && found) std::printf("found in %u of %u runs\n       %s", found, runs, example.c_str());
  std::printf("\n");
}

// ---- what a table of cases cannot hold -------------------------------------------------------------------------------

void check(bool good, const char* what) {
  failures += !good;
  std::printf("%s %s\n", good ? "ok    " : "FAILED", what);
}

void indices(int* seen) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  ++seen[block * blockDim.x * blockDim.y * blockDim.z + thread];
}

void pointwise(float* y, const float* x, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) y[i] = 2 * x[i];
}

void many_arguments(double* out, const char* text, float narrow, int64_t wide) {
  *out = text[0] + narrow + static_cast<double>(wide);
}

void two_deadlocks(Memory* m) {
  if (threadIdx.x == 40) {
    while (!load_acquire<Scope::device>(&m->flag[0])) {
    }
  }
  if (threadIdx.x < 32) named_barrier_sync(4, 64);
  block_barrier();
}

void launches() {
  emulator::options() = {};
  emulator::options().print = false;
  std::vector<int> seen(3 * 4 * 5 * 2 * 3 * 4);
  bool good = launch({.grid = {3, 4, 5}, .block = {2, 3, 4}}, indices, seen.data()).ok();
  for (const int n : seen) good &= n == 1;
  check(good, "three dimensions: every thread of every block once");

  constexpr int kNumbers = 1000 * 256 - 7;
  std::vector<float> x(kNumbers, 1.5f), y(kNumbers + 1);
  good = launch({.grid = {1000}, .block = {256}}, pointwise, y.data(), x.data(), kNumbers).ok();
  for (int i = 0; i < kNumbers; ++i) good &= y[static_cast<size_t>(i)] == 3;
  check(good && y.back() == 0 && emulator::statistics().switches < 10, "a pointwise kernel takes no switch of fibers");

  double out = 0;
  good = launch({.grid = {1}, .block = {1}}, many_arguments, &out, "A", 0.5, 1).ok() && out == 66.5;
  check(good, "arguments are converted to the parameters' types");

  Memory memory = {};
  Status status = launch({.grid = {265}, .block = {1024}, .co_resident = true}, shape_of_the_grid, &memory);
  check(
      status.code == 720 &&
          status.text == "too many blocks in cooperative launch: 265 have to be resident at once, the device holds 264",
      "a grid that does not fit is refused, with both numbers");
  emulator::options().device.multiprocessors = 2;
  status = launch({.grid = {6}, .block = {64}, .shared_bytes = 220 << 10, .cluster = 2, .co_resident = true},
                  shape_of_the_grid, &memory);
  check(
      status.code == 720 &&
          status.text.find("6 (in clusters of 2) have to be resident at once, the device holds 2") != std::string::npos,
      "so are clusters, on a device that is described");
  status = launch({.grid = {1}, .block = {2000}}, shape_of_the_grid, &memory);
  check(status.code == 9 && status.text.find("invalid configuration argument") == 0,
        "an impossible launch: CUDA's words");
  status = launch({.grid = {1}, .block = {64}}, two_deadlocks, &memory);
  check(status.code == 719 && status.text.find("live-lock: ") == 0 &&
            status.text.find("32 threads wait in named_barrier_sync at selftest_core.cpp:") != std::string::npos &&
            status.text.find("block 0 threads 0-31") != std::string::npos &&
            status.text.find("block 0 threads 32-39, 41-63") != std::string::npos &&
            status.text.find("1 thread wait in load_acquire") != std::string::npos,
        "a report says where every thread waits");
  status = launch({.grid = {1}, .block = {64}}, shape_of_the_grid, &memory);
  check(status.ok(), "and the next launch is none the worse");

  // The same seed, the same run.
  emulator::options() = {};
  const auto trace = [](uint64_t seed) {
    Memory m = {};
    emulator::options().order = Order::random;
    emulator::options().seed = seed;
    launch({.grid = {4}, .block = {64}, .shared_bytes = 1024, .co_resident = true}, hand_over<0>, &m);
    return emulator::statistics().switches;
  };
  check(trace(5) == trace(5), "a run is a function of its seed");
}

template <size_t N>
int one_of(const Case (&cases)[N], const char* number) {
  const size_t n = static_cast<size_t>(std::atoi(number));
  if (n >= N) return 2;
  auto memory = std::make_unique<Memory>();
  const emulator::Report report = run_once(cases[n], *memory, Order::forward, 1);
  std::printf("%s: %s\n", cases[n].name, report.text.c_str());
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "all";
  if (what == "races") return std::printf("%zu\n", std::size(kRaces)), 0;
  if (what == "overruns") return std::printf("%zu\n", std::size(kOverruns)), 0;
  if (what == "race") return one_of(kRaces, arguments[2]);
  if (what == "overrun") return one_of(kOverruns, arguments[2]);
  for (const Case& c : kCases) {
    if (what == "legal" && (c.expect != Expect::right || c.blocks == kMany)) continue;
    try_case(c, what == "legal" ? 0 : 6);
  }
  if (what == "all") launches();
  return failures != 0;
}
