// Products for few tokens per expert: out[token] = W[expert] x[token], bound by reading W.
//
//   block = one tile of up to 8 tokens of one expert x 2 row blocks
//
//            units of a row block (64 columns each)
//            0    1    2   ..   7    8    9  ..
//   rows    +----+----+----+  +----+----+----+      warp w multiplies units w, w + 8, ..
//   0 .. 15 | w0 | w1 | w2 |..| w7 | w0 | w1 |..    of both row blocks by the tokens
//   16.. 31 | w0 | w1 | w2 |..| w7 | w0 | w1 |..    (warp_product.cuh)
//           +----+----+----+  +----+----+----+
//
// Weights are read once per tile. At the end the warps' parts are added in the order of the warps,
// so a token's result depends on nothing but K: not on its neighbours, the tile, or the grid.
//
// Preconditions: x staged (stage.cuh), weights packed (formats/layout.h), 256 threads, grid = tiles
// x groups of row blocks. Not measured on hardware.
#pragma once

#include "device.cuh"
#include "gemm/product.cuh"
#include "gemm/warp_product.cuh"

namespace moesaic::cuda {

// Parts of K: unit u belongs to part u % kParts.
inline constexpr int kParts = kWalkUnits;
inline constexpr int kNarrowWarps = kParts;
inline constexpr int kNarrowTokens = 8;
inline constexpr int kRowBlocks = 2;

template <class D, int kPlanes>
struct Narrow : WarpProduct<D, kPlanes, kRowBlocks> {
  using Product = WarpProduct<D, kPlanes, kRowBlocks>;
  static constexpr int kRows = kRowBlocks * kUnitRows;
  // How many units a warp loads ahead. The depth keeps the registers low enough for two blocks per
  // multiprocessor, which together have 16 KiB or more in flight. x is loaded with them only where
  // it is one plane.
  static constexpr bool kManyScaleWords =
      kPlanes == 2 && (sizeof(typename D::Scales) > 16 || D::kScaleLoads > 2);
  // Codes of six bits take the most registers to put together, then those of five with minima.
  static constexpr bool kManyCodeWords =
      kPlanes == 2 && (D::kUnitBytes == 768 || (D::kMinima && D::kUnitBytes > 512));
  static constexpr int kDepth = D::kUnitBytes > 1024 || kManyScaleWords || kManyCodeWords ? 1
                                : D::kUnitBytes < 384 && kPlanes == 1                     ? 3
                                                                                          : 2;
  static constexpr bool kXAhead = kPlanes == 1;
  // Tokens lie 4 banks apart, so that the lanes of a fragment meet no bank twice.
  static constexpr int kTokenStride = kRows + 4;

  struct Shared {
    float parts[kParts][kNarrowTokens][kTokenStride];
    int64_t source[kNarrowTokens];  // staged row; behind the tile that of its first token
    int64_t destination[kNarrowTokens];
  };
  struct Operands {
    const uint8_t* expert;
    int64_t source;  // of token g
    int units;
  };
  // The units of a part of one expert.
  struct Walk {
    const Operands* operands;
    int unit;

    MOESAIC_DEV bool more() const { return unit < operands->units; }
    MOESAIC_DEV const uint8_t* expert() const { return operands->expert; }
    MOESAIC_DEV int64_t row() const { return operands->source; }
    MOESAIC_DEV bool advance() {
      unit += kParts;
      return false;
    }
    MOESAIC_DEV void finish(const typename Product::Totals&, const Walk&) const {}
  };

  MOESAIC_DEV Narrow(const ProductArgs& args, int group)
      : Product(args.weight, args.x, group * kRowBlocks) {}

  MOESAIC_DEV void run(const uint8_t* expert, int part, const Shared& shared) {
    const Operands operands{expert, shared.source[this->lane / 4], this->weight.units};
    Product::template run<kDepth, kXAhead>(Walk{&operands, part});
  }

  MOESAIC_DEV void put_part(float (&part)[kNarrowTokens][kTokenStride]) const {
    const int g = this->lane / 4, t = this->lane % 4;
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      MOESAIC_UNROLL
      for (int i = 0; i < 4; ++i) {
        part[t * 2 + i % 2][kUnitRows * r + g + i / 2 * 8] = this->total[r][i];
      }
    }
  }
};

template <class D, int kPlanes>
MOESAIC_KERNEL void __launch_bounds__(32 * kNarrowWarps, 2) narrow_kernel(ProductArgs args) {
  dev::begin_grid();
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
    const int32_t entry = tile.first + (thread < tile.count ? thread : 0);
    const int64_t destination = args.tiles.map.destination_of(entry);
    shared.destination[thread] = destination;
    shared.source[thread] =
        args.x.by_destination != 0 ? destination : args.tiles.map.source_of(entry);
  }
  __syncthreads();

  Loop loop(args, group);
  loop.run(expert, thread / 32, shared);
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
