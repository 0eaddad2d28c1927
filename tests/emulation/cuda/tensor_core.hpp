// mma.sync and ldmatrix on whole warps, with the fragment layouts of the PTX ISA manual.
#pragma once

#include <cstdint>

#include "cuda/float16.hpp"
#include "cuda/warp.hpp"

namespace moesaic::emulation {

struct MmaLane {
  const uint32_t* a;
  const uint32_t* b;
  float* d;
};

MOESAIC_UNCHECKED inline float half_of(uint32_t pair, int i, float2 (*unpack)(uint32_t)) {
  const float2 values = unpack(pair);
  return i == 0 ? values.x : values.y;
}

// Lane 4g + t holds, in register r and half i:
//   A (row, column) = (g + 8 (r & 1), 2t + i + 8 (r >> 1))
//   B (row, column) = (2t + i + 8 r, g)
//   D (row, column) = (g + 8 (e >> 1), 2t + (e & 1)) in register e
template <float2 (*unpack)(uint32_t)>
MOESAIC_UNCHECKED void mma_body(void* const* lanes, uint32_t) {
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; l++) {
    const auto* lane = static_cast<const MmaLane*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < 4; r++) {
      for (int i = 0; i < 2; i++) {
        a[g + 8 * (r & 1)][2 * t + i + 8 * (r >> 1)] = half_of(lane->a[r], i, unpack);
      }
    }
    for (int r = 0; r < 2; r++) {
      for (int i = 0; i < 2; i++) b[2 * t + i + 8 * r][g] = half_of(lane->b[r], i, unpack);
    }
  }
  for (int l = 0; l < 32; l++) {
    const auto* lane = static_cast<const MmaLane*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int e = 0; e < 4; e++) {
      float sum = 0;
      for (int k = 0; k < 16; k++) sum += a[g + 8 * (e >> 1)][k] * b[k][2 * t + (e & 1)];
      lane->d[e] += sum;
    }
  }
  counters().mma++;
}

// m16n8k8: the registers of A's first 8 columns and of B's first 8 rows.
MOESAIC_UNCHECKED inline void mma_k8_body(void* const* lanes, uint32_t) {
  float a[16][8], b[8][8];
  for (int l = 0; l < 32; l++) {
    const auto* lane = static_cast<const MmaLane*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 2; i++) {
      a[g][2 * t + i] = half_of(lane->a[0], i, dev::unpack_bf16);
      a[g + 8][2 * t + i] = half_of(lane->a[1], i, dev::unpack_bf16);
      b[2 * t + i][g] = half_of(lane->b[0], i, dev::unpack_bf16);
    }
  }
  for (int l = 0; l < 32; l++) {
    const auto* lane = static_cast<const MmaLane*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int e = 0; e < 4; e++) {
      float sum = 0;
      for (int k = 0; k < 8; k++) sum += a[g + 8 * (e >> 1)][k] * b[k][2 * t + (e & 1)];
      lane->d[e] += sum;
    }
  }
  counters().mma++;
}

struct MatrixLane {
  uint16_t row[8];
  uint32_t* result;
};

// Register q of lane l gets two neighbours of matrix q: (l / 4, 2 (l % 4)) and the next column, or
// with `kTranspose` the same of the transposed matrix.
template <int kMatrices, bool kTranspose>
MOESAIC_UNCHECKED void ldmatrix_body(void* const* lanes, uint32_t) {
  for (int l = 0; l < 32; l++) {
    for (int q = 0; q < kMatrices; q++) {
      uint32_t pair = 0;
      for (int i = 0; i < 2; i++) {
        const int row = l / 4, column = 2 * (l % 4) + i;
        const auto* source =
            static_cast<const MatrixLane*>(lanes[8 * q + (kTranspose ? column : row)]);
        pair |= uint32_t{source->row[kTranspose ? row : column]} << (16 * i);
      }
      static_cast<const MatrixLane*>(lanes[l])->result[q] = pair;
    }
  }
}

template <int kMatrices, bool kTranspose>
void ldmatrix(uint32_t* result, const void* row, Site site) {
  MatrixLane mine{{}, result};
  // The lane itself reads its row, so that a race checker sees who read what.
  if (position.lane < 8 * kMatrices) {
    if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) {
      fail("a row of ldmatrix is not 16-byte aligned", site);
    }
    if (!is_shared(row, 16)) fail("a row of ldmatrix is not in shared memory", site);
    for (int i = 0; i < 8; i++) mine.row[i] = static_cast<const uint16_t*>(row)[i];
  }
  warp_collective(kFullMask, &mine, ldmatrix_body<kMatrices, kTranspose>, site);
}

}  // namespace moesaic::emulation

namespace moesaic::dev {

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              MOESAIC_HERE) {
  emulation::MmaLane mine{a, b, d};
  emulation::warp_collective(emulation::kFullMask, &mine, emulation::mma_body<unpack_bf16>,
                             {"mma_m16n8k16_bf16", where});
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             MOESAIC_HERE) {
  emulation::MmaLane mine{a, b, d};
  emulation::warp_collective(emulation::kFullMask, &mine, emulation::mma_body<unpack_f16>,
                             {"mma_m16n8k16_f16", where});
}

inline void mma_m16n8k8_bf16(float (&d)[4], const uint32_t (&a)[2], uint32_t b, MOESAIC_HERE) {
  emulation::MmaLane mine{a, &b, d};
  emulation::warp_collective(emulation::kFullMask, &mine, emulation::mma_k8_body,
                             {"mma_m16n8k8_bf16", where});
}

inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, MOESAIC_HERE) {
  emulation::ldmatrix<2, false>(r, row, {"ldmatrix_x2", where});
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, MOESAIC_HERE) {
  emulation::ldmatrix<2, true>(r, row, {"ldmatrix_x2_trans", where});
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, MOESAIC_HERE) {
  emulation::ldmatrix<4, false>(r, row, {"ldmatrix_x4", where});
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, MOESAIC_HERE) {
  emulation::ldmatrix<4, true>(r, row, {"ldmatrix_x4_trans", where});
}

}  // namespace moesaic::dev
