// Products for few tokens per expert: out[token] = W[expert] x[token], bound by reading W.
//
//   block = one tile of up to 8 tokens of one expert x 2 row blocks
//
//            units of a row block (64 columns each)
//            0    1    2   ..   7    8    9  ..
//   rows    +----+----+----+  +----+----+----+      warp w multiplies units w, w + 8, ..
//   0 .. 15 | w0 | w1 | w2 |..| w7 | w0 | w1 |..    of both row blocks by the tokens, one
//   16.. 31 | w0 | w1 | w2 |..| w7 | w0 | w1 |..    m16n8k16 for each k16 step and plane
//           +----+----+----+  +----+----+----+
//
// Weights go from global memory straight to registers as A fragments, read once per tile; kDepth
// units are in flight per warp. Sums of a scale group are promoted to f32 accumulators (scale * sum
// + offset * sum of x). At the end the warps' parts are added in the order of the warps, so a
// token's result depends on nothing but K: not on its neighbours, the tile, or the grid.
//
// Preconditions: x staged (stage.cuh), weights packed (formats/layout.h), 256 threads, grid = tiles
// x groups of row blocks. Not measured on hardware.
#pragma once

#include "device.cuh"
#include "gemm/product.cuh"

namespace moesaic::cuda {

inline constexpr int kNarrowWarps = 8;
inline constexpr int kNarrowTokens = 8;
inline constexpr int kRowBlocks = 2;

template <class D, int kPlanes>
struct Narrow {
  static constexpr int kRows = kRowBlocks * kUnitRows;
  // Units in flight per warp, as many as the registers of two blocks per multiprocessor hold.
  static constexpr int kDepth = D::kUnitBytes > 1024 ? 1 : D::kUnitBytes > 512 ? 2 : 3;
  // Tokens lie 4 banks apart, so that the lanes of a fragment meet no bank twice.
  static constexpr int kTokenStride = kRows + 4;

  using Sums = float[kRowBlocks][4];

  struct Shared {
    float parts[kNarrowWarps][kNarrowTokens][kTokenStride];
    int64_t source[kNarrowTokens];  // staged row, -1 behind the tile
    int64_t destination[kNarrowTokens];
  };
  // One unit of weights on its way.
  struct Slot {
    typename D::Codes codes[kRowBlocks];
    typename D::Scales scales[kRowBlocks];
  };
  // One unit of x: fragments of token g, sums of 16 columns t of token g.
  struct Unit {
    uint32_t b[kPlanes][8];
    float sum;
  };

  const ProductArgs& args;
  const uint8_t* expert;
  int first_block;
  int lane;
  int64_t source;  // of token g
  Sums total = {};

  MOESAIC_DEV Narrow(const ProductArgs& product, const uint8_t* weights, int group,
                     const Shared& shared)
      : args(product),
        expert(weights),
        first_block(group * kRowBlocks),
        lane(static_cast<int>(threadIdx.x) % 32),
        source(shared.source[lane / 4]) {}

  MOESAIC_DEV bool has_block(int r) const { return first_block + r < args.weight.row_blocks; }

  MOESAIC_DEV void load(int unit, Slot& slot) const {
    const PackedWeight& w = args.weight;
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      if (!has_block(r)) continue;
      slot.codes[r] = D::load(
          w.codes(expert, first_block + r) + static_cast<int64_t>(unit) * D::kUnitBytes, lane);
      slot.scales[r] = D::load_scales(w, w.scales(expert, first_block + r), unit, lane / 4);
    }
  }

  MOESAIC_DEV void load_x(int unit, Unit& x) const {
    const bool real = source >= 0;
    const auto* const pieces =
        reinterpret_cast<const uint4*>(args.x.unit_planes(real ? source : 0, unit)) +
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
    if constexpr (D::kOffset) x.sum = real ? args.x.unit_sums(source, unit)[lane % 4] : 0.0F;
  }

  template <int kStep, int kPlane>
  MOESAIC_DEV void multiply(const Slot& slot, const Unit& x, Sums& sums) const {
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      if (!has_block(r)) continue;
      uint32_t a[4];
      D::template fragment<kStep, kPlane>(slot.codes[r], a);
      MOESAIC_UNROLL
      for (int plane = 0; plane < kPlanes; ++plane) {
        const uint32_t b[2] = {x.b[plane][2 * kStep], x.b[plane][2 * kStep + 1]};
        dev::mma_m16n8k16_bf16(sums[r], a, b);
      }
    }
    if constexpr (kPlane + 1 < D::kPlanes) multiply<kStep, kPlane + 1>(slot, x, sums);
  }

  // Sums of x over group kGroup of the unit, of tokens 2t and 2t + 1.
  template <int kGroup>
  MOESAIC_DEV float2 group_sums(float sum) const {
    if constexpr (D::kGroups <= 2) sum += __shfl_xor_sync(~0U, sum, 1);
    if constexpr (D::kGroups == 1) sum += __shfl_xor_sync(~0U, sum, 2);
    const int from = lane % 4 * 8 + kGroup * (4 / D::kGroups);
    return make_float2(__shfl_sync(~0U, sum, from), __shfl_sync(~0U, sum, from + 4));
  }

  template <int kGroup>
  MOESAIC_DEV void promote(const Slot& slot, const Unit& x, Sums& sums) {
    float2 x_sum{};
    if constexpr (D::kOffset) x_sum = group_sums<kGroup>(x.sum);
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      if (!has_block(r)) continue;
      const Promotion p = D::promotion(slot.scales[r], kGroup);
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
  MOESAIC_DEV void unit_steps(const Slot& slot, const Unit& x, Sums& sums) {
    multiply<kStep, 0>(slot, x, sums);
    if constexpr (D::kGroups > 0) {
      constexpr int kGroupSteps = 4 / (D::kGroups > 0 ? D::kGroups : 1);
      if constexpr ((kStep + 1) % kGroupSteps == 0) promote<kStep / kGroupSteps>(slot, x, sums);
    }
    if constexpr (kStep + 1 < 4) unit_steps<kStep + 1>(slot, x, sums);
  }

  MOESAIC_DEV void multiply_unit(int unit, const Slot& slot) {
    Unit x;
    load_x(unit, x);
    if constexpr (D::kGroups == 0) {
      unit_steps(slot, x, total);
    } else {
      Sums sums = {};
      unit_steps(slot, x, sums);
    }
  }

  // This warp's part of the product.
  MOESAIC_DEV void run(int warp) {
    const int units = args.weight.units;
    Slot ring[kDepth];
    MOESAIC_UNROLL
    for (int d = 0; d < kDepth; ++d) {
      if (warp + d * kNarrowWarps < units) load(warp + d * kNarrowWarps, ring[d]);
    }
    for (int first = warp; first < units; first += kDepth * kNarrowWarps) {
      MOESAIC_UNROLL
      for (int d = 0; d < kDepth; ++d) {
        const int unit = first + d * kNarrowWarps;
        if (unit >= units) break;
        multiply_unit(unit, ring[d]);
        const int next = unit + kDepth * kNarrowWarps;
        if (next < units) load(next, ring[d]);
      }
    }
  }

  MOESAIC_DEV void put_part(float (&part)[kNarrowTokens][kTokenStride]) const {
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      MOESAIC_UNROLL
      for (int i = 0; i < 4; ++i) {
        part[lane % 4 * 2 + i % 2][kUnitRows * r + lane / 4 + i / 2 * 8] = total[r][i];
      }
    }
  }
};

template <class D, int kPlanes>
MOESAIC_KERNEL void __launch_bounds__(32 * kNarrowWarps, 2) narrow_kernel(ProductArgs args) {
  using Loop = Narrow<D, kPlanes>;
  MOESAIC_SHARED(typename Loop::Shared, shared);
  const int groups = (args.weight.row_blocks + kRowBlocks - 1) / kRowBlocks;
  const int group = static_cast<int>(blockIdx.x) % groups;
  const int thread = static_cast<int>(threadIdx.x);

  Tile tile;
  if (!args.tiles.find(static_cast<int32_t>(blockIdx.x) / groups, tile)) return;
  const uint8_t* const expert = args.weight.expert(tile.expert);
  if (expert == nullptr) return;
  if (thread < kNarrowTokens) {
    const int32_t entry = tile.first + thread;
    const bool real = thread < tile.count;
    const int64_t destination = real ? destination_row(args.tiles.map, entry) : -1;
    shared.destination[thread] = destination;
    shared.source[thread] = !real                        ? -1
                            : args.x.by_destination != 0 ? destination
                                                         : source_row(args.tiles.map, entry);
  }
  __syncthreads();

  Loop loop(args, expert, group, shared);
  loop.run(thread / 32);
  loop.put_part(shared.parts[thread / 32]);
  __syncthreads();

  const int block_rows = args.out.block_rows();
  const int rows = kRowBlocks * block_rows;
  for (int i = thread; i < tile.count * rows; i += 32 * kNarrowWarps) {
    const int token = i / rows, r = i % rows;
    const int block = r / block_rows;
    if (!loop.has_block(block)) continue;
    args.out.store(tile.expert, group * kRowBlocks + block, r % block_rows,
                   shared.destination[token], [&](int unit_row) {
                     float sum = 0.0F;
                     MOESAIC_UNROLL
                     for (int w = 0; w < kNarrowWarps; ++w) {
                       sum += shared.parts[w][token][block * kUnitRows + unit_row];
                     }
                     return sum;
                   });
  }
}

}  // namespace moesaic::cuda
