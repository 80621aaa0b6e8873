// tests/emulator/samples/samples.cpp: runs every sample in every order of the emulator and checks what it computed.
//
//   samples [--seeds N] [name ...]        one line a case; ends at the first failure with status 1
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "../../../csrc/cuda/launch.cuh"
#include "../lend.h"
#include "bulk_pipeline.cuh"
#include "chunk_flags.cuh"
#include "cluster_recurrence.cuh"
#include "column_sums.cuh"
#include "mbarrier_ring.cuh"
#include "row_shares.cuh"
#include "tagged_words.cuh"
#include "tile_product.cuh"
#include "warp_roles.cuh"

using namespace stacked_lstm;
using namespace stacked_lstm::cuda;
using namespace stacked_lstm::cuda::samples;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<float> uniform(size_t count, float low = -1, float high = 1) {
  std::mt19937 random(static_cast<unsigned>(count) + 1);
  std::vector<float> values(count);
  for (float& value : values) value = std::uniform_real_distribution<float>(low, high)(random);
  return values;
}

// What is wrong with the numbers, or "".
std::string compare(const std::vector<float>& got, const std::vector<double>& expected, double tolerance) {
  for (size_t n = 0; n < expected.size(); ++n) {
    if (std::fabs(got[n] - expected[n]) <= tolerance) continue;
    return "wrong numbers: element " + std::to_string(n) + " of " + std::to_string(expected.size()) + " is " +
           std::to_string(got[n]) + ", expected " + std::to_string(expected[n]);
  }
  return "";
}

LaunchConfig config(dim3 grid, int threads, size_t shared_bytes = 0, unsigned cluster = 0, bool co_resident = false) {
  LaunchConfig c;
  c.grid = grid, c.block = dim3(static_cast<unsigned>(threads)), c.shared_bytes = shared_bytes;
  c.cluster = cluster, c.co_resident = co_resident;
  return c;
}

// What the next launch reads, and what it writes.
template <typename... In, typename... Out>
void lend(const std::tuple<In&...>& in, const std::tuple<Out&...>& out) {
  using emulator::Access;
  emulator::device_memory().clear();
  const auto each = [](const auto& vectors, const char* name, Access access) {
    std::apply([&](auto&... v) { (emulator::lend(name, v.data(), static_cast<int64_t>(v.size()), access), ...); },
               vectors);
  };
  each(in, "an input", Access::read), each(out, "an output", Access::read_write);
}

std::string shares(int rows, int columns) {
  const std::vector<float> in = uniform(static_cast<size_t>(rows * columns), 0.5f, 1);
  std::vector<float> out(in.size(), kNaN);
  lend(std::tie(in), std::tie(out));
  const Status status = launch(config(2, RowShares::kThreads), row_shares, in.data(), out.data(), rows, columns);
  if (!status.ok()) return status.text;
  std::vector<double> expected(in.begin(), in.end());
  for (int row = 0; row < rows; ++row) {
    double sum = 0;
    for (int column = 0; column < columns; ++column) sum += in[static_cast<size_t>(row * columns + column)];
    for (int column = 0; column < columns; ++column) expected[static_cast<size_t>(row * columns + column)] /= sum;
  }
  return compare(out, expected, 1e-6);
}

using TurnTiles = void (*)(const float*, float*, int);
std::string turn_tiles(TurnTiles kernel, int threads, int tile, size_t shared_bytes, int count) {
  const std::vector<float> in = uniform(static_cast<size_t>(count));
  std::vector<float> out(static_cast<size_t>((count + tile - 1) / tile * tile), kNaN);
  lend(std::tie(in), std::tie(out));
  const Status status = launch(config(1, threads, shared_bytes), kernel, in.data(), out.data(), count);
  if (!status.ok()) return status.text;
  std::vector<double> expected(out.size());
  for (int n = 0; n < static_cast<int>(out.size()); ++n) {
    const int from = n / tile * tile + tile - 1 - n % tile;
    expected[static_cast<size_t>(n)] = from < count ? in[static_cast<size_t>(from)] : 0;
  }
  return compare(out, expected, 0);
}

std::string named_barriers(int count) {
  using S = WarpRoles;
  return turn_tiles(turn_tiles_round, S::kThreads, S::kTile, sizeof(S), count);
}

std::string mbarriers(int count) {
  using S = MbarrierRing;
  return turn_tiles(turn_tiles_round_async, S::kThreads, S::kTile, sizeof(S), count);
}

std::string chunks(int layers, int count) {
  using S = ChunkFlags;
  const size_t size = static_cast<size_t>(count * S::kChunk);
  std::vector<float> data = uniform(size);
  data.resize(size * static_cast<size_t>(layers + 1), kNaN);
  std::vector<uint32_t> flags(static_cast<size_t>(layers * S::kProducers), 0);
  const LaunchConfig all = config(static_cast<unsigned>(layers * S::kProducers), S::kThreads, 0, 0, true);
  lend(std::tie(), std::tie(data, flags));
  const Status status = launch(all, hand_chunks_on, data.data(), flags.data(), count);
  if (!status.ok()) return status.text;
  std::vector<double> expected(data.begin(), data.begin() + static_cast<ptrdiff_t>(size));
  for (size_t n = 0; n < size * static_cast<size_t>(layers); ++n) {
    const size_t chunk = n / S::kChunk * S::kChunk;
    expected.push_back(expected[n] / 2 + expected[chunk + S::kChunk - 1 - n % S::kChunk]);
  }
  return compare(data, expected, 1e-5);
}

std::string tags(int steps) {
  using S = TaggedWords;
  const std::vector<float> start = uniform(S::kWidth);
  std::vector<double> v(start.begin(), start.end());
  std::vector<uint64_t> words(2 * S::kWidth, ~uint64_t{0});
  for (int n = 0; n < S::kWidth; ++n) words[static_cast<size_t>(n)] = tagged(0, start[static_cast<size_t>(n)]);
  std::vector<float> out(S::kWidth, kNaN);
  const LaunchConfig all = config(S::kBlocks, S::kUnits, 0, 0, true);
  lend(std::tie(), std::tie(words, out));
  const Status status = launch(all, exchange_tagged, words.data(), out.data(), steps);
  if (!status.ok()) return status.text;
  for (int step = 1; step <= steps; ++step) {
    std::vector<double> next(S::kWidth);
    for (size_t n = 0; n < S::kWidth; ++n)
      next[n] = (v[(n + S::kWidth - 1) % S::kWidth] + v[(n + 33) % S::kWidth]) / 2 + step;
    v = next;
  }
  return compare(out, v, 1e-4);
}

std::string product(int m, int n, int k) {
  using S = TileProduct;
  const int stride = (k + 7) / 8 * 8;
  const auto matrix = [&](int rows) {
    const std::vector<float> values = uniform(static_cast<size_t>(rows * stride));
    std::vector<bfloat16> narrowed(values.size());
    for (size_t at = 0; at < values.size(); ++at) {
      // Beyond k lies what must not be used: numbers that would be seen in any sum.
      narrowed[at] = narrow<bfloat16>(static_cast<int>(at) % stride < k ? values[at] : 1e3f);
    }
    return narrowed;
  };
  const std::vector<bfloat16> a = matrix(m), b = matrix(n);
  std::vector<float> c(static_cast<size_t>(m * n), kNaN);
  const dim3 grid(static_cast<unsigned>((m + S::kRows - 1) / S::kRows),
                  static_cast<unsigned>((n + S::kColumns - 1) / S::kColumns));
  lend(std::tie(a, b), std::tie(c));
  const Status status =
      launch(config(grid, S::kThreads, sizeof(S)), tile_product, a.data(), b.data(), c.data(), m, n, k, stride);
  if (!status.ok()) return status.text;
  std::vector<double> expected(c.size());
  for (int row = 0; row < m; ++row) {
    for (int column = 0; column < n; ++column) {
      double sum = 0;
      for (int depth = 0; depth < k; ++depth) {
        sum += double{widen(a[static_cast<size_t>(row * stride + depth)])} *
               widen(b[static_cast<size_t>(column * stride + depth)]);
      }
      expected[static_cast<size_t>(row * n + column)] = sum;
    }
  }
  return compare(c, expected, 1e-6 * k);
}

std::string recurrence(int steps) {
  using S = ClusterRecurrence;
  const std::vector<float> weight = uniform(S::kHidden * S::kHidden, -0.3f, 0.3f);
  const size_t step_size = S::kBatch * S::kHidden;
  const std::vector<float> x = uniform(static_cast<size_t>(steps) * step_size);
  std::vector<float> out(x.size(), kNaN);
  const LaunchConfig one = config(S::kBlocks, S::kThreads, sizeof(S), S::kBlocks, true);
  lend(std::tie(weight, x), std::tie(out));
  const Status status = launch(one, cluster_recurrence, weight.data(), x.data(), out.data(), steps);
  if (!status.ok()) return status.text;
  std::vector<double> h(x.begin(), x.end());
  for (size_t n = 0; n < h.size(); ++n) {
    const size_t unit = n % S::kHidden, row = n - unit;
    for (size_t j = 0; row >= step_size && j < S::kHidden; ++j) {
      h[n] += weight[unit * S::kHidden + j] * h[row - step_size + j];
    }
    h[n] /= 1 + std::fabs(h[n]);
  }
  return compare(out, h, 1e-5);
}

std::string pipeline(int tiles) {
  using S = BulkPipeline;
  const std::vector<float> values = uniform(static_cast<size_t>(tiles * S::kTile));
  std::vector<float4> in(values.size() / 4), out(in.size(), float4{kNaN, kNaN, kNaN, kNaN});  // aligned to 16 bytes
  std::memcpy(in.data(), values.data(), values.size() * sizeof(float));
  lend(std::tie(in), std::tie(out));
  const Status status =
      launch(config(2, S::kThreads, sizeof(S), 2, true), bulk_pipeline, &in.data()->x, &out.data()->x, tiles);
  if (!status.ok()) return status.text;
  std::vector<double> expected(values.size());
  for (size_t n = 0; n < values.size(); ++n) {
    const size_t tile = n / S::kTile * S::kTile, last = tile + S::kTile - 1;
    expected[n] = double{values[last - n % S::kTile]} + values[last];
  }
  std::vector<float> got(values.size());
  std::memcpy(got.data(), out.data(), got.size() * sizeof(float));
  return compare(got, expected, 1e-6);
}

// The reference adds in the kernel's order, so that every bit is the same.
std::string sums(int rows, int columns, int slices) {
  using S = ColumnSums;
  const std::vector<float> in = uniform(static_cast<size_t>(rows * columns));
  std::vector<float> partial(static_cast<size_t>(slices * columns), kNaN), out(static_cast<size_t>(columns), kNaN);
  const unsigned tiles = static_cast<unsigned>((columns + 31) / 32);
  std::vector<uint32_t> done(tiles, 0);
  lend(std::tie(in), std::tie(partial, done, out));
  const Status status = launch(config(dim3(tiles, static_cast<unsigned>(slices)), S::kThreads), column_sums, in.data(),
                               partial.data(), done.data(), out.data(), rows, columns);
  if (!status.ok()) return status.text;
  const int rows_of_slice = (rows + slices - 1) / slices;
  std::vector<double> expected;
  for (int column = 0; column < columns; ++column) {
    float total = 0;
    for (int slice = 0; slice < slices; ++slice) {
      float warp_sum[S::kWarps] = {}, slice_sum = 0;
      for (int row = slice * rows_of_slice; row < std::min((slice + 1) * rows_of_slice, rows); ++row) {
        warp_sum[(row - slice * rows_of_slice) % S::kWarps] += in[static_cast<size_t>(row * columns + column)];
      }
      for (const float sum : warp_sum) slice_sum += sum;
      total += slice_sum;
    }
    expected.push_back(total);
  }
  return compare(out, expected, 0);
}

struct Case {
  const char* name;
  std::string (*run)();
};

const Case kCases[] = {
    {"row_shares", [] { return shares(5, 200); }},
    {"row_shares_narrow", [] { return shares(7, 96); }},
    {"warp_roles", [] { return named_barriers(5 * 64 + 7); }},
    {"warp_roles_whole", [] { return named_barriers(4 * 64); }},
    {"warp_roles_short", [] { return named_barriers(9); }},
    {"chunk_flags", [] { return chunks(3, 4); }},
    {"tagged_words", [] { return tags(7); }},
    {"tile_product", [] { return product(45, 21, 91); }},
    {"tile_product_whole", [] { return product(32, 16, 64); }},
    {"tile_product_short", [] { return product(3, 17, 5); }},
    {"mbarrier_ring", [] { return mbarriers(7 * 64 + 9); }},
    {"mbarrier_ring_whole", [] { return mbarriers(6 * 64); }},
    {"cluster_recurrence", [] { return recurrence(6); }},
    {"cluster_recurrence_one_step", [] { return recurrence(1); }},
    {"bulk_pipeline", [] { return pipeline(7); }},
    {"bulk_pipeline_short", [] { return pipeline(1); }},
    {"column_sums", [] { return sums(50, 45, 3); }},
    {"column_sums_whole", [] { return sums(24, 64, 2); }},
};

struct Schedule {
  emulator::Order order;
  uint64_t seed;
};

std::vector<Schedule> schedules(int seeds) {
  using emulator::Order;
  std::vector<Schedule> all = {{Order::forward, 1}, {Order::reverse, 1}};
  for (int seed = 1; seed <= seeds; ++seed) {
    all.push_back({Order::random, static_cast<uint64_t>(seed)});
    all.push_back({Order::priorities, static_cast<uint64_t>(seed)});
  }
  return all;
}

}  // namespace

int main(int count, char** arguments) {
  int seeds = 4;
  std::vector<std::string> names;
  for (int n = 1; n < count; ++n) {
    if (std::string(arguments[n]) == "--seeds" && n + 1 < count) {
      seeds = std::atoi(arguments[++n]);
    } else {
      names.push_back(arguments[n]);
    }
  }
  emulator::options().print = false;  // the report is part of the line below
  for (const Case& c : kCases) {
    bool wanted = names.empty();
    for (const std::string& name : names) wanted |= std::string(c.name).starts_with(name);
    if (!wanted) continue;
    const std::vector<Schedule> all = schedules(seeds);
    for (const Schedule& schedule : all) {
      emulator::options().order = schedule.order;
      emulator::options().seed = schedule.seed;
      const std::string error = c.run();
      if (error.empty()) continue;
      std::printf("FAILED %s (order %s, seed %llu): %s\n", c.name, emulator::name(schedule.order),
                  static_cast<unsigned long long>(schedule.seed), error.c_str());
      return 1;
    }
    std::printf("ok     %s: %zu runs\n", c.name, all.size());
  }
  return 0;
}
