// csrc/cpu/fingerprint.h: the contents of some memory in 128 bits, to tell whether one of its bytes has changed.
//
// Two contents of the same memory that differ, in whichever bytes, have the same fingerprint with a probability of at most
// 2^-63. The key is drawn at random once a process, so this holds for any two contents that were not made with its help.
//
//   words m[n] of 64 bits, in blocks of kFingerprintBlock bytes; lo and hi are the halves of a word:
//   a block   a = Σ (lo(m[n]) + lo(k[n])) · (hi(m[n]) + hi(k[n]))        halves modulo 2^32, sums modulo 2^64
//             b = likewise with the key 64 bytes on
//   all       Σ over blocks (a + p[block]) · (b + q[block])              modulo 2^128
//
// This is NH (Black, Halevi, Krawczyk, Krovetz and Rogaway 1999, UMAC) at both levels. Blocks that differ have the same a
// with probability 2^-32 at most, the same a and b with 2^-64 (the key of b at the last word that differs is not in a), and
// pairs that differ have the same last sum with 2^-64.
#pragma once

#include <cstdint>
#include <vector>

namespace stacked_lstm::cpu {

inline constexpr int64_t kFingerprintBlock = 8192;
inline constexpr int64_t kFingerprintShift = 64;  // bytes of the key between a and b

struct Fingerprint {
  uint64_t low = 0, high = 0;

  Fingerprint& operator+=(const Fingerprint& other) {
    low += other.low;
    high += other.high + (low < other.low ? 1 : 0);
    return *this;
  }
  bool operator==(const Fingerprint&) const = default;
};

struct Bytes {
  const void* data;
  int64_t count;
};

// Of all the memory. Those of the parts 0 … parts-1 add up to it, so that workers can share it out.
Fingerprint fingerprint(const std::vector<Bytes>& memory, int64_t part = 0, int64_t parts = 1);

}  // namespace stacked_lstm::cpu
