// What a warp does with a unit of weights and the tokens it meets, in registers; the loops for few
// tokens are made of it (narrow.cuh, down_sum.cuh).
//
//   lane 4 g + t    weights   A fragments of rows g, g + 8 of kRowBlocks row blocks
//                   x         B fragments of token g: 8 words per plane, sums of 16 columns t
//                   totals    rows g, g + 8 x tokens 2 t, 2 t + 1, f32
//
// One m16n8k16 for each k16 step and plane; the sums of a scale group are promoted to the totals
// (scale * sum + offset * sum of x). Weights go from global memory straight to registers: kDepth
// units of them are in flight; x comes from L2, a unit ahead where there are registers for it.
#pragma once

#include "formats/packed.cuh"
#include "gemm/stage.cuh"

namespace moesaic::cuda {

template <class D, int kPlanes, int kRowBlocks>
struct WarpProduct {
  using Totals = float[kRowBlocks][4];

  struct Weights {
    typename D::Codes codes[kRowBlocks];
    typename D::Scales scales[kRowBlocks];
  };
  struct Inputs {
    uint32_t b[kPlanes][8];
    float sum = 0.0F;
  };

  const PackedWeight& weight;
  const StagedRows& staged;
  int first_block;
  int lane = static_cast<int>(threadIdx.x) % 32;
  Totals total = {};

  MOESAIC_DEV WarpProduct(const PackedWeight& packed, const StagedRows& x, int block)
      : weight(packed), staged(x), first_block(block) {}

  // The first unit always exists, because no block is launched without work.
  MOESAIC_DEV bool has_block(int r) const { return r == 0 || first_block + r < weight.row_blocks; }

  MOESAIC_DEV void load(const uint8_t* expert, int unit, Weights& to) const {
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      if (!has_block(r)) continue;
      to.codes[r] = D::load(
          weight.codes(expert, first_block + r) + static_cast<int64_t>(unit) * D::kUnitBytes, lane);
      to.scales[r] = D::load_scales(weight, weight.scales(expert, first_block + r), unit, lane / 4);
    }
  }

  // `row`: the staged row of token g; zeros where it is -1.
  MOESAIC_DEV void load_x(int64_t row, int unit, Inputs& x) const {
    const bool real = row >= 0;
    const auto* const pieces =
        reinterpret_cast<const uint4*>(staged.unit_planes(real ? row : 0, unit)) +
        lane % 4 * (2 * kPlanes);
    MOESAIC_UNROLL
    for (int i = 0; i < 2 * kPlanes; ++i) {
      const uint4 piece = real ? pieces[i] : make_uint4(0, 0, 0, 0);
      uint32_t* const b = x.b[i / 2] + i % 2 * 4;
      b[0] = piece.x;
      b[1] = piece.y;
      b[2] = piece.z;
      b[3] = piece.w;
    }
    if constexpr (D::kOffset) x.sum = real ? staged.unit_sums(row, unit)[lane % 4] : 0.0F;
  }

  template <int kStep, int kPlane>
  MOESAIC_DEV void multiply(const Weights& w, const Inputs& x, Totals& sums) const {
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      if (!has_block(r)) continue;
      uint32_t a[4];
      D::template fragment<kStep, kPlane>(w.codes[r], a);
      MOESAIC_UNROLL
      for (int plane = 0; plane < kPlanes; ++plane) {
        const uint32_t b[2] = {x.b[plane][2 * kStep], x.b[plane][2 * kStep + 1]};
        dev::mma_m16n8k16_bf16(sums[r], a, b);
      }
    }
    if constexpr (kPlane + 1 < D::kPlanes) multiply<kStep, kPlane + 1>(w, x, sums);
  }

  // Sums of x over group kGroup of the unit, of tokens 2t and 2t + 1.
  template <int kGroup>
  MOESAIC_DEV float2 group_sums(float sum) const {
    if constexpr (D::kScaleGroups <= 2) sum += __shfl_xor_sync(~0U, sum, 1);
    if constexpr (D::kScaleGroups == 1) sum += __shfl_xor_sync(~0U, sum, 2);
    const int from = lane % 4 * 8 + kGroup * (4 / D::kScaleGroups);
    return make_float2(__shfl_sync(~0U, sum, from), __shfl_sync(~0U, sum, from + 4));
  }

  template <int kGroup>
  MOESAIC_DEV void promote(const Weights& w, const Inputs& x, Totals& sums) {
    float2 x_sum{};
    if constexpr (D::kOffset) x_sum = group_sums<kGroup>(x.sum);
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      if (!has_block(r)) continue;
      const Promotion p = D::promotion(w.scales[r], kGroup);
      MOESAIC_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& to = total[r][i];
        to = fmaf(p.scale[i / 2], sums[r][i], to);
        if constexpr (D::kOffset) to = fmaf(p.offset[i / 2], i % 2 == 0 ? x_sum.x : x_sum.y, to);
        sums[r][i] = 0.0F;
      }
    }
  }

  template <int kStep = 0>
  MOESAIC_DEV void unit_steps(const Weights& w, const Inputs& x, Totals& sums) {
    multiply<kStep, 0>(w, x, sums);
    if constexpr (D::kScaleGroups > 0) {
      constexpr int kGroupSteps = 4 / (D::kScaleGroups > 0 ? D::kScaleGroups : 1);
      if constexpr ((kStep + 1) % kGroupSteps == 0) promote<kStep / kGroupSteps>(w, x, sums);
    }
    if constexpr (kStep + 1 < 4) unit_steps<kStep + 1>(w, x, sums);
  }

  MOESAIC_DEV void multiply_unit(const Weights& w, const Inputs& x) {
    if constexpr (D::kScaleGroups == 0) {
      unit_steps(w, x, total);
    } else {
      Totals sums = {};
      unit_steps(w, x, sums);
    }
  }

  // Multiplies all units of a walk in its order. A walk stands at one unit and has
  //   more()                  whether it stands at a unit
  //   expert(), row(), unit   what to load
  //   advance()               goes to the next unit
  //   finish(totals, next)    called when the unit has been added; `next` is where the walk goes on
  template <int kDepth, bool kXAhead, class Walk>
  MOESAIC_DEV void run(Walk now) {
    Walk ahead = now;
    Weights ring[kDepth] = {};
    MOESAIC_UNROLL
    for (int d = 0; d < kDepth; ++d) {
      if (!ahead.more()) break;
      load(ahead.expert(), ahead.unit, ring[d]);
      ahead.advance();
    }
    Inputs x;
    if constexpr (kXAhead) load_x(now.more() ? now.row() : -1, now.unit, x);
    while (now.more()) {
      MOESAIC_UNROLL
      for (int d = 0; d < kDepth; ++d) {
        if (!now.more()) break;
        Walk next = now;
        next.advance();
        Inputs next_x;
        if constexpr (kXAhead) {
          load_x(next.more() ? next.row() : -1, next.unit, next_x);
        } else {
          load_x(now.row(), now.unit, x);
        }
        multiply_unit(ring[d], x);
        if (ahead.more()) {
          load(ahead.expert(), ahead.unit, ring[d]);
          ahead.advance();
        }
        now.finish(total, next);
        if constexpr (kXAhead) x = next_x;
        now = next;
      }
    }
  }
};

}  // namespace moesaic::cuda
