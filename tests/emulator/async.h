// tests/emulator/async.h: asynchronous copies, mbarriers, and what is known of the bytes that are on their way.
//
// A copy is under way from the instruction until it is announced: by its thread's wait, or by the end of the mbarrier's
// phase that counts its bytes. Stricter than a GPU:
//   - the target holds NaN until the copy lands, and the copy lands late (see post() in core.h);
//   - reading, by a primitive, what is under way is an error; so is any write over it, or over what a copy still reads;
//   - an mbarrier checks its protocol: who initialised it and who can see that, arrivals and bytes of each phase.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core.h"

namespace stacked_lstm::emulator {

// ------------------------------------------------------------------------------ for primitives that access at once

// To be called by every primitive that reads or writes shared memory through an address, before it does.
void before_shared_read(uint32_t address, size_t bytes, const char* what, Location);
void before_shared_write(uint32_t address, size_t bytes, const char* what, Location);

// --------------------------------------------------------------------- cp.async: groups of a thread, own shared memory

void check_source_bytes(int source_bytes, int bytes, Location);  // where the instruction is given a size of the source
void copy_async(uint32_t target, const void* global, int bytes, int source_bytes, Location);
void copy_async_commit(Location);
void copy_async_wait(int groups_left, Location);
void copy_async_arrive(uint32_t barrier, Location);  // arrives when this thread's copies so far have landed

// ----------------------------------------------------------------------------------------------------------- mbarrier

void mbarrier_init(uint32_t barrier, uint32_t count, Location);
void mbarrier_init_fence(Location);
void mbarrier_invalidate(uint32_t barrier, Location);
void mbarrier_arrive(uint32_t barrier, Location);
void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes, Location);
void mbarrier_expect(uint32_t barrier, uint32_t bytes, Location);
void mbarrier_arrive_peer(uint32_t barrier, Location);
bool mbarrier_test(uint32_t barrier, uint32_t parity, Location);
void mbarrier_wait(uint32_t barrier, uint32_t parity, Location);

// To be called when a thread's writes become visible to its cluster (cluster_arrive): its mbarriers' inits do too.
void publish_mbarriers(const Thread&);

// ------------------------------------------------------------------- copies that an mbarrier, or a bulk group, counts

void store_async(uint32_t target, const void* value, size_t bytes, uint32_t barrier, Location);
void bulk_load(uint32_t target, const void* global, uint32_t bytes, uint32_t barrier, Location);
void bulk_push(uint32_t target, uint32_t source, uint32_t bytes, uint32_t barrier, Location);
void bulk_store(void* global, uint32_t source, uint32_t bytes, Location);
void bulk_commit(Location);
void bulk_wait(int groups_left, Location);

// Bulk copies read and write through a proxy of their own. What ordinary instructions wrote before is theirs to see
// only after this fence. The emulator notices bytes of shared memory that changed since any thread of the cluster last
// called it; of global memory, see caches.h.
void async_proxy_fence(Location);

}  // namespace stacked_lstm::emulator
