// tests/emulator/device_async.h: asynchronous copies and mbarriers of csrc/cuda/primitives.cuh, on the host. The last
// parameter of each is the caller's place.
#pragma once

#include <cstdint>

#include "async.h"

namespace stacked_lstm::cuda {

using emulator::Location;

template <int Bytes>
inline void copy_async(uint32_t shared, const void* global, Location at = Location::current()) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  emulator::copy_async(shared, global, Bytes, Bytes, at);
}
template <int Bytes>
inline void copy_async(uint32_t shared, const void* global, int source_bytes, Location at = Location::current()) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  emulator::check_source_bytes(source_bytes, Bytes, at);
  emulator::copy_async(shared, global, Bytes, source_bytes, at);
}
inline void copy_async_commit(Location at = Location::current()) { emulator::copy_async_commit(at); }
template <int GroupsLeft>
inline void copy_async_wait(Location at = Location::current()) {
  static_assert(GroupsLeft >= 0);
  emulator::copy_async_wait(GroupsLeft, at);
}
inline void copy_async_arrive(uint32_t barrier, Location at = Location::current()) {
  emulator::copy_async_arrive(barrier, at);
}

inline void mbarrier_init(uint32_t barrier, uint32_t count, Location at = Location::current()) {
  emulator::mbarrier_init(barrier, count, at);
}
inline void mbarrier_init_fence(Location at = Location::current()) { emulator::mbarrier_init_fence(at); }
inline void mbarrier_invalidate(uint32_t barrier, Location at = Location::current()) {
  emulator::mbarrier_invalidate(barrier, at);
}
inline void mbarrier_arrive(uint32_t barrier, Location at = Location::current()) {
  emulator::mbarrier_arrive(barrier, at);
}
inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes, Location at = Location::current()) {
  emulator::mbarrier_arrive_expect(barrier, bytes, at);
}
inline void mbarrier_expect(uint32_t barrier, uint32_t bytes, Location at = Location::current()) {
  emulator::mbarrier_expect(barrier, bytes, at);
}
inline void mbarrier_arrive_peer(uint32_t barrier, Location at = Location::current()) {
  emulator::mbarrier_arrive_peer(barrier, at);
}
inline bool mbarrier_test(uint32_t barrier, uint32_t parity, Location at = Location::current()) {
  return emulator::mbarrier_test(barrier, parity, at);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity, Location at = Location::current()) {
  emulator::mbarrier_wait(barrier, parity, at);
}

template <typename T>
inline void store_async(uint32_t target, T value, uint32_t barrier, Location at = Location::current()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  emulator::store_async(target, &value, sizeof value, barrier, at);
}
inline void bulk_load(uint32_t target, const void* global, uint32_t bytes, uint32_t barrier,
                      Location at = Location::current()) {
  emulator::bulk_load(target, global, bytes, barrier, at);
}
inline void bulk_push(uint32_t target, uint32_t source, uint32_t bytes, uint32_t barrier,
                      Location at = Location::current()) {
  emulator::bulk_push(target, source, bytes, barrier, at);
}
inline void bulk_store(void* global, uint32_t source, uint32_t bytes, Location at = Location::current()) {
  emulator::bulk_store(global, source, bytes, at);
}
inline void bulk_commit(Location at = Location::current()) { emulator::bulk_commit(at); }
template <int GroupsLeft>
inline void bulk_wait(Location at = Location::current()) {
  static_assert(GroupsLeft >= 0);
  emulator::bulk_wait(GroupsLeft, at);
}
inline void async_proxy_fence(Location at = Location::current()) { emulator::async_proxy_fence(at); }

}  // namespace stacked_lstm::cuda
