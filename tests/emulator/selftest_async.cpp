// tests/emulator/selftest_async.cpp: asynchronous copies and mbarriers of the emulator. A table of small protocols:
// every illegal one must be reported, as the right kind of error, in at least one order; every legal one never.
//
//   selftest_async           all of it
//   selftest_async legal     the legal protocols alone, in few runs: for the sanitizers
//   selftest_async races     how many races there are that only ThreadSanitizer can see
//   selftest_async races     how many races there are that only ThreadSanitizer can see
//   selftest_async race N    the N-th of them, from 0
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <string>
#include <vector>

#include "cuda/primitives.cuh"
#include "emulator/async.h"
#include "emulator/core.h"
#include "emulator/matrix.h"

namespace {

using namespace stacked_lstm;
using namespace stacked_lstm::cuda;
using emulator::Kind;
using emulator::Order;

constexpr uint32_t kRow = 64 * sizeof(float);  // bytes

struct Shared {
  alignas(128) float data[6][64];
  alignas(8) uint64_t barrier[4];
};

// What a case's kernel works on. `in` counts up from 0, `out` starts as NaN: a row of 64 numbers a block. a and b are
// the operands of a product in bf16.
struct Memory {
  alignas(128) float in[8][64];
  alignas(128) float out[8][64];
  alignas(128) uint16_t a[16][128];
  alignas(128) uint16_t b[8][128];
};

Shared& memory() { return dynamic_shared<Shared>(); }
uint32_t row(int i, int column = 0) { return shared_address(&memory().data[i][column]); }
uint32_t barrier(int i) { return shared_address(&memory().barrier[i]); }
unsigned thread() { return threadIdx.x; }

void init(int i, uint32_t count) {
  if (thread() == 0) {
    mbarrier_init(barrier(i), count);
    mbarrier_init_fence();
  }
  block_barrier();
}

void init_in_cluster(int i, uint32_t count) {
  if (thread() == 0) {
    mbarrier_init(barrier(i), count);
    mbarrier_init_fence();
  }
  cluster_barrier();
}

// Reads a row by ldmatrix, in the first warp; every element twice over.
void read_by_primitive(int i) {
  if (thread() >= 32) return;
  uint32_t r[4];
  load_matrix_x4(r, row(i) + thread() % 16 * 16);
}

void copy_row(Memory& m, int to, int from) {
  copy_async<4>(row(to, static_cast<int>(thread())), &m.in[from][thread()]);
}

void out_row(Memory& m, int i) { m.out[blockIdx.x][thread()] = memory().data[i][thread()]; }

uint32_t peer() { return cluster_rank() ^ 1; }

void work(int rounds) {
  for (int i = 0; i < rounds; ++i) warp_barrier();
}

// Global memory that instructions write, and bulk copies read: block 0 writes in[7], all blocks load it.
void write_for_bulk_loads(Memory& m) {
  if (blockIdx.x == 0) stored(&m.in[7][thread()]) = m.in[0][thread()];
}
void load_in_bulk(Memory& m, int i) {
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(i), kRow);
    bulk_load(row(0), m.in[7], kRow, barrier(i));
  }
  mbarrier_wait(barrier(i), 0);
  m.out[blockIdx.x][thread()] = memory().data[0][thread()] + static_cast<float>(blockIdx.x * 64);
}

// ---------------------------------------------------------------------------------------------------------- legal

void writes_then_loads_in_bulk(Memory& m) {
  init(0, 1);
  write_for_bulk_loads(m);
  async_proxy_fence();
  block_barrier();
  load_in_bulk(m, 0);
}
void writes_fenced_by_the_writer(Memory& m) {
  init_in_cluster(0, 1);
  write_for_bulk_loads(m);
  if (blockIdx.x == 0) async_proxy_fence();
  cluster_barrier();
  load_in_bulk(m, 0);
  cluster_barrier();
}
void writes_fenced_by_the_reader(Memory& m) {
  init_in_cluster(0, 1);
  write_for_bulk_loads(m);
  cluster_barrier();
  async_proxy_fence();
  block_barrier();
  load_in_bulk(m, 0);
  cluster_barrier();
}
// A bulk store to in[6], which the next block reads.
template <typename Between>
void stores_in_bulk_for_the_peer(Memory& m, Between between) {
  memory().data[0][thread()] = m.in[0][thread()];
  async_proxy_fence();
  block_barrier();
  if (thread() == 0 && blockIdx.x == 0) {
    bulk_store(m.in[6], row(0), kRow);
    bulk_commit();
  }
  between();
}
void stores_in_bulk_then_reads(Memory& m) {
  stores_in_bulk_for_the_peer(m, [] {
    if (thread() == 0) bulk_wait<0>();
    cluster_barrier();
  });
  m.out[blockIdx.x][thread()] = load_ordinary(&m.in[6][thread()]) + static_cast<float>(blockIdx.x * 64);
}
void loads_stores_over_it_and_loads_again(Memory& m) {
  init(0, 1);
  init(1, 1);
  const auto load = [&](int i) {
    if (thread() == 0) {
      mbarrier_arrive_expect(barrier(i), kRow);
      bulk_load(row(0), m.in[i], kRow, barrier(i));
    }
    mbarrier_wait(barrier(i), 0);
  };
  load(1);
  memory().data[0][thread()] += 1;
  async_proxy_fence();
  block_barrier();
  load(0);
  out_row(m, 0);
}
void pushes_in_bulk_to_itself(Memory& m) {
  init_in_cluster(0, 2);
  memory().data[1][thread()] = m.in[0][thread()];
  async_proxy_fence();
  block_barrier();
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), kRow);
    bulk_push(peer_address(row(0), 0), row(1), kRow, peer_address(barrier(0), 0));
    mbarrier_arrive_peer(peer_address(barrier(0), 0));
  }
  mbarrier_wait(barrier(0), 0);
  out_row(m, 0);
}

void cp_async_sizes(Memory& m) {
  const unsigned t = thread();
  copy_async<4>(row(0, static_cast<int>(t)), &m.in[0][t]);
  if (t < 32) copy_async<8>(row(1, static_cast<int>(2 * t)), &m.in[1][2 * t]);
  if (t < 16) copy_async<16>(row(2, static_cast<int>(4 * t)), &m.in[2][4 * t]);
  if (t < 16) copy_async<16>(row(3, static_cast<int>(4 * t)), &m.in[3][4 * t], static_cast<int>(t % 4) * 4);
  if (t < 16) copy_async<16>(row(4, static_cast<int>(4 * t)), &m.in[3][4 * t], 0);
  copy_async_commit();
  copy_async_wait<0>();
  block_barrier();
  const Shared& s = memory();
  const float third = t % 4 < t / 4 % 4 ? m.in[3][t] : 0;
  const bool right = s.data[0][t] == m.in[0][t] && s.data[1][t] == m.in[1][t] && s.data[2][t] == m.in[2][t] &&
                     s.data[3][t] == third && s.data[4][t] == 0;
  m.out[0][t] = right ? m.in[0][t] : -1;
}

void cp_async_groups(Memory& m) {
  copy_row(m, 0, 0);
  copy_async_commit();
  copy_row(m, 1, 1);
  copy_async_commit();
  copy_async_commit();  // an empty group is one
  copy_async_wait<2>();
  block_barrier();
  read_by_primitive(0);
  copy_async_wait<1>();
  block_barrier();
  read_by_primitive(1);
  out_row(m, 0);
}

void cp_async_to_barrier(Memory& m) {
  init(0, 64);
  copy_row(m, 0, 0);
  copy_async_arrive(barrier(0));
  mbarrier_wait(barrier(0), 0);
  read_by_primitive(0);
  out_row(m, 0);
}

void cp_async_to_barrier_then_exit(Memory& m) {
  init(0, 32);
  if (thread() < 32) {
    copy_async<8>(row(0, static_cast<int>(2 * thread())), &m.in[0][2 * thread()]);
    copy_async_arrive(barrier(0));
    return;
  }
  mbarrier_wait(barrier(0), 0);
  m.out[0][thread()] = memory().data[0][thread()];
  m.out[0][thread() - 32] = memory().data[0][thread() - 32];
}

void phases(Memory& m) {
  init(0, 64);
  for (unsigned phase = 0; phase < 5; ++phase) {
    memory().data[0][(thread() + phase) % 64] = m.in[0][(thread() + phase) % 64];
    mbarrier_arrive(barrier(0));
    mbarrier_wait(barrier(0), phase & 1);
    block_barrier();
  }
  mbarrier_wait(barrier(0), 0);  // the phase before the current one has ended
  out_row(m, 0);
}

void parity_of_the_phase_before_the_first(Memory& m) {
  init(0, 1);
  mbarrier_wait(barrier(0), 1);
  m.out[0][thread()] = m.in[0][thread()];
}

void bulk_load_expected_at_once(Memory& m) {
  init(0, 1);
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), kRow);
    bulk_load(row(0), m.in[0], kRow, barrier(0));
  }
  mbarrier_wait(barrier(0), 0);
  read_by_primitive(0);
  out_row(m, 0);
}

void bulk_load_expected_late(Memory& m) {
  init(0, 2);
  if (thread() == 0) {
    bulk_load(row(0), m.in[0], kRow / 2, barrier(0));
    work(0);
    mbarrier_expect(barrier(0), kRow);
    bulk_load(row(0, 32), &m.in[0][32], kRow / 2, barrier(0));
    mbarrier_arrive(barrier(0));
  }
  if (thread() == 1) mbarrier_arrive(barrier(0));
  mbarrier_wait(barrier(0), 0);
  out_row(m, 0);
}

void bulk_loads_twice_over(Memory& m) {
  init(0, 1);
  for (unsigned turn = 0; turn < 4; ++turn) {
    if (thread() == 0) {
      mbarrier_arrive_expect(barrier(0), kRow);
      bulk_load(row(0), m.in[(turn + 1) % 4], kRow, barrier(0));
    }
    mbarrier_wait(barrier(0), turn & 1);
    read_by_primitive(0);
    block_barrier();
  }
  out_row(m, 0);
}

void polled_barrier(Memory& m) {
  init(0, 1);
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), kRow);
    bulk_load(row(0), m.in[0], kRow, barrier(0));
  }
  while (!mbarrier_test(barrier(0), 0)) {
  }
  out_row(m, 0);
}

void one_look_and_on(Memory& m) {
  init(0, 1);
  const bool early = mbarrier_test(barrier(0), 0);
  block_barrier();
  if (thread() == 0) mbarrier_arrive(barrier(0));
  mbarrier_wait(barrier(0), 0);
  m.out[0][thread()] = early ? -1 : m.in[0][thread()];
}

void store_to_global(Memory& m) {
  memory().data[0][thread()] = m.in[0][thread()];
  async_proxy_fence();
  block_barrier();
  if (thread() == 0) {
    bulk_store(m.out[0], row(0), kRow / 2);
    bulk_commit();
    bulk_store(&m.out[0][32], row(0, 32), kRow / 2);
    bulk_commit();
    bulk_wait<1>();
    bulk_wait<0>();
  }
}

// The fence may be the storing thread's, after the barrier, too: it lies on the way from the writes to the copy.
void store_to_global_fenced_by_one(Memory& m) {
  memory().data[0][thread()] = m.in[0][thread()];
  block_barrier();
  if (thread() == 0) {
    async_proxy_fence();
    bulk_store(m.out[0], row(0), kRow);
    bulk_commit();
    bulk_wait<0>();
  }
}

void load_then_store(Memory& m) {
  init(0, 1);
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), kRow);
    bulk_load(row(0), m.in[0], kRow, barrier(0));
    mbarrier_wait(barrier(0), 0);
    bulk_store(m.out[0], row(0), kRow);
    bulk_commit();
    bulk_wait<0>();
  }
}

// What a copy has read may be overwritten when it has been waited for.
void store_then_load(Memory& m) {
  init(0, 1);
  if (thread() == 0) {
    bulk_store(m.out[1], row(0), kRow);
    bulk_commit();
    bulk_wait<0>();
    mbarrier_arrive_expect(barrier(0), kRow);
    bulk_load(row(0), m.in[0], kRow, barrier(0));
  }
  mbarrier_wait(barrier(0), 0);
  out_row(m, 0);
}

void invalidated_and_made_anew(Memory& m) {
  init(0, 64);
  mbarrier_arrive(barrier(0));
  mbarrier_wait(barrier(0), 0);
  block_barrier();
  if (thread() == 0) mbarrier_invalidate(barrier(0));
  block_barrier();
  init(0, 1);
  if (thread() == 5) mbarrier_arrive(barrier(0));
  mbarrier_wait(barrier(0), 0);
  block_barrier();
  if (thread() == 0) mbarrier_invalidate(barrier(0));
  block_barrier();
  if (thread() == 0) memory().barrier[0] = 0;  // ordinary memory again
  m.out[0][thread()] = m.in[0][thread()];
}

// Two blocks from here on; each pushes its row of `in`, and writes out the one that it got.
template <typename T>
void store_async_of(Memory& m) {
  constexpr unsigned kNumbers = sizeof(T) / sizeof(float);
  init_in_cluster(0, 1);
  if (thread() == 0) mbarrier_arrive_expect(barrier(0), kRow);
  if (thread() < 64 / kNumbers) {
    T value;
    std::memcpy(&value, &m.in[peer()][thread() * kNumbers], sizeof value);
    store_async(peer_address(row(0, static_cast<int>(thread() * kNumbers)), peer()), value,
                peer_address(barrier(0), peer()));
  }
  mbarrier_wait(barrier(0), 0);
  read_by_primitive(0);
  out_row(m, 0);
}

void store_async_4(Memory& m) { store_async_of<float>(m); }
void store_async_8(Memory& m) { store_async_of<double>(m); }
void store_async_16(Memory& m) { store_async_of<float4>(m); }

void arrive_at_the_peer(Memory& m) {
  init_in_cluster(0, 64);
  memory().data[0][thread()] = m.in[peer()][thread()];
  mbarrier_arrive_peer(peer_address(barrier(0), peer()));
  mbarrier_wait(barrier(0), 0);
  m.out[blockIdx.x][thread()] = load_peer<float>(peer_address(row(0, static_cast<int>(thread())), peer()));
  cluster_barrier();  // the peer's memory is there until it has been read
}

void push_in_bulk(Memory& m) {
  init_in_cluster(0, 1);
  memory().data[1][thread()] = m.in[peer()][thread()];
  async_proxy_fence();
  block_barrier();
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), kRow);
    bulk_push(peer_address(row(0), peer()), row(1), kRow, peer_address(barrier(0), peer()));
  }
  mbarrier_wait(barrier(0), 0);
  read_by_primitive(0);
  out_row(m, 0);
  cluster_barrier();
}

// One block loads for both: the target may be a peer's.
void load_for_the_peer(Memory& m) {
  init_in_cluster(0, 1);
  if (thread() == 0) mbarrier_arrive_expect(barrier(0), kRow);
  if (thread() == 0 && cluster_rank() == 0) {
    for (uint32_t rank = 0; rank < 2; ++rank) {
      bulk_load(peer_address(row(0), rank), m.in[rank], kRow, peer_address(barrier(0), rank));
    }
  }
  mbarrier_wait(barrier(0), 0);
  out_row(m, 0);
  cluster_barrier();
}

void written_at_the_peer_then_pushed_back(Memory& m) {
  init_in_cluster(0, 1);
  store_peer(peer_address(row(1, static_cast<int>(thread())), peer()), m.in[blockIdx.x][thread()]);
  async_proxy_fence();
  cluster_barrier();
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), kRow);
    bulk_push(peer_address(row(0), peer()), row(1), kRow, peer_address(barrier(0), peer()));
  }
  mbarrier_wait(barrier(0), 0);
  out_row(m, 0);
  cluster_barrier();
}

// -------------------------------------------------------------------------------------------------- larger, legal

// A product of 16 x 128 by 128 x 8 in bf16: chunks of 16 columns come by cp.async into one of two buffers while the
// other one is multiplied.
void product_pipeline(Memory& m) {
  constexpr int kChunks = 8;
  constexpr int kStride = 24;  // elements a row: 48 bytes, so that ldmatrix's rows lie in different banks
  struct Tiles {
    alignas(128) uint16_t a[2][16][kStride];
    alignas(128) uint16_t b[2][8][kStride];
  };
  Tiles& tiles = static_shared<Tiles>();
  const unsigned t = thread();
  const auto load = [&](int chunk) {
    if (t < 32) {
      const unsigned r = t / 2, half = t % 2 * 8;
      copy_async<16>(shared_address(&tiles.a[chunk % 2][r][half]), &m.a[r][static_cast<unsigned>(chunk) * 16 + half]);
    } else if (t < 48) {
      const unsigned r = (t - 32) / 2, half = t % 2 * 8;
      copy_async<16>(shared_address(&tiles.b[chunk % 2][r][half]), &m.b[r][static_cast<unsigned>(chunk) * 16 + half]);
    }
    copy_async_commit();
  };
  float d[4] = {};
  load(0);
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    if (chunk + 1 < kChunks) {
      load(chunk + 1);
      copy_async_wait<1>();  // this chunk is here, as far as this thread copied it, …
    } else {
      copy_async_wait<0>();
    }
    block_barrier();  // … and as far as all did.
    if (t < 32) {
      uint32_t fragment_a[4], fragment_b[2];
      load_matrix_x4(fragment_a, shared_address(&tiles.a[chunk % 2][t % 16][t / 16 * 8]));
      load_matrix_x2(fragment_b, shared_address(&tiles.b[chunk % 2][t % 8][t / 8 % 2 * 8]));
      mma_bf16(d, fragment_a, fragment_b);
    }
    block_barrier();  // the buffer has been read: it may be loaded into
  }
  if (t >= 32) return;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned r = t / 4 + i / 2 * 8, c = t % 4 * 2 + i % 2;
    (&m.out[0][0])[r * 8 + c] = d[i];
  }
}

// Warp 0 produces, warp 1 consumes: a ring of two rows, each with an mbarrier "full" and one "empty".
void producer_and_consumer(Memory& m) {
  constexpr unsigned kSlots = 2, kTurns = 9;
  const auto full = [](unsigned slot) { return barrier(static_cast<int>(slot)); };
  const auto empty = [](unsigned slot) { return barrier(static_cast<int>(slot + kSlots)); };
  if (thread() == 0) {
    for (unsigned slot = 0; slot < kSlots; ++slot) {
      mbarrier_init(full(slot), 1);
      mbarrier_init(empty(slot), 32);
    }
    mbarrier_init_fence();
  }
  block_barrier();
  if (thread() < 32) {
    // One thread alone: were all lanes to wait, a slow one could find the phase over and the next one too.
    for (unsigned turn = 0; turn < kTurns && thread() == 0; ++turn) {
      const unsigned slot = turn % kSlots, round = turn / kSlots;
      mbarrier_wait(empty(slot), (round & 1) ^ 1);  // passes at once in the first round
      mbarrier_arrive_expect(full(slot), kRow);
      bulk_load(row(static_cast<int>(slot)), m.in[turn % 8], kRow, full(slot));
    }
    return;
  }
  float sum[2] = {};
  const unsigned lane = thread() - 32;
  for (unsigned turn = 0; turn < kTurns; ++turn) {
    const unsigned slot = turn % kSlots, round = turn / kSlots;
    mbarrier_wait(full(slot), round & 1);
    for (unsigned i = 0; i < 2; ++i) sum[i] += memory().data[slot][lane + 32 * i];
    mbarrier_arrive(empty(slot));
  }
  for (unsigned i = 0; i < 2; ++i) m.out[0][lane + 32 * i] = sum[i];
}

// Four blocks: each pushes its row to the next one, adds its own, and so on, until every row has come to every block.
// Two buffers, used in turn. A block pushes into the buffer that its neighbour read a step before; so the neighbour
// tells, on the mbarrier "free", that it has.
void push_ring(Memory& m) {
  constexpr unsigned kSteps = 6;
  const uint32_t next = (cluster_rank() + 1) % cluster_size();
  const uint32_t before = (cluster_rank() + cluster_size() - 1) % cluster_size();
  if (thread() == 0) {
    for (int i = 0; i < 2; ++i) mbarrier_init(barrier(i), 1);   // a row is here
    for (int i = 2; i < 4; ++i) mbarrier_init(barrier(i), 64);  // the next block's buffer is free
    mbarrier_init_fence();
  }
  cluster_barrier();
  float value = m.in[cluster_rank()][thread()], sum = value;
  for (unsigned step = 0; step < kSteps; ++step) {
    const int buffer = static_cast<int>(step % 2);
    const unsigned round = step / 2;
    if (thread() == 0) mbarrier_arrive_expect(barrier(buffer), kRow);
    if (round > 0) mbarrier_wait(barrier(2 + buffer), (round - 1) & 1);  // the next block has read this buffer
    store_async(peer_address(row(buffer, static_cast<int>(thread())), next), value,
                peer_address(barrier(buffer), next));
    mbarrier_wait(barrier(buffer), round & 1);
    value = memory().data[buffer][thread()];
    sum += value;
    if (step + 2 < kSteps) mbarrier_arrive_peer(peer_address(barrier(2 + buffer), before));
  }
  m.out[blockIdx.x][thread()] = sum;
  cluster_barrier();
}

// -------------------------------------------------------------------------------------------------------- illegal

void used_before_init(Memory&) { mbarrier_arrive(barrier(0)); }

void waited_before_init(Memory&) {
  if (thread() == 0) mbarrier_init(barrier(0), 1);
  if (thread() == 0) mbarrier_arrive(barrier(0));
  mbarrier_wait(barrier(0), 0);
}

void initialised_twice(Memory&) { mbarrier_init(barrier(0), 64); }

void count_of_zero(Memory&) { init(0, 0); }

void too_many_arrivals(Memory& m) {
  init(0, 2);
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), 2 * kRow);
    bulk_load(row(0), m.in[0], kRow, barrier(0));
  }
  if (thread() < 3 && thread() > 0) mbarrier_arrive(barrier(0));
  block_barrier();
  if (thread() == 0) bulk_load(row(1), m.in[0], kRow, barrier(0));
  mbarrier_wait(barrier(0), 0);
}

void more_bytes_than_expected(Memory& m) {
  init(0, 1);
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), kRow - 16);
    bulk_load(row(0), m.in[0], kRow, barrier(0));
  }
  mbarrier_wait(barrier(0), 0);
}

void bytes_nobody_expects(Memory& m) {
  init(0, 1);
  if (thread() == 0) {
    bulk_load(row(0), m.in[0], kRow, barrier(0));
    mbarrier_arrive(barrier(0));
  }
  mbarrier_wait(barrier(0), 0);
}

void count_out_of_range(Memory&) {
  init(0, 3);
  if (thread() < 2) mbarrier_arrive_expect(barrier(0), (1 << 20) - 1);
}

void init_not_fenced(Memory& m) {
  if (thread() == 0) mbarrier_init(barrier(0), 1);
  block_barrier();
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), kRow);
    bulk_load(row(0), m.in[0], kRow, barrier(0));
  }
  mbarrier_wait(barrier(0), 0);
}

void init_not_fenced_in_a_cluster(Memory& m) {
  if (thread() == 0) mbarrier_init(barrier(0), 1);
  cluster_barrier();  // the peers come after the init, but their copies go another way
  if (thread() == 0) mbarrier_arrive_expect(barrier(0), kRow);
  store_async(peer_address(row(0, static_cast<int>(thread())), peer()), m.in[peer()][thread()],
              peer_address(barrier(0), peer()));
  mbarrier_wait(barrier(0), 0);
  out_row(m, 0);
}

void signal_before_the_peers_init(Memory& m) {
  if (thread() == 0) {
    mbarrier_init(barrier(0), 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(barrier(0), kRow);
  }
  block_barrier();  // and not the cluster's
  store_async(peer_address(row(0, static_cast<int>(thread())), peer()), m.in[0][thread()],
              peer_address(barrier(0), peer()));
  mbarrier_wait(barrier(0), 0);
  cluster_barrier();
}

void another_thread_fences(Memory& m) {
  if (thread() == 0) mbarrier_init(barrier(0), 1);
  if (thread() == 1) mbarrier_init_fence();
  block_barrier();
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), kRow);
    bulk_load(row(0), m.in[0], kRow, barrier(0));
  }
  mbarrier_wait(barrier(0), 0);
}

void barrier_in_another_block(Memory& m) {
  init_in_cluster(0, 1);
  if (thread() == 0) mbarrier_arrive_expect(barrier(0), kRow);
  store_async(peer_address(row(0, static_cast<int>(thread())), peer()), m.in[0][thread()], barrier(0));
  mbarrier_wait(barrier(0), 0);
}

void same_target_twice(Memory& m) {
  init_in_cluster(0, 1);
  if (thread() == 0) mbarrier_arrive_expect(barrier(0), kRow);
  store_async(peer_address(row(0, static_cast<int>(thread() / 2)), peer()), m.in[0][thread()],
              peer_address(barrier(0), peer()));
  mbarrier_wait(barrier(0), 0);
  cluster_barrier();
}

void push_into_a_block_that_has_gone(Memory& m) {
  init_in_cluster(0, 1);
  if (cluster_rank() == 1) return;
  work(40);
  store_async(peer_address(row(0, static_cast<int>(thread())), 1), m.in[0][thread()], peer_address(barrier(0), 1));
}

void exit_before_the_bytes(Memory&) {
  init(0, 1);
  if (thread() == 0) mbarrier_arrive_expect(barrier(0), 16);
}

void exit_before_the_load(Memory& m) {
  init(0, 1);
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), kRow);
    bulk_load(row(0), m.in[0], kRow, barrier(0));
  }
}

void exit_while_the_peer_reads_it(Memory& m) {
  init_in_cluster(0, 1);
  if (cluster_rank() == 0) {
    memory().data[1][thread()] = 0;
    async_proxy_fence();
    block_barrier();
    if (thread() == 0) bulk_push(peer_address(row(0), 1), row(1), kRow, peer_address(barrier(0), 1));
    return;
  }
  if (thread() == 0) mbarrier_arrive_expect(barrier(0), kRow);
  mbarrier_wait(barrier(0), 0);
  out_row(m, 0);
}

void exit_without_a_wait(Memory& m) {
  copy_row(m, 0, 0);
  copy_async_commit();
}

void exit_without_a_bulk_wait(Memory& m) {
  memory().data[0][thread()] = 0;
  async_proxy_fence();
  block_barrier();
  if (thread() != 0) return;
  bulk_store(m.out[0], row(0), kRow);
  bulk_commit();
}

void waits_for_nobody(Memory&) {
  init(0, 2);
  if (thread() == 0) mbarrier_arrive(barrier(0));
  mbarrier_wait(barrier(0), 0);
}

void wrong_parity(Memory&) {
  init(0, 64);
  mbarrier_arrive(barrier(0));
  mbarrier_wait(barrier(0), 0);
  mbarrier_wait(barrier(0), 1);
}

void two_phases_behind(Memory&) {
  init(0, 32);
  if (thread() < 32) {
    for (unsigned phase = 0; phase < 2; ++phase) {
      mbarrier_arrive(barrier(0));
      mbarrier_wait(barrier(0), phase);
    }
  } else {
    mbarrier_wait(barrier(0), 0);
  }
}

void polls_for_ever(Memory&) {
  init(0, 1);
  while (!mbarrier_test(barrier(0), 0)) {
  }
}

void misaligned_copy_target(Memory& m) {
  if (thread() == 0) copy_async<16>(row(0, 1), m.in[0]);
  copy_async_wait<0>();
}
void misaligned_copy_source(Memory& m) {
  if (thread() == 0) copy_async<8>(row(0), &m.in[0][1]);
}
void misaligned_barrier(Memory&) {
  if (thread() == 0) mbarrier_init(barrier(0) + 4, 1);
}
void misaligned_bulk_target(Memory& m) {
  init(0, 1);
  if (thread() == 0) bulk_load(row(0, 2), m.in[0], 32, barrier(0));
}
void misaligned_bulk_source(Memory& m) {
  init(0, 1);
  if (thread() == 0) bulk_load(row(0), &m.in[0][2], 32, barrier(0));
}
void misaligned_store_async(Memory&) {
  init_in_cluster(0, 1);
  if (thread() == 0) store_async(peer_address(row(0, 1), peer()), 1.0, peer_address(barrier(0), peer()));
  cluster_barrier();
}
void odd_bulk_size(Memory& m) {
  init(0, 1);
  if (thread() == 0) bulk_load(row(0), m.in[0], 24, barrier(0));
}
void bulk_of_nothing(Memory& m) {
  init(0, 1);
  if (thread() == 0) bulk_load(row(0), m.in[0], 0, barrier(0));
}
void reads_more_than_it_copies(Memory& m) {
  if (thread() == 0) copy_async<4>(row(0), m.in[0], 8);
}
void is_given_the_size_of_the_copy(Memory& m) {
  if (thread() == 0) copy_async<16>(row(0), m.in[0], 16);
}
void is_given_less_than_nothing(Memory& m) {
  if (thread() == 0) copy_async<8>(row(0), m.in[0], -4);
}
void copy_out_of_bounds(Memory& m) {
  if (thread() == 0) copy_async<16>(row(0) + 4096, m.in[0]);
}
void bulk_out_of_bounds(Memory& m) {
  init(0, 1);
  if (thread() == 0) bulk_load(row(5), m.in[0], 2 * kRow, barrier(0));
}
void copy_into_the_peer(Memory& m) {
  if (thread() == 0) copy_async<16>(peer_address(row(0), peer()), m.in[0]);
  cluster_barrier();
}
void wait_on_the_peers_barrier(Memory&) {
  init_in_cluster(0, 1);
  if (thread() == 0) mbarrier_arrive(barrier(0));
  mbarrier_wait(peer_address(barrier(0), peer()), 0);
  cluster_barrier();
}

void reads_a_copy_early(Memory& m) {
  copy_row(m, 0, 0);
  copy_async_commit();
  read_by_primitive(0);
  copy_async_wait<0>();
}
void waits_for_one_group_too_few(Memory& m) {
  copy_row(m, 0, 0);
  copy_async_commit();
  copy_async_wait<1>();
  block_barrier();
  read_by_primitive(0);
  copy_async_wait<0>();
}
void forgets_to_commit(Memory& m) {
  copy_row(m, 0, 0);
  copy_async_wait<0>();
  block_barrier();
  read_by_primitive(0);
  copy_async_commit();
  copy_async_wait<0>();
}
void reads_a_load_early(Memory& m) {
  init(0, 1);
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), kRow);
    bulk_load(row(0), m.in[0], kRow, barrier(0));
  }
  block_barrier();
  read_by_primitive(0);
  mbarrier_wait(barrier(0), 0);
}
void reads_what_landed_in_an_open_phase(Memory& m) {
  init(0, 2);
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), kRow);
    bulk_load(row(0), m.in[0], kRow, barrier(0));
  }
  block_barrier();
  work(60);
  read_by_primitive(0);
  block_barrier();
  if (thread() == 0) mbarrier_arrive(barrier(0));
  mbarrier_wait(barrier(0), 0);
}
void loads_from_a_peer_early(Memory& m) {
  init_in_cluster(0, 1);
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), kRow);
    bulk_load(row(0), m.in[0], kRow, barrier(0));
  }
  cluster_barrier();
  load_peer<float>(peer_address(row(0), peer()));
  mbarrier_wait(barrier(0), 0);
  cluster_barrier();
}
void pushes_what_is_still_coming(Memory& m) {
  init_in_cluster(0, 1);
  init_in_cluster(1, 1);
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), kRow);
    mbarrier_arrive_expect(barrier(1), kRow);
    bulk_load(row(0), m.in[0], kRow, barrier(0));
    bulk_push(peer_address(row(1), peer()), row(0), kRow, peer_address(barrier(1), peer()));
  }
  mbarrier_wait(barrier(1), 0);
  cluster_barrier();
}
void pushes_over_what_is_still_read(Memory& m) {
  init_in_cluster(0, 1);
  init_in_cluster(1, 1);
  const auto push = [&](int i) {
    if (thread() == 0) mbarrier_arrive_expect(barrier(i), kRow);
    store_async(peer_address(row(0, static_cast<int>(thread())), peer()), m.in[0][thread()],
                peer_address(barrier(i), peer()));
  };
  push(0);
  mbarrier_wait(barrier(0), 0);
  push(1);  // the peer may not have read the first
  if (thread() < 32) {
    for (int i = 0; i < 10; ++i) {
      warp_barrier();
      read_by_primitive(0);
    }
  }
  mbarrier_wait(barrier(1), 0);
  cluster_barrier();
}
void pushes_over_a_copys_source(Memory& m) {
  init_in_cluster(0, 1);
  memory().data[1][thread()] = 0;
  async_proxy_fence();
  block_barrier();
  if (cluster_rank() == 0 && thread() == 0) {
    mbarrier_arrive_expect(barrier(0), kRow);
    bulk_store(m.out[0], row(1), kRow);
    bulk_commit();
  }
  cluster_barrier();
  if (cluster_rank() == 1) {
    store_async(peer_address(row(1, static_cast<int>(thread())), 0), 1.0f, peer_address(barrier(0), 0));
  }
  cluster_barrier();
  if (thread() == 0) bulk_wait<0>();
  if (cluster_rank() == 0) mbarrier_wait(barrier(0), 0);
}
void stores_into_a_peer_over_a_copy(Memory& m) {
  init_in_cluster(0, 1);
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), kRow);
    bulk_load(row(0), m.in[0], kRow, barrier(0));
  }
  cluster_barrier();
  store_peer(peer_address(row(0, static_cast<int>(thread())), peer()), 1.0f);
  mbarrier_wait(barrier(0), 0);
  cluster_barrier();
}
void two_copies_into_one_place(Memory& m) {
  copy_row(m, 0, 0);
  block_barrier();
  if (thread() == 0) copy_async<16>(row(0), m.in[1]);
  copy_async_commit();
  copy_async_wait<0>();
}
void stores_over_a_copys_target(Memory& m) {
  copy_row(m, 0, 0);
  copy_async_commit();
  memory().data[0][thread()] = 0;
  copy_async_wait<0>();
}
void stores_over_a_copys_source(Memory& m) {
  memory().data[0][thread()] = 0;
  async_proxy_fence();
  block_barrier();
  if (thread() == 0) {
    bulk_store(m.out[0], row(0), kRow);
    bulk_commit();
  }
  block_barrier();
  memory().data[0][thread()] = 1;
  block_barrier();
  if (thread() == 0) bulk_wait<0>();
}
void stores_over_a_global_source(Memory& m) {
  copy_row(m, 0, 0);
  copy_async_commit();
  m.in[0][thread()] = -1;
  copy_async_wait<0>();
}

void loads_what_was_written_without_a_proxy_fence(Memory& m) {
  init(0, 1);
  write_for_bulk_loads(m);
  block_barrier();
  load_in_bulk(m, 0);
}
void fences_the_proxy_before_the_write(Memory& m) {
  init_in_cluster(0, 1);
  async_proxy_fence();
  cluster_barrier();
  write_for_bulk_loads(m);
  cluster_barrier();
  load_in_bulk(m, 0);
  cluster_barrier();
}
// An mbarrier orders shared memory: what the peer wrote to global memory before it arrived is not ordered.
template <typename Read>
void reads_behind_the_peers_arrival(Memory& m, Read read) {
  init_in_cluster(0, 64);
  if (blockIdx.x == 0) {
    stored(&m.in[7][thread()]) = 1.0f;
    async_proxy_fence();
    mbarrier_arrive_peer(peer_address(barrier(0), 1));
  } else {
    mbarrier_wait(barrier(0), 0);
    read();
    copy_async_commit();
    copy_async_wait<0>();
  }
  cluster_barrier();
}
void loads_behind_the_peers_arrival(Memory& m) {
  reads_behind_the_peers_arrival(m, [&] { m.out[1][thread()] = load_ordinary(&m.in[7][thread()]); });
}
void copies_4_behind_the_peers_arrival(Memory& m) {
  reads_behind_the_peers_arrival(m, [&] { copy_row(m, 0, 7); });
}
void copies_16_behind_the_peers_arrival(Memory& m) {
  reads_behind_the_peers_arrival(m, [&] {
    if (thread() < 16) copy_async<16>(row(0, static_cast<int>(4 * thread())), &m.in[7][4 * thread()]);
  });
}
void loads_in_bulk_behind_the_peers_arrival(Memory& m) {
  init_in_cluster(1, 1);
  reads_behind_the_peers_arrival(m, [&] { load_in_bulk(m, 1); });
}
void reads_a_bulk_store_early(Memory& m) {
  stores_in_bulk_for_the_peer(m, [] { block_barrier(); });
  m.out[0][thread()] = load_l2(&m.in[6][thread()]);
  if (thread() == 0) bulk_wait<0>();
}
void reads_a_bulk_store_unacquired(Memory& m) {
  init_in_cluster(0, 64);
  stores_in_bulk_for_the_peer(m, [] {
    if (blockIdx.x == 0) {
      if (thread() == 0) bulk_wait<0>();
      mbarrier_arrive_peer(peer_address(barrier(0), 1));
    } else {
      mbarrier_wait(barrier(0), 0);
    }
  });
  if (blockIdx.x == 1) m.out[1][thread()] = load_l2(&m.in[6][thread()]);
  cluster_barrier();
}
void stores_in_bulk_over_constants(Memory& m) {
  m.out[0][thread()] = load_readonly(&m.in[6][thread()]);
  stores_in_bulk_for_the_peer(m, [] {});
  if (thread() == 0) bulk_wait<0>();
}
void pushes_in_a_cluster_of_one(Memory& m) {
  init_in_cluster(0, 1);
  if (thread() == 0) mbarrier_arrive_expect(barrier(0), kRow);
  store_async(peer_address(row(0, static_cast<int>(thread())), 0), m.in[0][thread()], peer_address(barrier(0), 0));
  mbarrier_wait(barrier(0), 0);
}

void pushes_without_a_proxy_fence(Memory& m) {
  init_in_cluster(0, 1);
  memory().data[1][thread()] = m.in[0][thread()];
  block_barrier();
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), kRow);
    bulk_push(peer_address(row(0), peer()), row(1), kRow, peer_address(barrier(0), peer()));
  }
  mbarrier_wait(barrier(0), 0);
  cluster_barrier();
}
void stores_without_a_proxy_fence(Memory& m) {
  async_proxy_fence();  // too early
  memory().data[0][thread()] = m.in[0][thread()];
  block_barrier();
  if (thread() == 0) {
    bulk_store(m.out[0], row(0), kRow);
    bulk_commit();
    bulk_wait<0>();
  }
}
void stores_a_cp_async_without_a_proxy_fence(Memory& m) {
  copy_row(m, 0, 1);
  copy_async_commit();
  copy_async_wait<0>();
  block_barrier();
  if (thread() == 0) {
    bulk_store(m.out[0], row(0), kRow);
    bulk_commit();
    bulk_wait<0>();
  }
}
void loads_over_stores_without_a_proxy_fence(Memory& m) {
  init(0, 1);
  memory().data[0][thread()] = 0;
  block_barrier();
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), kRow);
    bulk_load(row(0), m.in[0], kRow, barrier(0));
  }
  mbarrier_wait(barrier(0), 0);
}

void stores_over_a_barrier(Memory&) {
  init(0, 1);
  if (thread() == 0) memory().barrier[0] = 0;
  block_barrier();
  if (thread() == 0) mbarrier_arrive(barrier(0));
}
void copies_over_a_barrier(Memory& m) {
  init(0, 1);
  if (thread() == 0) copy_async<8>(barrier(0), m.in[0]);
  copy_async_wait<0>();
}
void inits_over_a_copy(Memory& m) {
  if (thread() == 0) {
    copy_async<8>(barrier(0), m.in[0]);
    mbarrier_init(barrier(0), 1);
  }
}
void invalidated_in_use(Memory&) {
  init(0, 1);
  if (thread() == 0) {
    mbarrier_expect(barrier(0), 16);
    mbarrier_invalidate(barrier(0));
  }
}
void used_after_its_end(Memory&) {
  init(0, 1);
  if (thread() == 0) mbarrier_invalidate(barrier(0));
  block_barrier();
  if (thread() == 0) mbarrier_arrive(barrier(0));
}

// -------------------------------------------------------------------------------- what ordinary instructions see early

// Every element that thread 0 reads while the copy is under way, in one row of `out`.
void look(Memory& m, const float* at) {
  for (int i = 0; i < 64; ++i) m.out[blockIdx.x][i] = at[i];
}
void looks_at_cp_async(Memory& m) {
  if (thread() != 0) return;
  for (int i = 0; i < 64; i += 4) copy_async<16>(row(0, i), &m.in[0][i], i % 8);
  copy_async_commit();
  look(m, memory().data[0]);
  copy_async_wait<0>();
}
void looks_at_a_bulk_load(Memory& m) {
  init(0, 1);
  if (thread() != 0) return;
  mbarrier_arrive_expect(barrier(0), kRow);
  bulk_load(row(0), m.in[0], kRow, barrier(0));
  look(m, memory().data[0]);
  mbarrier_wait(barrier(0), 0);
}
void looks_at_a_bulk_store(Memory& m) {
  memory().data[0][thread()] = 1;
  async_proxy_fence();
  block_barrier();
  if (thread() != 0) return;
  bulk_store(m.out[1], row(0), kRow);
  bulk_commit();
  look(m, m.out[1]);
  bulk_wait<0>();
}
void looks_at_a_push(Memory& m) {
  init_in_cluster(0, 1);
  if (thread() == 0) mbarrier_arrive_expect(barrier(0), kRow);
  store_async(peer_address(row(0, static_cast<int>(thread())), peer()), 1.0f, peer_address(barrier(0), peer()));
  cluster_barrier();
  if (thread() == 0) look(m, memory().data[0]);
  mbarrier_wait(barrier(0), 0);
  cluster_barrier();
}

// ----------------------------------------------------------------------------------- races, for ThreadSanitizer alone

// In this order of threads all numbers are right: what is missing is seen only as a missing happens-before.
void no_barrier_after_the_wait(Memory& m) {
  copy_row(m, 0, 0);
  copy_async_commit();
  copy_async_wait<0>();
  if (thread() == 0) work(0);
  m.out[0][thread()] = memory().data[0][thread() ^ 1];
}
void store_without_waiting_for_the_readers(Memory& m) {
  init(0, 1);
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), kRow);
    bulk_load(row(0), m.in[0], kRow, barrier(0));
  }
  mbarrier_wait(barrier(0), 0);
  m.out[0][thread()] = memory().data[0][thread()];
  if (thread() == 63) memory().data[0][0] = 1;
}
void load_without_waiting_for_the_readers(Memory& m) {
  init(0, 1);
  const auto load = [&] {
    if (thread() != 0) return;
    mbarrier_arrive_expect(barrier(0), kRow);
    bulk_load(row(0), m.in[0], kRow, barrier(0));
  };
  load();
  mbarrier_wait(barrier(0), 0);
  m.out[0][thread()] = memory().data[0][thread()];
  load();
  mbarrier_wait(barrier(0), 1);
}
void init_without_a_barrier(Memory& m) {
  if (thread() == 0) mbarrier_init(barrier(0), 64);
  mbarrier_arrive(barrier(0));
  m.out[0][thread()] = 0;
}

// ------------------------------------------------------------------------------------------------------------ table

enum class Result { row_of_its_own, product, sum_of_turns, sum_of_ring };

struct Case {
  const char* name;
  void (*kernel)(Memory&);
  unsigned blocks;
  Kind kind = Kind::none;  // what is to be found; none: legal
  Kind also = Kind::none;  // some orders may find this instead
  Result result = Result::row_of_its_own;
};

const Case kCases[] = {
    {"cp.async of all sizes, with zeros", cp_async_sizes, 1},
    {"cp.async in groups", cp_async_groups, 1},
    {"cp.async announced by an mbarrier", cp_async_to_barrier, 1},
    {"cp.async announced after the thread's exit", cp_async_to_barrier_then_exit, 1},
    {"mbarrier phases", phases, 1},
    {"a fresh mbarrier's phase before the first", parity_of_the_phase_before_the_first, 1},
    {"bulk load, expected at once", bulk_load_expected_at_once, 1},
    {"bulk load, expected late", bulk_load_expected_late, 1},
    {"bulk loads into one place in turn", bulk_loads_twice_over, 1},
    {"mbarrier polled", polled_barrier, 1},
    {"mbarrier looked at once", one_look_and_on, 1},
    {"bulk store", store_to_global, 1},
    {"bulk store, fenced by one thread", store_to_global_fenced_by_one, 1},
    {"bulk load, then bulk store", load_then_store, 1},
    {"bulk store, then bulk load over its source", store_then_load, 1},
    {"mbarrier invalidated and made anew", invalidated_and_made_anew, 1},
    {"st.async of 4 bytes", store_async_4, 2},
    {"st.async of 8 bytes", store_async_8, 2},
    {"st.async of 16 bytes", store_async_16, 2},
    {"arrival at the peer", arrive_at_the_peer, 2},
    {"bulk push", push_in_bulk, 2},
    {"bulk load for the peer", load_for_the_peer, 2},
    {"written at the peer, fenced there, pushed back", written_at_the_peer_then_pushed_back, 2},
    {"bulk load of what the block has written", writes_then_loads_in_bulk, 1},
    {"bulk load of what a peer has written, and fenced", writes_fenced_by_the_writer, 2},
    {"bulk load of what a peer has written, fenced by the reader", writes_fenced_by_the_reader, 2},
    {"bulk store, read by a peer", stores_in_bulk_then_reads, 2},
    {"bulk load, stores over it, bulk load", loads_stores_over_it_and_loads_again, 1},
    {"bulk push and arrival in a cluster of one", pushes_in_bulk_to_itself, 1},
    {"double-buffered cp.async and mma", product_pipeline, 1, Kind::none, Kind::none, Result::product},
    {"ring of mbarriers", producer_and_consumer, 1, Kind::none, Kind::none, Result::sum_of_turns},
    {"ring of pushes", push_ring, 4, Kind::none, Kind::none, Result::sum_of_ring},

    {"mbarrier used before its init", used_before_init, 1, Kind::async_misuse},
    {"mbarrier waited for before its init", waited_before_init, 1, Kind::async_misuse},
    {"mbarrier initialised twice", initialised_twice, 1, Kind::async_misuse},
    {"mbarrier for nobody", count_of_zero, 1, Kind::async_misuse},
    {"more arrivals than the count", too_many_arrivals, 1, Kind::phase_overrun, Kind::outstanding_at_exit},
    {"more bytes than expected", more_bytes_than_expected, 1, Kind::phase_overrun},
    {"bytes that nobody expects", bytes_nobody_expects, 1, Kind::phase_overrun, Kind::outstanding_at_exit},
    {"transaction count out of range", count_out_of_range, 1, Kind::phase_overrun},
    {"init not visible to the copy engine", init_not_fenced, 1, Kind::async_misuse},
    {"init not fenced, in a cluster", init_not_fenced_in_a_cluster, 2, Kind::async_misuse},
    {"init not visible to the peer", signal_before_the_peers_init, 2, Kind::async_misuse},
    {"init fenced by another thread", another_thread_fences, 1, Kind::async_misuse},
    {"data and mbarrier in different blocks", barrier_in_another_block, 2, Kind::async_misuse},
    {"one target twice in a phase", same_target_twice, 2, Kind::phase_overrun},
    {"push into a block that has gone", push_into_a_block_that_has_gone, 2, Kind::peer_gone, Kind::outstanding_at_exit},
    {"exit before the expected bytes", exit_before_the_bytes, 1, Kind::outstanding_at_exit},
    {"exit before the load", exit_before_the_load, 1, Kind::outstanding_at_exit},
    {"exit while a push reads its source", exit_while_the_peer_reads_it, 2, Kind::outstanding_at_exit},
    {"exit without a wait for cp.async", exit_without_a_wait, 1, Kind::outstanding_at_exit},
    {"exit without a wait for a bulk store", exit_without_a_bulk_wait, 1, Kind::outstanding_at_exit},
    {"an arrival too few", waits_for_nobody, 1, Kind::deadlock},
    {"wrong parity", wrong_parity, 1, Kind::deadlock},
    {"a wait two phases behind", two_phases_behind, 1, Kind::phase_overrun, Kind::deadlock},
    {"polls for ever", polls_for_ever, 1, Kind::live_lock},
    {"cp.async: misaligned target", misaligned_copy_target, 1, Kind::misaligned},
    {"cp.async: misaligned source", misaligned_copy_source, 1, Kind::misaligned},
    {"misaligned mbarrier", misaligned_barrier, 1, Kind::misaligned},
    {"bulk load: misaligned target", misaligned_bulk_target, 1, Kind::misaligned},
    {"bulk load: misaligned source", misaligned_bulk_source, 1, Kind::misaligned},
    {"st.async: misaligned target", misaligned_store_async, 2, Kind::misaligned},
    {"bulk load of 24 bytes", odd_bulk_size, 1, Kind::async_misuse},
    {"bulk load of nothing", bulk_of_nothing, 1, Kind::async_misuse},
    {"cp.async reads more than it writes", reads_more_than_it_copies, 1, Kind::async_misuse},
    {"cp.async is given the size that it has", is_given_the_size_of_the_copy, 1, Kind::async_misuse},
    {"cp.async is given a size below 0", is_given_less_than_nothing, 1, Kind::async_misuse},
    {"st.async in a cluster of one block", pushes_in_a_cluster_of_one, 1, Kind::cluster_misuse},
    {"bulk load of stores, no proxy fence", loads_what_was_written_without_a_proxy_fence, 1, Kind::async_misuse},
    {"bulk load of stores, the proxy fence too early", fences_the_proxy_before_the_write, 2, Kind::async_misuse},
    {"global memory behind a peer's arrival", loads_behind_the_peers_arrival, 2, Kind::stale},
    {"cp.async of 4 bytes behind a peer's arrival", copies_4_behind_the_peers_arrival, 2, Kind::stale},
    {"cp.async of 16 bytes behind a peer's arrival", copies_16_behind_the_peers_arrival, 2, Kind::stale},
    {"bulk load behind a peer's arrival", loads_in_bulk_behind_the_peers_arrival, 2, Kind::stale},
    {"bulk store's target read before its wait", reads_a_bulk_store_early, 1, Kind::read_before_wait},
    {"bulk store's target read without an acquire", reads_a_bulk_store_unacquired, 2, Kind::stale},
    {"bulk store over what is read as constant", stores_in_bulk_over_constants, 1, Kind::not_constant},
    {"cp.async out of bounds", copy_out_of_bounds, 1, Kind::out_of_bounds},
    {"bulk load out of bounds", bulk_out_of_bounds, 1, Kind::out_of_bounds},
    {"cp.async into the peer", copy_into_the_peer, 2, Kind::async_misuse},
    {"wait on the peer's mbarrier", wait_on_the_peers_barrier, 2, Kind::async_misuse},
    {"cp.async read before its wait", reads_a_copy_early, 1, Kind::read_before_wait},
    {"cp.async: a group too few waited for", waits_for_one_group_too_few, 1, Kind::read_before_wait},
    {"cp.async not committed", forgets_to_commit, 1, Kind::read_before_wait},
    {"bulk load read before its wait", reads_a_load_early, 1, Kind::read_before_wait},
    {"landed, in a phase that is still open", reads_what_landed_in_an_open_phase, 1, Kind::read_before_wait},
    {"the peer's load read early", loads_from_a_peer_early, 2, Kind::read_before_wait},
    {"bulk push of bytes still to come", pushes_what_is_still_coming, 2, Kind::read_before_wait},
    {"push over data still to be read", pushes_over_what_is_still_read, 2, Kind::read_before_wait,
     Kind::overwritten_early},
    {"push over the source of a copy", pushes_over_a_copys_source, 2, Kind::overwritten_early},
    {"store to the peer over a copy", stores_into_a_peer_over_a_copy, 2, Kind::overwritten_early},
    {"two copies into one place", two_copies_into_one_place, 1, Kind::overwritten_early},
    {"store over the target of a copy", stores_over_a_copys_target, 1, Kind::overwritten_early},
    {"store over the source of a bulk store", stores_over_a_copys_source, 1, Kind::overwritten_early},
    {"store over the global source of a copy", stores_over_a_global_source, 1, Kind::overwritten_early},
    {"bulk push without a proxy fence", pushes_without_a_proxy_fence, 2, Kind::async_misuse},
    {"bulk store, the proxy fence too early", stores_without_a_proxy_fence, 1, Kind::async_misuse},
    {"bulk store of a cp.async, no proxy fence", stores_a_cp_async_without_a_proxy_fence, 1, Kind::async_misuse},
    {"bulk load over stores, no proxy fence", loads_over_stores_without_a_proxy_fence, 1, Kind::async_misuse},
    {"store over an mbarrier", stores_over_a_barrier, 1, Kind::async_misuse},
    {"cp.async over an mbarrier", copies_over_a_barrier, 1, Kind::async_misuse},
    {"mbarrier on a copy's target", inits_over_a_copy, 1, Kind::overwritten_early},
    {"mbarrier invalidated in use", invalidated_in_use, 1, Kind::async_misuse},
    {"mbarrier used after its end", used_after_its_end, 1, Kind::async_misuse},
};

const Case kLooks[] = {
    {"cp.async", looks_at_cp_async, 1},
    {"bulk load", looks_at_a_bulk_load, 1},
    {"bulk store", looks_at_a_bulk_store, 1},
    {"st.async", looks_at_a_push, 2},
};

const Case kRaces[] = {
    {"no barrier after cp.async's wait", no_barrier_after_the_wait, 1},
    {"store into a buffer others read", store_without_waiting_for_the_readers, 1},
    {"load into a buffer others read", load_without_waiting_for_the_readers, 1},
    {"mbarrier initialised without a barrier", init_without_a_barrier, 1},
};

float bf16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

void fill(Memory& m) {
  for (unsigned r = 0; r < 8; ++r) {
    for (unsigned c = 0; c < 64; ++c) {
      m.in[r][c] = static_cast<float>(r * 64 + c);
      m.out[r][c] = std::nanf("");
    }
  }
  // Halves from -2 to 2, which bf16 holds exactly, and their products and sums too.
  const uint16_t numbers[] = {0xC000, 0xBFC0, 0xBF80, 0xBF00, 0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000};
  for (unsigned k = 0; k < 128; ++k) {
    for (unsigned r = 0; r < 16; ++r) m.a[r][k] = numbers[(r * 5 + k * 7 + r * k) % 9];
    for (unsigned n = 0; n < 8; ++n) m.b[n][k] = numbers[(n * 4 + k * 2 + n * k * k) % 9];
  }
}

float wanted(Result result, const Memory& m, unsigned block, unsigned t) {
  double sum = 0;
  switch (result) {
    case Result::row_of_its_own:
      return static_cast<float>(block * 64 + t);
    case Result::sum_of_turns:
      for (unsigned turn = 0; turn < 9; ++turn) sum += turn % 8 * 64 + t;
      return static_cast<float>(sum);
    case Result::sum_of_ring:
      for (unsigned step = 0; step <= 6; ++step) sum += (block + 8 - step) % 4 * 64 + t;
      return static_cast<float>(sum);
    case Result::product:
      for (unsigned k = 0; k < 128; ++k) sum += bf16(m.a[(block * 64 + t) / 8][k]) * bf16(m.b[t % 8][k]);
      return static_cast<float>(sum);
  }
  return 0;
}

Memory& memory_of_all_runs() {
  static Memory m;
  return m;
}

// One run of a case: the emulator's report, and what is wrong with the result, if anything.
emulator::Report run_once(Memory& m, const Case& c, Order order, uint64_t seed, std::string& wrong) {
  fill(m);
  emulator::options().order = order;
  emulator::options().seed = seed;
  emulator::options().print = false;
  emulator::Shape shape;
  shape.grid = dim3(c.blocks);
  shape.block = dim3(64);
  shape.shared_bytes = sizeof(Shared);
  shape.cluster = c.blocks;
  const emulator::Report report = emulator::run(shape, [&] { c.kernel(m); });
  if (!report.ok() || c.kind != Kind::none) return report;
  const unsigned rows = c.result == Result::product ? 2 : c.blocks;
  for (unsigned block = 0; block < rows; ++block) {
    for (unsigned t = 0; t < 64; ++t) {
      const float want = wanted(c.result, m, block, t);
      if (m.out[block][t] == want) continue;
      wrong = "out[" + std::to_string(block) + "][" + std::to_string(t) + "] is " + std::to_string(m.out[block][t]) +
              " instead of " + std::to_string(want);
      return report;
    }
  }
  return report;
}

constexpr Order kOrders[] = {Order::forward, Order::reverse, Order::random, Order::priorities};

// All orders and seeds. A legal case must never be reported and be right; an illegal one must be reported at least
// once, and never as something else than it is.
bool try_case(const Case& c, unsigned seeds) {
  std::string found_in, fault, example;
  bool exact = false;  // found as the kind that it is above all
  for (Order order : kOrders) {
    unsigned found = 0;
    for (unsigned seed = 1; seed <= seeds; ++seed) {
      std::string wrong;
      const emulator::Report report = run_once(memory_of_all_runs(), c, order, seed, wrong);
      if (report.ok()) {
        if (!wrong.empty()) fault = std::string(name(order)) + ": " + wrong;
        continue;
      }
      ++found;
      const bool right = c.kind != Kind::none && (report.kind == c.kind || report.kind == c.also);
      if (!right) fault = std::string(name(order)) + ", seed " + std::to_string(seed) + ": " + report.text;
      const bool placed = report.file.find("selftest_async") != std::string::npos && report.line > 0;
      if (!placed) fault = "no place in the kernel: " + report.text;
      if (!exact) example = report.text;
      exact = exact || report.kind == c.kind;
    }
    if (found) found_in += (found_in.empty() ? "" : ", ") + std::string(name(order));
    if (found && found < seeds) found_in += " (" + std::to_string(found) + " of " + std::to_string(seeds) + ")";
  }
  if (c.kind != Kind::none && !exact && fault.empty()) fault = "not noticed";
  if (c.kind == Kind::none) {
    std::printf("%s legal: %s%s%s\n", fault.empty() ? "ok    " : "FAILED", c.name, fault.empty() ? "" : ": ",
                fault.c_str());
  } else {
    std::printf("%s %s: %s\n       %s\n", fault.empty() ? "ok    " : "FAILED", c.name,
                fault.empty() ? ("noticed in " + found_in).c_str() : fault.c_str(), example.c_str());
  }
  return fault.empty();
}

// Where a copy is under way, ordinary instructions find NaN: `forward` lands it at the wait.
bool try_look(const Case& c) {
  std::string wrong;
  Memory& m = memory_of_all_runs();
  const emulator::Report report = run_once(m, c, Order::forward, 1, wrong);
  int numbers = 0;
  for (unsigned block = 0; block < c.blocks; ++block) {
    for (float x : m.out[block]) numbers += x == x;
  }
  const bool right = report.ok() && !numbers;
  std::printf("%s %s under way is NaN to ordinary instructions%s%s\n", right ? "ok    " : "FAILED", c.name,
              right ? "" : (": " + std::to_string(numbers) + " are not; ").c_str(), report.text.c_str());
  return right;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "all";
  if (what == "races") return std::printf("%zu\n", std::size(kRaces)), 0;
  if (what == "races") {
    std::printf("%zu\n", std::size(kRaces));
    return 0;
  }
  if (what == "race") {
    std::string wrong;
    const Case& c = kRaces[static_cast<unsigned>(std::atoi(arguments[2])) % std::size(kRaces)];
    for (Order order : {Order::forward, Order::reverse}) {
      const emulator::Report report = run_once(memory_of_all_runs(), c, order, 1, wrong);
      std::printf("%s, order %s: %s%s\n", c.name, name(order), report.text.c_str(), wrong.c_str());
    }
    return 0;
  }
  int failures = 0;
  for (const Case& c : kCases) {
    if (what == "legal" && c.kind != Kind::none) continue;
    failures += !try_case(c, what == "legal" ? 1 : 8);
  }
  for (const Case& c : kLooks) failures += what != "legal" && !try_look(c);
  return failures != 0;
}
