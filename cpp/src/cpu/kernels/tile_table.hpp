#pragma once

/// make_tile_kernels() fills a TileKernels with what gemm_tile.hpp can multiply. Include after
/// simd.hpp and a definition of Tiles.

#include "cpu/kernels/decode_block32.hpp"
#include "cpu/kernels/decode_grid.hpp"
#include "cpu/kernels/decode_k.hpp"
#include "cpu/kernels/decode_ternary.hpp"
#include "cpu/kernels/gemm_float.hpp"
#include "cpu/kernels/gemm_scaled.hpp"
#include "cpu/kernels/gemm_tile.hpp"
#include "cpu/kernels/quantize.hpp"

namespace moesaic::cpu {
namespace {

template <class D>
constexpr PanelKernel gemm_tile_of() {
  if constexpr (IntegerDecoder<D>) {
    return &gemm_tile<D>;
  } else {
    return nullptr;
  }
}

/// Columns of a scale group by QuantType.
struct ScaleGroups {
  std::uint8_t of[kNumFormats] = {};
};
template <class D>
constexpr std::uint8_t scale_group() {
  if constexpr (IntegerDecoder<D>) {
    return D::kSub;
  } else {
    return 0;
  }
}
constexpr ScaleGroups kScaleGroups = [] {
  ScaleGroups groups;
#define MOESAIC_KERNEL(TYPE, NAME) \
  groups.of[static_cast<int>(QuantType::TYPE)] = scale_group<NAME>();
#include "cpu/kernels/kernels.inc"
#undef MOESAIC_KERNEL
  groups.of[static_cast<int>(QuantType::INT4)] = int4<false>::kSub;
  return groups;
}();

/// ProductKernels::begin_job.
inline void begin_tiles(QuantType type, const PanelTask& task) {
  Tiles::configure(tile_config(task, kScaleGroups.of[static_cast<int>(type)]));
}
/// ProductKernels::end_job. Tile state that stays would be saved at each switch of threads, and in
/// the frames of signals.
inline void end_tiles() { Tiles::release(); }

constexpr TileKernels make_tile_kernels() {
  TileKernels k;
  for (int p = 1; p < 3; ++p) k.bundle_tokens[p] = kTileTokens[p];
  // Measured in the first cache: formats with a scale per 16 columns break even at 10 and 6, those
  // with one per 32 at 8 and 4.
  k.min_tokens[1] = 10;
  k.min_tokens[2] = 6;
#define MOESAIC_KERNEL(TYPE, NAME) k.gemm[static_cast<int>(QuantType::TYPE)] = gemm_tile_of<NAME>();
#include "cpu/kernels/kernels.inc"
#undef MOESAIC_KERNEL
  k.gemm[static_cast<int>(QuantType::INT4)] = &gemm_tile_int4;
  k.begin_job = &begin_tiles;
  k.end_job = &end_tiles;
  k.quantize = &quantize<Order::Tiles>;
  k.copy_token = &copy_token<Order::Tiles>;
  return k;
}

}  // namespace
}  // namespace moesaic::cpu
