#pragma once

/// The loop of the integer formats over tiles (AMX): out[T][16] = one panel * the activations of T
/// tokens, for T x planes up to 16, with the bits of gemm_int.hpp.
///
///        32 columns                    16 rows                          16 rows
///   t0  [ .. .. .. ]            k4 0  [ 4 columns each ]           t0  [ int32 .. ]
///   ..    int8          times    ..                          ->     ..
///   t15 [ .. .. .. ]            k4 7  [ .. .. .. .. .. ]           t15 [ .. .. .. ]
///   activations, tile A         decoded record, tile B             dot products, tile C
///
/// The vectors of a decoded record are the rows of B as they lie. A tile product covers one scale
/// group, 32 or 16 columns, because each has a scale; the dot products go through the first cache
/// into vector registers, where f32 arithmetic follows as described in gemm_int.hpp. Weights are
/// decoded as signed bytes, so that no sums of activations correct the dot products.
///
/// Vector arithmetic sets the pace: for 16 tokens x 16 rows x 32 columns three operations per token
/// (four with constants to add), each on one of two ports, so 24 (32) cycles, where the tile product
/// takes 16. The products of the next step are issued before that arithmetic.
///
/// Tiles are configured when a thread begins a job and released when the job ends (some 200 cycles;
/// a panel takes 2000 and more). Outside of jobs no thread has tile state: other libraries' use of
/// AMX, the code of callers, fork and the end of threads meet none of ours. A signal handler that
/// interrupts a job may use tiles, because the system saves and restores them around it.
///
/// Include after simd.hpp and a definition of Tiles. Preconditions: those of gemm_int.hpp, kLanes is
/// 16, activations in the order of tiles.

#include <utility>

#include "cpu/kernels/activations.hpp"
#include "cpu/kernels/decode_int4.hpp"
#include "cpu/kernels/gemm_int.hpp"
#include "cpu/kernels/records.hpp"
#include "cpu/kernels/tile_config.hpp"

namespace moesaic::cpu {
namespace {

static_assert(kLanes == kRows);

constexpr int kTileTokens[3] = {0, kTileRows, kTileRows / 2};  // of a bundle, by planes

/// The tiles of a task. Its last bundle may have fewer tokens, for which C and A have other shapes.
struct TileNumbers {
  static constexpr int kC = 0, kC1 = 1, kA = 2, kA1 = 3, kB = 4, kB1 = 5, kLastC = 6, kLastA = 7;
};

/// How many bundles a task has, and the tokens of the last one.
struct TaskBundles {
  int count, last_tokens;

  explicit TaskBundles(const PanelTask& task)
      : count((task.tokens + task.bundle - 1) / task.bundle),
        last_tokens(task.tokens - (count - 1) * task.bundle) {}
};

/// Shapes the tiles for scale groups of `sub` columns.
inline TileConfig tile_config(const PanelTask& task, int sub) {
  using N = TileNumbers;
  const int rows = task.bundle * task.planes;
  const int last_rows = TaskBundles(task).last_tokens * task.planes;
  TileConfig config;
  for (const int c : {N::kC, N::kC1}) config.shape(c, rows, kTileRowBytes);
  for (const int a : {N::kA, N::kA1}) config.shape(a, rows, sub);
  for (const int b : {N::kB, N::kB1}) config.shape(b, sub / 4, kTileRowBytes);
  config.shape(N::kLastC, last_rows, kTileRowBytes);
  config.shape(N::kLastA, last_rows, sub);
  return config;
}

template <int kC, int kA, int kB>
MOESAIC_ALWAYS_INLINE void tile_product(const std::int8_t* a, const std::uint8_t* b,
                                        std::int32_t* dots) {
  Tiles::load<kB>(b, kVector);
  Tiles::load<kA>(a, kActBlock);
  Tiles::zero<kC>();
  Tiles::dot_signed<kC, kA, kB>();
  Tiles::store<kC>(dots, kRows * sizeof(std::int32_t));
}

/// dots[part][row][16]: the dot products of one step's scale groups with the rows of a bundle.
template <int kSub, int kBundleRows>
MOESAIC_ALWAYS_INLINE void step_products(const std::int8_t* a, const std::uint8_t* b, bool last,
                                         std::int32_t (*dots)[kBundleRows][kRows]) {
  using N = TileNumbers;
  if (!last) {
    tile_product<N::kC, N::kA, N::kB>(a, b, dots[0][0]);
    if constexpr (kSub == 16) {
      tile_product<N::kC1, N::kA1, N::kB1>(a + kSub, b + kSub * kRows, dots[1][0]);
    }
  } else {
    tile_product<N::kLastC, N::kLastA, N::kB>(a, b, dots[0][0]);
    if constexpr (kSub == 16) {
      tile_product<N::kLastC, N::kLastA, N::kB1>(a + kSub, b + kSub * kRows, dots[1][0]);
    }
  }
}

MOESAIC_ALWAYS_INLINE I load_dots(const std::int32_t* p) {
  return __builtin_bit_cast(I, load(reinterpret_cast<const std::uint8_t*>(p)));
}

/// out[T][16] += decoded record * activations; `last` names the tiles.
template <int kSub, bool kAdd, int T, int P>
MOESAIC_NOINLINE void multiply_tiles(const DecodedRecord& decoded, int steps, const Ahead& ahead,
                                     const ActRecord& a, bool last, float* out) {
  constexpr int kParts = 32 / kSub;
  constexpr int kBundleRows = T * P;
  alignas(64) std::int32_t dots[2][kParts][kBundleRows][kRows];
  const auto products = [&](int step) __attribute__((always_inline)) {
    const auto* q = reinterpret_cast<const std::int8_t*>(a.q) + step * (kActBlock * kBundleRows);
    step_products<kSub, kBundleRows>(q, decoded.q + step * kStep, last, dots[step % 2]);
  };
  F acc[T];
  load_sums(out, 0, acc);
  products(0);
  for (int step = 0; step < steps; ++step) {
    fetch(ahead, step);
    if (step + 1 < steps) products(step + 1);
    const auto& sums = dots[step % 2];
    const float* act_scale = a.scale + step;
    const float* act_sum = kParts == 2 ? a.sum16 + 2 * step : a.sum + step;
    F scale[kParts];
    F add_row[kParts];
    for (int part = 0; part < kParts; ++part) {
      scale[part] = load_f(decoded.scale[kParts * step + part]);
      if constexpr (kAdd) add_row[part] = load_f(decoded.add[kParts * step + part]);
    }
    const auto dot_of = [&](int part, int t) __attribute__((always_inline)) {
      const I low = load_dots(sums[part][P * t + P - 1]);
      return to_float(P == 2 ? join_planes(load_dots(sums[part][P * t]), low) : low);
    };
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      F f = mul(dot_of(0, t), scale[0]);
      if constexpr (kAdd) f = fma(add_row[0], broadcast_f(act_sum + kParts * steps * t), f);
      if constexpr (kParts == 2) {
        f = fma(dot_of(1, t), scale[1], f);
        if constexpr (kAdd) f = fma(add_row[1], broadcast_f(act_sum + kParts * steps * t + 1), f);
      }
      acc[t] = fma(f, broadcast_f(act_scale + steps * t), acc[t]);
    }
  }
  store_sums(out, 0, acc);
}

using TilesFn = void (*)(const DecodedRecord&, int, const Ahead&, const ActRecord&, bool, float*);

/// The functions for one token, two, and so on.
template <int P>
struct TilesFns {
  TilesFn of[kTileTokens[P]];
};
template <int kSub, bool kAdd, int P, std::size_t... I>
constexpr TilesFns<P> tiles_fns(std::index_sequence<I...>) {
  return {{&multiply_tiles<kSub, kAdd, static_cast<int>(I) + 1, P>...}};
}
template <int kSub, bool kAdd, int P>
constexpr TilesFns<P> kTilesFns =
    tiles_fns<kSub, kAdd, P>(std::make_index_sequence<kTileTokens[P]>());

/// Multiplies all tokens of a task with the records that record_at(index, steps) finds.
template <class D, class RecordAt>
MOESAIC_ALWAYS_INLINE void multiply_records_by_tiles(const PanelTask& task,
                                                     const RecordAt& record_at) {
  static_assert(D::kOffset != kNoOffset || !D::kWide);  // the signed weights fit in a byte
  DecodedRecord decoded;
  const int planes = task.planes;
  const TilesFn* const fns =
      planes == 2 ? kTilesFns<D::kSub, D::kAdd, 2>.of : kTilesFns<D::kSub, D::kAdd, 1>.of;
  const std::int64_t records = (task.cols + kRecordCols - 1) / kRecordCols;
  const std::int64_t bundle_bytes = act_token_bytes(task.cols, planes) * task.bundle;
  const auto [bundles, last_tokens] = TaskBundles(task);
  std::memset(task.out, 0, sizeof(float) * kRows * static_cast<std::size_t>(task.tokens));

  for (std::int64_t index = 0; index < records; ++index) {
    const std::int64_t left = (task.cols - index * kRecordCols) / 32;
    const int steps = static_cast<int>(left < 8 ? left : 8);
    const auto record = record_at(index, steps);
    decode_record<D, true>(record, decoded);
    Ahead ahead{record.ahead.from, (record.ahead.bytes + bundles - 1) / bundles};
    const std::uint8_t* bundle = task.activations;
    float* out = task.out;
    for (int b = 0; b < bundles; ++b) {
      const bool last = b + 1 == bundles;
      const int tokens = last ? last_tokens : task.bundle;
      fns[tokens - 1](decoded, steps, ahead, act_record(bundle, tokens, planes, index, steps), last,
                      out);
      ahead.from += 8 * ahead.bytes;
      bundle += bundle_bytes;
      out += tokens * kRows;
    }
  }
}

template <class D>
void gemm_tile(const PanelTask& task) {
  over_records<D>(task, [&](const auto& record_at) __attribute__((always_inline)) {
    multiply_records_by_tiles<D>(task, record_at);
  });
}

template <bool kZeros>
void multiply_int4_by_tiles(const PanelTask& task) {
  over_int4_records<kZeros>(task, [&](const auto& record_at) __attribute__((always_inline)) {
    multiply_records_by_tiles<int4<kZeros>>(task, record_at);
  });
}

/// The kernel of QuantType::INT4.
inline void gemm_tile_int4(const PanelTask& task) {
  if (task.zeros) {
    multiply_int4_by_tiles<true>(task);
  } else {
    multiply_int4_by_tiles<false>(task);
  }
}

}  // namespace
}  // namespace moesaic::cpu
