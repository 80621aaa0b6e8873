// csrc/cpu/gradient.inc.h: the product that computes weight gradients, included by kernels.inc.h for each instruction
// set.
//
//          two vectors           dW = dGᵀ·x sums over the rows of both, so a tile broadcasts along a row of dG, not
//         ┌───────────┐          down a column. Rows of a gradient block are copied in the order in which tiles read
//   rows  │ x (L1/L2) │          them: as many columns of dG at a time as stay in the second-level cache for all of x,
//         └───────────┘          and two vectors of x at a time, which stay there for all of these columns. dW is read
//  ▒▒▒▒▒▒ dG (L2) → broadcast    and written once a gradient block. If dG of it is small and in one run, it is in that
//                                cache already, and is read in place. Units that multiply bfloat16 take two rows at a
//                                time, rounded when they are copied.

inline constexpr int64_t kGradientCache = 512 << 10;  // most bytes of dG that is read in place, gaps included
inline constexpr int kGradientAhead = 8;              // how many rows ahead dG is prefetched

template <typename Panel, int Rows>
void gradient_tile(const typename Panel::Word* __restrict a, int64_t lda,
                   const typename Panel::Stored* __restrict panel, int64_t steps, typename Panel::T* c, int64_t ldc,
                   int64_t columns, bool accumulate) {
  using T = typename Panel::T;
  constexpr int V = kVectorElements<T>, Width = 2;
  unroll<Rows>([&](auto m) INLINE_LAMBDA {
    __builtin_prefetch(c + m * ldc, 1);
    __builtin_prefetch(c + m * ldc + V, 1);
  });
  Vec<T> sum[Rows * Width] = {};
  for (int64_t step = 0; step < steps; ++step, a += lda, panel += Width * V * Panel::kRows) {
    typename Panel::Weight x[Width];
    Panel::load_weights(panel, x);
    __builtin_prefetch(a + kGradientAhead * lda);
    __builtin_prefetch(a + kGradientAhead * lda + Rows - 1);
    unroll<Rows>([&](auto m) INLINE_LAMBDA {
      const auto g = Panel::spread(a[m]);
      unroll<Width>([&](auto v)
                        INLINE_LAMBDA { sum[m * Width + v] = Panel::multiply_add(x[v], g, sum[m * Width + v]); });
    });
  }
  alignas(STACKED_LSTM_VECTOR_BYTES) T sums[Rows * Width * V];
  unroll<Rows * Width>([&](auto n) INLINE_LAMBDA { store(sums + n * V, sum[n]); });
  for (int64_t m = 0; m < Rows; ++m) {
    for (int64_t n = 0; n < Width * V && n < columns; n += V) {
      const int64_t left = columns - n;
      T* to = c + m * ldc + n;
      Vec<T> total = load(sums + m * Width * V + n);
      if (accumulate) total = total + (left < V ? load_first(to, left) : load(to));
      store_first(to, total, left);
    }
  }
}

template <typename Panel>
using GradientTile = void (*)(const typename Panel::Word*, int64_t, const typename Panel::Stored*, int64_t,
                              typename Panel::T*, int64_t, int64_t, bool);
template <typename Panel>
struct GradientTiles {
  GradientTile<Panel> of[kTileRows<2> + 1];
};
template <typename Panel, int... row>
constexpr GradientTiles<Panel> gradient_tiles_of(std::integer_sequence<int, row...>) {
  return {{nullptr, gradient_tile<Panel, row + 1>...}};
}
template <typename Panel>
constexpr GradientTiles<Panel> kGradientTiles =
    gradient_tiles_of<Panel>(std::make_integer_sequence<int, kTileRows<2>>{});

// Copies `count` columns of all rows in the order in which a tile broadcasts them: one row (or pair of rows) after the
// other. row_at(r) is where row r is. There are `left` columns to the end of a row.
template <typename Panel, typename RowAt>
INLINE void copy_columns(RowAt&& row_at, int64_t rows, int64_t count, [[maybe_unused]] int64_t left,
                         typename Panel::Word* to) {
  for (int64_t row = 0; row < rows; row += Panel::kRows, to += count) {
    const auto* const from = row_at(row);
    const auto* const ahead = row_at(row + kGradientAhead);
    __builtin_prefetch(ahead);
    __builtin_prefetch(ahead + count - 1);
    if constexpr (Panel::kRows == 1) {
      for (int64_t m = 0; m < count; ++m) to[m] = from[m];
    }
#if defined(STACKED_LSTM_BF16_UNITS)
    if constexpr (Panel::kRows == 2) {
      constexpr int V = kVectorElements<float>;
      static_assert(kTileRows<2> <= V);
      const auto some = [&](const float* p) INLINE_LAMBDA { return left >= V ? load(p) : load_first(p, count); };
      const IntVec<float> words = round_rows(some(from), row + 1 < rows ? some(row_at(row + 1)) : Vec<float>{});
      int32_t all[V];
      __builtin_memcpy(all, &words, sizeof all);
      for (int64_t m = 0; m < count; ++m) to[m] = all[m];
    }
#endif
  }
}

// Copies two vectors of every row (or pair of rows), one row after the other, with zeros from column `left` on.
template <typename Panel, typename RowAt>
INLINE void copy_panel(RowAt&& row_at, int64_t rows, int64_t left, typename Panel::Stored* panel) {
  using T = typename Panel::T;
  constexpr int V = kVectorElements<T>;
  const auto some = [&](const T* p, int64_t v) INLINE_LAMBDA {
    return left - v >= V ? load(p + v) : left > v ? load_first(p + v, left - v) : Vec<T>{};
  };
  for (int64_t row = 0; row < rows; row += Panel::kRows) {
    for (int64_t v = 0; v < 2 * V; v += V, panel += V * Panel::kRows) {
      if constexpr (Panel::kRows == 1) store(panel, some(row_at(row), v));
#if defined(STACKED_LSTM_BF16_UNITS)
      if constexpr (Panel::kRows == 2) {
        const IntVec<float> words =
            round_rows(some(row_at(row), v), row + 1 < rows ? some(row_at(row + 1), v) : Vec<float>{});
        __builtin_memcpy(panel, &words, sizeof words);
      }
#endif
    }
  }
}

// Every element is the sum of the gradient blocks' sums in the order of these blocks, so how m and n are shared out
// changes no bit.
template <typename Panel>
void gradient_of(const GradientProduct<typename Panel::T>& p) {
  using T = typename Panel::T;
  using Word = typename Panel::Word;
  constexpr int columns = 2 * kVectorElements<T>;
  auto* const some_a = static_cast<Word*>(p.scratch);
  void* const rest = some_a + kGradientRows<T> * kGradientColumns;
  auto* const panel = static_cast<typename Panel::Stored*>(rest);
  int64_t first = 0;
  do {  // without rows, once: it stores zeros
    const int64_t rows = p.rows - first < kGradientRows<T> ? p.rows - first : kGradientRows<T>;
    const int64_t steps = (rows + Panel::kRows - 1) / Panel::kRows;
    const bool accumulate = p.accumulate || first > 0;
    const int64_t parting = p.parting - first;  // in this gradient block
    const bool together = parting <= 0 || parting >= rows;
    // Row n of the gradient block, column m: from one of the two runs.
    const auto a_at = [&, head = p.a + first * p.lda, tail = p.a_rest - parting * p.lda](int64_t n, int64_t m)
                          INLINE_LAMBDA { return (n < parting ? head : tail) + n * p.lda + m; };
    const auto b_at = [&, head = p.b + first * p.ldb, tail = p.b_rest - parting * p.ldb](int64_t n, int64_t m)
                          INLINE_LAMBDA { return (n < parting ? head : tail) + n * p.ldb + m; };
    const bool in_place = Panel::kRows == 1 && together && rows * p.lda * int64_t{sizeof(T)} <= kGradientCache;
    for (int64_t m0 = 0; m0 < p.m; m0 += kGradientColumns) {
      const int64_t some = p.m - m0 < kGradientColumns ? p.m - m0 : kGradientColumns;
      if (!in_place) {
        share_rows(some, kTileRows<2>, [&](int64_t m, int64_t count) INLINE_LAMBDA {
          copy_columns<Panel>([&](int64_t row) INLINE_LAMBDA { return a_at(row, m0 + m); }, rows, count, p.m - m0 - m,
                              some_a + steps * m);
        });
      }
      for (int64_t n = 0; n < p.n; n += columns) {
        copy_panel<Panel>([&](int64_t row) INLINE_LAMBDA { return b_at(row, n); }, rows, p.n - n, panel);
        share_rows(some, kTileRows<2>, [&](int64_t m, int64_t count) INLINE_LAMBDA {
          const Word* a = some_a + steps * m;
          if constexpr (Panel::kRows == 1) {
            if (in_place) a = a_at(0, m0 + m);
          }
          kGradientTiles<Panel>.of[count](a, in_place ? p.lda : count, panel, steps, p.c + (m0 + m) * p.ldc + n, p.ldc,
                                          p.n - n, accumulate);
        });
      }
    }
    first += kGradientRows<T>;
  } while (first < p.rows);
}

template <typename T>
void gradient(const GradientProduct<T>& p) {
#if defined(STACKED_LSTM_BF16_UNITS)
  if constexpr (sizeof(T) == sizeof(float)) {
    if (p.rounded) return gradient_of<Pairs<1>>(p);
  }
#endif
  gradient_of<Whole<T>>(p);
}
