// tests/emulator/device.h: what a kernel's source needs to be C++ for the host compiler: CUDA's keywords, its built-in
// variables and functions, and the host twins of csrc/cuda/primitives.cuh (the matrix instructions' and the asynchronous
// copies' in device_matrix.h and device_async.h). Each twin's last parameter is its caller's place.
//
// They are inlined into the kernel, so that its accesses to memory are made in code that a sanitizer has instrumented.
#pragma once

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "caches.h"
#include "core.h"
#if __has_include("device_matrix.h")
#include "device_matrix.h"
#endif
#if __has_include("device_async.h")
#include "device_async.h"
#define STACKED_LSTM_EMULATOR_HAS_ASYNC
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

#define threadIdx (::stacked_lstm::emulator::this_thread().index)
#define blockIdx (::stacked_lstm::emulator::this_block().index)
#define blockDim (::stacked_lstm::emulator::this_block().threads)
#define gridDim (::stacked_lstm::emulator::this_block().grid)
constexpr int warpSize = 32;

// ------------------------------------------------------------------------------------------- CUDA's own functions

[[noreturn]] inline void __trap(stacked_lstm::emulator::Location at = stacked_lstm::emulator::Location::current()) {
  stacked_lstm::emulator::trap(at);
}

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }

namespace stacked_lstm::cuda {

using emulator::Location;

namespace device_detail {

template <typename T>
inline char type_id;  // its address stands for T

constexpr emulator::Reach reach(Scope scope) {
  static_assert(static_cast<int>(Scope::system) == static_cast<int>(emulator::Reach::system));
  return static_cast<emulator::Reach>(scope);
}

template <typename T>
constexpr bool is_word = std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

// A place where threads wait for each other's writes: looking again at the same value lets all others run first.
template <typename T, typename Load>
__forceinline__ T look(const T* from, Scope scope, const char* what, Location at, Load load) {
  static_assert(is_word<T>);
  emulator::check_word(from, sizeof(T), reach(scope), what, at);
  T value = load();
  if (emulator::looks_like_polling(from, static_cast<uint64_t>(value))) {
    emulator::poll(what, at);
    value = load();
    emulator::looks_like_polling(from, static_cast<uint64_t>(value));
  }
  emulator::read_global_strongly(from, sizeof(T), what, at);
  return value;
}

// A read-modify-write, device scope, relaxed. One that changes nothing may be a lock that somebody polls.
template <typename T, typename Modify>
__forceinline__ T modify(T* to, const char* what, Location at, Modify modify) {
  static_assert(is_word<T>);
  emulator::check_aligned(to, sizeof(T), what, at);
  emulator::write_global_strongly(to, sizeof(T), what, at);
  emulator::before_relaxed_write(to);
  const T before = modify();
  emulator::after_relaxed_read(to);
  const T after = __atomic_load_n(to, __ATOMIC_RELAXED);
  if (after != before) {
    emulator::after_write(true);
  } else if (emulator::looks_like_polling(to, static_cast<uint64_t>(before))) {
    emulator::poll(what, at);
  }
  return before;
}

// One access of global memory, as caches.h sees it: after the access itself.
template <typename T>
__forceinline__ T load_piece(const T* from, decltype(&emulator::read_global) read, const char* what, Location at) {
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  emulator::check_aligned(from, sizeof(T), what, at);
  const T value = *from;
  read(from, sizeof(T), what, at);
  return value;
}
template <typename T>
__forceinline__ void store_piece(T* to, const T& value, const char* what, Location at) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  emulator::check_aligned(to, sizeof(T), what, at);
  *to = value;
  emulator::write_global(to, sizeof(T), what, at);
}

// What stored() returns, to be assigned to.
template <typename T>
struct Stored {
  T* to;
  Location at;

  __forceinline__ void operator=(const T& value) const { store_piece(to, value, "stored", at); }
};

template <typename T>
__forceinline__ T shuffle_from(const char* what, unsigned mask, T value, unsigned source, Location at) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  emulator::Shuffle shuffle = {0, source, 0};
  std::memcpy(&shuffle.value, &value, sizeof value);
  emulator::warp_operation(what, mask, &shuffle, &emulator::combine_shuffle, at);
  std::memcpy(&value, &shuffle.result, sizeof value);
  return value;
}

}  // namespace device_detail

// ---------------------------------------------------------------------------------------------------- shared memory

template <typename T>
__forceinline__ T& static_shared(Location at = Location::current()) {
  return *static_cast<T*>(emulator::static_shared_memory(&device_detail::type_id<T>, sizeof(T), alignof(T), at));
}
template <typename T>
__forceinline__ T& dynamic_shared(Location at = Location::current()) {
  return *static_cast<T*>(emulator::dynamic_shared_memory(sizeof(T), at));
}
__forceinline__ uint32_t shared_address(const void* pointer, Location at = Location::current()) {
  return emulator::shared_address_of(pointer, at);
}

template <typename T>
__forceinline__ T kept(T value) {
  return value;
}

// --------------------------------------------------------------------------------------------------- barriers, warps

__forceinline__ void block_barrier(Location at = Location::current()) { emulator::block_barrier(at); }
__forceinline__ void named_barrier_sync(int id, int threads, Location at = Location::current()) {
  emulator::named_barrier(id, threads, true, at);
}
__forceinline__ void named_barrier_arrive(int id, int threads, Location at = Location::current()) {
  emulator::named_barrier(id, threads, false, at);
}
__forceinline__ void warp_barrier(unsigned mask = kFullWarp, Location at = Location::current()) {
  emulator::warp_operation("warp_barrier", mask, nullptr, nullptr, at);
}

template <typename T>
__forceinline__ T shuffle(unsigned mask, T value, int lane, Location at = Location::current()) {
  return device_detail::shuffle_from("shuffle", mask, value, static_cast<unsigned>(lane) % 32, at);
}
template <typename T>
__forceinline__ T shuffle_xor(unsigned mask, T value, int lanes, Location at = Location::current()) {
  const unsigned source = emulator::this_thread().lane ^ static_cast<unsigned>(lanes);
  return device_detail::shuffle_from("shuffle_xor", mask, value, source % 32, at);
}
template <typename T>
__forceinline__ T shuffle_up(unsigned mask, T value, unsigned delta, Location at = Location::current()) {
  const unsigned lane = emulator::this_thread().lane;
  return device_detail::shuffle_from("shuffle_up", mask, value, delta > lane ? lane : lane - delta, at);
}
template <typename T>
__forceinline__ T shuffle_down(unsigned mask, T value, unsigned delta, Location at = Location::current()) {
  const unsigned lane = emulator::this_thread().lane;
  return device_detail::shuffle_from("shuffle_down", mask, value, lane + delta > 31 ? lane : lane + delta, at);
}
__forceinline__ unsigned ballot(unsigned mask, bool predicate, Location at = Location::current()) {
  emulator::Vote vote = {predicate, 0};
  emulator::warp_operation("ballot", mask, &vote, &emulator::combine_vote, at);
  return vote.ballot;
}
__forceinline__ bool any(unsigned mask, bool predicate, Location at = Location::current()) {
  emulator::Vote vote = {predicate, 0};
  emulator::warp_operation("any", mask, &vote, &emulator::combine_vote, at);
  return vote.ballot != 0;
}
__forceinline__ bool all(unsigned mask, bool predicate, Location at = Location::current()) {
  emulator::Vote vote = {!predicate, 0};
  emulator::warp_operation("all", mask, &vote, &emulator::combine_vote, at);
  return vote.ballot == 0;
}

// ------------------------------------------------------------------------------------------------- release, acquire

template <Scope scope>
__forceinline__ void fence(Location at = Location::current()) {
  emulator::fence(device_detail::reach(scope), at);
}

template <Scope scope, typename T>
__forceinline__ T load_acquire(const T* from, Location at = Location::current()) {
  const T value =
      device_detail::look(from, scope, "load_acquire", at, [&] { return __atomic_load_n(from, __ATOMIC_ACQUIRE); });
  emulator::after_acquire(from, device_detail::reach(scope), at);
  return value;
}
template <Scope scope, typename T>
__forceinline__ T load_relaxed(const T* from, Location at = Location::current()) {
  const T value =
      device_detail::look(from, scope, "load_relaxed", at, [&] { return __atomic_load_n(from, __ATOMIC_RELAXED); });
  emulator::after_relaxed_read(from);
  return value;
}
template <Scope scope, typename T, typename V>
__forceinline__ void store_release(T* to, V value, Location at = Location::current()) {
  static_assert(device_detail::is_word<T>);
  emulator::check_word(to, sizeof(T), device_detail::reach(scope), "store_release", at);
  emulator::write_global_strongly(to, sizeof(T), "store_release", at);
  emulator::before_release(to, device_detail::reach(scope), at);
  const bool changes = __atomic_load_n(to, __ATOMIC_RELAXED) != static_cast<T>(value);
  __atomic_store_n(to, static_cast<T>(value), __ATOMIC_RELEASE);
  emulator::after_write(changes);
}
template <Scope scope, typename T, typename V>
__forceinline__ void store_relaxed(T* to, V value, Location at = Location::current()) {
  static_assert(device_detail::is_word<T>);
  emulator::check_word(to, sizeof(T), device_detail::reach(scope), "store_relaxed", at);
  emulator::write_global_strongly(to, sizeof(T), "store_relaxed", at);
  emulator::before_relaxed_write(to);
  const bool changes = __atomic_load_n(to, __ATOMIC_RELAXED) != static_cast<T>(value);
  __atomic_store_n(to, static_cast<T>(value), __ATOMIC_RELAXED);
  emulator::after_write(changes);
}
template <Scope scope, typename T, typename V>
__forceinline__ void add_release(T* to, V value, Location at = Location::current()) {
  static_assert(device_detail::is_word<T>);
  emulator::check_word(to, sizeof(T), device_detail::reach(scope), "add_release", at);
  emulator::write_global_strongly(to, sizeof(T), "add_release", at);
  emulator::before_release(to, device_detail::reach(scope), at);
  __atomic_fetch_add(to, static_cast<T>(value), __ATOMIC_RELEASE);
  emulator::after_write(static_cast<T>(value) != 0);
}

template <typename T, typename V>
__forceinline__ T atomic_add(T* to, V value, Location at = Location::current()) {
  return device_detail::modify(to, "atomic_add", at,
                               [&] { return __atomic_fetch_add(to, static_cast<T>(value), __ATOMIC_RELAXED); });
}
template <typename T, typename V>
__forceinline__ T atomic_exchange(T* to, V value, Location at = Location::current()) {
  return device_detail::modify(to, "atomic_exchange", at,
                               [&] { return __atomic_exchange_n(to, static_cast<T>(value), __ATOMIC_RELAXED); });
}
template <typename T, typename V, typename W>
__forceinline__ T atomic_compare_exchange(T* to, V expected, W desired, Location at = Location::current()) {
  return device_detail::modify(to, "atomic_compare_exchange", at, [&] {
    T found = static_cast<T>(expected);
    __atomic_compare_exchange_n(to, &found, static_cast<T>(desired), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return found;
  });
}
template <typename T, typename V>
__forceinline__ T atomic_max(T* to, V value, Location at = Location::current()) {
  return device_detail::modify(to, "atomic_max", at, [&] {
    T found = __atomic_load_n(to, __ATOMIC_RELAXED);
    while (found < static_cast<T>(value) &&
           !__atomic_compare_exchange_n(to, &found, static_cast<T>(value), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return found;
  });
}

__forceinline__ void pause(Location at = Location::current()) { emulator::poll("pause", at); }
__forceinline__ void nanosleep(unsigned, Location at = Location::current()) { emulator::poll("nanosleep", at); }

// Time does not pass here: clocks only count how often they were read.
inline uint64_t clock_cycles() {
  static std::atomic<uint64_t> readings{0};  // relaxed: whoever reads a clock is not ordered by it
  return readings.fetch_add(1, std::memory_order_relaxed) + 1;
}
inline uint64_t clock_nanoseconds() { return clock_cycles(); }

// ------------------------------------------------------------------------------------------------------- cache hints

template <typename T>
__forceinline__ T load_ordinary(const T* from, Location at = Location::current()) {
  return device_detail::load_piece(from, &emulator::read_global, "load_ordinary", at);
}
template <typename T>
__forceinline__ auto stored(T* to, Location at = Location::current()) {
  return device_detail::Stored<T>{to, at};
}
template <typename Element, typename T>
__forceinline__ T load_whole(const T* from, Location at = Location::current()) {
  return device_detail::load_piece(from, &emulator::read_global, "load_whole", at);
}
template <typename Element, typename T>
__forceinline__ void store_whole(T* to, const T& value, Location at = Location::current()) {
  device_detail::store_piece(to, value, "store_whole", at);
}
template <typename T>
__forceinline__ T load_streaming(const T* from, Location at = Location::current()) {
  return device_detail::load_piece(from, &emulator::read_global, "load_streaming", at);
}
template <typename T>
__forceinline__ T load_l2(const T* from, Location at = Location::current()) {
  return device_detail::load_piece(from, &emulator::read_global_past_l1, "load_l2", at);
}
template <typename T>
__forceinline__ T load_readonly(const T* from, Location at = Location::current()) {
  return device_detail::load_piece(from, &emulator::read_constant, "load_readonly", at);
}
template <typename T>
__forceinline__ void store_streaming(T* to, T value, Location at = Location::current()) {
  device_detail::store_piece(to, value, "store_streaming", at);
}

// ---------------------------------------------------------------------------------------------------------- clusters

__forceinline__ uint32_t cluster_rank() { return emulator::cluster_rank(); }
__forceinline__ uint32_t cluster_size() { return emulator::cluster_size(); }
__forceinline__ void cluster_arrive(Location at = Location::current()) { emulator::cluster_arrive(at); }
__forceinline__ void cluster_wait(Location at = Location::current()) { emulator::cluster_wait(at); }
__forceinline__ void cluster_barrier(Location at = Location::current()) {
  emulator::cluster_arrive(at);
  emulator::cluster_wait(at);
}
__forceinline__ uint32_t peer_address(uint32_t shared_address, uint32_t rank, Location at = Location::current()) {
  return emulator::map_to_rank(shared_address, rank, at);
}
template <typename T>
__forceinline__ void store_peer(uint32_t address, T value, Location at = Location::current()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  T* to = reinterpret_cast<T*>(emulator::shared_pointer(address, sizeof(T), sizeof(T), "store_peer", at));
#if defined(STACKED_LSTM_EMULATOR_HAS_ASYNC)
  emulator::before_shared_write(address, sizeof(T), "store_peer", at);
#endif
  *to = value;
}
template <typename T>
__forceinline__ T load_peer(uint32_t address, Location at = Location::current()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  const T* from = reinterpret_cast<const T*>(emulator::shared_pointer(address, sizeof(T), sizeof(T), "load_peer", at));
#if defined(STACKED_LSTM_EMULATOR_HAS_ASYNC)
  emulator::before_shared_read(address, sizeof(T), "load_peer", at);
#endif
  return *from;
}

}  // namespace stacked_lstm::cuda
