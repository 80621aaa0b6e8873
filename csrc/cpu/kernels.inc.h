// csrc/cpu/kernels.inc.h: the CPU kernels, once, for whatever vectors the including file has chosen (see kernels.h).

// ---- The one product ----------------------------------------------------------------------------------------------
//
//              width vectors                A tile keeps rows × width accumulators in registers for the whole of K and
//            ┌───────────────┐              reads each weight once: K·width loads for K·width·rows multiply-adds.
//       K    │ panel  (L1/L2)│              Few rows leave the multiply-add units waiting for each other, so a tile may
//            └───────────────┘              keep `Sums` partial sums of every output, over k ≡ 0, 1, … mod Sums.
//   rows ▒▒▒▒ → broadcast a[row][k]

template <int Width>
inline constexpr int kTileRows = kRegisters >= 32 ? (Width == 4 ? 6 : 14) : (Width == 4 ? 3 : 6);
// Multiply-adds in flight that hide their latency (4 to 5 cycles, 2 a cycle).
inline constexpr int kInFlight = kRegisters >= 32 ? 16 : 8;
// How far ahead, in steps of k, to ask for weights. One row streams best by the hardware's own prefetcher.
inline constexpr int kPrefetchSteps = 16;

// The weights of a panel at one k, `Width` vectors.
template <typename T, int Width>
INLINE void load_weights(const T* w, Vec<T> (&weight)[Width]) {
  unroll<Width>([&](auto v) INLINE_LAMBDA { weight[v] = load(w + v * kLanes<T>); });
}
template <typename T, int Width>
INLINE void load_weights(const Bf16* w, Vec<T> (&weight)[Width]) {
  unroll<Width / 2>(
      [&](auto pair) INLINE_LAMBDA { unpack_bf16(w + 2 * pair * kLanes<T>, weight[2 * pair], weight[2 * pair + 1]); });
}

template <typename T, typename W, int Rows, int Width, int Sums>
void tile(const W* __restrict panel, const T* __restrict a, int64_t lda, int64_t inner, const T* init,
          int64_t init_step, T* c, int64_t ldc) {
  constexpr int V = kLanes<T>;
  Vec<T> sum[Sums * Rows * Width];
  unroll<Sums * Rows * Width>([&](auto n) INLINE_LAMBDA {
    constexpr int part = n / (Rows * Width), row = n / Width % Rows, v = n % Width;
    sum[n] = part == 0 && init ? load(init + row * init_step + v * V) : Vec<T>{};
  });
  const auto multiply_add = [&](auto part, int64_t k) INLINE_LAMBDA {
    const W* w = panel + k * Width * V;
    Vec<T> weight[Width];
    load_weights<T, Width>(w, weight);
    if constexpr (Rows > 1) {
      constexpr int lines = Width * int{sizeof(W)} / int{sizeof(T)};  // vectors, of memory
      unroll<lines>(
          [&](auto v) INLINE_LAMBDA { __builtin_prefetch(w + kPrefetchSteps * Width * V + v * (Width * V / lines)); });
    }
    unroll<Rows>([&](auto row) INLINE_LAMBDA {
      const Vec<T> x = broadcast(a[row * lda + k]);
      unroll<Width>([&](auto v) INLINE_LAMBDA {
        constexpr int n = (part * Rows + row) * Width + v;
        sum[n] = weight[v] * x + sum[n];
      });
    });
  };
  int64_t k = 0;
  for (; k + Sums <= inner; k += Sums) unroll<Sums>([&](auto part) INLINE_LAMBDA { multiply_add(part, k + part); });
  for (; k < inner; ++k) multiply_add(std::integral_constant<int, 0>{}, k);
  unroll<Rows * Width>([&](auto n) INLINE_LAMBDA {
    constexpr int row = n / Width, v = n % Width;
    Vec<T> total = sum[n];
    unroll<Sums - 1>([&](auto part) INLINE_LAMBDA { total = total + sum[(part + 1) * Rows * Width + n]; });
    store(c + row * ldc + v * V, total);
  });
}

template <typename T, typename W>
using Tile = void (*)(const W*, const T*, int64_t, int64_t, const T*, int64_t, T*, int64_t);

// Partial sums for a product of `rows` rows: as many as are in flight anyway.
template <int Width>
constexpr int sums_for(int64_t rows) {
  int sums = 1;
  while (sums < 8 && rows * Width * sums * 2 <= kInFlight) sums *= 2;
  return sums;
}

template <typename T, typename W, int Width, int Sums, int Rows>
constexpr Tile<T, W> tile_or_null() {
  if constexpr (Sums == 1 || Rows * Width * Sums <= kInFlight)
    return tile<T, W, Rows, Width, Sums>;
  else
    return nullptr;  // sums_for never asks for it
}

// The tiles of one number of partial sums, by rows.
template <typename T, typename W, int Width>
struct Tiles {
  Tile<T, W> of[kTileRows<Width> + 1];
};
template <typename T, typename W, int Width, int Sums, int... row>
constexpr Tiles<T, W, Width> tiles_of(std::integer_sequence<int, row...>) {
  return {{nullptr, tile_or_null<T, W, Width, Sums, row + 1>()...}};
}
template <typename T, typename W, int Width, int Sums>
constexpr Tiles<T, W, Width> kTiles = tiles_of<T, W, Width, Sums>(std::make_integer_sequence<int, kTileRows<Width>>{});

// Calls f(first, count) for even shares of `rows`, each at most `most`.
template <typename F>
INLINE void share_rows(int64_t rows, int64_t most, F&& f) {
  const int64_t parts = (rows + most - 1) / most;
  for (int64_t part = 0, first = 0; part < parts; ++part) {
    const int64_t end = rows * (part + 1) / parts;
    f(first, end - first);
    first = end;
  }
}

template <typename T, typename W, int Width>
INLINE const Tile<T, W>* tiles_for(int64_t unroll_rows) {
  switch (sums_for<Width>(unroll_rows)) {
    case 8:
      return kTiles<T, W, Width, 8>.of;
    case 4:
      return kTiles<T, W, Width, 4>.of;
    case 2:
      return kTiles<T, W, Width, 2>.of;
    default:
      return kTiles<T, W, Width, 1>.of;
  }
}

// Calls run(panels, width) with what the panels hold and how many vectors wide they are, both as types.
template <typename T, typename Run>
INLINE void with_panels(const Panels& panels, int64_t width, Run&& run) {
  const auto of_type = [&](auto* data) INLINE_LAMBDA {
    width == 4 ? run(data, std::integral_constant<int, 4>{}) : run(data, std::integral_constant<int, 2>{});
  };
  if constexpr (sizeof(T) == sizeof(float)) {
    if (panels.storage == Storage::bf16) return of_type(static_cast<const Bf16*>(panels.data));
  }
  of_type(static_cast<const T*>(panels.data));
}

// Calls f(n) for first … last-1, or the other way round.
template <typename F>
INLINE void there_or_back(int64_t first, int64_t last, bool from_last, F&& f) {
  for (int64_t n = first; n < last; ++n) f(from_last ? first + last - 1 - n : n);
}

template <typename T, typename W, int Width>
void product_of_width(const Product<T>& p, const W* panels) {
  constexpr int64_t columns = Width * kLanes<T>;
  const Tile<T, W>* tiles = tiles_for<T, W, Width>(p.unroll_rows);
  there_or_back(p.first_panel, p.last_panel, p.from_last, [&](int64_t panel) INLINE_LAMBDA {
    share_rows(p.rows, kTileRows<Width>, [&](int64_t row, int64_t count) INLINE_LAMBDA {
      tiles[count](panels + panel * p.inner * columns, p.a + row * p.lda, p.lda, p.inner,
                   p.init ? p.init + row * p.init_step + panel * columns : nullptr, p.init_step,
                   p.c + row * p.ldc + panel * columns, p.ldc);
    });
  });
}

template <typename T>
void product(const Product<T>& p) {
  with_panels<T>(p.panels, p.width, [&]<typename W>(const W* panels, auto width) INLINE_LAMBDA {
    product_of_width<T, W, width>(p, panels);
  });
}

// ---- Forward --------------------------------------------------------------------------------------------------------

template <typename T>
INLINE Gates<Vec<T>> load_gates(const T* p) {
  constexpr int V = kLanes<T>;
  return {load(p), load(p + V), load(p + 2 * V), load(p + 3 * V)};
}
template <typename T>
INLINE void store_gates(T* p, const Gates<Vec<T>>& y) {
  constexpr int V = kLanes<T>;
  store(p, y.i), store(p + V, y.f), store(p + 2 * V, y.g), store(p + 3 * V, y.o);
}

// The cell for one unit block of `rows` rows, `pre` holding their pre-activations. Not inlined, so that every caller
// runs the same instructions and gets the same bits.
template <typename T>
__attribute__((noinline)) void cells_forward(const StepForward<T>& s, const T* pre, int64_t block, int64_t row,
                                             int64_t rows) {
  constexpr int V = kLanes<T>;
  const int64_t unit = block * V;
  for (int64_t end = row + rows; row < end; ++row, pre += 4 * V) {
    const Gates<Vec<T>> y = activate<Math<T>>(load_gates(pre));
    Vec<T> c = load(s.c + row * s.padded_hidden + unit);
    const Vec<T> h = cell_forward<Math<T>>(y, c);
    store(s.c + row * s.padded_hidden + unit, c);
    store(s.h_next + row * s.ldh_next + unit, h);
    if (s.y) store_first(s.y + row * s.ldy + unit, h, s.hidden - unit);
    if (s.saved_c) store(s.saved_c + row * s.padded_hidden + unit, c);
    if (s.saved_gates) store_gates(s.saved_gates + (row * s.padded_hidden + unit) * 4, y);
  }
}

template <typename T, typename W, int Width>
void step_forward_of_width(const StepForward<T>& s, const W* panels) {
  constexpr int V = kLanes<T>;
  constexpr int64_t columns = Width * V;
  const Tile<T, W>* tiles = tiles_for<T, W, Width>(s.unroll_rows);
  alignas(STACKED_LSTM_VECTOR_BYTES) T pre[kTileRows<Width> * 4 * V];
  there_or_back(s.first_block, s.last_block, s.from_last, [&](int64_t block) INLINE_LAMBDA {
    share_rows(s.rows, kTileRows<Width>, [&](int64_t row, int64_t count) INLINE_LAMBDA {
      for (int64_t part = 0; part < 4 / Width; ++part) {
        const int64_t panel = block * (4 / Width) + part;
        tiles[count](panels + panel * s.inner * columns, s.h + row * s.ldh, s.ldh, s.inner,
                     s.projected + row * 4 * s.padded_hidden + panel * columns, 4 * s.padded_hidden,
                     pre + part * columns, 4 * V);
      }
      cells_forward(s, pre, block, row, count);
    });
  });
}

template <typename T>
void step_forward(const StepForward<T>& s) {
  with_panels<T>(s.panels, s.width, [&]<typename W>(const W* panels, auto width) INLINE_LAMBDA {
    step_forward_of_width<T, W, width>(s, panels);
  });
}

// ---- Backward -------------------------------------------------------------------------------------------------------

// The first `count` lanes of v, zero in the others. Not a product with a mask: padded units of a row with an Inf in it
// hold NaNs (0·Inf in their products), and those must not reach the products of backward.
template <typename T>
INLINE Vec<T> first_lanes(Vec<T> v, int64_t count) {
  alignas(STACKED_LSTM_VECTOR_BYTES) T all[kLanes<T>];
  store(all, v);
  return load_first(all, count);
}

template <typename T>
void step_backward(const StepBackward<T>& s) {
  constexpr int V = kLanes<T>;
  for (int64_t row = 0; row < s.rows; ++row) {
    for (int64_t block = s.first_block; block < s.last_block; ++block) {
      const int64_t unit = block * V, at = row * s.padded_hidden + unit;
      Vec<T> dh = load(s.dh + row * s.lddh + unit);
      if (s.dy) dh = dh + load(s.dy + row * s.lddy + unit);
      Vec<T> dc = load(s.dc + at);
      const Gates<Vec<T>> y = load_gates(s.gates + at * 4);
      const Vec<T> c_next = load(s.c_next + at);
      Gates<Vec<T>> d = cell_backward<Math<T>>(y, load(s.c + at), c_next, dh, dc);
      if (const int64_t left = s.hidden - unit; left < V) {
        d = {first_lanes<T>(d.i, left), first_lanes<T>(d.f, left), first_lanes<T>(d.g, left),
             first_lanes<T>(d.o, left)};
      }
      if (s.projected) store(s.projected + row * s.ldm + unit, y.o * Math<T>::tanh(c_next));
      store(s.dc + at, dc);
      T* out = s.dgates + row * s.lddg + unit;
      store(out, d.i), store(out + s.padded_hidden, d.f), store(out + 2 * s.padded_hidden, d.g),
          store(out + 3 * s.padded_hidden, d.o);
    }
  }
}

template <typename T>
void activate_rows(T* gates, int64_t rows, int64_t padded_hidden, int64_t first_block, int64_t last_block) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t block = first_block; block < last_block; ++block) {
      T* p = gates + (row * padded_hidden + block * kLanes<T>)*4;
      store_gates(p, activate<Math<T>>(load_gates(p)));
    }
  }
}

template <typename T>
void sum_rows(const T* a, int64_t lda, int64_t rows, int64_t columns, bool accumulate, T* sum) {
  constexpr int V = kLanes<T>;
  for (int64_t n = 0; n < columns; n += V) {  // rows are padded to whole vectors
    const int64_t left = columns - n;
    Vec<T> total{};
    if (accumulate) total = left < V ? load_first(sum + n, left) : load(sum + n);
    for (int64_t row = 0; row < rows; ++row) total = total + load(a + row * lda + n);
    store_first(sum + n, total, left);
  }
}

// ---- Weight gradients -----------------------------------------------------------------------------------------------
//
//          two vectors           dW = dGᵀ·x sums over the rows of both, so a tile broadcasts along a row of dG, not down a
//         ┌───────────┐          column. The rows of a block are copied, as the tiles read them: of dG so many columns that
//   rows  │ x (L1/L2) │          their copies stay in the second-level cache for all of x, and two vectors of x, which stay
//         └───────────┘          there for all of those columns. dW is read and written once a block. What of dG is there
//  ▒▒▒▒▒▒ dG (L2) → broadcast    already, because it is small, is read where it is.

inline constexpr int64_t kGradientCache = 512 << 10;  // bytes of dG, gaps between rows included
inline constexpr int kGradientAhead = 8;              // rows of dG to ask for ahead of their use

template <typename T, int Rows>
void gradient_tile(const T* __restrict a, int64_t lda, const T* __restrict panel, int64_t rows, T* c, int64_t ldc,
                   int64_t columns, bool accumulate) {
  constexpr int V = kLanes<T>, Width = 2;
  unroll<Rows>([&](auto m) INLINE_LAMBDA {
    __builtin_prefetch(c + m * ldc, 1);
    __builtin_prefetch(c + m * ldc + V, 1);
  });
  Vec<T> sum[Rows * Width] = {};
  for (int64_t row = 0; row < rows; ++row, a += lda, panel += Width * V) {
    const Vec<T> x[Width] = {load(panel), load(panel + V)};
    __builtin_prefetch(a + kGradientAhead * lda);
    __builtin_prefetch(a + kGradientAhead * lda + Rows - 1);
    unroll<Rows>([&](auto m) INLINE_LAMBDA {
      const Vec<T> g = broadcast(a[m]);
      unroll<Width>([&](auto v) INLINE_LAMBDA { sum[m * Width + v] = x[v] * g + sum[m * Width + v]; });
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

template <typename T>
using GradientTile = void (*)(const T*, int64_t, const T*, int64_t, T*, int64_t, int64_t, bool);
template <typename T>
struct GradientTiles {
  GradientTile<T> of[kTileRows<2> + 1];
};
template <typename T, int... row>
constexpr GradientTiles<T> gradient_tiles_of(std::integer_sequence<int, row...>) {
  return {{nullptr, gradient_tile<T, row + 1>...}};
}
template <typename T>
constexpr GradientTiles<T> kGradientTiles = gradient_tiles_of<T>(std::make_integer_sequence<int, kTileRows<2>>{});

// `count` columns of each row, one row after the other.
template <typename T>
void copy_columns(const T* from, int64_t ld, int64_t rows, int64_t count, T* to) {
  for (int64_t row = 0; row < rows; ++row, from += ld, to += count) {
    __builtin_prefetch(from + kGradientAhead * ld);
    __builtin_prefetch(from + kGradientAhead * ld + count - 1);
    for (int64_t m = 0; m < count; ++m) to[m] = from[m];
  }
}

// Every element is the sum of its blocks' sums, in their order: how m and n were shared out cannot be seen in it.
template <typename T>
void gradient(const GradientProduct<T>& p) {
  constexpr int V = kLanes<T>, columns = 2 * V;
  T *const some_a = p.scratch, *const panel = p.scratch + kGradientRows<T> * kGradientColumns;
  const auto at = [&](const T* data, const T* rest, int64_t ld, int64_t row)
                      INLINE_LAMBDA { return row < p.parting ? data + row * ld : rest + (row - p.parting) * ld; };
  int64_t first = 0;
  do {  // once without any rows, for zeros
    const int64_t rows = p.rows - first < kGradientRows<T> ? p.rows - first : kGradientRows<T>;
    const bool accumulate = p.accumulate || first > 0;
    const int64_t in_piece = p.parting > first ? p.parting - first : rows;  // in the piece where the block begins
    const int64_t together = in_piece < rows ? in_piece : rows;
    const bool in_place = together == rows && rows * p.lda * int64_t{sizeof(T)} <= kGradientCache;
    for (int64_t m0 = 0; m0 < p.m; m0 += kGradientColumns) {
      const int64_t some = p.m - m0 < kGradientColumns ? p.m - m0 : kGradientColumns;
      const T* const a = at(p.a, p.a_rest, p.lda, first) + m0;
      if (!in_place) {
        share_rows(some, kTileRows<2>, [&](int64_t m, int64_t count) INLINE_LAMBDA {
          copy_columns(a + m, p.lda, together, count, some_a + rows * m);
          copy_columns(p.a_rest + m0 + m, p.lda, rows - together, count, some_a + rows * m + together * count);
        });
      }
      for (int64_t n = 0; n < p.n; n += columns) {
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t v = 0; v < columns; v += V) {
            const int64_t left = p.n - n - v;
            const T* x = at(p.b, p.b_rest, p.ldb, first + row) + n + v;
            store(panel + row * columns + v, left >= V ? load(x) : left > 0 ? load_first(x, left) : Vec<T>{});
          }
        }
        share_rows(some, kTileRows<2>, [&](int64_t m, int64_t count) INLINE_LAMBDA {
          kGradientTiles<T>.of[count](in_place ? a + m : some_a + rows * m, in_place ? p.lda : count, panel, rows,
                                      p.c + (m0 + m) * p.ldc + n, p.ldc, p.n - n, accumulate);
        });
      }
    }
    first += kGradientRows<T>;
  } while (first < p.rows);
}

// ---- Packing --------------------------------------------------------------------------------------------------------

// Two neighbouring vectors of a panel's row.
template <typename T>
INLINE void store_pair(T* out, Vec<T> even, Vec<T> odd) {
  store(out, even), store(out + kLanes<T>, odd);
}
INLINE void store_pair(Bf16* out, Vec<float> even, Vec<float> odd) { pack_bf16(out, even, odd); }

// `lanes` rows of W from `first` on, of which `count` exist; the others are zero.
template <typename T>
struct RowsOf {
  const T* first;
  int64_t count;

  // Columns k … k + lanes - 1 of them, as vectors of rows. The rows are short, so no prefetcher finds its way: the
  // rows that follow are asked for here. Of W's gate rows those are the next to be packed but three.
  INLINE void columns(int64_t k, int64_t inner, Vec<T> (&v)[kLanes<T>]) const {
    constexpr int V = kLanes<T>;
    for (int64_t n = 0; n < V; ++n) {
      const T* p = first + n * inner + k;
      __builtin_prefetch(p + V * inner);
      v[n] = n >= count ? Vec<T>{} : inner - k >= V ? load(p) : load_first(p, inner - k);
    }
    transpose<T>(v);
  }
};

// Rows of W to two vectors of columns of a panel.
template <typename T, typename W>
void pack_lanes(const RowsOf<T>& even, const RowsOf<T>& odd, int64_t inner, W* out, int64_t ldo) {
  constexpr int V = kLanes<T>;
  for (int64_t k = 0; k < inner; k += V) {
    Vec<T> a[V], b[V];
    even.columns(k, inner, a), odd.columns(k, inner, b);
    const int64_t steps = inner - k < V ? inner - k : V;
    for (int64_t step = 0; step < steps; ++step) store_pair(out + (k + step) * ldo, a[step], b[step]);
  }
}

// Calls run(panels) with the type that they hold.
template <typename T, typename Run>
INLINE void with_storage(Storage storage, void* panels, Run&& run) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (storage == Storage::bf16) return run(static_cast<Bf16*>(panels));
  }
  run(static_cast<T*>(panels));
}

// Panels whose vector `column` holds the rows that rows_of(column) names.
template <typename T, typename RowsOfColumn>
INLINE void pack_panels(int64_t inner, int64_t width, int64_t first, int64_t last, Storage storage, void* panels,
                        RowsOfColumn&& rows_of) {
  const int64_t ldo = width * kLanes<T>;
  with_storage<T>(storage, panels, [&](auto* out) INLINE_LAMBDA {
    for (int64_t panel = first; panel < last; ++panel) {
      for (int64_t v = 0; v < width; v += 2) {
        const int64_t column = panel * width + v;
        pack_lanes(rows_of(column), rows_of(column + 1), inner, out + panel * inner * ldo + v * kLanes<T>, ldo);
      }
    }
  });
}

template <typename T>
void pack_gates(const T* w, int64_t hidden, int64_t inner, int64_t width, int64_t first, int64_t last, Storage storage,
                void* panels) {
  pack_panels<T>(inner, width, first, last, storage, panels, [&](int64_t column) INLINE_LAMBDA {
    const int64_t unit = column / 4 * kLanes<T>, gate = column % 4;
    return RowsOf<T>{w + (gate * hidden + unit) * inner, hidden - unit};
  });
}

template <typename T>
void pack_rows(const T* w, int64_t columns, int64_t inner, int64_t width, int64_t first, int64_t last, Storage storage,
               void* panels) {
  pack_panels<T>(inner, width, first, last, storage, panels, [&](int64_t column) INLINE_LAMBDA {
    const int64_t row = column * kLanes<T>;
    return RowsOf<T>{w + row * inner, columns - row};
  });
}

template <typename T>
void pack_columns(const T* w, int64_t columns, int64_t blocks, int64_t rows_per_block, int64_t padded_rows,
                  int64_t width, int64_t first, int64_t last, Storage storage, void* panels) {
  constexpr int V = kLanes<T>;
  const int64_t ldo = width * V;
  constexpr int64_t kTogether =
      4;  // panels: a row is read in pieces of some cache lines, and few pages are written at once
  with_storage<T>(storage, panels, [&](auto* data) INLINE_LAMBDA {
    for (int64_t some = first; some < last; some += kTogether) {
      const int64_t end = last - some < kTogether ? last : some + kTogether;
      for (int64_t to = 0; to < blocks * padded_rows; ++to) {
        const int64_t block = to / padded_rows, row = to % padded_rows;
        const T* from = w + (block * rows_per_block + row) * columns;
        for (int64_t panel = some; panel < end; ++panel) {
          auto* out = data + (panel * blocks * padded_rows + to) * ldo;
          const auto vector = [&](int64_t v) INLINE_LAMBDA {
            const int64_t column = (panel * width + v) * V, left = columns - column;
            const T* p = from + column;
            return row >= rows_per_block || left <= 0 ? Vec<T>{} : left >= V ? load(p) : load_first(p, left);
          };
          for (int64_t v = 0; v < width; v += 2) store_pair(out + v * V, vector(v), vector(v + 1));
        }
      }
    }
  });
}

template <typename T>
void pack_bias(const T* b_ih, const T* b_hh, int64_t hidden, int64_t first, int64_t last, T* bias) {
  constexpr int V = kLanes<T>;
  for (int64_t unit = first * V; unit < last * V; ++unit) {
    for (int64_t gate = 0; gate < 4; ++gate) {
      T sum = 0;
      if (unit < hidden && b_ih) sum += b_ih[gate * hidden + unit];
      if (unit < hidden && b_hh) sum += b_hh[gate * hidden + unit];
      bias[(unit / V * 4 + gate) * V + unit % V] = sum;
    }
  }
}

template <typename T>
void maths(const T* x, int64_t n, T* sigmoid, T* tanh) {
  for (int64_t at = 0; at < n; at += kLanes<T>) {
    const int64_t left = n - at;
    const Vec<T> v = left < kLanes<T> ? load_first(x + at, left) : load(x + at);
    store_first(sigmoid + at, Math<T>::sigmoid(v), left);
    store_first(tanh + at, Math<T>::tanh(v), left);
  }
}

template <typename T>
constexpr Kernels<T> kTable = {
    kLanes<T>,       pack_gates<T>,    pack_rows<T>,     pack_columns<T>, pack_bias<T>, product<T>,
    step_forward<T>, step_backward<T>, activate_rows<T>, gradient<T>,     sum_rows<T>,  maths<T>,
};
