// tests/ptx/probes/probes.cuh: small kernels that together execute every inline PTX statement of csrc/cuda/primitives.cuh, most of
// them nothing but one primitive. probes.cpp launches them and knows what has to come out.
//
// They are made for mutants.py: whatever is changed in a statement, a probe should show it. So values differ in every
// lane, byte and argument, what lies beside a destination is looked at as well, and a thread that does not wait, or waits
// for the wrong thing, finds something else. Names are C's, so that a launch finds its kernel in the PTX.
#pragma once

#include <cstdint>

#include "../../../csrc/cuda/primitives.cuh"

namespace stacked_lstm::cuda::probes {

constexpr int kWarp = 32;

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

// ------------------------------------------------------------------------------------------------------------ barriers

// Three warps. Warp 0 hands `rounds` rows over to warp 1 through one row of shared memory; warp 2 only is there.
struct NamedBarriers {
  static constexpr int kThreads = 3 * kWarp, kFull = 1, kEmpty = 2, kFirst = 3, kSecond = 4;
  uint32_t row[kWarp];
};
extern "C" __global__ void __launch_bounds__(NamedBarriers::kThreads)
    probe_named_barriers(const uint32_t* in, uint32_t* out, int rounds) {
  using S = NamedBarriers;
  S& shared = static_shared<S>();
  const int warp = thread() / kWarp;
  for (int round = 0; round < rounds; ++round) {
    if (warp == 0) {
      shared.row[lane()] = in[round * kWarp + lane()];
      named_barrier_arrive(S::kFull, 2 * kWarp);  // the row before warp 1 reads it
      named_barrier_sync(S::kEmpty, 2 * kWarp);   // warp 1's reads before the next row
    } else if (warp == 1) {
      named_barrier_sync(S::kFull, 2 * kWarp);
      out[round * kWarp + lane()] = shared.row[kWarp - 1 - lane()];
      named_barrier_arrive(S::kEmpty, 2 * kWarp);
    }
  }
  // An arrival does not wait: else warp 0 would stand at the first barrier, and warp 1 at the second.
  if (warp == 0) {
    named_barrier_arrive(S::kFirst, 2 * kWarp);
    named_barrier_arrive(S::kSecond, 2 * kWarp);
  } else if (warp == 1) {
    named_barrier_sync(S::kSecond, 2 * kWarp);
    named_barrier_sync(S::kFirst, 2 * kWarp);
  }
  block_barrier();
}

// A value that the compiler is to know nothing of.
extern "C" __global__ void __launch_bounds__(kWarp) probe_kept(const uint32_t* in, uint32_t* out) {
  out[thread()] = kept(in[thread()] + 1) * 3;
}

// -------------------------------------------------------------------------------------------------- release, acquire
// One thread writes data and then a flag, another waits for the flag and reads the data, three times: by release and
// acquire, by fences and relaxed accesses, and by a sum. The data are accessed plainly: a race, where nothing orders them.
// Beside each word lies one that stays as it is.

template <typename T>
struct Message {
  struct alignas(2 * sizeof(T)) Word {
    T value;
    T beside;
  };
  Word data[3], flag[2], sum;
};

template <Scope scope, typename T>
__device__ __forceinline__ void send(Message<T>& to, const T* values) {
  to.data[0].value = values[0];
  store_release<scope>(&to.flag[0].value, values[1]);
  to.data[1].value = values[2];
  fence<scope>();  // data[1] before flag[1]
  store_relaxed<scope>(&to.flag[1].value, values[3]);
  to.data[2].value = values[4];
  add_release<scope>(&to.sum.value, values[5]);
}
template <Scope scope, typename T>
__device__ __forceinline__ void receive(const Message<T>& from, const T* values, T* out) {
  while (load_acquire<scope>(&from.flag[0].value) != values[1]) {
  }
  out[0] = from.data[0].value;
  while (load_relaxed<scope>(&from.flag[1].value) != values[3]) {
  }
  fence<scope>();  // flag[1] before data[1]
  out[1] = from.data[1].value;
  T sum;
  while ((sum = load_acquire<scope>(&from.sum.value)) == values[6]) {
  }
  out[2] = from.data[2].value;
  out[3] = sum;
}

// Two blocks, through global memory.
template <Scope scope, typename T>
__device__ __forceinline__ void message_through_memory(Message<T>* message, const T* values, T* out) {
  if (blockIdx.x == 0) {
    send<scope>(*message, values);
  } else {
    receive<scope>(*message, values, out);
  }
}
// Two warps of a block, through shared memory and then through global memory.
template <Scope scope, typename T>
__device__ __forceinline__ void message_in_block(Message<T>* message, const T* values, T* out) {
  Message<T>& shared = static_shared<Message<T>>();
  if (thread() == 0) {
    const T none = 0;
    for (int n = 0; n < 3; ++n) shared.data[n] = {none, none};
    for (int n = 0; n < 2; ++n) shared.flag[n] = {none, none};
    shared.sum = {values[6], values[7]};
  }
  block_barrier();  // the shared message before it is used
  if (thread() == 0) {
    send<scope>(shared, values);
    send<scope>(*message, values);
  } else if (thread() == kWarp) {
    receive<scope>(shared, values, out);
    receive<scope>(*message, values, out + 4);
  }
  block_barrier();
  if (thread() == 0) {
    for (int n = 0; n < 3; ++n) out[8 + n] = shared.data[n].beside;
    for (int n = 0; n < 2; ++n) out[11 + n] = shared.flag[n].beside;
    out[13] = shared.sum.beside;
  }
}
extern "C" __global__ void probe_device_32(Message<uint32_t>* message, const uint32_t* values, uint32_t* out) {
  message_through_memory<Scope::device>(message, values, out);
}
extern "C" __global__ void probe_device_64(Message<uint64_t>* message, const uint64_t* values, uint64_t* out) {
  message_through_memory<Scope::device>(message, values, out);
}
extern "C" __global__ void probe_system_32(Message<uint32_t>* message, const uint32_t* values, uint32_t* out) {
  message_through_memory<Scope::system>(message, values, out);
}
extern "C" __global__ void probe_system_64(Message<uint64_t>* message, const uint64_t* values, uint64_t* out) {
  message_through_memory<Scope::system>(message, values, out);
}
extern "C" __global__ void probe_block_32(Message<uint32_t>* message, const uint32_t* values, uint32_t* out) {
  message_in_block<Scope::block>(message, values, out);
}
extern "C" __global__ void probe_block_64(Message<uint64_t>* message, const uint64_t* values, uint64_t* out) {
  message_in_block<Scope::block>(message, values, out);
}
// In a cluster of two blocks: between them through memory, within each through shared memory.
template <typename T>
__device__ __forceinline__ void message_in_cluster(Message<T>* messages, const T* values, T* out) {
  message_in_block<Scope::cluster>(messages + 1 + blockIdx.x, values, out + 14 * blockIdx.x);
  if (thread() == 0) message_through_memory<Scope::cluster>(messages, values, out + 28);
}
extern "C" __global__ void probe_cluster_32(Message<uint32_t>* messages, const uint32_t* values, uint32_t* out) {
  message_in_cluster(messages, values, out);
}
extern "C" __global__ void probe_cluster_64(Message<uint64_t>* messages, const uint64_t* values, uint64_t* out) {
  message_in_cluster(messages, values, out);
}

extern "C" __global__ void probe_clocks(uint64_t* out) {
  out[0] = clock_cycles();
  out[1] = clock_nanoseconds();
  out[2] = clock_nanoseconds();
  out[3] = clock_cycles();
}

// ---------------------------------------------------------------------------------------------------------- matrices

// Four matrices, whose rows lie anywhere: `rows` says for each lane which.
struct Matrices {
  uint16_t row[64][8];
};
template <typename Load, int Count>
__device__ __forceinline__ void load_matrices(const uint16_t* in, const int* rows, uint32_t* out, Load load,
                                              uint32_t (&registers)[Count]) {
  Matrices& shared = static_shared<Matrices>();
  for (int at = thread(); at < 64 * 8; at += kWarp) shared.row[at / 8][at % 8] = in[at];
  block_barrier();
  load(registers, shared_address(shared.row[rows[lane()]]));
  for (int n = 0; n < Count; ++n) out[n * kWarp + lane()] = registers[n];
}
extern "C" __global__ void __launch_bounds__(kWarp)
    probe_load_matrix_x1(const uint16_t* in, const int* rows, uint32_t* out) {
  uint32_t registers[1];
  load_matrices(in, rows, out, [](auto& r, uint32_t at) { load_matrix_x1(r, at); }, registers);
}
extern "C" __global__ void __launch_bounds__(kWarp)
    probe_load_matrix_x2(const uint16_t* in, const int* rows, uint32_t* out) {
  uint32_t registers[2];
  load_matrices(in, rows, out, [](auto& r, uint32_t at) { load_matrix_x2(r, at); }, registers);
}
extern "C" __global__ void __launch_bounds__(kWarp)
    probe_load_matrix_x4(const uint16_t* in, const int* rows, uint32_t* out) {
  uint32_t registers[4];
  load_matrices(in, rows, out, [](auto& r, uint32_t at) { load_matrix_x4(r, at); }, registers);
}
extern "C" __global__ void __launch_bounds__(kWarp)
    probe_load_matrix_x1_transposed(const uint16_t* in, const int* rows, uint32_t* out) {
  uint32_t registers[1];
  load_matrices(in, rows, out, [](auto& r, uint32_t at) { load_matrix_x1_transposed(r, at); }, registers);
}
extern "C" __global__ void __launch_bounds__(kWarp)
    probe_load_matrix_x2_transposed(const uint16_t* in, const int* rows, uint32_t* out) {
  uint32_t registers[2];
  load_matrices(in, rows, out, [](auto& r, uint32_t at) { load_matrix_x2_transposed(r, at); }, registers);
}
extern "C" __global__ void __launch_bounds__(kWarp)
    probe_load_matrix_x4_transposed(const uint16_t* in, const int* rows, uint32_t* out) {
  uint32_t registers[4];
  load_matrices(in, rows, out, [](auto& r, uint32_t at) { load_matrix_x4_transposed(r, at); }, registers);
}

// a: 4 registers of 32 lanes, b: 2, d: 4, which is replaced.
template <typename Mma>
__device__ __forceinline__ void multiply(const uint32_t* a, const uint32_t* b, float* d, Mma mma) {
  uint32_t a_part[4], b_part[2];
  float sum[4];
  for (int n = 0; n < 4; ++n) a_part[n] = a[n * kWarp + lane()];
  for (int n = 0; n < 2; ++n) b_part[n] = b[n * kWarp + lane()];
  for (int n = 0; n < 4; ++n) sum[n] = d[n * kWarp + lane()];
  mma(sum, a_part, b_part);
  for (int n = 0; n < 4; ++n) d[n * kWarp + lane()] = sum[n];
}
extern "C" __global__ void __launch_bounds__(kWarp) probe_mma_bf16(const uint32_t* a, const uint32_t* b, float* d) {
  multiply(a, b, d, [](auto& sum, const auto& a_part, const auto& b_part) { mma_bf16(sum, a_part, b_part); });
}
extern "C" __global__ void __launch_bounds__(kWarp) probe_mma_f16(const uint32_t* a, const uint32_t* b, float* d) {
  multiply(a, b, d, [](auto& sum, const auto& a_part, const auto& b_part) { mma_f16(sum, a_part, b_part); });
}
extern "C" __global__ void __launch_bounds__(kWarp) probe_mma_tf32(const uint32_t* a, const uint32_t* b, float* d) {
  multiply(a, b, d, [](auto& sum, const auto& a_part, const auto& b_part) { mma_tf32(sum, a_part, b_part); });
}

// ------------------------------------------------------------------------------------------------------------- maths

extern "C" __global__ void __launch_bounds__(kWarp) probe_nearest_tf32(const float* x, float* y) {
  y[thread()] = nearest_tf32(x[thread()]);
}
extern "C" __global__ void __launch_bounds__(kWarp) probe_tanh(const float* x, float* y) {
  y[thread()] = tanh_approx(x[thread()]);
}
extern "C" __global__ void __launch_bounds__(kWarp) probe_reciprocal(const float* x, float* y) {
  y[thread()] = reciprocal_approx(x[thread()]);
}
extern "C" __global__ void __launch_bounds__(kWarp) probe_exp2(const float* x, float* y) {
  y[thread()] = exp2_approx(x[thread()]);
}
extern "C" __global__ void __launch_bounds__(kWarp) probe_lesser(const float* a, const float* b, float* y) {
  y[thread()] = lesser_or_nan(a[thread()], b[thread()]);
}

// ---------------------------------------------------------------------------------------------------------- cp.async

template <int Bytes>
struct Copies {
  static constexpr int kSlots = 3 * kWarp;  // three groups, a slot for each lane
  alignas(16) uint8_t slot[kSlots][Bytes];
};
// Group 0 copies `sizes` bytes a lane, group 1 whole slots, group 2 `sizes` bytes again. A lane reads its slots of group 0
// while groups 1 and 2 may be under way; of 8 bytes, it waits once, for all.
template <int Bytes>
__device__ __forceinline__ void copy_three_groups(const uint8_t* in, const int* sizes, uint8_t* out) {
  using S = Copies<Bytes>;
  S& shared = static_shared<S>();
  for (int slot = lane(); slot < S::kSlots; slot += kWarp) {
    for (int byte = 0; byte < Bytes; ++byte) shared.slot[slot][byte] = 0xA5;
  }
  const auto read = [&](int group) {
    const int slot = group * kWarp + lane();
    for (int byte = 0; byte < Bytes; ++byte) out[slot * Bytes + byte] = shared.slot[slot][byte];
  };
  for (int group = 0; group < 3; ++group) {
    const int slot = group * kWarp + lane();
    if (group == 1) {
      copy_async<Bytes>(shared_address(shared.slot[slot]), in + slot * Bytes);
    } else {
      copy_async<Bytes>(shared_address(shared.slot[slot]), in + slot * Bytes, sizes[lane()]);
    }
    copy_async_commit();
  }
  if constexpr (Bytes != 8) {
    copy_async_wait<2>();  // group 0 is here
    read(0);
    copy_async_wait<1>();  // group 1, too
    read(1);
  }
  copy_async_wait<0>();  // all are
  for (int group = Bytes != 8 ? 2 : 0; group < 3; ++group) read(group);
}
extern "C" __global__ void __launch_bounds__(kWarp)
    probe_copy_async_4(const uint8_t* in, const int* sizes, uint8_t* out) {
  copy_three_groups<4>(in, sizes, out);
}
extern "C" __global__ void __launch_bounds__(kWarp)
    probe_copy_async_8(const uint8_t* in, const int* sizes, uint8_t* out) {
  copy_three_groups<8>(in, sizes, out);
}
extern "C" __global__ void __launch_bounds__(kWarp)
    probe_copy_async_16(const uint8_t* in, const int* sizes, uint8_t* out) {
  copy_three_groups<16>(in, sizes, out);
}

// A warp copies, another one waits at an mbarrier and reads.
struct CopyArrivals {
  uint64_t barrier;
  uint32_t value[kWarp];
};
extern "C" __global__ void __launch_bounds__(2 * kWarp) probe_copy_async_arrive(const uint32_t* in, uint32_t* out) {
  CopyArrivals& shared = static_shared<CopyArrivals>();
  const uint32_t barrier = shared_address(&shared.barrier);
  if (thread() == 0) {
    mbarrier_init(barrier, kWarp);
    mbarrier_init_fence();
  }
  block_barrier();  // the mbarrier before its use
  for (int round = 0; round < 2; ++round) {
    if (thread() < kWarp) {
      copy_async<4>(shared_address(&shared.value[lane()]), in + round * kWarp + lane());
      copy_async_arrive(barrier);
    } else {
      mbarrier_wait(barrier, static_cast<uint32_t>(round));
      out[round * kWarp + lane()] = shared.value[kWarp - 1 - lane()];
    }
    block_barrier();  // the reads before the next copies
  }
}

// --------------------------------------------------------------------------------------------------------- mbarriers

// Warp 0 hands rows over to warp 1; `test`: warp 1 asks instead of waiting. Then the barriers' memory is used for something
// else, and for barriers again.
struct Mbarriers {
  uint64_t full, empty;
  uint32_t row[kWarp];
};
template <bool Test>
__device__ __forceinline__ void hand_over(const uint32_t* in, uint32_t* out, int rounds) {
  Mbarriers& shared = static_shared<Mbarriers>();
  const uint32_t full = shared_address(&shared.full), empty = shared_address(&shared.empty);
  const auto await = [](uint32_t barrier, uint32_t parity) {
    if constexpr (Test) {
      while (!mbarrier_test(barrier, parity)) pause();
    } else {
      mbarrier_wait(barrier, parity);
    }
  };
  for (int use = 0; use < 2; ++use) {
    if (thread() == 0) {
      mbarrier_init(full, kWarp);
      mbarrier_init(empty, kWarp);
      mbarrier_init_fence();
    }
    block_barrier();  // the mbarriers before their use
    for (int round = 0; round < rounds; ++round) {
      const uint32_t parity = static_cast<uint32_t>(round) & 1;
      if (thread() < kWarp) {
        if (round > 0) await(empty, parity ^ 1);
        shared.row[lane()] = in[round * kWarp + lane()];
        mbarrier_arrive(full);
      } else {
        await(full, parity);
        out[(use * rounds + round) * kWarp + lane()] = shared.row[kWarp - 1 - lane()];
        mbarrier_arrive(empty);
      }
    }
    block_barrier();  // all waits before the end of the mbarriers
    if (thread() == 0) {
      mbarrier_invalidate(full);
      mbarrier_invalidate(empty);
      shared.full = in[0];
      shared.empty = in[1];
      out[2 * rounds * kWarp + use] = static_cast<uint32_t>(shared.full - shared.empty);
    }
    block_barrier();
  }
}
extern "C" __global__ void __launch_bounds__(2 * kWarp)
    probe_mbarrier_wait(const uint32_t* in, uint32_t* out, int rounds) {
  hand_over<false>(in, out, rounds);
}
extern "C" __global__ void __launch_bounds__(2 * kWarp)
    probe_mbarrier_test(const uint32_t* in, uint32_t* out, int rounds) {
  hand_over<true>(in, out, rounds);
}

// ---------------------------------------------------------------------------------------------------------- clusters

// What each block of a cluster says of itself.
extern "C" __global__ void probe_cluster_place(uint32_t* out) {
  out[2 * blockIdx.x] = cluster_rank();
  out[2 * blockIdx.x + 1] = cluster_size();
}

// A cluster's warps write into the next block's memory and read from the one after it, by accesses of T.
template <typename T>
struct Peers {
  T before, from_peer[kWarp], own[kWarp], after;
};
template <typename T>
__device__ __forceinline__ void exchange_with_peers(const T* in, T* out) {
  Peers<T>& shared = dynamic_shared<Peers<T>>();
  const uint32_t rank = cluster_rank(), size = cluster_size();
  in += blockIdx.x * kWarp, out += blockIdx.x * 2 * kWarp;
  shared.own[lane()] = in[lane()];
  cluster_barrier();  // what each block wrote, before its peers read it
  const T got = load_peer<T>(peer_address(shared_address(&shared.own[kWarp - 1 - lane()]), (rank + 2) % size));
  store_peer<T>(peer_address(shared_address(&shared.from_peer[lane()]), (rank + 1) % size), got);
  out[kWarp + lane()] = got;
  cluster_barrier();  // what peers wrote, before it is read; and nobody is gone while it is accessed
  out[lane()] = shared.from_peer[lane()];
}
extern "C" __global__ void __launch_bounds__(kWarp) probe_peers_4(const uint32_t* in, uint32_t* out) {
  exchange_with_peers(in, out);
}
extern "C" __global__ void __launch_bounds__(kWarp) probe_peers_8(const uint2* in, uint2* out) {
  exchange_with_peers(in, out);
}
extern "C" __global__ void __launch_bounds__(kWarp) probe_peers_16(const uint4* in, uint4* out) {
  exchange_with_peers(in, out);
}

// Between the halves of a cluster barrier a thread does not wait.
extern "C" __global__ void __launch_bounds__(kWarp) probe_split_cluster_barrier(const uint32_t* in, uint32_t* out) {
  Peers<uint32_t>& shared = dynamic_shared<Peers<uint32_t>>();
  const uint32_t rank = cluster_rank(), size = cluster_size();
  const uint32_t there = peer_address(shared_address(&shared.from_peer[lane()]), (rank + 1) % size);
  store_peer(there, in[blockIdx.x * kWarp + lane()]);
  cluster_arrive();
  shared.own[lane()] = 1;
  cluster_wait();  // what the peer wrote before its arrival is here to be read
  out[blockIdx.x * kWarp + lane()] = shared.from_peer[lane()] + shared.own[lane()];
  cluster_barrier();
}

// All other blocks of the cluster write into the first, whose mbarrier they arrive at.
struct Arrivals {
  uint64_t before, barrier, after;
  uint32_t value[8];
};
extern "C" __global__ void __launch_bounds__(kWarp) probe_arrive_peer(const uint32_t* in, uint32_t* out) {
  Arrivals& shared = dynamic_shared<Arrivals>();
  const uint32_t barrier = shared_address(&shared.barrier);
  const uint32_t rank = cluster_rank(), size = cluster_size();
  if (thread() == 0) {
    shared.before = shared.after = 0;
    mbarrier_init(barrier, size - 1);
    mbarrier_init_fence();
  }
  cluster_barrier();  // the mbarriers before peers arrive there
  if (thread() == 0 && rank != 0) {
    store_peer(peer_address(shared_address(&shared.value[rank]), 0), in[blockIdx.x]);
    mbarrier_arrive_peer(peer_address(barrier, 0));
  }
  if (rank == 0) {
    if (thread() % 2 == 0) {
      mbarrier_wait(barrier, 0);
    } else {
      while (!mbarrier_test(barrier, 0)) pause();
    }
    if (thread() > 0 && thread() < static_cast<int>(size)) out[blockIdx.x + threadIdx.x] = shared.value[thread()];
  }
  cluster_barrier();
}

// Each block of the cluster sends its values to the next, twice, where they are counted. One thread does all of a block's
// accounts: it adds to what is expected, in two steps, and arrives.
template <typename T>
struct Pushes {
  uint64_t barrier;
  T before, value[2][kWarp], after;
};
template <typename T>
__device__ __forceinline__ void push(const T* in, T* out) {
  Pushes<T>& shared = dynamic_shared<Pushes<T>>();
  const uint32_t barrier = shared_address(&shared.barrier);
  const uint32_t rank = cluster_rank(), size = cluster_size();
  in += blockIdx.x * 2 * kWarp, out += blockIdx.x * 2 * kWarp;
  if (thread() == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_expect(barrier, sizeof(T));
    mbarrier_arrive_expect(barrier, (kWarp - 1) * sizeof(T));
  }
  cluster_barrier();  // the mbarriers before peers count there
  const uint32_t next = (rank + 1) % size;
  for (uint32_t round = 0; round < 2; ++round) {
    store_async<T>(peer_address(shared_address(&shared.value[round][lane()]), next), in[round * kWarp + threadIdx.x],
                   peer_address(barrier, next));
    mbarrier_wait(barrier, round);
    out[round * kWarp + threadIdx.x] = shared.value[round][lane()];
    if (round == 0) {
      if (thread() == 0) mbarrier_arrive_expect(barrier, kWarp * sizeof(T));
      cluster_barrier();  // what is expected, before it comes: not needed, but then counts stay positive
    }
  }
  cluster_barrier();  // nobody is gone while pushes are under way
}
extern "C" __global__ void __launch_bounds__(kWarp) probe_push_4(const uint32_t* in, uint32_t* out) { push(in, out); }
extern "C" __global__ void __launch_bounds__(kWarp) probe_push_8(const uint2* in, uint2* out) { push(in, out); }
extern "C" __global__ void __launch_bounds__(kWarp) probe_push_16(const uint4* in, uint4* out) { push(in, out); }

// ------------------------------------------------------------------------------------------------------- bulk copies

// Each block of a cluster loads two pieces, pushes the first to the next block, and stores what it was sent and its own
// second piece: 16 bytes a lane. The memory that a copy overwrites was written by threads before.
struct Bulk {
  uint64_t loaded, pushed;
  alignas(16) uint4 before, first[kWarp], second[kWarp], sent[kWarp], after;
};
extern "C" __global__ void __launch_bounds__(kWarp) probe_bulk(const uint4* in, uint4* out) {
  constexpr uint32_t kBytes = kWarp * sizeof(uint4);
  Bulk& shared = dynamic_shared<Bulk>();
  const uint32_t loaded = shared_address(&shared.loaded), pushed = shared_address(&shared.pushed);
  const uint32_t rank = cluster_rank(), size = cluster_size(), next = (rank + 1) % size;
  in += blockIdx.x * 2 * kWarp, out += blockIdx.x * 4 * kWarp;
  shared.first[lane()] = shared.second[lane()] = shared.sent[lane()] = make_uint4(1, 2, 3, 4);
  async_proxy_fence();  // these writes before the copies that replace them
  if (thread() == 0) {
    mbarrier_init(loaded, 1);
    mbarrier_init(pushed, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(pushed, kBytes);
  }
  cluster_barrier();  // the mbarriers, and the memory that was written, before peers push
  if (thread() == 0) {
    mbarrier_expect(loaded, kBytes);
    bulk_load(shared_address(shared.first), in, kBytes, loaded);
    mbarrier_arrive_expect(loaded, kBytes);
    bulk_load(shared_address(shared.second), in + kWarp, kBytes, loaded);
  }
  mbarrier_wait(loaded, 0);
  if (thread() == 0) {
    bulk_push(peer_address(shared_address(shared.sent), next), shared_address(shared.first), kBytes,
              peer_address(pushed, next));
  }
  out[lane()] = shared.second[lane()];
  mbarrier_wait(pushed, 0);
  if (thread() == 0) {
    bulk_store(out + kWarp, shared_address(shared.sent), kBytes);
    bulk_commit();
    bulk_store(out + 2 * kWarp, shared_address(shared.second), kBytes);
    bulk_commit();
    bulk_wait<1>();  // the first is written, and this thread may read it
    for (int n = 0; n < kWarp; ++n) out[3 * kWarp + n] = out[kWarp + n];
    bulk_wait<0>();
    out[3 * kWarp] = out[2 * kWarp];
  }
  cluster_barrier();  // nobody is gone while pushes are under way
}
// What a thread has written is what a bulk copy reads, if a fence stands between.
struct Proxies {
  alignas(16) uint4 value[kWarp];
};
extern "C" __global__ void __launch_bounds__(kWarp) probe_proxy_fence(const uint4* in, uint4* out) {
  Proxies& shared = dynamic_shared<Proxies>();
  shared.value[lane()] = in[lane()];
  async_proxy_fence();
  block_barrier();
  if (thread() == 0) {
    bulk_store(out, shared_address(shared.value), sizeof shared.value);
    bulk_commit();
    bulk_wait<0>();
  }
}

}  // namespace stacked_lstm::cuda::probes
