#pragma once

/// The tile instructions of AMX as gemm_tile.hpp wants them. Written as assembly, because the
/// intrinsics of GCC 12 take tile numbers as literals only, and do not say that a load reads memory
/// that the compiler may still hold in registers.
///
/// tests/emulation/amx/tiles.hpp has the same names for a machine in software.

#include <cstdint>

#include "cpu/kernels/tile_config.hpp"

namespace moesaic::cpu {
namespace {

struct Tiles {
  static inline __attribute__((always_inline)) void configure(const TileConfig& config) {
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  /// Leaves no tile state behind, which switches of threads would save and signal frames hold.
  static inline __attribute__((always_inline)) void release() { asm volatile("tilerelease"); }

  template <int kTile>
  static inline __attribute__((always_inline)) void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  /// Row i from p + i * stride, in bytes.
  template <int kTile>
  static inline __attribute__((always_inline)) void load(const void* p, std::int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  static inline __attribute__((always_inline)) void store(void* p, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
  }
  /// c += a * b in 32-bit integers: a has rows of signed bytes, b holds 4 of its rows in each row.
  template <int kC, int kA, int kB>
  static inline __attribute__((always_inline)) void dot_signed() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }
};

}  // namespace
}  // namespace moesaic::cpu
