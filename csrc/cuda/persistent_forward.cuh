// csrc/cuda/persistent_forward.cuh: the whole stack, every time step, one launch.
//
//            t →   0    1    2    3    4    5         A block owns some units of one layer for the whole sequence: their
//   layer 0        ■────■────■────■────■────■         recurrent weights and c sit in registers. Inside a layer, h(t) goes to
//   layer 1                  ■────■────■────■──       every block that needs it (─), as persistent.cuh's exchange policies
//   layer 2                            ■────■────     say. Between layers it goes through L2, a chunk of steps at a time.
//
// A step:   receive h(t-1)   →   W_hh·h(t-1), each warp its part of K   →   a group's warps meet; split 0 adds up, does the
//           gates, sends h(t)   →   and only then writes h(t), and what backward wants, to memory.
// Blocks wait for data, never for each other: no barrier of a block (with L2Exchange: one), none of the grid.
//
// Between layers: h of every step has its own place in memory, so that nobody waits for readers. When a block has written a
// chunk, it says so in its own counter; a block of the layer above waits for the counters of all.
#pragma once

#include <algorithm>
#include <string>

#include "launch.cuh"
#include "persistent.cuh"

namespace stacked_lstm::cuda::persistent {

// ---- Hand-over between layers ---------------------------------------------------------------------------------------

// This block's h of `chunks` chunks is in memory.
template <typename T>
__device__ __forceinline__ void publish(const Arguments<T>& arguments, int layer, const Place& place, int chunks) {
  const Sizes& sizes = arguments.sizes;
  if (layer + 1 == sizes.layers) return;
  // All threads of the block have written their h: the release covers them all. (The last thread's warp does it, since
  // the first one's waits for the layer below.)
  if (place.thread == static_cast<int>(blockDim.x) - 1) {
    store_release<Scope::device>(arguments.chunks_done + layer * sizes.blocks + place.rank,
                                 static_cast<uint32_t>(chunks));
  }
}

// Until all blocks of the layer below have written `chunks` chunks. The stack's input is there from the start.
template <typename T>
__device__ __forceinline__ void await_below(const Arguments<T>& arguments, int layer, const Place& place, int chunks) {
  const Sizes& sizes = arguments.sizes;
  if (layer == 0) return;
  for (int block = place.thread; block < sizes.blocks; block += static_cast<int>(blockDim.x)) {
    const uint32_t* done = arguments.chunks_done + (layer - 1) * sizes.blocks + block;
    // With the number comes, by its acquire, the h that the block had written before: to this thread, and by the
    // caller's barrier to all threads of the block.
    while (load_acquire<Scope::device>(done) < static_cast<uint32_t>(chunks)) nanosleep(20);
  }
}

// ---- Pieces of a step -----------------------------------------------------------------------------------------------

// h(-1), and zeros wherever no unit and no row of the batch is: products read those too. And W_ih, where it lives here.
template <typename T, class C>
__device__ __forceinline__ void fill_shared(const Sizes& sizes, const Layer<T>& layer, const Place& place,
                                            const Shared<T, C>& shared) {
  const int threads = static_cast<int>(blockDim.x);
  for (int n = place.thread; n < C::kColumns * C::kRow; n += threads) {
    const int column = n / C::kRow, unit = n % C::kRow;
    const bool initial = layer.h_0 && column < sizes.batch && unit < sizes.hidden;
    shared.fixed.h[0][column][unit] = initial ? layer.h_0[int64_t{column} * sizes.hidden + unit] : T{0};
    shared.fixed.h[1][column][unit] = T{0};
  }
  if (sizes.weights_in_shared) {
    const int words = sizes.groups * input_k_steps(layer.inputs) * 2 * kLanes;
    for (int n = place.thread; n < words; n += threads) {
      shared.weights[n] = load_streaming(layer.w_ih + int64_t{place.rank} * words + n);
    }
  }
}

// The cells of a thread, of split 0.
template <typename T, class C>
struct Cells {
  float c[C::kTiles][2], h[C::kTiles][2];
  Gates<float> gates[C::kTiles][2];

  // Calls f(batch tile, 0 or 1, index in (batch, hidden)) for those of the thread's cells that exist.
  template <typename F>
  static __device__ __forceinline__ void for_each(const Sizes& sizes, const Place& place, F f) {
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int b = n * 8 + place.column + j;
        if (b < sizes.batch && place.unit < sizes.hidden) f(n, j, b * sizes.hidden + place.unit);
      }
    }
  }

  __device__ __forceinline__ Cells(const Sizes& sizes, const Layer<T>& layer, const Place& place) {
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) c[n][0] = c[n][1] = h[n][0] = h[n][1] = 0;
    if (!layer.c_0) return;
    for_each(sizes, place, [&](int n, int j, int64_t at) { c[n][j] = widen(layer.c_0[at]); });
  }

  // From the pre-activations to c and h; stages h, rounded, as [column][8 units].
  __device__ __forceinline__ void update(const Sums<C>& d, const Place& place, T* staged) {
#pragma unroll
    for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        gates[n][j] = activate<FastMaths>(Gates<float>{d[n][0][j], d[n][0][2 + j], d[n][1][j], d[n][1][2 + j]});
        h[n][j] = cell_forward<FastMaths>(gates[n][j], c[n][j]);
        staged[(n * 8 + place.column + j) * kGroupUnits + place.lane / 4] = narrow<T>(h[n][j]);
      }
    }
  }

  // What stays of step t in memory.
  __device__ __forceinline__ void store(const Sizes& sizes, const Layer<T>& layer, const Place& place, int t) const {
    const int64_t size = int64_t{sizes.batch} * sizes.hidden, from = t * size;
    const bool last = t + 1 == sizes.steps;
    for_each(sizes, place, [&](int n, int j, int64_t at) {
      layer.h[from + at] = narrow<T>(h[n][j]);
      if (layer.saved_c) layer.saved_c[from + at] = c[n][j];
      if (layer.saved_gates) {
        // (batch, 4, hidden): row b of `at` becomes row 4b.
        float* to = layer.saved_gates + 4 * from + at + 3 * int64_t{at - place.unit};
        to[0] = gates[n][j].i;
        to[sizes.hidden] = gates[n][j].f;
        to[2 * sizes.hidden] = gates[n][j].g;
        to[3 * sizes.hidden] = gates[n][j].o;
      }
      if (last && layer.h_n) layer.h_n[at] = narrow<T>(h[n][j]);
      if (last && layer.c_n) layer.c_n[at] = narrow<T>(c[n][j]);
    });
  }
};

// The input's share of step `step` of the chunk.
template <typename T, class C>
__device__ __forceinline__ void load_projected(Sums<C>& d, const Sizes& sizes, const Place& place,
                                               const Shared<T, C>& shared, int step) {
#pragma unroll
  for (int n = 0; n < C::kTiles; ++n) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int tile = ((step * C::kTiles + n) * sizes.groups + place.group) * 2 + m;
      const float4 v = shared.projected[tile * kLanes + place.lane];
      d[n][m][0] = v.x, d[n][m][1] = v.y, d[n][m][2] = v.z, d[n][m][3] = v.w;
    }
  }
}

// The group's warps meet: split 0 gets the others' sums added to its own, always in the same order.
//
// Hazard: sums have two places. Those of step t are overwritten in step t+2, by a warp that has received h(t+1): its
// group's split 0 sent its part of that after the meeting of step t+1, to which it came when it had read those of step t.
// So too does nobody come twice to one meeting: the next step's begins with an h that this one's split 0 has sent.
template <typename T, class C>
__device__ __forceinline__ void meet(Sums<C>& d, const Place& place, float4* partial) {
  if constexpr (C::kSplits > 1) {
    constexpr int kThreads = C::kSplits * kLanes, kWords = C::kTiles * 2;
    float4* mine = partial + place.lane;
    if (place.split > 0) {
#pragma unroll
      for (int n = 0; n < kWords; ++n) {
        const float (&v)[4] = d[n / 2][n % 2];
        mine[((place.split - 1) * kWords + n) * kLanes] = make_float4(v[0], v[1], v[2], v[3]);
      }
      // The sums are visible to split 0 behind its barrier. This warp has nothing to wait for but the next h.
      named_barrier_arrive(1 + place.group, kThreads);
    } else {
      // All warps of the group have read h(t-1), and written their sums, which are read next.
      named_barrier_sync(1 + place.group, kThreads);
#pragma unroll
      for (int split = 0; split + 1 < C::kSplits; ++split) {
#pragma unroll
        for (int n = 0; n < kWords; ++n) {
          const float4 v = mine[(split * kWords + n) * kLanes];
          float (&sum)[4] = d[n / 2][n % 2];
          sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
        }
      }
    }
  }
}

// ---- The kernel -----------------------------------------------------------------------------------------------------

template <typename T, class C, template <typename, class> class ExchangeOf>
__global__ void __launch_bounds__(kMaxWarps* kLanes, 1) forward(const __grid_constant__ Arguments<T> arguments) {
  using Layout = SharedLayout<T, C>;
  const Sizes& sizes = arguments.sizes;
  const int layer_number = static_cast<int>(blockIdx.x) / sizes.blocks;
  const Layer<T>& layer = arguments.layer[layer_number];
  const Place place(sizes);
  const Shared<T, C> shared(Layout(sizes, layer.inputs));
  const ExchangeOf<T, C> exchange(arguments, place, shared.fixed);

  const RecurrentWeights<C> weights(layer.w_hh, place);
  Cells<T, C> cells(sizes, layer, place);
  fill_shared<T, C>(sizes, layer, place, shared);
  exchange.start();

  for (int t = 0, step = 0, chunk = 0; t < sizes.steps; ++t, ++step) {
    if (step == sizes.chunk_steps) step = 0, ++chunk;
    if (step == 0) {
      // All threads of the block have written their h of the chunk before, which is published next, and read its
      // projections, which are overwritten. Before the first chunk: what they have filled shared memory with is visible.
      block_barrier();
      publish(arguments, layer_number, place, chunk);
      await_below(arguments, layer_number, place, chunk + 1);
      block_barrier();  // the chunk of the layer below, which a few threads have acquired, is visible to all of them
      project<T, C>(sizes, layer, place, shared, t,
                    sizes.steps - t < sizes.chunk_steps ? sizes.steps - t : sizes.chunk_steps);
      // The projections that the group's other warps wrote are visible to its split 0.
      if constexpr (C::kSplits > 1) named_barrier_sync(1 + place.group, C::kSplits * kLanes);
    }

    const bool sends = t + 1 < sizes.steps;  // the last h is nobody's input: a push could meet a block that has exited
    if (sends) exchange.expect(t);
    Sums<C> d = {};
    if (place.split == 0) load_projected<T, C>(d, sizes, place, shared, step);
    if (t > 0) exchange.receive(t);
    // ldmatrix takes the addresses of four matrices' rows: 8 columns of h, at four times 8 units.
    weights.template multiply_h<T>(
        d, shared_address(&shared.fixed.h[t % 2][place.lane % 8][place.split * C::kSteps * 16 + place.lane / 8 * 8]));
    meet<T, C>(d, place, shared.partial + (t % 2 * sizes.groups + place.group) * Layout::kPartial);
    if (place.split > 0) continue;

    T* staged = shared.staged + (t % 2 * sizes.groups + place.group) * Layout::kStaged;
    cells.update(d, place, staged);
    // The lanes' h(t) are staged, for each lane to send some of them; and with one split, whose warp meets nobody, all
    // lanes have read h(t-1). What was staged two steps ago was read before the warp met here in the last step.
    warp_barrier();
    if (sends) exchange.send(t, staged);
    cells.store(sizes, layer, place, t);
  }
  block_barrier();  // all threads have written the last chunk's h, for the release
  publish(arguments, layer_number, place, (sizes.steps + sizes.chunk_steps - 1) / sizes.chunk_steps);
  exchange.finish();
}

// ---- Launch ---------------------------------------------------------------------------------------------------------

// What is wrong with these arguments for a kernel cut like this, or "".
template <typename T, class C>
std::string misfit(const Arguments<T>& arguments) {
  const Sizes& s = arguments.sizes;
  const auto number = [](int64_t n) { return std::to_string(n); };
  if (s.layers < 1 || s.layers > kMaxLayers)
    return number(s.layers) + " layers: a launch takes 1 to " + number(kMaxLayers);
  if (s.steps < 1 || s.chunk_steps < 1) return "no steps, or chunks of none";
  if (s.batch < 1 || s.batch > C::kColumns) return "batch " + number(s.batch) + " of at most " + number(C::kColumns);
  if (s.blocks < 1 || s.groups < 1 || s.groups * C::kSplits > kMaxWarps) {
    return number(s.groups) + " groups of " + number(C::kSplits) + " warps: a block has at most " + number(kMaxWarps);
  }
  if (s.hidden < 1 || s.hidden > s.units() || s.units() > C::kDepth) {
    return "hidden " + number(s.hidden) + ", units " + number(s.units()) + ", K " + number(C::kDepth) +
           " have to grow in this order";
  }
  return "";
}

// Starts the kernel. Whatever the arguments point to stays until the stream has done it. Refused, before anything runs, when
// not all blocks fit on the device at once.
template <typename T, class C, template <typename, class> class ExchangeOf>
Status launch_forward(const Arguments<T>& arguments, void* stream) {
  const std::string error = misfit<T, C>(arguments);
  if (!error.empty()) return {1, "the persistent kernel does not take this: " + error};
  const Sizes& sizes = arguments.sizes;
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(sizes.layers * sizes.blocks));
  config.block = dim3(static_cast<unsigned>(sizes.groups * C::kSplits * kLanes));
  for (int n = 0; n < sizes.layers; ++n) {
    config.shared_bytes = std::max(config.shared_bytes, SharedLayout<T, C>(sizes, arguments.layer[n].inputs).bytes);
  }
  if (ExchangeOf<T, C>::kCluster) config.cluster = static_cast<unsigned>(sizes.blocks);
  config.co_resident = true;
  config.stream = stream;
  return launch(config, &forward<T, C, ExchangeOf>, arguments);
}

// ---- Packing on the device ------------------------------------------------------------------------------------------

constexpr int kPackThreads = 256;

// One thread a word.
template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    pack_weight(const T* weight, int hidden, int depth, int k_steps, Order order, uint4* packed, int64_t words) {
  const int64_t word = int64_t{blockIdx.x} * kPackThreads + threadIdx.x;
  if (word >= words) return;
  packed[word] = packed_word(weight, hidden, depth, k_steps, order, word);
}

template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    pack_bias(const T* b_ih, const T* b_hh, int hidden, float4* packed, int units) {
  const int unit = static_cast<int>(blockIdx.x) * kPackThreads + static_cast<int>(threadIdx.x);
  if (unit >= units) return;
  packed[unit] = packed_bias(b_ih, b_hh, hidden, unit);
}

}  // namespace stacked_lstm::cuda::persistent
