// What a warp does with a unit of weights and the tokens it meets, in registers; the loops for few
// tokens are made of it (narrow.cuh, down_sum.cuh).
//
//   lane 4 g + t    weights   A fragments of rows g, g + 8 of kRowBlocks row blocks
//                   x         B fragments of token g: 8 words per plane, sum of step t's scale group
//                   totals    rows g, g + 8 x tokens 2 t, 2 t + 1, f32
//
// One m16n8k16 for each k16 step and plane; the sums of a scale group are promoted to the totals
// (scale * sum + offset * sum of x). Weights go from global memory straight to registers: kDepth
// units of them, their scales and, where there are registers for it, their x are in flight.
//
// Few issue slots are what makes 8 warps of a multiprocessor keep up with memory. So places are
// pointers that walk; scales stay words until the promotion; row blocks behind the last one and
// tokens behind the tile are computed like the others, of zeros and of some token's x, and dropped.
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
  struct WeightPlace {
    typename D::Place row_blocks[kRowBlocks];
  };
  struct Inputs {
    uint32_t b[kPlanes][8];
    float sum;
  };
  struct InputPlace {
    const uint4* planes;
    const float* sums;
  };
  // A unit on its way; its x only where that is loaded ahead.
  struct Stage {
    Weights weights;
    Inputs x;
  };

  const PackedWeight& weight;
  const StagedRows& staged;
  int first_block;
  int lane = static_cast<int>(threadIdx.x) % 32;
  Totals total = {};

  MOESAIC_DEV WarpProduct(const PackedWeight& packed, const StagedRows& x, int block)
      : weight(packed), staged(x), first_block(block) {}

  // The first always exists, because no block is launched without work.
  MOESAIC_DEV bool has_block(int r) const { return r == 0 || first_block + r < weight.row_blocks; }

  MOESAIC_DEV WeightPlace weight_place(const uint8_t* expert, int unit) const {
    WeightPlace place;
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      place.row_blocks[r] = D::place(weight, expert, first_block + r, unit, lane);
    }
    return place;
  }
  MOESAIC_DEV void step(WeightPlace& place) const {
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) D::step(place.row_blocks[r], weight);
  }
  MOESAIC_DEV void load(const WeightPlace& place, Weights& to) const {
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      if (!has_block(r)) continue;
      to.codes[r] = D::load(place.row_blocks[r]);
      to.scales[r] = D::load_scales(place.row_blocks[r].scales);
    }
  }

  // `row`: the staged row of token g.
  MOESAIC_DEV InputPlace input_place(int64_t row, int unit) const {
    return {
        reinterpret_cast<const uint4*>(staged.unit_planes(row, unit)) + lane % 4 * (2 * kPlanes),
        staged.unit_sums(row, unit) + lane % 4};
  }
  static MOESAIC_DEV void step(InputPlace& place) {
    place.planes += kWalkUnits * kPlanes * (kPlaneWords / 4);
    place.sums += kWalkUnits * kUnitSums;
  }
  static MOESAIC_DEV void load(const InputPlace& place, Inputs& x) {
    MOESAIC_UNROLL
    for (int i = 0; i < 2 * kPlanes; ++i) {
      const uint4 piece = place.planes[i];
      uint32_t* const b = x.b[i / 2] + i % 2 * 4;
      b[0] = piece.x;
      b[1] = piece.y;
      b[2] = piece.z;
      b[3] = piece.w;
    }
    if constexpr (D::kOffset) x.sum = *place.sums;
  }

  template <int kStep, int kPlane>
  MOESAIC_DEV void multiply(const Weights& w, const Inputs& x, Totals& sums) const {
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
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
    const int from = lane % 4 * 8 + kGroup * (4 / D::kScaleGroups);
    return make_float2(__shfl_sync(~0U, sum, from), __shfl_sync(~0U, sum, from + 4));
  }

  template <int kGroup>
  MOESAIC_DEV void promote(const Weights& w, const Inputs& x, Totals& sums) {
    float2 x_sum{};
    if constexpr (D::kOffset) x_sum = group_sums<kGroup>(x.sum);
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
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
  //   advance()               goes to the next unit; false where that lies kWalkUnits behind in the
  //                           same rows, so that places need a step only
  //   finish(totals, next)    called when the unit has been added; `next` is where the walk goes on
  template <int kDepth, bool kXAhead, class Walk>
  MOESAIC_DEV void run(Walk now) {
    if (!now.more()) return;
    Walk ahead = now;
    WeightPlace place = weight_place(ahead.expert(), ahead.unit);
    InputPlace x_place = input_place(ahead.row(), ahead.unit);  // of `ahead`, else of `now`
    const auto load_next = [&](Stage& to) {
      load(place, to.weights);
      if constexpr (kXAhead) load(x_place, to.x);
      if (!ahead.advance()) {
        step(place);
        if constexpr (kXAhead) step(x_place);
      } else if (ahead.more()) {
        place = weight_place(ahead.expert(), ahead.unit);
        if constexpr (kXAhead) x_place = input_place(ahead.row(), ahead.unit);
      }
    };
    Stage ring[kDepth] = {};
    MOESAIC_UNROLL
    for (int d = 0; d < kDepth; ++d) {
      if (!ahead.more()) break;
      load_next(ring[d]);
    }
    while (now.more()) {
      MOESAIC_UNROLL
      for (int d = 0; d < kDepth; ++d) {
        if (!now.more()) break;
        Walk next = now;
        const bool elsewhere = next.advance();
        if constexpr (kXAhead) {
          multiply_unit(ring[d].weights, ring[d].x);
        } else {
          Inputs x;
          load(x_place, x);
          if (!elsewhere) {
            step(x_place);
          } else if (next.more()) {
            x_place = input_place(next.row(), next.unit);
          }
          multiply_unit(ring[d].weights, x);
        }
        if (ahead.more()) load_next(ring[d]);
        now.finish(total, next);
        now = next;
      }
    }
  }
};

}  // namespace moesaic::cuda
