#pragma once

/// The tile instructions of AMX in software, after the pseudo-code of Intel's manual (volume 2,
/// LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBSSD). What would fault on a CPU is thrown, and
/// what memory a load or a store touches is plain C++, which ASan sees. One machine per thread, as
/// in a CPU.
///
/// Has the names of cpu/kernels/amx/tiles.hpp. Not modelled: loads that go on after a page fault
/// (start_row), and the tiles of bf16 and complex numbers.

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels/tile_config.hpp"

namespace moesaic::emulation {
namespace {  // as the configuration is, which kernels compile for themselves

/// #GP reaches a program as SIGSEGV, #UD as SIGILL.
enum class TileFaultKind { GeneralProtection, UndefinedInstruction };

class TileFault : public std::runtime_error {
 public:
  TileFault(TileFaultKind kind, const std::string& what) : std::runtime_error(what), kind(kind) {}
  TileFaultKind kind;
};

class TileMachine {
 public:
  /// LDTILECFG. Also sets all tiles to zero.
  void configure(const cpu::TileConfig& config) {
    using cpu::kTileRowBytes, cpu::kTileRows, cpu::kTileCount;
    if (config.palette > 1) protection("palette " + std::to_string(config.palette));
    if (config.palette == 0) {
      release();
      return;
    }
    if (config.start_row != 0) protection("start_row, which is not modelled");
    for (const std::uint8_t byte : config.reserved) {
      if (byte != 0) protection("a reserved byte is set");
    }
    for (int t = 0; t < 16; ++t) {
      const int rows = config.rows[t];
      const int bytes = config.row_bytes[t];
      if (t >= kTileCount) {
        if (rows != 0 || bytes != 0) protection("a ninth tile");
        continue;
      }
      if (rows > kTileRows) protection("rows of tile " + std::to_string(t));
      if (bytes > kTileRowBytes) protection("row bytes of tile " + std::to_string(t));
      if ((rows == 0) != (bytes == 0)) protection("half a shape for tile " + std::to_string(t));
    }
    config_ = config;
    configured_ = true;
    std::memset(tiles_, 0, sizeof tiles_);
  }
  /// TILERELEASE
  void release() {
    configured_ = false;
    config_ = {};
    std::memset(tiles_, 0, sizeof tiles_);
  }
  bool configured() const { return configured_; }

  void zero(int tile) {
    check(tile);
    std::memset(tiles_[tile], 0, sizeof tiles_[tile]);
  }
  void load(int tile, const void* p, std::int64_t stride) {
    zero(tile);
    for (int row = 0; row < config_.rows[tile]; ++row) {
      std::memcpy(tiles_[tile][row], static_cast<const std::uint8_t*>(p) + row * stride,
                  config_.row_bytes[tile]);
    }
  }
  void store(int tile, void* p, std::int64_t stride) const {
    check(tile);
    for (int row = 0; row < config_.rows[tile]; ++row) {
      std::memcpy(static_cast<std::uint8_t*>(p) + row * stride, tiles_[tile][row],
                  config_.row_bytes[tile]);
    }
  }
  /// TDPBSSD
  void dot_signed(int c, int a, int b) {
    for (const int tile : {c, a, b}) check(tile);
    if (c == a || c == b || a == b) undefined("a product's tiles are not distinct");
    const auto& bytes = config_.row_bytes;
    const auto& rows = config_.rows;
    if (bytes[c] % 4 != 0 || bytes[a] % 4 != 0 || bytes[b] % 4 != 0) {
      undefined("rows of a product are not whole words");
    }
    if (bytes[c] != bytes[b]) undefined("columns of c and b");
    if (rows[c] != rows[a]) undefined("rows of c and a");
    if (bytes[a] / 4 != rows[b]) undefined("columns of a and rows of b");
    for (int m = 0; m < rows[c]; ++m) {
      for (int k = 0; k < bytes[a] / 4; ++k) {
        for (int n = 0; n < bytes[c] / 4; ++n) {
          std::uint32_t sum;  // wraps around
          std::memcpy(&sum, tiles_[c][m] + 4 * n, 4);
          for (int i = 0; i < 4; ++i) {
            const int left = static_cast<std::int8_t>(tiles_[a][m][4 * k + i]);
            const int right = static_cast<std::int8_t>(tiles_[b][k][4 * n + i]);
            sum += static_cast<std::uint32_t>(left * right);
          }
          std::memcpy(tiles_[c][m] + 4 * n, &sum, 4);
        }
      }
    }
    // Columns behind a row's bytes and rows behind the last are zero in every result.
    for (int row = 0; row < cpu::kTileRows; ++row) {
      const int kept = row < rows[c] ? bytes[c] : 0;
      std::memset(tiles_[c][row] + kept, 0, static_cast<std::size_t>(cpu::kTileRowBytes - kept));
    }
  }

 private:
  [[noreturn]] static void protection(const std::string& what) {
    throw TileFault(TileFaultKind::GeneralProtection, "LDTILECFG: " + what);
  }
  [[noreturn]] static void undefined(const std::string& what) {
    throw TileFault(TileFaultKind::UndefinedInstruction, what);
  }
  void check(int tile) const {
    if (!configured_) undefined("tiles are not configured");
    if (config_.rows[tile] == 0) undefined("tile " + std::to_string(tile) + " has no shape");
  }

  bool configured_ = false;
  cpu::TileConfig config_;
  std::uint8_t tiles_[cpu::kTileCount][cpu::kTileRows][cpu::kTileRowBytes] = {};
};

inline TileMachine& this_threads_tiles() {
  static thread_local TileMachine machine;
  return machine;
}

/// What gemm_tile.hpp calls.
struct Tiles {
  static void configure(const cpu::TileConfig& config) { this_threads_tiles().configure(config); }
  static void release() { this_threads_tiles().release(); }
  template <int kTile>
  static void zero() {
    this_threads_tiles().zero(kTile);
  }
  template <int kTile>
  static void load(const void* p, std::int64_t stride) {
    this_threads_tiles().load(kTile, p, stride);
  }
  template <int kTile>
  static void store(void* p, std::int64_t stride) {
    this_threads_tiles().store(kTile, p, stride);
  }
  template <int kC, int kA, int kB>
  static void dot_signed() {
    this_threads_tiles().dot_signed(kC, kA, kB);
  }
};

}  // namespace
}  // namespace moesaic::emulation
