// csrc/cpu/kernels.inc.h: the CPU kernels, written once, for the vectors that the including file defines (see
// kernels.h).

// ---- The one product ----------------------------------------------------------------------------------------------
//
//              width vectors                A tile keeps rows × width accumulators in registers for the whole of K and
//            ┌───────────────┐              reads each weight once: K·width loads for K·width·rows multiply-adds.
//       K    │ panel  (L1/L2)│              With few rows, multiply-adds wait for each other's results. So a tile may
//            └───────────────┘              keep `Sums` partial sums of every output, which take the k in turn.
//   rows ▒▒▒▒ → broadcast a[row][k]

template <int Width>
inline constexpr int kTileRows = kRegisters >= 32 ? (Width == 4 ? 6 : 14) : (Width == 4 ? 3 : 6);
// How many multiply-adds in flight hide their latency (4 to 5 cycles, 2 a cycle).
inline constexpr int kInFlight = kRegisters >= 32 ? 16 : 8;
// Whether there are units that multiply bfloat16.
#if defined(STACKED_LSTM_BF16_UNITS)
inline constexpr bool kUnits = true;
#else
inline constexpr bool kUnits = false;
#endif
// How many steps of k ahead a tile prefetches weights. A tile of one row does not: the hardware's prefetcher is better
// then.
inline constexpr int kPrefetchSteps = 16;

// What a panel holds, and how a tile multiplies it. Here: numbers of T as they are. A step of a tile takes `kRows` rows
// of the inner dimension: `Width` vectors of weights in registers, and one word for each part of each row of
// activations.
template <typename Number>
struct Whole {
  using T = Number;
  using Stored = T;
  using Word = T;
  using Weight = Vec<T>;
  static constexpr int kRows = 1, kParts = 1;

  template <int Width>
  static INLINE void load_weights(const Stored* w, Weight (&weight)[Width]) {
    unroll<Width>([&](auto v) INLINE_LAMBDA { weight[v] = load(w + v * kVectorElements<T>); });
  }
  static INLINE Vec<T> spread(Word x) { return broadcast(x); }
  static INLINE Vec<T> multiply_add(Weight weight, Vec<T> x, Vec<T> sum) { return weight * x + sum; }
};

// Numbers of 16 bits that are widened to T in registers.
struct Halves : Whole<float> {
  using Stored = Bf16;

  template <int Width>
  static INLINE void load_weights(const Stored* w, Weight (&weight)[Width]) {
    unroll<Width / 2>([&](auto pair) INLINE_LAMBDA {
      unpack_bf16(w + 2 * pair * kVectorElements<T>, weight[2 * pair], weight[2 * pair + 1]);
    });
  }
};

#if defined(STACKED_LSTM_BF16_UNITS)
// Pairs of numbers of 16 bits, one from each of two rows of the inner dimension. The activations have `Parts` parts.
template <int Parts>
struct Pairs {
  using T = float;
  using Stored = Bf16;
  using Word = int32_t;
  using Weight = IntVec<T>;
  static constexpr int kRows = 2, kParts = Parts;

  template <int Width>
  static INLINE void load_weights(const Stored* w, Weight (&weight)[Width]) {
    unroll<Width>(
        [&](auto v) INLINE_LAMBDA { __builtin_memcpy(&weight[v], w + v * 2 * kVectorElements<T>, sizeof weight[v]); });
  }
  static INLINE IntVec<T> spread(Word x) { return x + IntVec<T>{}; }
  static INLINE Vec<T> multiply_add(Weight weight, IntVec<T> x, Vec<T> sum) { return dot_pairs(weight, x, sum); }
};
#endif

// The words of the activations: `ld` words from row to row, `part` words from a number's high part to its low part.
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
    constexpr int V = kVectorElements<float>;
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
  constexpr int V = kVectorElements<T>, stored = Width * V * Panel::kRows;
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
      constexpr int lines = stored * int{sizeof *w} / STACKED_LSTM_VECTOR_BYTES;  // vectors of memory
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

// Partial sums for a product of `rows` rows: as many as kInFlight allows, and 8 at most.
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
    return nullptr;  // sums_for() never returns this number of sums for so many rows
}

// The tiles with one number of partial sums, indexed by their rows.
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

// Calls f(n) for n = first … last-1, or in reverse order.
template <typename F>
INLINE void there_or_back(int64_t first, int64_t last, bool from_last, F&& f) {
  for (int64_t n = first; n < last; ++n) f(from_last ? first + last - 1 - n : n);
}

template <typename Panel, int Width>
void product_of_width(const Product<typename Panel::T>& p) {
  constexpr int64_t columns = Width * kVectorElements<typename Panel::T>;
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
  constexpr int V = kVectorElements<T>;
  return {load(p), load(p + V), load(p + 2 * V), load(p + 3 * V)};
}
template <typename T>
INLINE void store_gates(T* p, const Gates<Vec<T>>& y) {
  constexpr int V = kVectorElements<T>;
  store(p, y.i), store(p + V, y.f), store(p + 2 * V, y.g), store(p + 3 * V, y.o);
}

// The cell for one unit block of `rows` rows; `pre` holds their pre-activations. Not inlined, so that every caller runs
// the same instructions and gets the same bits.
template <typename Cell, typename T>
__attribute__((noinline)) void cells_forward(const StepForward<T>& s, const T* pre, int64_t unit_block, int64_t row,
                                             int64_t rows) {
  constexpr int V = kVectorElements<T>;
  const int64_t unit = unit_block * V;
  for (int64_t end = row + rows; row < end; ++row, pre += 4 * V) {
    Gates<Vec<T>> y;
    Vec<T> c = load(s.c + row * s.padded_hidden + unit);
    const Vec<T> h = Cell::template forward<Math<T>>(load_gates(pre), c, y);
    store(s.c + row * s.padded_hidden + unit, c);
    store(s.h_next + row * s.ldh_next + unit, h);
    if (s.y) store_first(s.y + row * s.ldy + unit, h, s.hidden - unit);
    if (s.saved_c) store(s.saved_c + row * s.padded_hidden + unit, c);
    if (s.saved_gates) store_gates(s.saved_gates + (row * s.padded_hidden + unit) * 4, y);
  }
}

template <typename Cell, typename Panel, int Width>
void step_forward_of_width(const StepForward<typename Panel::T>& s) {
  using T = typename Panel::T;
  constexpr int V = kVectorElements<T>;
  constexpr int64_t columns = Width * V;
  if (s.first_unit_block >= s.last_unit_block) return;
  const auto* const panels = static_cast<const typename Panel::Stored*>(s.panels.data);
  const int64_t steps = (s.inner + Panel::kRows - 1) / Panel::kRows;
  const auto h = operands_of<Panel>(s.h, s.ldh, s.rows, s.inner, s.operands);
  const Tile<Panel>* tiles = tiles_for<Panel, Width>(s.unroll_rows);
  alignas(STACKED_LSTM_VECTOR_BYTES) T pre[kTileRows<Width> * 4 * V];
  there_or_back(s.first_unit_block, s.last_unit_block, s.from_last, [&](int64_t unit_block) INLINE_LAMBDA {
    share_rows(s.rows, kTileRows<Width>, [&](int64_t row, int64_t count) INLINE_LAMBDA {
      for (int64_t part = 0; part < 4 / Width; ++part) {
        const int64_t panel = unit_block * (4 / Width) + part;
        tiles[count](panels + panel * steps * Panel::kRows * columns, h.data + row * h.ld, h.ld, h.part, steps,
                     s.projected + row * 4 * s.padded_hidden + panel * columns, 4 * s.padded_hidden,
                     pre + part * columns, 4 * V);
      }
      cells_forward<Cell>(s, pre, unit_block, row, count);
    });
  });
}

template <typename Cell, typename T>
void step_forward(const StepForward<T>& s) {
  with_panels<T>(s.panels, s.width, s.rounded, [&]<typename Panel>(Panel, auto width) INLINE_LAMBDA {
    step_forward_of_width<Cell, Panel, width>(s);
  });
}

// ---- Backward -------------------------------------------------------------------------------------------------------

// The first `count` elements of v, and zero in the others. This is no product with a mask: if a row has an Inf in it,
// its padded units hold NaNs (0·Inf in their products), and NaNs must not reach the products of backward.
template <typename T>
INLINE Vec<T> first_elements(Vec<T> v, int64_t count) {
  alignas(STACKED_LSTM_VECTOR_BYTES) T all[kVectorElements<T>];
  store(all, v);
  return load_first(all, count);
}

template <typename Cell, typename T>
void step_backward(const StepBackward<T>& s) {
  constexpr int V = kVectorElements<T>;
  for (int64_t row = 0; row < s.rows; ++row) {
    for (int64_t unit_block = s.first_unit_block; unit_block < s.last_unit_block; ++unit_block) {
      const int64_t unit = unit_block * V, at = row * s.padded_hidden + unit;
      Vec<T> dh = load(s.dh + row * s.lddh + unit);
      if (s.dy) dh = dh + load(s.dy + row * s.lddy + unit);
      Vec<T> dc = load(s.dc + at);
      const Gates<Vec<T>> y = load_gates(s.gates + at * 4);
      const Vec<T> c_next = load(s.c_next + at);
      Gates<Vec<T>> d = Cell::template backward<Math<T>>(y, load(s.c + at), c_next, dh, dc);
      if (const int64_t left = s.hidden - unit; left < V) {
        d = {first_elements<T>(d.i, left), first_elements<T>(d.f, left), first_elements<T>(d.g, left),
             first_elements<T>(d.o, left)};
      }
      if (s.projected) store(s.projected + row * s.ldm + unit, Cell::template output<Math<T>>(y, c_next));
      store(s.dc + at, dc);
      T* out = s.dgates + row * s.lddg + unit;
      store(out, d.i), store(out + s.padded_hidden, d.f), store(out + 2 * s.padded_hidden, d.g),
          store(out + 3 * s.padded_hidden, d.o);
    }
  }
}

template <typename Cell, typename T>
void replay(const Replay<T>& s) {
  constexpr int V = kVectorElements<T>;
  for (int64_t row = 0; row < s.rows; ++row) {
    for (int64_t unit_block = s.first_unit_block; unit_block < s.last_unit_block; ++unit_block) {
      const int64_t at = row * s.padded_hidden + unit_block * V;
      Vec<T> c = load(s.c + at);
      if (s.gates) {
        c = Cell::state(load_gates(s.gates + at * 4), c);
      } else {
        Gates<Vec<T>> y;
        Cell::template forward<Math<T>>(load_gates(s.sums + at * 4), c, y);
        store_gates(s.sums + at * 4, y);
      }
      if (s.c_next) store(s.c_next + at, c);
    }
  }
}

template <typename T>
void sum_rows(const T* a, int64_t lda, int64_t rows, int64_t columns, bool accumulate, T* sum) {
  constexpr int V = kVectorElements<T>;
  for (int64_t n = 0; n < columns; n += V) {  // rows are padded to whole vectors
    const int64_t left = columns - n;
    Vec<T> total{};
    if (accumulate) total = left < V ? load_first(sum + n, left) : load(sum + n);
    for (int64_t row = 0; row < rows; ++row) total = total + load(a + row * lda + n);
    store_first(sum + n, total, left);
  }
}

#include "gradient.inc.h"
#include "packing.inc.h"

template <typename T>
void maths(const T* x, int64_t n, T* sigmoid, T* tanh) {
  for (int64_t at = 0; at < n; at += kVectorElements<T>) {
    const int64_t left = n - at;
    const Vec<T> v = left < kVectorElements<T> ? load_first(x + at, left) : load(x + at);
    store_first(sigmoid + at, Math<T>::sigmoid(v), left);
    store_first(tanh + at, Math<T>::tanh(v), left);
  }
}

#include "fingerprint.inc.h"

template <typename T>
constexpr CpuKernels<T> kTable = {
    kVectorElements<T>,
    kUnits,
    pack_gates<T>,
    pack_rows<T>,
    pack_columns<T>,
    pack_bias<T>,
    product<T>,
    step_forward<LstmCell, T>,
    step_backward<LstmCell, T>,
    replay<LstmCell, T>,
    gradient<T>,
    sum_rows<T>,
    maths<T>,
    digest,
};
