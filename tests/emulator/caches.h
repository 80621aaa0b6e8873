// tests/emulator/caches.h: what is known of global memory during a launch: who wrote which bytes, and who may see them.
//
// Primitives announce their accesses here. There is no simulated cache: an access is an error where a GPU's caches and
// proxies may show it other bytes than the emulator does, whether or not they would in this run.
//
//   load                   sees what another block wrote ...
//   relaxed, acquire       what was written by a store of that kind, or an atomic: always. It goes to L2. What was written by
//                          an ordinary store: as an ordinary load does, since the two accesses race
//   ordinary, .cs, .cg,    after an acquire or a fence by the reading block since the write, at the scope of the cluster or
//   cp.async               wider. Until then its L1 may hold older bytes, and nothing orders a .cg after the write either
//   .nc (load_readonly)    never: no byte that it reads may be written in the same launch, before or after, by any thread
//   bulk copies            as an ordinary load, and if instructions wrote the bytes: after an async_proxy_fence(), by the
//                          writing or the reading block, since the write
//
// A block sees its own writes through its L1. What a bulk_store() writes is nobody's to read before its wait.
//
// An acquire counts for all threads of its block: the L1 is theirs together. Whether the reading thread is ordered behind
// that acquire, by a barrier, is for ThreadSanitizer to see. What goes past the primitives (`*p`) is not seen here: in the
// kernels, the arguments, dropout's seed, the watchdog's record, and all of gates.h and elements.h, whose threads share nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core.h"

namespace stacked_lstm::emulator {

// Accesses of global memory by the current thread; what lies in its block's shared memory is let pass. `what` names the
// primitive in reports, and lives as long as the launch. To be called after the access, so that ThreadSanitizer sees it first.
void read_global(const void*, size_t bytes, const char* what, Location);
void read_global_past_l1(const void*, size_t bytes, const char* what, Location);
void read_global_strongly(const void*, size_t bytes, const char* what, Location);  // relaxed, acquire
void read_constant(const void*, size_t bytes, const char* what, Location);
void write_global(const void*, size_t bytes, const char* what, Location);
void write_global_strongly(const void*, size_t bytes, const char* what, Location);  // relaxed, release, atomic

// Of the copy engine, on behalf of the current thread.
void read_global_in_bulk(const void*, size_t bytes, const char* what, Location);
void start_bulk_write(const void*, size_t bytes, const char* what, Location);
void finish_bulk_write(const void*, size_t bytes);

// A new moment, later than all accesses so far.
uint32_t next_moment();
// The current block has acquired what was there at this moment: its L1 holds nothing older.
void refresh_l1(uint32_t moment);
// What the current block has written, or seen, before this moment is visible to bulk copies.
void fence_proxy();

// At the begin of each launch.
void forget_global_memory();

}  // namespace stacked_lstm::emulator
