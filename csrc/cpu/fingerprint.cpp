// csrc/cpu/fingerprint.cpp: see fingerprint.h.
#include "fingerprint.h"

#include <algorithm>
#include <random>

#include "kernels.h"

namespace stacked_lstm::cpu {
namespace {

// Number `index` of a sequence of numbers that are practically independent (Steele, Lea and Flood 2014, SplitMix).
uint64_t number(uint64_t seed, uint64_t index) {
  uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

uint64_t drawn() {
  std::random_device device;
  return static_cast<uint64_t>(device()) << 32 | device();
}

struct Key {
  alignas(64) uint64_t words[(kFingerprintBlock + kFingerprintShift) / 8];
  const uint64_t seed = drawn();  // of the fingerprint blocks' keys

  Key() {
    const uint64_t other = drawn();
    for (uint64_t n = 0; n < std::size(words); ++n) words[n] = number(other, n);
  }
};

const Key& key() {
  static const Key drawn_once;
  return drawn_once;
}

Fingerprint product(uint64_t a, uint64_t b) {
  const unsigned __int128 wide = static_cast<unsigned __int128>(a) * b;
  return {static_cast<uint64_t>(wide), static_cast<uint64_t>(wide >> 64)};
}

int64_t blocks_of(const Bytes& memory) { return (memory.count + kFingerprintBlock - 1) / kFingerprintBlock; }

}  // namespace

Fingerprint fingerprint(const std::vector<Bytes>& memory, int64_t part, int64_t parts) {
  const Key& k = key();
  const auto digest = kernels<float>().digest;
  int64_t blocks = 0;
  for (const Bytes& range : memory) blocks += blocks_of(range);
  const int64_t first = blocks * part / parts, last = blocks * (part + 1) / parts;
  Fingerprint sum;
  int64_t before = 0;  // fingerprint blocks of the ranges before
  for (const Bytes& range : memory) {
    const int64_t own = blocks_of(range);
    for (int64_t n = std::max<int64_t>(first - before, 0); n < std::min(last - before, own); ++n) {
      const int64_t at = n * kFingerprintBlock;
      uint64_t ab[2];
      digest(static_cast<const char*>(range.data) + at, std::min(range.count - at, kFingerprintBlock), k.words, ab);
      const auto block = static_cast<uint64_t>(before + n);
      sum += product(ab[0] + number(k.seed, 2 * block), ab[1] + number(k.seed, 2 * block + 1));
    }
    before += own;
  }
  return sum;
}

}  // namespace stacked_lstm::cpu
