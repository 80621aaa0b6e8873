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
// Whether there are units that multiply bfloat16.
#if defined(STACKED_LSTM_BF16_UNITS)
inline constexpr bool kUnits = true;
#else
inline constexpr bool kUnits = false;
#endif
// How far ahead, in steps of k, to ask for weights. One row streams best by the hardware's own prefetcher.
inline constexpr int kPrefetchSteps = 16;

// What a panel holds and how a tile multiplies it: numbers of T as they are. A tile takes `kRows` rows of the inner
// dimension at a step: of the weights `Width` vectors in registers, of each row of activations a word for each part.
template <typename Number>
struct Whole {
  using T = Number;
  using Stored = T;
  using Word = T;
  using Weight = Vec<T>;
  static constexpr int kRows = 1, kParts = 1;

  template <int Width>
  static INLINE void load_weights(const Stored* w, Weight (&weight)[Width]) {
    unroll<Width>([&](auto v) INLINE_LAMBDA { weight[v] = load(w + v * kLanes<T>); });
  }
  static INLINE Vec<T> spread(Word x) { return broadcast(x); }
  static INLINE Vec<T> multiply_add(Weight weight, Vec<T> x, Vec<T> sum) { return weight * x + sum; }
};

// Numbers of 16 bits, that become T in registers.
struct Halves : Whole<float> {
  using Stored = Bf16;

  template <int Width>
  static INLINE void load_weights(const Stored* w, Weight (&weight)[Width]) {
    unroll<Width / 2>([&](auto pair) INLINE_LAMBDA {
      unpack_bf16(w + 2 * pair * kLanes<T>, weight[2 * pair], weight[2 * pair + 1]);
    });
  }
};

#if defined(STACKED_LSTM_BF16_UNITS)
// Pairs of numbers of 16 bits, one from each of two rows of the inner dimension, and activations in as many parts.
template <int Parts>
struct Pairs {
  using T = float;
  using Stored = Bf16;
  using Word = int32_t;
  using Weight = IntVec<T>;
  static constexpr int kRows = 2, kParts = Parts;

  template <int Width>
  static INLINE void load_weights(const Stored* w, Weight (&weight)[Width]) {
    unroll<Width>([&](auto v) INLINE_LAMBDA { __builtin_memcpy(&weight[v], w + v * 2 * kLanes<T>, sizeof weight[v]); });
  }
  static INLINE IntVec<T> spread(Word x) { return x + IntVec<T>{}; }
  static INLINE Vec<T> multiply_add(Weight weight, IntVec<T> x, Vec<T> sum) { return dot_pairs(weight, x, sum); }
};
#endif

// Words of one row of activations, and from the high part of a number to its low one.
template <typename Word>
struct Operands {
  const Word* data;
  int64_t ld, part;
};

template <typename Panel>
INLINE Operands<typename Panel::Word> operands_of(const typename Panel::T* a, int64_t lda,
                                                  [[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t inner,
                                                  [[maybe_unused]] void* memory) {
  if constexpr (Panel::kRows == 1) {
    return {a, lda, 0};
  } else {
#if defined(STACKED_LSTM_BF16_UNITS)
    constexpr int V = kLanes<float>;
    auto* const words = static_cast<int32_t*>(memory);
    const int64_t ld = operand_words(inner, Panel::kParts), part = operand_part(inner);
    const auto some = [&](const float* x, int64_t count) INLINE_LAMBDA {
      return count >= V ? load(x) : count > 0 ? load_first(x, count) : Vec<float>{};
    };
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t k = 0; k < inner; k += 2 * V) {
        const float* const x = a + row * lda + k;
        const Vec<float> first = some(x, inner - k), second = some(x + V, inner - k - V);
        const IntVec<float> high = round_to_pairs(first, second);
        int32_t* const to = words + row * ld + k / 2;
        __builtin_memcpy(to, &high, sizeof high);
        if constexpr (Panel::kParts == 2) {
          const IntVec<float> low = round_to_pairs(rest_of<0>(first, high), rest_of<1>(second, high));
          __builtin_memcpy(to + part, &low, sizeof low);
        }
      }
    }
    return {words, ld, part};
#endif
  }
}

template <typename Panel, int Rows, int Width, int Sums>
void tile(const typename Panel::Stored* __restrict panel, const typename Panel::Word* __restrict a, int64_t lda,
          [[maybe_unused]] int64_t part_words, int64_t steps, const typename Panel::T* init, int64_t init_step,
          typename Panel::T* c, int64_t ldc) {
  using T = typename Panel::T;
  constexpr int V = kLanes<T>, stored = Width * V * Panel::kRows;
  Vec<T> sum[Sums * Rows * Width];
  unroll<Sums * Rows * Width>([&](auto n) INLINE_LAMBDA {
    constexpr int part = n / (Rows * Width), row = n / Width % Rows, v = n % Width;
    sum[n] = part == 0 && init ? load(init + row * init_step + v * V) : Vec<T>{};
  });
  const auto multiply_add = [&](auto part, int64_t k) INLINE_LAMBDA {
    const auto* w = panel + k * stored;
    typename Panel::Weight weight[Width];
    Panel::load_weights(w, weight);
    if constexpr (Rows > 1) {
      constexpr int lines = stored * int{sizeof *w} / STACKED_LSTM_VECTOR_BYTES;  // vectors, of memory
      unroll<lines>([&](auto v)
                        INLINE_LAMBDA { __builtin_prefetch(w + kPrefetchSteps * stored + v * (stored / lines)); });
    }
    unroll<Panel::kParts>([&](auto high_or_low) INLINE_LAMBDA {
      unroll<Rows>([&](auto row) INLINE_LAMBDA {
        const auto x = Panel::spread(a[row * lda + high_or_low * part_words + k]);
        unroll<Width>([&](auto v) INLINE_LAMBDA {
          constexpr int n = (part * Rows + row) * Width + v;
          sum[n] = Panel::multiply_add(weight[v], x, sum[n]);
        });
      });
    });
  };
  int64_t k = 0;
  for (; k + Sums <= steps; k += Sums) unroll<Sums>([&](auto part) INLINE_LAMBDA { multiply_add(part, k + part); });
  for (; k < steps; ++k) multiply_add(std::integral_constant<int, 0>{}, k);
  unroll<Rows * Width>([&](auto n) INLINE_LAMBDA {
    constexpr int row = n / Width, v = n % Width;
    Vec<T> total = sum[n];
    unroll<Sums - 1>([&](auto part) INLINE_LAMBDA { total = total + sum[(part + 1) * Rows * Width + n]; });
    store(c + row * ldc + v * V, total);
  });
}

template <typename Panel>
using Tile = void (*)(const typename Panel::Stored*, const typename Panel::Word*, int64_t, int64_t, int64_t,
                      const typename Panel::T*, int64_t, typename Panel::T*, int64_t);

// Partial sums for a product of `rows` rows: as many as are in flight anyway.
template <int Width>
constexpr int sums_for(int64_t rows) {
  int sums = 1;
  while (sums < 8 && rows * Width * sums * 2 <= kInFlight) sums *= 2;
  return sums;
}

template <typename Panel, int Width, int Sums, int Rows>
constexpr Tile<Panel> tile_or_null() {
  if constexpr (Sums == 1 || Rows * Width * Sums <= kInFlight)
    return tile<Panel, Rows, Width, Sums>;
  else
    return nullptr;  // sums_for never asks for it
}

// The tiles of one number of partial sums, by rows.
template <typename Panel, int Width>
struct Tiles {
  Tile<Panel> of[kTileRows<Width> + 1];
};
template <typename Panel, int Width, int Sums, int... row>
constexpr Tiles<Panel, Width> tiles_of(std::integer_sequence<int, row...>) {
  return {{nullptr, tile_or_null<Panel, Width, Sums, row + 1>()...}};
}
template <typename Panel, int Width, int Sums>
constexpr Tiles<Panel, Width> kTiles =
    tiles_of<Panel, Width, Sums>(std::make_integer_sequence<int, kTileRows<Width>>{});

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

template <typename Panel, int Width>
INLINE const Tile<Panel>* tiles_for(int64_t unroll_rows) {
  switch (sums_for<Width>(unroll_rows)) {
    case 8:
      return kTiles<Panel, Width, 8>.of;
    case 4:
      return kTiles<Panel, Width, 4>.of;
    case 2:
      return kTiles<Panel, Width, 2>.of;
    default:
      return kTiles<Panel, Width, 1>.of;
  }
}

// Calls run(panel, width) with what the panels hold and how many vectors wide they are, both as types.
template <typename T, typename Run>
INLINE void with_panels(const Panels& panels, int64_t width, [[maybe_unused]] bool rounded, Run&& run) {
  const auto of_type = [&](auto panel) INLINE_LAMBDA {
    width == 4 ? run(panel, std::integral_constant<int, 4>{}) : run(panel, std::integral_constant<int, 2>{});
  };
  if constexpr (sizeof(T) == sizeof(float)) {
#if defined(STACKED_LSTM_BF16_UNITS)
    if (panels.storage == Storage::bf16) return rounded ? of_type(Pairs<1>{}) : of_type(Pairs<2>{});
#else
    if (panels.storage == Storage::bf16) return of_type(Halves{});
#endif
  }
  of_type(Whole<T>{});
}

// Calls f(n) for first … last-1, or the other way round.
template <typename F>
INLINE void there_or_back(int64_t first, int64_t last, bool from_last, F&& f) {
  for (int64_t n = first; n < last; ++n) f(from_last ? first + last - 1 - n : n);
}

template <typename Panel, int Width>
void product_of_width(const Product<typename Panel::T>& p) {
  constexpr int64_t columns = Width * kLanes<typename Panel::T>;
  if (p.first_panel >= p.last_panel) return;
  const auto* const panels = static_cast<const typename Panel::Stored*>(p.panels.data);
  const int64_t steps = (p.inner + Panel::kRows - 1) / Panel::kRows;
  const auto a = operands_of<Panel>(p.a, p.lda, p.rows, p.inner, p.operands);
  const Tile<Panel>* tiles = tiles_for<Panel, Width>(p.unroll_rows);
  there_or_back(p.first_panel, p.last_panel, p.from_last, [&](int64_t panel) INLINE_LAMBDA {
    share_rows(p.rows, kTileRows<Width>, [&](int64_t row, int64_t count) INLINE_LAMBDA {
      tiles[count](panels + panel * steps * Panel::kRows * columns, a.data + row * a.ld, a.ld, a.part, steps,
                   p.init ? p.init + row * p.init_step + panel * columns : nullptr, p.init_step,
                   p.c + row * p.ldc + panel * columns, p.ldc);
    });
  });
}

template <typename T>
void product(const Product<T>& p) {
  with_panels<T>(p.panels, p.width, p.rounded,
                 [&]<typename Panel>(Panel, auto width) INLINE_LAMBDA { product_of_width<Panel, width>(p); });
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

template <typename Panel, int Width>
void step_forward_of_width(const StepForward<typename Panel::T>& s) {
  using T = typename Panel::T;
  constexpr int V = kLanes<T>;
  constexpr int64_t columns = Width * V;
  if (s.first_block >= s.last_block) return;
  const auto* const panels = static_cast<const typename Panel::Stored*>(s.panels.data);
  const int64_t steps = (s.inner + Panel::kRows - 1) / Panel::kRows;
  const auto h = operands_of<Panel>(s.h, s.ldh, s.rows, s.inner, s.operands);
  const Tile<Panel>* tiles = tiles_for<Panel, Width>(s.unroll_rows);
  alignas(STACKED_LSTM_VECTOR_BYTES) T pre[kTileRows<Width> * 4 * V];
  there_or_back(s.first_block, s.last_block, s.from_last, [&](int64_t block) INLINE_LAMBDA {
    share_rows(s.rows, kTileRows<Width>, [&](int64_t row, int64_t count) INLINE_LAMBDA {
      for (int64_t part = 0; part < 4 / Width; ++part) {
        const int64_t panel = block * (4 / Width) + part;
        tiles[count](panels + panel * steps * Panel::kRows * columns, h.data + row * h.ld, h.ld, h.part, steps,
                     s.projected + row * 4 * s.padded_hidden + panel * columns, 4 * s.padded_hidden,
                     pre + part * columns, 4 * V);
      }
      cells_forward(s, pre, block, row, count);
    });
  });
}

template <typename T>
void step_forward(const StepForward<T>& s) {
  with_panels<T>(s.panels, s.width, s.rounded,
                 [&]<typename Panel>(Panel, auto width) INLINE_LAMBDA { step_forward_of_width<Panel, width>(s); });
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
void states(const T* gates, const T* c, int64_t rows, int64_t padded_hidden, int64_t first_block, int64_t last_block,
            T* c_next) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t at = row * padded_hidden + block * kLanes<T>;
      store(c_next + at, cell_state(load_gates(gates + at * 4), load(c + at)));
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
//  ▒▒▒▒▒▒ dG (L2) → broadcast    already, because it is small, is read where it is. Units that multiply bfloat16 take two
//                                rows at a time, rounded when they are copied.

inline constexpr int64_t kGradientCache = 512 << 10;  // bytes of dG, gaps between rows included
inline constexpr int kGradientAhead = 8;              // rows of dG to ask for ahead of their use

template <typename Panel, int Rows>
void gradient_tile(const typename Panel::Word* __restrict a, int64_t lda,
                   const typename Panel::Stored* __restrict panel, int64_t steps, typename Panel::T* c, int64_t ldc,
                   int64_t columns, bool accumulate) {
  using T = typename Panel::T;
  constexpr int V = kLanes<T>, Width = 2;
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

// `count` columns of all rows, as a tile broadcasts them, one row (or pair of rows) after the other; row_at(r)
// is where row r stands. There are `left` columns to the end of a row.
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
      constexpr int V = kLanes<float>;
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

// Two vectors of every row (or pair of rows), one after the other, zeros from column `left` on.
template <typename Panel, typename RowAt>
INLINE void copy_panel(RowAt&& row_at, int64_t rows, int64_t left, typename Panel::Stored* panel) {
  using T = typename Panel::T;
  constexpr int V = kLanes<T>;
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

// Every element is the sum of its blocks' sums, in their order: how m and n were shared out cannot be seen in it.
template <typename Panel>
void gradient_of(const GradientProduct<typename Panel::T>& p) {
  using T = typename Panel::T;
  using Word = typename Panel::Word;
  constexpr int columns = 2 * kLanes<T>;
  auto* const some_a = static_cast<Word*>(p.scratch);
  void* const rest = some_a + kGradientRows<T> * kGradientColumns;
  auto* const panel = static_cast<typename Panel::Stored*>(rest);
  int64_t first = 0;
  do {  // once without any rows, for zeros
    const int64_t rows = p.rows - first < kGradientRows<T> ? p.rows - first : kGradientRows<T>;
    const int64_t steps = (rows + Panel::kRows - 1) / Panel::kRows;
    const bool accumulate = p.accumulate || first > 0;
    const int64_t parting = p.parting - first;  // in this block
    const bool together = parting <= 0 || parting >= rows;
    // Row n of the block, column m: from one of the two pieces.
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

// ---- Packing --------------------------------------------------------------------------------------------------------

// Rows of a panel whose numbers share words.
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

// N neighbouring vectors of a panel's row, or of its rows that stand together. at(row, vector) has the numbers.
template <int N, typename T, typename At>
INLINE void store_vectors(T* out, At&& at) {
  unroll<N>([&](auto v) INLINE_LAMBDA { store(out + v * kLanes<T>, at(0, v)); });
}
template <int N, typename At>
INLINE void store_vectors(Bf16* out, At&& at) {
  if constexpr (kRowsTogether<Bf16> == 2) {
    unroll<N>([&](auto v) INLINE_LAMBDA { pack_bf16(out + 2 * v * kLanes<float>, at(0, v), at(1, v)); });
  } else {
    unroll<N / 2>([&](auto v)
                      INLINE_LAMBDA { pack_bf16(out + 2 * v * kLanes<float>, at(0, 2 * v), at(0, 2 * v + 1)); });
  }
}

// `lanes` rows of W from `first` on, of which `count` exist; the others are zero.
template <typename T>
struct RowsOf {
  const T* first;
  int64_t count;

  // Columns k … k + lanes - 1 of them, as vectors of rows. Nothing is read past the last row or a row's end.
  INLINE void columns(int64_t k, int64_t inner, Vec<T> (&v)[kLanes<T>]) const {
    constexpr int V = kLanes<T>;
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

// Vectors of a panel that are packed at a time: as few as fill whole cache lines of it, or share words.
template <typename T, typename W>
inline constexpr int kVectorsTogether = kLanes<T> * kRowsTogether<W> * int{sizeof(W)} >= 64 ? 1 : 2;

// Rows of W to neighbouring vectors of a panel. The processor's prefetchers follow neither so many rows nor the strided
// lines of the panel: each block of rows asks for as much of the rows that are packed next, in the order of their
// addresses, and for the lines that the next block writes.
template <typename T, typename W>
void pack_lanes(const RowsOf<T>* rows, const RowsOf<T>* next, int64_t inner, W* out, int64_t ldo) {
  constexpr int V = kLanes<T>, R = kRowsTogether<W>, N = kVectorsTogether<T, W>;
  constexpr int kLine = 64 / int{sizeof(T)}, kSecondLevel = 2;  // rows a power of two apart share sets of the first
  for (int64_t k = 0; k < inner; k += V, out += V * ldo) {
    Vec<T> v[N][V];
    unroll<N>([&](auto n) INLINE_LAMBDA {
      for (int64_t at = 0; at < V * V; at += kLine) __builtin_prefetch(next[n].first + V * k + at, 0, kSecondLevel);
      rows[n].columns(k, inner, v[n]);
    });
    const auto store_rows = [&](int64_t steps) INLINE_LAMBDA {
      unroll<V / R>([&](auto step) INLINE_LAMBDA {  // past the last row, columns are zeros
        if (step * R >= steps) return;
        __builtin_prefetch(out + (V + step * R) * ldo, 1);
        store_vectors<N>(out + step * R * ldo,
                         [&](int row, int vector) INLINE_LAMBDA { return v[vector][step * R + row]; });
      });
    };
    inner - k >= V ? store_rows(V) : store_rows(inner - k);
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
  with_storage<T>(storage, panels, [&]<typename W>(W* out) INLINE_LAMBDA {
    constexpr int N = kVectorsTogether<T, W>;
    const int64_t rows = rows_in_panel<W>(inner);
    for (int64_t panel = first; panel < last; ++panel) {
      for (int64_t v = 0; v < width; v += N) {
        const int64_t column = panel * width + v, following = column + N < last * width ? column + N : column;
        RowsOf<T> of[N], next[N];
        unroll<N>([&](auto n) INLINE_LAMBDA { of[n] = rows_of(column + n), next[n] = rows_of(following + n); });
        pack_lanes(of, next, inner, out + panel * rows * ldo + v * kLanes<T> * kRowsTogether<W>, ldo);
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
  // Panels: a row is read in pieces of many lines, but few panels are written at once.
  const int64_t together = 32 / width;
  // Of W, to ask for where rows are long: pieces of those are no sequence that the processor's prefetchers would follow.
  constexpr int kRowsAhead = 4;
  const bool ask = columns * int64_t{sizeof(T)} >= 1024;
  with_storage<T>(storage, panels, [&]<typename W>(W* data) INLINE_LAMBDA {
    constexpr int R = kRowsTogether<W>;
    const int64_t rows = rows_in_panel<W>(blocks * padded_rows);
    for (int64_t some = first; some < last; some += together) {
      const int64_t end = last - some < together ? last : some + together;
      int64_t block = 0, row = 0;
      for (int64_t to = 0; to < rows; to += R) {
        const T* from[R];  // null: a row of zeros
        for (const T*& p : from) {
          p = block < blocks && row < rows_per_block ? w + (block * rows_per_block + row) * columns : nullptr;
          if (++row == padded_rows) row = 0, ++block;
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

#include "fingerprint.inc.h"

template <typename T>
constexpr Kernels<T> kTable = {
    kLanes<T>,    kUnits,      pack_gates<T>,   pack_rows<T>,     pack_columns<T>,
    pack_bias<T>, product<T>,  step_forward<T>, step_backward<T>, activate_rows<T>,
    states<T>,    gradient<T>, sum_rows<T>,     maths<T>,         digest,
};
