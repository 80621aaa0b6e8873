// csrc/cpu/packing.inc.h: weights as panels, included by kernels.inc.h for each instruction set.

// How many rows of a panel share words.
template <typename W>
inline constexpr int kRowsTogether = 1;
#if defined(STACKED_LSTM_BF16_UNITS)
template <>
inline constexpr int kRowsTogether<Bf16> = 2;
#endif
// Rows that a panel of K rows has.
template <typename W>
INLINE int64_t rows_in_panel(int64_t inner) {
  return (inner + kRowsTogether<W> - 1) / kRowsTogether<W> * kRowsTogether<W>;
}

// Stores N neighbouring vectors of a panel's row, or of the rows that share words. at(row, vector) returns the numbers.
template <int N, typename T, typename At>
INLINE void store_vectors(T* out, At&& at) {
  unroll<N>([&](auto v) INLINE_LAMBDA { store(out + v * kVectorElements<T>, at(0, v)); });
}
template <int N, typename At>
INLINE void store_vectors(Bf16* out, At&& at) {
  if constexpr (kRowsTogether<Bf16> == 2) {
    unroll<N>([&](auto v) INLINE_LAMBDA { pack_bf16(out + 2 * v * kVectorElements<float>, at(0, v), at(1, v)); });
  } else {
    unroll<N / 2>(
        [&](auto v) INLINE_LAMBDA { pack_bf16(out + 2 * v * kVectorElements<float>, at(0, 2 * v), at(0, 2 * v + 1)); });
  }
}

// `kVectorElements` rows of W from `first` on, of which `count` exist; the others are zero.
template <typename T>
struct RowsOf {
  const T* first;
  int64_t count;

  // Columns k … k + kVectorElements - 1 of these rows, one vector each. Nothing is read past the last row or a row's
  // end.
  INLINE void columns(int64_t k, int64_t inner, Vec<T> (&v)[kVectorElements<T>]) const {
    constexpr int V = kVectorElements<T>;
    const T* const p = first + k;
    if (count >= V && inner - k >= V) {
      unroll<V>([&](auto n) INLINE_LAMBDA { v[n] = load(p + n * inner); });
    } else {
      alignas(STACKED_LSTM_VECTOR_BYTES) T edge[V * V];
      for (int64_t n = 0; n < V; ++n) {
        const T* const row = p + n * inner;
        store(edge + n * V, n >= count ? Vec<T>{} : inner - k >= V ? load(row) : load_first(row, inner - k));
      }
      unroll<V>([&](auto n) INLINE_LAMBDA { v[n] = load(edge + n * V); });
    }
    transpose<T>(v);
  }
};

// How many vectors of a panel are packed at a time: one if it fills a cache line of the panel, else two. Vectors that
// share words are always packed together.
template <typename T, typename W>
inline constexpr int kVectorsTogether = kVectorElements<T> * kRowsTogether<W> * int{sizeof(W)} >= 64 ? 1 : 2;

// Packs rows of W as neighbouring vectors of a panel. The processor's prefetchers follow neither so many rows nor the
// strided lines of the panel. So each iteration prefetches as much as it reads of the rows that are packed next, in the
// order of their addresses, and the lines that the next iteration writes.
template <typename T, typename W>
void pack_rows_of(const RowsOf<T>* rows, const RowsOf<T>* next, int64_t inner, W* out, int64_t ldo) {
  constexpr int V = kVectorElements<T>, R = kRowsTogether<W>, N = kVectorsTogether<T, W>;
  constexpr int kLine = 64 / int{sizeof(T)}, kSecondLevel = 2;  // rows a power of two apart share sets of the first
  for (int64_t k = 0; k < inner; k += V, out += V * ldo) {
    Vec<T> v[N][V];
    unroll<N>([&](auto n) INLINE_LAMBDA {
      for (int64_t at = 0; at < V * V; at += kLine) __builtin_prefetch(next[n].first + V * k + at, 0, kSecondLevel);
      rows[n].columns(k, inner, v[n]);
    });
    const auto store_rows = [&](int64_t steps) INLINE_LAMBDA {
      unroll<V / R>([&](auto step) INLINE_LAMBDA {  // past the inner dimension, v holds zeros
        if (step * R >= steps) return;
        __builtin_prefetch(out + (V + step * R) * ldo, 1);
        store_vectors<N>(out + step * R * ldo,
                         [&](int row, int vector) INLINE_LAMBDA { return v[vector][step * R + row]; });
      });
    };
    inner - k >= V ? store_rows(V) : store_rows(inner - k);
  }
}

// Calls run(panels) with a pointer to the type that the panels hold.
template <typename T, typename Run>
INLINE void with_storage(Storage storage, void* panels, Run&& run) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (storage == Storage::bf16) return run(static_cast<Bf16*>(panels));
  }
  run(static_cast<T*>(panels));
}

// Packs panels first … last-1: vector `column` holds the rows that rows_of(column) returns.
template <typename T, typename RowsOfColumn>
INLINE void pack_panels(int64_t inner, int64_t width, int64_t first, int64_t last, Storage storage, void* panels,
                        RowsOfColumn&& rows_of) {
  const int64_t ldo = width * kVectorElements<T>;
  with_storage<T>(storage, panels, [&]<typename W>(W* out) INLINE_LAMBDA {
    constexpr int N = kVectorsTogether<T, W>;
    const int64_t rows = rows_in_panel<W>(inner);
    for (int64_t panel = first; panel < last; ++panel) {
      for (int64_t v = 0; v < width; v += N) {
        const int64_t column = panel * width + v, following = column + N < last * width ? column + N : column;
        RowsOf<T> of[N], next[N];
        unroll<N>([&](auto n) INLINE_LAMBDA { of[n] = rows_of(column + n), next[n] = rows_of(following + n); });
        pack_rows_of(of, next, inner, out + panel * rows * ldo + v * kVectorElements<T> * kRowsTogether<W>, ldo);
      }
    }
  });
}

template <typename T>
void pack_gates(const T* w, int64_t hidden, int64_t inner, int64_t width, int64_t first, int64_t last, Storage storage,
                void* panels) {
  pack_panels<T>(inner, width, first, last, storage, panels, [&](int64_t column) INLINE_LAMBDA {
    const int64_t unit = column / 4 * kVectorElements<T>, gate = column % 4;
    return RowsOf<T>{w + (gate * hidden + unit) * inner, hidden - unit};
  });
}

template <typename T>
void pack_rows(const T* w, int64_t columns, int64_t inner, int64_t width, int64_t first, int64_t last, Storage storage,
               void* panels) {
  pack_panels<T>(inner, width, first, last, storage, panels, [&](int64_t column) INLINE_LAMBDA {
    const int64_t row = column * kVectorElements<T>;
    return RowsOf<T>{w + row * inner, columns - row};
  });
}

template <typename T>
void pack_columns(const T* w, int64_t columns, int64_t row_blocks, int64_t rows_per_block, int64_t padded_rows,
                  int64_t width, int64_t first, int64_t last, Storage storage, void* panels) {
  constexpr int V = kVectorElements<T>;
  const int64_t ldo = width * V;
  // Panels that are written at once: few, but enough for a row to be read in runs of many lines.
  const int64_t together = 32 / width;
  // How many rows ahead W is prefetched, if its rows are long: the processor's prefetchers do not follow runs of such
  // rows.
  constexpr int kRowsAhead = 4;
  const bool ask = columns * int64_t{sizeof(T)} >= 1024;
  with_storage<T>(storage, panels, [&]<typename W>(W* data) INLINE_LAMBDA {
    constexpr int R = kRowsTogether<W>;
    const int64_t rows = rows_in_panel<W>(row_blocks * padded_rows);
    for (int64_t some = first; some < last; some += together) {
      const int64_t end = last - some < together ? last : some + together;
      int64_t row_block = 0, row = 0;
      for (int64_t to = 0; to < rows; to += R) {
        const T* from[R];  // null: a row of zeros
        for (const T*& p : from) {
          p = row_block < row_blocks && row < rows_per_block ? w + (row_block * rows_per_block + row) * columns
                                                             : nullptr;
          if (++row == padded_rows) row = 0, ++row_block;
        }
        for (int64_t panel = some; panel < end; ++panel) {
          W* const out = data + (panel * rows + to) * ldo;
          for (int64_t v = 0; v < width; v += 2) {
            store_vectors<2>(out + v * V * R, [&](int next, int vector) INLINE_LAMBDA {
              const int64_t column = (panel * width + v + vector) * V, left = columns - column;
              if (!from[next] || left <= 0) return Vec<T>{};
              const T* const p = from[next] + column;
              if (ask) __builtin_prefetch(p + kRowsAhead * columns);
              return left >= V ? load(p) : load_first(p, left);
            });
          }
        }
      }
    }
  });
}

template <typename T>
void pack_bias(const T* b_ih, const T* b_hh, int64_t hidden, int64_t first, int64_t last, T* bias) {
  constexpr int V = kVectorElements<T>;
  for (int64_t unit = first * V; unit < last * V; ++unit) {
    for (int64_t gate = 0; gate < 4; ++gate) {
      T sum = 0;
      if (unit < hidden && b_ih) sum += b_ih[gate * hidden + unit];
      if (unit < hidden && b_hh) sum += b_hh[gate * hidden + unit];
      bias[(unit / V * 4 + gate) * V + unit % V] = sum;
    }
  }
}
