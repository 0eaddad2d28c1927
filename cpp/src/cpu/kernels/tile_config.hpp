#pragma once

/// The 64 bytes that shape the eight tiles of AMX: how many rows each has and how many bytes a row
/// holds. Intel's manual (volume 1, chapter 18) calls them TILECFG.

#include <cstdint>

namespace moesaic::cpu {
namespace {

constexpr int kTileCount = 8;
constexpr int kTileRows = 16;      // the most rows of a tile
constexpr int kTileRowBytes = 64;  // the most bytes of a row

struct alignas(64) TileConfig {
  std::uint8_t palette = 1;    // the only palette with tiles
  std::uint8_t start_row = 0;  // where an interrupted load goes on
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};  // those behind the eighth are reserved
  std::uint8_t rows[16] = {};

  void shape(int tile, int tile_rows, int bytes) {
    rows[tile] = static_cast<std::uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<std::uint16_t>(bytes);
  }
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace
}  // namespace moesaic::cpu
