// csrc/cuda/persistent.cuh: what the persistent kernels are made of. One launch runs a whole stack for all time steps, and
// the recurrent weights never leave the registers. The kernel that puts the pieces together: persistent_forward.cuh.
//
//   a layer          `blocks` blocks; all of them hold h(t-1) of every unit in shared memory
//   └ a block        `groups` groups of 8 units
//     └ a group      32 gate rows, two mma tiles of the same 8 units, and `splits` warps, each over its part of K
//
//      tile 0   rows 0-7: gate i, rows 8-15: gate f      lane l of a warp has unit l/4 and two of every 8 batch columns:
//      tile 1   rows 0-7: gate g, rows 8-15: gate o      its accumulators are all four gates of its cells, beside c
//
// H that does not fill blocks · groups · 8, or K = 16 · splits · k_steps, is filled up with zeros in the packed weights and
// on the chip, never in the caller's memory. The same goes for I and for B.
//
// T is what tensors hold, bfloat16 or float16. Sums, gates and c are fp32; h is rounded to T once a step, for everybody.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../cell.h"
#include "../number.h"
#include "primitives.cuh"

namespace stacked_lstm::cuda::persistent {

// ---- What a kernel is given -----------------------------------------------------------------------------------------

constexpr int kGroupUnits = 8, kLanes = 32;
// A group has a named barrier, of which a block has 15 besides its own: kMaxWarps is less.
constexpr int kMaxWarps = 8;    // of a block: 65536 registers, 255 a thread
constexpr int kMaxLayers = 32;  // of a launch: their arguments travel by value, in 4 KB

// How a layer is cut, as far as the compiler has to know it.
template <int KSteps, int Splits, int Tiles>
struct Cut {
  static constexpr int kSteps = KSteps;   // k-steps (of 16) of a warp: 8 registers of weights each
  static constexpr int kSplits = Splits;  // warps that share a group
  static constexpr int kTiles = Tiles;    // of 8 batch columns
  static constexpr int kColumns = 8 * Tiles;
  static constexpr int kDepth = 16 * Splits * KSteps;  // K
  // A row of h in shared memory. 16 bytes past a multiple of 128: the eight rows that ldmatrix reads at once lie in
  // different banks.
  static constexpr int kRow = kDepth + 8;
  static_assert(KSteps % 2 == 0, "one ldmatrix brings two k-steps");
  static_assert(Splits == 1 || Splits % 2 == 0, "the two tiles of gate rows are dealt among the warps of a group");
  static_assert(kLanes % kColumns == 0, "a lane of a warp sends one word to some of the peers");
  static_assert(kDepth % 64 == 0 || kDepth == 32, "see kRow");
};

struct Sizes {
  int layers, steps, batch, hidden;
  int blocks;              // of a layer
  int groups;              // of a block
  int chunk_steps;         // steps whose input projection is done together
  bool weights_in_shared;  // W_ih is copied to shared memory once, instead of being read from L2 every chunk

  STACKED_LSTM_HOST_DEVICE int units() const { return blocks * groups * kGroupUnits; }
};

template <typename T>
struct Layer {
  const uint4* w_hh;   // packed (packed_word), Order::natural, kDepth / 16 k-steps
  const uint4* w_ih;   // packed, Order::paired, input_k_steps(inputs) k-steps
  const float4* bias;  // packed (packed_bias): a unit's b_ih + b_hh
  const T* x;          // (steps, batch, inputs): the stack's input, or h of the layer below
  T* h;                // (steps, batch, hidden)
  const T* h_0;        // (batch, hidden), or null: zeros
  const T* c_0;        // (batch, hidden), or null: zeros
  T* h_n;              // (batch, hidden), or null
  T* c_n;              // (batch, hidden), or null
  float* saved_c;      // (steps, batch, hidden), or null
  float* saved_gates;  // (steps, batch, 4, hidden): the activations; or null
  int inputs;
};

template <typename T>
struct Arguments {
  Sizes sizes;
  uint32_t* chunks_done;  // (layers, blocks), zero at the launch: chunks of h that a block has written
  uint64_t* words;        // L2Exchange alone: (layers, 2, kColumns, kDepth / 2), zero at the launch
  Layer<T> layer[kMaxLayers];
};
static_assert(sizeof(Arguments<bfloat16>) <= 4096, "what every architecture and driver takes as a kernel's arguments");

// ---- Packed weights: A-fragments of mma, in the order in which the kernel reads them ---------------------------------
// Words of 16 bytes: [group of 8 units][k-step][tile of gate rows][lane]. Which block has which groups does not matter.

enum class Order {
  natural,  // k-step s holds k = 16 s … 16 s + 15
  // Two k-steps hold 32 s … 32 s + 31 so that a lane's part of both is 8 neighbours: one load of 16 bytes of x.
  paired,
};

STACKED_LSTM_HOST_DEVICE int input_k_steps(int inputs) { return (inputs + 31) / 32 * 2; }

// Word number `word` of `weight`, (4·hidden, depth) in torch's order of gates; zeros where that has ended.
template <typename T>
STACKED_LSTM_HOST_DEVICE uint4 packed_word(const T* weight, int hidden, int depth, int k_steps, Order order,
                                           int64_t word) {
  const int lane = static_cast<int>(word % kLanes), tile = static_cast<int>(word / kLanes % 2);
  const int k_step = static_cast<int>(word / (2 * kLanes) % k_steps);
  const int64_t unit = word / (2 * kLanes) / k_steps * kGroupUnits + lane / 4;
  uint32_t fragment[4];
  for (int i = 0; i < 4; ++i) {
    // Register i of a lane: row lane/4 + 8·(i mod 2), and two neighbours of K, in its lower or (i ≥ 2) upper half.
    const int gate = 2 * tile + i % 2, quarter = lane % 4, half = i / 2;
    const int k = order == Order::natural ? 16 * k_step + 8 * half + 2 * quarter
                                          : k_step / 2 * 32 + 8 * quarter + k_step % 2 * 4 + 2 * half;
    const T* row = weight + (gate * int64_t{hidden} + unit) * depth;
    const uint32_t low = unit < hidden && k < depth ? row[k].bits : 0;
    const uint32_t high = unit < hidden && k + 1 < depth ? row[k + 1].bits : 0;
    fragment[i] = high << 16 | low;
  }
  return {fragment[0], fragment[1], fragment[2], fragment[3]};
}

// Both biases of one unit, in the order i, f, g, o. Either may be null.
template <typename T>
STACKED_LSTM_HOST_DEVICE float4 packed_bias(const T* b_ih, const T* b_hh, int hidden, int unit) {
  float gate[4] = {};
  for (int n = 0; n < 4 && unit < hidden; ++n) {
    if (b_ih) gate[n] += widen(b_ih[n * hidden + unit]);
    if (b_hh) gate[n] += widen(b_hh[n * hidden + unit]);
  }
  return {gate[0], gate[1], gate[2], gate[3]};
}

// ---- Who a thread is, and where things lie in shared memory ----------------------------------------------------------

struct Place {
  int thread, lane, group, split;
  int rank;         // of the block, in its layer
  int block_group;  // of all groups of the layer, the one that this warp belongs to
  int unit;         // of the layer, the one that this lane has
  int column;       // the first of two, in every tile of 8 batch columns

  explicit __device__ __forceinline__ Place(const Sizes& sizes)
      : thread(static_cast<int>(threadIdx.x)),
        lane(thread % kLanes),
        // Neighbouring warps are on different schedulers: so are then those that compute gates, of split 0.
        group(thread / kLanes % sizes.groups),
        split(thread / kLanes / sizes.groups),
        rank(static_cast<int>(blockIdx.x) % sizes.blocks),
        block_group(rank * sizes.groups + group),
        unit(block_group * kGroupUnits + lane / 4),
        column(lane % 4 * 2) {}
};

template <typename T, class C>
struct FixedShared {
  alignas(16) T h[2][C::kColumns][C::kRow];  // h(t-1), for step t, in h[t mod 2]
  alignas(16) uint64_t arrived[2];           // ClusterExchange: mbarriers, for the two h
};

// What follows it depends on the sizes: offsets in bytes from the start.
template <typename T, class C>
struct SharedLayout {
  size_t partial, staged, projected, weights, bytes;
  // A group's share of each, in elements.
  static constexpr int kPartial = (C::kSplits - 1) * C::kTiles * 2 * kLanes;  // float4
  static constexpr int kStaged = C::kColumns * kGroupUnits;                   // T

  explicit STACKED_LSTM_HOST_DEVICE SharedLayout(const Sizes& sizes, int inputs) {
    const size_t groups = static_cast<size_t>(sizes.groups),
                 columns = static_cast<size_t>(sizes.chunk_steps) * C::kTiles;
    partial = sizeof(FixedShared<T, C>);
    staged = partial + 2 * groups * kPartial * sizeof(float4);
    projected = staged + 2 * groups * kStaged * sizeof(T);
    weights = projected + columns * groups * 2 * kLanes * sizeof(float4);
    bytes = weights;
    if (sizes.weights_in_shared)
      bytes += groups * static_cast<size_t>(input_k_steps(inputs)) * 2 * kLanes * sizeof(uint4);
  }
};

template <typename T, class C>
struct Shared {
  FixedShared<T, C>& fixed;
  float4* partial;    // [t mod 2][group][split - 1][batch tile][gate tile][lane]: sums over the other splits' K
  T* staged;          // [t mod 2][group][column][8 units]: h(t), on its way out
  float4* projected;  // [step of the chunk][batch tile][group][gate tile][lane]: W_ih·x + b, in accumulator order
  uint4* weights;     // W_ih of the block, where it lives here

  Shared(const Shared&) = delete;
  explicit __device__ __forceinline__ Shared(const SharedLayout<T, C>& layout)
      : fixed(dynamic_shared<FixedShared<T, C>>()),
        partial(reinterpret_cast<float4*>(start() + layout.partial)),
        staged(reinterpret_cast<T*>(start() + layout.staged)),
        projected(reinterpret_cast<float4*>(start() + layout.projected)),
        weights(reinterpret_cast<uint4*>(start() + layout.weights)) {}

 private:
  __device__ __forceinline__ unsigned char* start() const { return reinterpret_cast<unsigned char*>(&fixed); }
};

// ---- Arithmetic -----------------------------------------------------------------------------------------------------

// σ and tanh from 2^x and 1/x of the special function unit, each within two units in the last place: absolute error below
// 2⁻²⁰. What is rounded to 16 bits next is less exact, except for tanh of |x| < 2⁻⁹ or so, whose relative error grows.
struct FastMaths {
  static __device__ __forceinline__ float sigmoid(float x) {
    constexpr float kLog2E = 1.44269504f;
    return reciprocal_approx(1.0f + exp2_approx(-kLog2E * x));  // 2^x = ∞ gives 0, as it should
  }
  static __device__ __forceinline__ float tanh(float x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }
};

// d += a·b of elements T.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  if constexpr (std::is_same_v<T, bfloat16>) {
    mma_bf16(d, a, b);
  } else {
    mma_f16(d, a, b);
  }
}

__device__ __forceinline__ void unpack(uint32_t (&to)[4], const uint4& from) {
  to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}

// Elements column … column + 7 of a row of x, zeros past its end. From L2: a block of another layer may have written them
// during this launch. Aligned: the row begins, and ends, at a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ uint4 load_eight(const T* row, int column, int width, bool aligned) {
  uint4 eight = {0, 0, 0, 0};
  if (aligned) {
    if (column < width) eight = load_l2(reinterpret_cast<const uint4*>(row + column));
  } else {
    // A loop that stays one, which turns the words round: few registers, beside all those weights.
#pragma unroll 1
    for (int n = 0; n < 8; n += 2) {
      const int at = column + n;
      const uint32_t low = at < width ? load_l2(row + at).bits : 0;
      const uint32_t high = at + 1 < width ? load_l2(row + at + 1).bits : 0;
      eight = {eight.y, eight.z, eight.w, high << 16 | low};
    }
  }
  return eight;
}

// Accumulators of a warp: [batch tile][gate tile][element]: element 0, 1 are two columns of the tile's upper gate (i, g),
// 2, 3 the same columns of its lower one (f, o).
template <class C>
using Sums = float[C::kTiles][2][4];

// W_hh: the warp's A-fragments, for good.
template <class C>
struct RecurrentWeights {
  uint32_t fragment[C::kSteps][2][4];

  __device__ __forceinline__ RecurrentWeights(const uint4* w_hh, const Place& place) {
    const int64_t first = int64_t{place.block_group} * C::kSplits + place.split;  // of pieces of kSteps k-steps
#pragma unroll
    for (int k = 0; k < C::kSteps; ++k) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        unpack(fragment[k][m], load_streaming(w_hh + ((first * C::kSteps + k) * 2 + m) * kLanes + place.lane));
      }
    }
  }

  // d += W_hh·h over the warp's part of K. `row`: shared address of h of row lane % 8, of the lane's eight elements.
  template <typename T>
  __device__ __forceinline__ void multiply_h(Sums<C>& d, uint32_t row) const {
    // One batch tile alone would be two chains of dependent products: make it four.
    constexpr int kChains = C::kTiles == 1 ? 2 : 1;
    Sums<C> more = {};
#pragma unroll
    for (int k = 0; k < C::kSteps; k += 2) {
#pragma unroll
      for (int n = 0; n < C::kTiles; ++n) {
        uint32_t b[4];
        load_matrix_x4(b, row + static_cast<uint32_t>((n * 8 * C::kRow + k * 16) * sizeof(T)));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply<T>(d[n][m], fragment[k][m], b[0], b[1]);
          multiply<T>(kChains == 2 ? more[n][m] : d[n][m], fragment[k + 1][m], b[2], b[3]);
        }
      }
    }
    if constexpr (kChains == 2) add<C>(d, more);
  }

 private:
  template <class>
  static __device__ __forceinline__ void add(Sums<C>& d, const Sums<C>& more) {
#pragma unroll
    for (int n = 0; n < C::kTiles * 8; ++n) d[n / 8][n / 4 % 2][n % 4] += more[n / 8][n / 4 % 2][n % 4];
  }
};

// The input's share of the gates, W_ih·x + b, of `steps` steps from `first_step` on, into shared.projected. A column
// tile is 8 rows of x, of one step. Of a group's warps each takes one tile of gate rows, so that it reads half of the
// group's W_ih, and an equal part of the column tiles. A lane writes what the same lane of split 0 will read.
template <typename T, class C>
__device__ __forceinline__ void project(const Sizes& sizes, const Layer<T>& layer, const Place& place,
                                        const Shared<T, C>& shared, int first_step, int steps) {
  constexpr int kGateTiles = C::kSplits == 1 ? 2 : 1;            // of a warp
  constexpr int kShares = C::kSplits == 1 ? 1 : C::kSplits / 2;  // of the column tiles
  constexpr int kPass = 4;                                       // column tiles in registers at a time
  const int first_gate_tile = kGateTiles == 1 ? place.split % 2 : 0;
  const int k_steps = input_k_steps(layer.inputs), columns = steps * C::kTiles;
  const T* x = layer.x + int64_t{first_step} * sizes.batch * layer.inputs;
  const bool aligned = layer.inputs % 8 == 0 && reinterpret_cast<uintptr_t>(layer.x) % 16 == 0;
  const uint4* w = (sizes.weights_in_shared ? shared.weights + int64_t{place.group} * k_steps * 2 * kLanes
                                            : layer.w_ih + int64_t{place.block_group} * k_steps * 2 * kLanes) +
                   first_gate_tile * kLanes + place.lane;
  const float4 bias = load_readonly(layer.bias + place.unit);

  for (int first = place.split / 2 * kPass; first < columns; first += kShares * kPass) {
    float d[kPass][kGateTiles][4];
    int row[kPass];  // of x: where it begins. Row 0 where there is none: nothing that counts comes of such a column
#pragma unroll
    for (int n = 0; n < kPass; ++n) {
      const int column = first + n, step = column / C::kTiles, b = column % C::kTiles * 8 + place.lane / 4;
      row[n] = column < columns && b < sizes.batch ? (step * sizes.batch + b) * layer.inputs : 0;
#pragma unroll
      for (int m = 0; m < kGateTiles; ++m) {
        const bool lower = first_gate_tile + m == 1;
        d[n][m][0] = d[n][m][1] = lower ? bias.z : bias.x;
        d[n][m][2] = d[n][m][3] = lower ? bias.w : bias.y;
      }
    }
#pragma unroll 1
    for (int k = 0; k < k_steps; k += 2) {
      uint32_t a[2][kGateTiles][4];
#pragma unroll
      for (int n = 0; n < 2 * kGateTiles; ++n) {
        unpack(a[n / kGateTiles][n % kGateTiles], w[((k + n / kGateTiles) * 2 + n % kGateTiles) * kLanes]);
      }
      const auto multiply_column = [&](int n, const uint4& b) {
#pragma unroll
        for (int m = 0; m < kGateTiles; ++m) {
          multiply<T>(d[n][m], a[0][m], b.x, b.y);
          multiply<T>(d[n][m], a[1][m], b.z, b.w);
        }
      };
      const auto load = [&](int n, bool aligned_row) {
        return load_eight(x + row[n], k * 16 + place.lane % 4 * 8, layer.inputs, aligned_row);
      };
      if (aligned) {
        uint4 b[kPass];  // all under way together
#pragma unroll
        for (int n = 0; n < kPass; ++n) b[n] = load(n, true);
#pragma unroll
        for (int n = 0; n < kPass; ++n) multiply_column(n, b[n]);
      } else {
#pragma unroll
        for (int n = 0; n < kPass; ++n) multiply_column(n, load(n, false));
      }
    }
#pragma unroll
    for (int n = 0; n < kPass; ++n) {
      if (first + n >= columns) break;
      float4* to = shared.projected + ((first + n) * sizes.groups + place.group) * 2 * kLanes + place.lane;
#pragma unroll
      for (int m = 0; m < kGateTiles; ++m) {
        to[(first_gate_tile + m) * kLanes] = make_float4(d[n][m][0], d[n][m][1], d[n][m][2], d[n][m][3]);
      }
    }
  }
}

// ---- Exchange of h inside a layer -----------------------------------------------------------------------------------
// A policy brings h(t), which the groups of all blocks of a layer send, to the shared memory of each of these blocks.
//
//   start()            once, by all threads, after they have filled h[0] and h[1]: what arrives in them comes later
//   expect(t)          by all warps, at the start of a step that will send
//   receive(t)         by all warps: h(t-1) of the whole layer is in h[t mod 2], for this thread to read. Not at t = 0
//   send(t, staged)    by the warp of split 0 of a group, whose lanes have all staged their h(t). Not at the last step
//   finish()           once, by all threads

// All blocks of a layer are one thread-block cluster: h is pushed into every block's shared memory, the own too, and an
// mbarrier there counts the bytes.
//
// Hazard: h has two buffers. h(t+1) may land on h(t-1) in a block only when all of its warps have read that. So it is:
// whoever sends h(t+1) has received h(t) from every group of that block, and a group sends h(t) only after its warps
// have met, at the end of their products with h(t-1). For the same reason no warp falls a phase of an mbarrier behind.
template <typename T, class C>
struct ClusterExchange {
  static constexpr bool kCluster = true;
  const Sizes& sizes;
  const Place& place;
  FixedShared<T, C>& shared;

  __device__ __forceinline__ ClusterExchange(const Arguments<T>& arguments, const Place& p, FixedShared<T, C>& s)
      : sizes(arguments.sizes), place(p), shared(s) {}

  __device__ __forceinline__ void start() const {
    if (place.thread == 0) {
      mbarrier_init(shared_address(&shared.arrived[0]), 1);
      mbarrier_init(shared_address(&shared.arrived[1]), 1);
    }
    // The initialised mbarriers are visible to the pushes of all peers, which begin after the barrier …
    mbarrier_init_fence();
    // … and a peer's push into h[1] comes after all threads of the block have filled it with zeros.
    cluster_barrier();
  }

  __device__ __forceinline__ void expect(int t) const {
    // The bytes of h(t) may come before this is said: the phase cannot end without this arrival.
    const auto bytes = static_cast<uint32_t>(C::kColumns * sizes.units() * static_cast<int>(sizeof(T)));
    if (place.thread == 0) mbarrier_arrive_expect(shared_address(&shared.arrived[(t + 1) % 2]), bytes);
  }

  __device__ __forceinline__ void receive(int t) const {
    // Every group's push of h(t-1) into this block is visible to this thread's reads of it.
    mbarrier_wait(shared_address(&shared.arrived[t % 2]), static_cast<uint32_t>((t - 1) / 2 % 2));
  }

  // A lane has one word, 8 units of a batch column, and sends it to some of the peers.
  __device__ __forceinline__ void send(int t, const T* staged) const {
    const int next = (t + 1) % 2, column = place.lane % C::kColumns;
    const uint4 word = *reinterpret_cast<const uint4*>(staged + column * kGroupUnits);
    const uint32_t to = shared_address(&shared.h[next][column][place.block_group * kGroupUnits]);
    const uint32_t barrier = shared_address(&shared.arrived[next]);
#pragma unroll 4
    for (int peer = place.lane / C::kColumns; peer < sizes.blocks; peer += kLanes / C::kColumns) {
      const auto rank = static_cast<uint32_t>(peer);
      store_async(peer_address(to, rank), word, peer_address(barrier, rank));
    }
  }

  // Every block has received the last h that was sent: no push is under way to a block, or from one, that exits.
  __device__ __forceinline__ void finish() const { cluster_barrier(); }
};

// Through L2, for a layer of more blocks than a cluster has, and where there are no clusters. Two neighbouring units of
// a batch column and the number of the step travel in one word of 64 bits, which the memory model keeps whole: no flag and
// no fence, a step takes one crossing of L2.
//
//   step + 1 (32) | h of unit 2u + 1 (16) | h of unit 2u (16)
//
// Hazard: words have two places, for even and odd steps. h(t+1) may be written over h(t-1) because its writer has read all
// words of h(t), and a block sends those only after all of its threads have read the words of h(t-1), and met.
template <typename T, class C>
struct L2Exchange {
  static constexpr bool kCluster = false;
  static constexpr int kRowWords = C::kDepth / 2;
  const Sizes& sizes;
  const Place& place;
  FixedShared<T, C>& shared;
  uint64_t* words;  // [t mod 2][column][unit / 2]

  __device__ __forceinline__ L2Exchange(const Arguments<T>& arguments, const Place& p, FixedShared<T, C>& s)
      : sizes(arguments.sizes), place(p), shared(s) {
    const int layer = static_cast<int>(blockIdx.x) / sizes.blocks;
    words = arguments.words + int64_t{layer} * 2 * C::kColumns * kRowWords;
  }

  __device__ __forceinline__ void start() const {}  // words of 0 have no step's tag: whoever comes first waits

  __device__ __forceinline__ void expect(int) const {}

  // A warp takes whole columns, a lane every 32nd word of them.
  __device__ __forceinline__ void receive(int t) const {
    constexpr int kWords = (kRowWords + kLanes - 1) / kLanes;
    const int warps = static_cast<int>(blockDim.x) / kLanes, left = sizes.units() / 2 - place.lane;
    for (int column = place.thread / kLanes; column < C::kColumns; column += warps) {
      const uint64_t* from = words + ((t - 1) % 2 * C::kColumns + column) * kRowWords + place.lane;
      uint64_t word[kWords];
      // The first word tells when the step has come; the others are then asked for at once, and most will be there.
#pragma unroll
      for (int n = 0; n < kWords; ++n) {
        if (n * kLanes < left) word[n] = load_relaxed<Scope::device>(from + n * kLanes);
        if (n == 0 && left > 0) await_tag(word[0], from, t);
      }
      T* to = shared.h[t % 2][column];
#pragma unroll
      for (int n = 0; n < kWords; ++n) {
        if (n * kLanes >= left) break;
        await_tag(word[n], from + n * kLanes, t);
        // What stood here, h(t-3), was read by all before they met in the step before.
        *reinterpret_cast<uint32_t*>(to + 2 * (place.lane + n * kLanes)) = static_cast<uint32_t>(word[n]);
      }
    }
    // Every thread's part of h(t-1) is visible to all; and all words of h(t-1) have been read, so that the block's h(t)
    // may tell its peers to write over them.
    block_barrier();
  }

  __device__ __forceinline__ void send(int t, const T* staged) const {
    uint64_t* to = words + t % 2 * C::kColumns * kRowWords;
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
      const int column = n * 8 + place.lane / 4, pair = place.lane % 4;
      const uint32_t value = *reinterpret_cast<const uint32_t*>(staged + column * kGroupUnits + 2 * pair);
      store_relaxed<Scope::device>(to + column * kRowWords + place.block_group * (kGroupUnits / 2) + pair,
                                   static_cast<uint64_t>(t + 1) << 32 | value);
    }
  }

  __device__ __forceinline__ void finish() const {}

 private:
  // Until the word is that of step t - 1. The tag came with the value: nothing else has to be ordered.
  static __device__ __forceinline__ void await_tag(uint64_t& word, const uint64_t* from, int t) {
    while (word >> 32 != static_cast<uint64_t>(t)) word = load_relaxed<Scope::device>(from);
  }
};

}  // namespace stacked_lstm::cuda::persistent
