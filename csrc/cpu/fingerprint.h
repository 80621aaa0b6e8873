// csrc/cpu/fingerprint.h: the contents of some memory in 128 bits, to tell whether one of its bytes has changed.
//
// Two different contents of the same memory have the same fingerprint with a probability of at most 2^-63, whichever
// bytes differ. Each process draws its key at random, so this holds for any two contents that were not made with the
// key's help.
//
//   words m[n] of 64 bits, in fingerprint blocks of kFingerprintBlock bytes; lo and hi are the halves of a word:
//   one block    a = Σ (lo(m[n]) + lo(k[n])) · (hi(m[n]) + hi(k[n]))        halves modulo 2^32, sums modulo 2^64
//                b = likewise with the key's words from byte 64 on
//   all blocks   Σ over blocks (a + p[block]) · (b + q[block])              modulo 2^128
//
// This is NH (Black, Halevi, Krawczyk, Krovetz and Rogaway 1999, UMAC) at both levels. Two different fingerprint blocks
// have the same a with a probability of at most 2^-32, and the same a and b with at most 2^-64: whether the a's are
// equal does not depend on the key word that b has at the last word that differs. Different pairs (a, b) have the same
// last sum with a probability of at most 2^-64.
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

// The fingerprint of all the memory, or one part of it. The fingerprints of the parts 0 … parts-1 add up to that of all
// the memory, so that workers can share out the work.
Fingerprint fingerprint(const std::vector<Bytes>& memory, int64_t part = 0, int64_t parts = 1);

}  // namespace stacked_lstm::cpu
