// csrc/cuda/primitives.cuh: everything for which CUDA C++ needs PTX, and all synchronisation of threads. Only this file
// has inline PTX, and kernels synchronise only through this file.
//
// It has two halves with the same names: PTX for nvcc, and, for the host compiler, the emulator (tests/emulator), which
// runs the same kernels on the CPU and checks how they use these functions. A kernel's source is the same for both.
//
// A function that an architecture lacks traps when it is called there: cp.async and mbarriers need sm_80; clusters,
// st.async, bulk copies and transaction counts need sm_90. A kernel that needs them is not launched on older GPUs.
//
// Shared memory is addressed in 32 bits: in the calling block, or, after peer_address(), in a peer of its cluster.
#pragma once

#include <cstdint>
#include <cstring>

namespace stacked_lstm::cuda {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;

// The threads that are sure to see what a release or a fence publishes.
enum class Scope { block, cluster, device, system };

}  // namespace stacked_lstm::cuda

#if !defined(__CUDACC__)

#include "emulator/device.h"

#else

#include <cuda_runtime.h>

namespace stacked_lstm::cuda {

// Called by functions that the architecture lacks.
__device__ __forceinline__ void missing_on_this_architecture() { __trap(); }

// ---------------------------------------------------------------------------------------------------- shared memory

// The one object of type T in the block's static shared memory, not initialised.
template <typename T>
__device__ __forceinline__ T& static_shared() {
  __shared__ __align__(alignof(T) > 16 ? alignof(T) : 16) unsigned char bytes[sizeof(T)];
  return *reinterpret_cast<T*>(bytes);
}

// The dynamic shared memory that the launch asked for, not initialised, aligned to 128 bytes.
template <typename T>
__device__ __forceinline__ T& dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return *reinterpret_cast<T*>(dynamic_shared_bytes);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Returns `value` (32 bits), but the compiler cannot know that. So the value, and what is computed from it, is computed
// here. The compiler neither computes the value again at each use, nor computes what follows from it before a loop,
// where it would occupy a register during the whole loop.
template <typename T>
__device__ __forceinline__ T kept(T value) {
  static_assert(sizeof(T) == 4);
  asm volatile("" : "+r"(value));
  return value;
}

// ---------------------------------------------------------------------------------------------------------- barriers

// A barrier of all threads of the block that have not exited. After it, each sees what any of them wrote before it.
__device__ __forceinline__ void block_barrier() { __syncthreads(); }

// A barrier, number 1 ... 15, of `threads` threads (whole warps) of the block: as block_barrier, among these threads.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts as one of `threads` and does not wait. After the barrier, the threads that are in named_barrier_sync see what
// this thread wrote before.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A barrier of the warp lanes of `mask`. After it, each sees what any of them wrote before it.
__device__ __forceinline__ void warp_barrier(unsigned mask = kFullWarp) { __syncwarp(mask); }

// ------------------------------------------------------------------------------------------------------------- warps
// Every warp lane of `mask` calls the same function with the same mask. These functions do not order memory accesses. A
// value from a warp lane outside the mask is undefined. T has 4 or 8 bytes.

template <typename T>
__device__ __forceinline__ T shuffle(unsigned mask, T value, int warp_lane) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  return __shfl_sync(mask, value, warp_lane);
}
template <typename T>
__device__ __forceinline__ T shuffle_xor(unsigned mask, T value, int apart) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  return __shfl_xor_sync(mask, value, apart);
}
// From the warp lane `delta` below; where there is none, the value is kept. shuffle_down: from the one `delta` above.
template <typename T>
__device__ __forceinline__ T shuffle_up(unsigned mask, T value, unsigned delta) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  return __shfl_up_sync(mask, value, delta);
}
template <typename T>
__device__ __forceinline__ T shuffle_down(unsigned mask, T value, unsigned delta) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  return __shfl_down_sync(mask, value, delta);
}
__device__ __forceinline__ unsigned ballot(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate); }
__device__ __forceinline__ bool any(unsigned mask, bool predicate) { return __any_sync(mask, predicate); }
__device__ __forceinline__ bool all(unsigned mask, bool predicate) { return __all_sync(mask, predicate); }

// ------------------------------------------------------------------------------------------------- release, acquire
// store_release and add_release: a thread that acquires the value sees all that this thread wrote or has seen before.
// load_acquire: no access of this thread that follows is done before it. T: an integer of 32 or 64 bits; at the scopes
// device and system in global memory, at others anywhere. (A reduction at an address of either kind costs a branch.)
//
// There is one instruction for each scope and width, since PTX has no other way to choose them.

namespace primitives_detail {

template <int Bytes>
struct Word;
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = unsigned long long;
};

// `ptx`: the scope; `space`: scope and state space. In global memory, generic and global addresses are equal.
#define STACKED_LSTM_SCOPED_ACCESS(scope, ptx, space)                                                       \
  template <>                                                                                               \
  struct Access<scope> {                                                                                    \
    static __device__ __forceinline__ void fence() { asm volatile("fence.acq_rel." ptx ";" ::: "memory"); } \
    STACKED_LSTM_LOAD(acquire, space, uint32_t, "r", "b32")                                                 \
    STACKED_LSTM_LOAD(acquire, space, unsigned long long, "l", "b64")                                       \
    STACKED_LSTM_LOAD(relaxed, space, uint32_t, "r", "b32")                                                 \
    STACKED_LSTM_LOAD(relaxed, space, unsigned long long, "l", "b64")                                       \
    STACKED_LSTM_STORE(release, space, uint32_t, "r", "b32")                                                \
    STACKED_LSTM_STORE(release, space, unsigned long long, "l", "b64")                                      \
    STACKED_LSTM_STORE(relaxed, space, uint32_t, "r", "b32")                                                \
    STACKED_LSTM_STORE(relaxed, space, unsigned long long, "l", "b64")                                      \
    STACKED_LSTM_ADD(space, uint32_t, "r", "u32")                                                           \
    STACKED_LSTM_ADD(space, unsigned long long, "l", "u64")                                                 \
  };
#define STACKED_LSTM_LOAD(order, space, T, letter, width)                                                   \
  static __device__ __forceinline__ void load_##order(T& value, const void* from) {                         \
    asm volatile("ld." #order "." space "." width " %0, [%1];" : "=" letter(value) : "l"(from) : "memory"); \
  }
#define STACKED_LSTM_STORE(order, space, T, letter, width)                                           \
  static __device__ __forceinline__ void store_##order(void* to, T value) {                          \
    asm volatile("st." #order "." space "." width " [%0], %1;" ::"l"(to), letter(value) : "memory"); \
  }
#define STACKED_LSTM_ADD(space, T, letter, width)                                                      \
  static __device__ __forceinline__ void add_release(void* to, T value) {                              \
    asm volatile("red.release." space ".add." width " [%0], %1;" ::"l"(to), letter(value) : "memory"); \
  }

template <Scope scope>
struct Access;
STACKED_LSTM_SCOPED_ACCESS(Scope::block, "cta", "cta")
STACKED_LSTM_SCOPED_ACCESS(Scope::device, "gpu", "gpu.global")
STACKED_LSTM_SCOPED_ACCESS(Scope::system, "sys", "sys.global")
#if __CUDA_ARCH__ >= 900
STACKED_LSTM_SCOPED_ACCESS(Scope::cluster, "cluster", "cluster")
#else
// Without clusters, a block is its own cluster.
template <>
struct Access<Scope::cluster> : Access<Scope::block> {};
#endif

#undef STACKED_LSTM_ADD
#undef STACKED_LSTM_STORE
#undef STACKED_LSTM_LOAD
#undef STACKED_LSTM_SCOPED_ACCESS

}  // namespace primitives_detail

// Orders what this thread did before it and what it does after it, for all threads in the scope. With relaxed accesses
// on both sides, it is a release or an acquire of many values at once.
template <Scope scope>
__device__ __forceinline__ void fence() {
  primitives_detail::Access<scope>::fence();
}

template <Scope scope, typename T>
__device__ __forceinline__ T load_acquire(const T* from) {
  typename primitives_detail::Word<sizeof(T)>::type word;
  primitives_detail::Access<scope>::load_acquire(word, from);
  return static_cast<T>(word);
}

template <Scope scope, typename T>
__device__ __forceinline__ T load_relaxed(const T* from) {
  typename primitives_detail::Word<sizeof(T)>::type word;
  primitives_detail::Access<scope>::load_relaxed(word, from);
  return static_cast<T>(word);
}

template <Scope scope, typename T, typename V>
__device__ __forceinline__ void store_release(T* to, V value) {
  primitives_detail::Access<scope>::store_release(
      to, static_cast<typename primitives_detail::Word<sizeof(T)>::type>(static_cast<T>(value)));
}

template <Scope scope, typename T, typename V>
__device__ __forceinline__ void store_relaxed(T* to, V value) {
  primitives_detail::Access<scope>::store_relaxed(
      to, static_cast<typename primitives_detail::Word<sizeof(T)>::type>(static_cast<T>(value)));
}

// Adds, and returns nothing: a reduction is carried out where the memory is, and no thread waits for it. (On today's
// GPUs its release is a full memory barrier. Call it from a warp that no other warp waits for.)
template <Scope scope, typename T, typename V>
__device__ __forceinline__ void add_release(T* to, V value) {
  primitives_detail::Access<scope>::add_release(
      to, static_cast<typename primitives_detail::Word<sizeof(T)>::type>(static_cast<T>(value)));
}

// Read-modify-write at device scope; it orders no other access. Returns the old value.
template <typename T, typename V>
__device__ __forceinline__ T atomic_add(T* to, V value) {
  using Word = typename primitives_detail::Word<sizeof(T)>::type;
  return static_cast<T>(atomicAdd(reinterpret_cast<Word*>(to), static_cast<Word>(static_cast<T>(value))));
}
template <typename T, typename V>
__device__ __forceinline__ T atomic_exchange(T* to, V value) {
  using Word = typename primitives_detail::Word<sizeof(T)>::type;
  return static_cast<T>(atomicExch(reinterpret_cast<Word*>(to), static_cast<Word>(static_cast<T>(value))));
}
template <typename T, typename V, typename W>
__device__ __forceinline__ T atomic_compare_exchange(T* to, V expected, W desired) {
  using Word = typename primitives_detail::Word<sizeof(T)>::type;
  return static_cast<T>(atomicCAS(reinterpret_cast<Word*>(to), static_cast<Word>(static_cast<T>(expected)),
                                  static_cast<Word>(static_cast<T>(desired))));
}
template <typename T, typename V>
__device__ __forceinline__ T atomic_max(T* to, V value) {
  constexpr bool is_signed = static_cast<T>(-1) < static_cast<T>(0);
  if constexpr (sizeof(T) == 4 && is_signed) {
    return atomicMax(reinterpret_cast<int*>(to), static_cast<int>(value));
  } else if constexpr (sizeof(T) == 4) {
    return atomicMax(reinterpret_cast<unsigned*>(to), static_cast<unsigned>(value));
  } else if constexpr (is_signed) {
    return static_cast<T>(atomicMax(reinterpret_cast<long long*>(to), static_cast<long long>(value)));
  } else {
    return static_cast<T>(atomicMax(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value)));
  }
}

// For a polling loop, between two reads. It does nothing here. (In the emulator it lets other threads run, among them
// perhaps the thread that the loop waits for.)
__device__ __forceinline__ void pause() {}
// For a polling loop: leaves to other threads the time that the loop would take from them.
__device__ __forceinline__ void nanosleep(unsigned nanoseconds) { __nanosleep(nanoseconds); }

// The multiprocessor's clock, and the device's (which may tick only every microsecond). The compiler does not move the
// read across other memory accesses.
__device__ __forceinline__ uint64_t clock_cycles() {
  uint64_t cycles;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(cycles)::"memory");
  return cycles;
}
__device__ __forceinline__ uint64_t clock_nanoseconds() {
  uint64_t nanoseconds;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds)::"memory");
  return nanoseconds;
}

// ------------------------------------------------------------------------------------------------------- cache hints
// Each is one access of 1, 2, 4, 8 or 16 bytes of global memory, aligned to its size. None of them orders other accesses.
// A block may read what another block writes only after an acquire (or a fence) of its own, of scope cluster or wider,
// and never by load_readonly. The emulator checks this for accesses through these functions. A plain `*p` is the same
// instruction as load_ordinary(p) or stored(p), but the emulator does not see it.

namespace primitives_detail {

template <int Bytes>
struct RawWord;
template <>
struct RawWord<1> {
  using type = unsigned char;
};
template <>
struct RawWord<2> {
  using type = unsigned short;
};
template <>
struct RawWord<4> {
  using type = unsigned;
};
template <>
struct RawWord<8> {
  using type = uint2;
};
template <>
struct RawWord<16> {
  using type = uint4;
};

template <typename T>
using RawWordOf = typename RawWord<sizeof(T)>::type;

// The same for memory that holds elements of type Element. Doubles have words of their own: if their bits were in
// words of 32 bits, ptxas would convert them by way of a stack.
template <typename Element, int Bytes>
struct RawWordOfElements : RawWord<Bytes> {};
template <>
struct RawWordOfElements<double, 8> {
  using type = double;
};
template <>
struct RawWordOfElements<double, 16> {
  using type = double2;
};

template <typename To, typename From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace primitives_detail

// Through the L1, the same as `*from` and `*to = value`, which is written `stored(to) = value`.
template <typename T>
__device__ __forceinline__ T load_ordinary(const T* from) {
  return *from;
}
template <typename T>
__device__ __forceinline__ T& stored(T* to) {
  return *to;
}
// The same for a struct T of elements, as one access. The compiler may split an assignment of the struct into its
// members (nvcc 13.0 does that to stores for sm_80 to sm_90a).
template <typename Element, typename T>
__device__ __forceinline__ T load_whole(const T* from) {
  using Word = typename primitives_detail::RawWordOfElements<Element, sizeof(T)>::type;
  const Word word = *reinterpret_cast<const Word*>(from);  // a copy: a reference would be read byte by byte
  return primitives_detail::bits_as<T>(word);
}
template <typename Element, typename T>
__device__ __forceinline__ void store_whole(T* to, const T& value) {
  using Word = typename primitives_detail::RawWordOfElements<Element, sizeof(T)>::type;
  __stwb(reinterpret_cast<Word*>(to), primitives_detail::bits_as<Word>(value));
}
// For data that is read once: the caches evict it first.
template <typename T>
__device__ __forceinline__ T load_streaming(const T* from) {
  using Word = primitives_detail::RawWordOf<T>;
  return primitives_detail::bits_as<T>(__ldcs(reinterpret_cast<const Word*>(from)));
}
// Bypasses the L1, which other multiprocessors' writes do not reach.
template <typename T>
__device__ __forceinline__ T load_l2(const T* from) {
  using Word = primitives_detail::RawWordOf<T>;
  return primitives_detail::bits_as<T>(__ldcg(reinterpret_cast<const Word*>(from)));
}
// Through the read-only path: no thread may write the data during the launch, neither before the load nor after it.
template <typename T>
__device__ __forceinline__ T load_readonly(const T* from) {
  using Word = primitives_detail::RawWordOf<T>;
  return primitives_detail::bits_as<T>(__ldg(reinterpret_cast<const Word*>(from)));
}
template <typename T>
__device__ __forceinline__ void store_streaming(T* to, T value) {
  using Word = primitives_detail::RawWordOf<T>;
  __stcs(reinterpret_cast<Word*>(to), primitives_detail::bits_as<Word>(value));
}

// ------------------------------------------------------------------------------------------------------------ matrix
// The whole warp calls these functions, converged. The PTX ISA defines the layout of fragments for each shape.

// 1, 2 or 4 matrices of 8 x 8 elements of 16 bits: warp lanes 8i ... 8i + 7 give the addresses of the rows of matrix i
// (16 bytes each, aligned), and warp lane l gets the elements 2(l mod 4) and 2(l mod 4) + 1 of row l / 4. Transposed:
// of column l / 4.
__device__ __forceinline__ void load_matrix_x1(uint32_t (&r)[1], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(shared_address) : "memory");
}
__device__ __forceinline__ void load_matrix_x2(uint32_t (&r)[2], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address)
               : "memory");
}
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address)
               : "memory");
}
__device__ __forceinline__ void load_matrix_x1_transposed(uint32_t (&r)[1], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address)
               : "memory");
}
__device__ __forceinline__ void load_matrix_x2_transposed(uint32_t (&r)[2], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address)
               : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address)
               : "memory");
}

// d += a b, in fp32: a is 16 x 16 by rows, b 16 x 8 by columns, d 16 x 8.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same with a 16 x 8 and b 8 x 8 of TF32: floats whose last 13 bits do not count.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The TF32 nearest to x, ties away from zero; a NaN stays a NaN.
__device__ __forceinline__ float nearest_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// ------------------------------------------------------------------------------------- cp.async: global to own shared

// Starts a copy of Bytes bytes. This thread sees them after it has waited for the copy's group; other threads see them
// after a barrier that follows. 16 bytes bypass the L1, 4 and 8 bytes go through it.
template <int Bytes>
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  const size_t from = __cvta_generic_to_global(global);
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(Bytes) : "memory");
  }
}
// The same for the first `source_bytes` (0 ... Bytes - 1) bytes, with zeros after them. PTX requires fewer than Bytes.
template <int Bytes>
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, int source_bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  const size_t from = __cvta_generic_to_global(global);
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(from), "n"(Bytes), "r"(source_bytes)
                 : "memory");
  }
}
// Closes the group of this thread's copies since the last commit.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `GroupsLeft` of this thread's groups, the newest, are under way.
template <int GroupsLeft>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GroupsLeft) : "memory");
}
// Arrives at the mbarrier when all of this thread's copies so far are complete; its count includes this arrival.
__device__ __forceinline__ void copy_async_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// --------------------------------------------------------------------------------------------------------- mbarriers
// An mbarrier is 8 bytes of shared memory. A phase ends when there were as many arrivals as mbarrier_init() said, and
// no expected byte is missing; the next begins at once. A thread waits for a parity: 0 for the first phase, 1, 0, ...

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After a block or cluster barrier that follows, the cluster and asynchronous copies see this thread's inits.
__device__ __forceinline__ void mbarrier_init_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  asm volatile("fence.acq_rel.cta;" ::: "memory");
#endif
}
// Necessary before the mbarrier's memory is used for something else. No thread may be waiting for it.
__device__ __forceinline__ void mbarrier_invalidate(uint32_t barrier) {
  asm volatile("mbarrier.inval.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
// A release at block scope: a thread that has waited for the phase sees what this thread wrote before.
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}
// Adds to the bytes that this phase expects, then arrives. The bytes themselves may arrive earlier.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#else
  missing_on_this_architecture();
#endif
}
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#else
  missing_on_this_architecture();
#endif
}
// Arrives at a peer's mbarrier, as a release at cluster scope.
__device__ __forceinline__ void mbarrier_arrive_peer(uint32_t peer_barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(peer_barrier) : "memory");
#else
  missing_on_this_architecture();
#endif
}

// Whether the phase of this parity has ended. If so, what its arrivals released and the bytes it counted are visible.
//
// On sm_90 the scope is the cluster, since peers write here. With a plain acquire.cluster, ptxas would invalidate the
// whole L1 (CCTL.IVALL) at every wait. A relaxed wait and a fence restricted to shared memory are enough, and cost
// nothing. Hazard: so an mbarrier orders no writes of a peer to *global* memory: use store_release and load_acquire.
__device__ __forceinline__ bool mbarrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t over;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred over;\n"
      "mbarrier.test_wait.parity.relaxed.cluster.shared::cta.b64 over, [%1], %2;\n"
      "selp.u32 %0, 1, 0, over;\n"
      "fence.acquire.sync_restrict::shared::cluster.cluster;\n}"
      : "=r"(over)
      : "r"(barrier), "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n.reg .pred over;\n"
      "mbarrier.test_wait.parity.shared.b64 over, [%1], %2;\n"
      "selp.u32 %0, 1, 0, over;\n}"
      : "=r"(over)
      : "r"(barrier), "r"(parity)
      : "memory");
#endif
  return over != 0;
}

// Waits until the phase of this parity has ended; then as mbarrier_test. On sm_90 the hardware suspends the thread.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "fence.acquire.sync_restrict::shared::cluster.cluster;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#else
  while (!mbarrier_test(barrier, parity)) {
  }
#endif
}

// ---------------------------------------------------------------------------------------------------------- clusters

// The block's place in its cluster, and the cluster's size.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#else
  missing_on_this_architecture();
#endif
  return rank;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#else
  missing_on_this_architecture();
#endif
  return size;
}

// The halves of a barrier of all threads of the cluster that have not exited, in converged warps. After its wait, each
// thread sees what any thread wrote before its arrive: in its own or a peer's shared memory, or in global memory.
// Hazard: a barrier must follow the last access to a peer's shared memory: the memory is gone when the peer exits.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  missing_on_this_architecture();
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  missing_on_this_architecture();
#endif
}
__device__ __forceinline__ void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

// The address of the same place in the shared memory of the block with this rank (which may be the calling block).
__device__ __forceinline__ uint32_t peer_address(uint32_t shared_address, uint32_t rank) {
  uint32_t address = 0;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address), "r"(rank));
#else
  missing_on_this_architecture();
#endif
  return address;
}

// Plain accesses of 4, 8 or 16 bytes to a peer's shared memory. A barrier must order them, as in the block's own.
template <typename T>
__device__ __forceinline__ void store_peer(uint32_t address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
#if __CUDA_ARCH__ >= 900
  const auto word = primitives_detail::bits_as<primitives_detail::RawWordOf<T>>(value);
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(word.x), "r"(word.y) : "memory");
  } else {
    asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(word.x), "r"(word.y),
                 "r"(word.z), "r"(word.w)
                 : "memory");
  }
#else
  missing_on_this_architecture();
#endif
}
template <typename T>
__device__ __forceinline__ T load_peer(uint32_t address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  primitives_detail::RawWordOf<T> word = {};
#if __CUDA_ARCH__ >= 900
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];" : "=r"(word.x), "=r"(word.y) : "r"(address) : "memory");
  } else {
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
                 : "r"(address)
                 : "memory");
  }
#else
  missing_on_this_architecture();
#endif
  return primitives_detail::bits_as<T>(word);
}

// Sends 4, 8 or 16 bytes to a peer, and then counts them at an mbarrier of the same peer; a wait for that mbarrier
// makes them visible there. The sender gets no notice, and may exit. The peer must not exit before the bytes have
// arrived. The peer may be the calling block, but in a cluster of one block the instruction is undefined.
template <typename T>
__device__ __forceinline__ void store_async(uint32_t peer_address, T value, uint32_t peer_barrier) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
#if __CUDA_ARCH__ >= 900
  const auto word = primitives_detail::bits_as<primitives_detail::RawWordOf<T>>(value);
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(peer_address),
                 "r"(word), "r"(peer_barrier)
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(peer_address),
        "r"(word.x), "r"(word.y), "r"(peer_barrier)
        : "memory");
  } else {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                     peer_address),
                 "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w), "r"(peer_barrier)
                 : "memory");
  }
#else
  missing_on_this_architecture();
#endif
}

// ------------------------------------------------------------------------------------------------------- bulk copies
// One thread issues a bulk copy; addresses and bytes are multiples of 16. It goes through the asynchronous proxy:
// between writes of threads and a bulk copy that reads or overwrites them, there must be an async_proxy_fence().

// From global memory to the block's own or a peer's shared memory, counted at an mbarrier of the receiving block.
__device__ __forceinline__ void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(barrier)
               : "memory");
#else
  missing_on_this_architecture();
#endif
}
// From the block's own shared memory to a peer's. The source must not change until the peer has the bytes.
__device__ __forceinline__ void bulk_push(uint32_t peer_address, uint32_t shared, uint32_t bytes,
                                          uint32_t peer_barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   peer_address),
               "r"(shared), "r"(bytes), "r"(peer_barrier)
               : "memory");
#else
  missing_on_this_architecture();
#endif
}
// From the block's own shared memory to global memory, in groups of this thread as with copy_async.
__device__ __forceinline__ void bulk_store(void* global, uint32_t shared, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(global)),
               "r"(shared), "r"(bytes)
               : "memory");
#else
  missing_on_this_architecture();
#endif
}
__device__ __forceinline__ void bulk_commit() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
  missing_on_this_architecture();
#endif
}
// Waits until at most `GroupsLeft` of this thread's bulk groups are under way. This thread sees what the others wrote.
template <int GroupsLeft>
__device__ __forceinline__ void bulk_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(GroupsLeft) : "memory");
#else
  missing_on_this_architecture();
#endif
}
// Orders this thread's accesses before it, and accesses that it has seen, with bulk copies after it, and the reverse.
__device__ __forceinline__ void async_proxy_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async;" ::: "memory");
#else
  missing_on_this_architecture();
#endif
}

// ------------------------------------------------------------------------------------- maths whose instruction matters

// Relative error about 2^-11. One instruction.
__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1/x within one unit in the last place; denormals are 0.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 2^x within two units in the last place; denormals are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The lesser of two numbers, or NaN if one of them is NaN; fminf would return the other number.
__device__ __forceinline__ float lesser_or_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

}  // namespace stacked_lstm::cuda

#endif
