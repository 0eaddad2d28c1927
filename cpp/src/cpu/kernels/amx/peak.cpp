// Peak of tdpbssd on whole tiles: four independent accumulators hide its latency.

#include "cpu/peak.hpp"

#include "cpu/kernels/amx/tiles.hpp"

namespace moesaic::cpu::amx {

std::int64_t dot_peak(std::int64_t rounds) {
  TileConfig config;
  for (int tile = 0; tile < kTileCount; ++tile) config.shape(tile, kTileRows, kTileRowBytes);
  Tiles::configure(config);  // which also sets every tile to zero
  for (std::int64_t i = 0; i < rounds; ++i) {
    Tiles::dot_signed<0, 4, 6>();
    Tiles::dot_signed<1, 4, 7>();
    Tiles::dot_signed<2, 5, 6>();
    Tiles::dot_signed<3, 5, 7>();
  }
  Tiles::release();
  return rounds * 4 * kTileRows * kTileRows * kTileRowBytes * 2;
}

}  // namespace moesaic::cpu::amx
