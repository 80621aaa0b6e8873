// csrc/stack/philox.h: dropout masks that are a function of (seed, layer, element) and of nothing else.
//
// Philox4x32-10, a counter-based generator (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011). A mask is never stored: backward draws the same words again, whatever the schedule and the threads.
#pragma once

#include <cstdint>

#include "cell.h"

namespace stacked_lstm {

struct Philox {
  uint32_t word[4];
};

STACKED_LSTM_HOST_DEVICE Philox philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                                              uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The mask between layer k and layer k+1. Let e be the index of element (t, b, j) of layer k's output, j < width, in a
// tensor of shape (T, B, 4·⌈width/4⌉). The element is kept if word e mod 4 of counter (e / 4, k) reaches the threshold.
struct Dropout {
  double rate = 0;  // probability of an element being zeroed, 0 to 1
  uint64_t seed = 0;

  STACKED_LSTM_HOST_DEVICE bool active() const { return rate > 0; }
  STACKED_LSTM_HOST_DEVICE uint64_t threshold() const { return static_cast<uint64_t>(rate * 4294967296.0); }
  STACKED_LSTM_HOST_DEVICE double scale() const { return rate < 1 ? 1 / (1 - rate) : 0; }

  // Multiplies the `width` elements of row (t, b), i.e. row number t·B + b, by their mask.
  template <typename T>
  STACKED_LSTM_HOST_DEVICE void apply(T* row, int64_t width, int64_t row_number, int64_t layer) const {
    apply(row, 0, width, width, row_number, layer);
  }
  // The same for the elements first … last-1 of the row alone.
  template <typename T>
  STACKED_LSTM_HOST_DEVICE void apply(T* row, int64_t first, int64_t last, int64_t width, int64_t row_number,
                                      int64_t layer) const {
    const uint64_t quads = static_cast<uint64_t>((width + 3) / 4), limit = threshold();
    const uint64_t begin = static_cast<uint64_t>(first), end = static_cast<uint64_t>(last);
    const T kept = static_cast<T>(scale());
    for (uint64_t quad = begin / 4; quad < (end + 3) / 4; ++quad) {
      const uint64_t e = static_cast<uint64_t>(row_number) * quads + quad;
      const Philox random =
          philox4x32_10(static_cast<uint32_t>(e), static_cast<uint32_t>(e >> 32), static_cast<uint32_t>(layer), 0,
                        static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
      for (uint64_t word = 0; word < 4 && quad * 4 + word < end; ++word) {
        if (quad * 4 + word < begin) continue;
        T& element = row[quad * 4 + word];
        // A dropped element is multiplied by 0, not set to 0, so that a NaN in it stays a NaN.
        element *= random.word[word] >= limit ? kept : T(0);
      }
    }
  }
};

}  // namespace stacked_lstm
