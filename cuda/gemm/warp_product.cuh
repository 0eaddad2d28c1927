// What a warp does with a unit of weights and the tokens it meets, in registers; the loops for few
// tokens are made of it (narrow.cuh, down_sum.cuh).
//
//   lane 4 g + t    weights   A fragments of rows g, g + 8 of kRowBlocks row blocks
//                   x         B fragments of token g: 8 words per plane, word t of sums for minima
//                   totals    rows g, g + 8 x tokens 2 t, 2 t + 1, f32
//
// One m16n8k16 for each k16 step and plane; the sums of a scale group are promoted to the totals.
// What the fragments hold in excess of the codes is the same for all rows, so products with a
// fragment of -kShift begin each sum: they cost one instruction for all row blocks, where sums of x
// would have to be loaded, shuffled and multiplied. Minima are one more product for a whole unit.
//
// Weights go from global memory straight to registers: kDepth units of them, their scales and, where
// there are registers for it, their x are in flight.
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
    const uint8_t* expert;
    typename D::Place row_blocks[kRowBlocks];
  };
  struct Inputs {
    uint32_t b[kPlanes][8];
    uint32_t sums;
  };
  struct InputPlace {
    const uint8_t* planes;
    const uint32_t* sums;
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
    place.expert = expert;
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      place.row_blocks[r] = D::place(weight, first_block + r, unit, lane);
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
      to.codes[r] = D::load(place.expert, place.row_blocks[r]);
      to.scales[r] = D::load_scales(place.expert, place.row_blocks[r].scales);
    }
  }

  // `row`: the staged row of token g.
  MOESAIC_DEV InputPlace input_place(int64_t row, int unit) const {
    return {staged.unit_planes(row, unit) + 2 * D::kLaneCols * (lane % 4),
            D::kMinima ? staged.unit_sums(row, unit) + lane % 4 : nullptr};
  }
  static MOESAIC_DEV void step(InputPlace& place) {
    place.planes += kWalkUnits * kPlanes * kPlaneBytes;
    if constexpr (D::kMinima) place.sums += kWalkUnits * kUnitSums;
  }
  static MOESAIC_DEV void load(const InputPlace& place, Inputs& x) {
    MOESAIC_UNROLL
    for (int plane = 0; plane < kPlanes; ++plane) {
      const uint8_t* const from = place.planes + plane * kPlaneBytes;
      load_lane_cols<D::kLaneCols>([&](int at) { return from + at; }, x.b[plane]);
    }
    if constexpr (D::kMinima) x.sums = *place.sums;
  }

  // Adds -kShift times the sums of x of steps kStep .. kLast, the same in all rows.
  template <int kStep, int kLast>
  static MOESAIC_DEV void add_excess(const Inputs& x, float (&excess)[4]) {
    constexpr uint32_t kPair = bf16_pair(-D::kShift);
    const uint32_t a[4] = {kPair, kPair, kPair, kPair};
    MOESAIC_UNROLL
    for (int plane = 0; plane < kPlanes; ++plane) {
      const uint32_t b[2] = {x.b[plane][2 * kStep], x.b[plane][2 * kStep + 1]};
      dev::mma_m16n8k16_bf16(excess, a, b);
    }
    if constexpr (kStep + 1 < kLast) add_excess<kStep + 1, kLast>(x, excess);
  }

  // Adds the products of steps kStep .. kLast of a row block.
  template <int kStep, int kLast, int kPlane = 0>
  static MOESAIC_DEV void multiply(const typename D::Codes& codes, const Inputs& x,
                                   float (&sums)[4]) {
    uint32_t a[4];
    D::template fragment<kStep, kPlane>(codes, a);
    MOESAIC_UNROLL
    for (int plane = 0; plane < kPlanes; ++plane) {
      const uint32_t b[2] = {x.b[plane][2 * kStep], x.b[plane][2 * kStep + 1]};
      dev::mma_m16n8k16_bf16(sums, a, b);
    }
    if constexpr (kPlane + 1 < D::kPlanes) {
      multiply<kStep, kLast, kPlane + 1>(codes, x, sums);
    } else if constexpr (kStep + 1 < kLast) {
      multiply<kStep + 1, kLast>(codes, x, sums);
    }
  }

  template <int kGroup = 0>
  MOESAIC_DEV void multiply_groups(const Weights& w, const Inputs& x) {
    constexpr int kSteps = 4 / D::kScaleGroups, kFirst = kGroup * kSteps;
    float excess[4] = {};
    if constexpr (D::kShift != 0) add_excess<kFirst, kFirst + kSteps>(x, excess);
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      float sums[4] = {excess[0], excess[1], excess[2], excess[3]};
      multiply<kFirst, kFirst + kSteps>(w.codes[r], x, sums);
      const Promotion p = D::promotion(w.scales[r], kGroup);
      MOESAIC_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& to = total[r][i];
        to = fmaf(p.scale[i / 2], sums[i], to);
        if constexpr (D::kOffset) to = fmaf(p.offset[i / 2], excess[i], to);
      }
    }
    if constexpr (kGroup + 1 < D::kScaleGroups) multiply_groups<kGroup + 1>(w, x);
  }

  MOESAIC_DEV void subtract_minima(const Weights& w, const Inputs& x) {
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      uint32_t a[2];
      D::minima(w.scales[r], a);
      float sums[4] = {};
      dev::mma_m16n8k8_bf16(sums, a, x.sums);
      const float2 scale = D::minima_scale(w.scales[r]);
      MOESAIC_UNROLL
      for (int i = 0; i < 4; ++i) {
        total[r][i] = fmaf(i < 2 ? -scale.x : -scale.y, sums[i], total[r][i]);
      }
    }
  }

  MOESAIC_DEV void multiply_unit(const Weights& w, const Inputs& x) {
    if constexpr (D::kScaleGroups == 0) {
      MOESAIC_UNROLL
      for (int r = 0; r < kRowBlocks; ++r) multiply<0, 4>(w.codes[r], x, total[r]);
    } else {
      multiply_groups(w, x);
      if constexpr (D::kMinima) subtract_minima(w, x);
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
