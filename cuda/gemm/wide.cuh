// Products for many tokens per expert: out[token] = W[expert] x[token], bound by the tensor cores.
//
//   block = one tile of up to 64 tokens of one expert x 4 warps of 1 or 2 row blocks
//
//                     64 tokens, in bf16
//                   +----+----+----+----+--    a stage of the ring: one unit (64 columns) of
//                   | n0 | n1 | n2 | n3 | ..     x     [64][planes x 128 B], swizzled
//   rows            +----+----+----+----+--      sums  [64][4 words], where offsets differ by row
//   0 .. 15   warp 0| f32 accumulators  |        codes [4 warps][row blocks][unit bytes]
//   16.. 31   warp 0| in registers      |      all brought by cp.async, one or two stages ahead;
//   32.. 47   warp 1|                   |      a warp decodes the codes of its own rows into A
//   ..              +----+----+----+----+--    fragments and multiplies them by all tokens
//
// A warp decodes the A fragments of the k16 steps of a unit, of as many as there are registers for;
// then for each 8 tokens it reads their B words, multiplies, and promotes the sums of each scale group
// to the accumulators. Eights of tokens behind the tile's last are left out, so a tile's cost
// follows its count. K runs from left to right in one warp: a token's result depends on nothing but
// K. Each code byte is read once per tile.
//
// What fragments hold in excess of the codes is subtracted from them, exactly: they meet many tokens.
// Where promotions have an offset it costs less to add the excess to that. Rows behind the tile's
// count are some token's, and dropped.
//
// Banks: one phase of a 16-byte read is two rows x four lanes t, of an 8-byte read four rows; the
// swizzle gives them the 128 bytes that all banks serve at once.
// Preconditions: x staged (stage.cuh), weights packed (formats/layout.h), kWideThreads threads,
// grid = tiles x groups of row blocks, all groups of a tile side by side, so that its tokens stay
// in L2; Wide::kSharedBytes of dynamic shared memory. Not measured on hardware.
#pragma once

#include "device.cuh"
#include "formats/codes.cuh"
#include "gemm/product.cuh"

namespace moesaic::cuda {

inline constexpr int kWideWarps = 4;
inline constexpr int kWideThreads = 32 * kWideWarps;
inline constexpr int kWideTokens = 64;

template <class D, int kPlanes>
struct Wide {
  // Two row blocks share each fragment of x, unless the A fragments of one fill the registers.
  static constexpr int kRowBlocks = D::kUnitBytes > 1024 ? 1 : 2;
  static constexpr int kGroupBlocks = kWideWarps * kRowBlocks;  // row blocks of a thread block
  static constexpr int kTokenTiles = kWideTokens / 8;

  static constexpr int kRowBytes = kPlanes * kPlaneBytes;  // of a token and unit
  static constexpr int kRowPieces = kRowBytes / 16;
  static constexpr int kXBytes = kWideTokens * kRowBytes;
  static constexpr bool kSums = D::kOffset || D::kMinima;
  static constexpr int kSumBytes = kSums ? kWideTokens * kUnitSums * 4 : 0;
  static constexpr int kCodeBytes = kGroupBlocks * D::kUnitBytes;
  static constexpr int kStageBytes = kXBytes + kSumBytes + kCodeBytes;
  // How many blocks share one multiprocessor of sm_80: its registers and 164 KiB of shared memory
  // are the limit.
  static constexpr int kResident = kPlanes == 1 ? 3 : 2;
  static constexpr int kStages = kStageBytes * 3 * kResident <= 156 * 1024 ? 3 : 2;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  // Floats between tokens of a finished row block: the four of a fragment lie 8 banks apart.
  static constexpr int kTokenStride = kUnitRows + 4;
  static_assert(kWideWarps * kWideTokens * kTokenStride * 4 <= kSharedBytes);

  struct Shared {
    const uint8_t* planes[kWideTokens];  // of the row; behind the tile of that of its first token
    const uint8_t* sums[kWideTokens];
    int64_t destination[kWideTokens];
    int32_t expert;
  };
  // The k16 steps of a part: those whose fragments, with the scales of their groups, fit in registers.
  static constexpr int kPartSteps = D::kScaleGroups == 0 || D::kScaleGroups == 4 ? 2 : 4;
  static constexpr int kPartGroups = D::kScaleGroups == 0 ? 1 : D::kScaleGroups * kPartSteps / 4;
  static constexpr int kGroupSteps = kPartSteps / kPartGroups;
  static_assert(!D::kMinima || kPartSteps == 4);

  using Fragments = uint32_t[D::kPlanes][kPartSteps][4];
  struct Minima {
    uint32_t a[2];
    float2 scale;
  };
  // What the products of one row block with one part of a unit need of the weights.
  struct Operands {
    Fragments a;
    Promotion promotion[kPartGroups];
    Minima minima;
  };
  static constexpr int kXCopies = kXBytes / 16 / kWideThreads;   // of a thread and unit
  static constexpr int kCopiedRows = kWideThreads / kRowPieces;  // from one copy to the next

  const ProductArgs& args;
  const Shared& shared;
  uint8_t* ring;
  const uint8_t* expert;
  int first_block;  // of this warp
  int count;        // tokens
  // The next unit to copy: its bytes from the start of rows, and its codes.
  uint32_t next_x = 0;
  uint32_t next_sums = 0;
  const uint8_t* codes[kRowBlocks];
  float total[kRowBlocks][kTokenTiles][4] = {};

  MOESAIC_DEV Wide(const ProductArgs& product, const Shared& memory, uint8_t* stages,
                   const uint8_t* weights, int group, int tokens)
      : args(product),
        shared(memory),
        ring(stages),
        expert(weights),
        first_block(group * kGroupBlocks + warp() * kRowBlocks),
        count(tokens) {
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      codes[r] = args.weight.codes(expert, existing_block(r)) + 16 * lane();
    }
  }

  static MOESAIC_DEV int thread() { return static_cast<int>(threadIdx.x); }
  static MOESAIC_DEV int lane() { return thread() % 32; }
  static MOESAIC_DEV int warp() { return thread() / 32; }

  // Rows of the tile's last 8 tokens included.
  MOESAIC_DEV int live_rows() const { return (count + 7) / 8 * 8; }
  MOESAIC_DEV bool has_block(int r) const { return first_block + r < args.weight.row_blocks; }
  // Behind the last row block that one; its sums go nowhere.
  MOESAIC_DEV int existing_block(int r) const {
    return has_block(r) ? first_block + r : args.weight.row_blocks - 1;
  }

  // Where piece `piece` (16 bytes) of a row lies in the row: what lanes read at once of two or four
  // rows lies in different banks.
  static MOESAIC_DEV int swizzled(int row, int piece) {
    return piece ^ (D::kLaneCols == 8 ? (row & 1) << 2 : (row & 3) << 1);
  }

  MOESAIC_DEV uint8_t* codes_of(uint8_t* stage, int r) const {
    return stage + kXBytes + kSumBytes + (warp() * kRowBlocks + r) * D::kUnitBytes;
  }

  // Starts the copies of the next unit; rows that no 8 tokens of the tile read are left out.
  MOESAIC_DEV void start(uint8_t* stage) {
    const int piece = thread() % kRowPieces;
    MOESAIC_UNROLL
    for (int i = 0; i < kXCopies; ++i) {
      const int row = thread() / kRowPieces + i * kCopiedRows;
      if (row >= live_rows()) break;
      dev::cp_async16(stage + row * kRowBytes + 16 * swizzled(row, piece),
                      shared.planes[row] + next_x + 16 * piece);
    }
    next_x += kRowBytes;
    if constexpr (kSums) {
      if (thread() < live_rows()) {
        dev::cp_async16(stage + kXBytes + 16 * thread(), shared.sums[thread()] + next_sums);
      }
      next_sums += 4 * kUnitSums;
    }
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      if (!has_block(r)) break;
      uint8_t* const to = codes_of(stage, r) + 16 * lane();
      MOESAIC_UNROLL
      for (int i = 0; i < D::kUnitBytes; i += 16 * 32) {
        if (i + 16 * 32 <= D::kUnitBytes || i + 16 * lane() < D::kUnitBytes) {
          dev::cp_async_weight16(to + i, codes[r] + i);
        }
      }
      codes[r] += D::kUnitBytes;
    }
  }

  // Decodes steps kStep .. kStep + kPartSteps of the unit, from the kAt-th of them on.
  template <int kStep, int kPlane = 0, int kAt = 0>
  static MOESAIC_DEV void decode(const typename D::Codes& codes, Fragments& to) {
    uint32_t(&a)[4] = to[kPlane][kAt];
    D::template fragment<kStep + kAt, kPlane>(codes, a);
    if constexpr (D::kShift != 0 && !D::kOffset) {
      MOESAIC_UNROLL
      for (uint32_t& pair : a) pair = dev::bf16x2_add(pair, bf16_pair(-D::kShift));
    }
    if constexpr (kAt + 1 < kPartSteps) {
      decode<kStep, kPlane, kAt + 1>(codes, to);
    } else if constexpr (kPlane + 1 < D::kPlanes) {
      decode<kStep, kPlane + 1>(codes, to);
    }
  }

  template <int kStep>
  MOESAIC_DEV void prepare(const uint8_t* codes, const typename D::Scales& scales,
                           Operands& to) const {
    decode<kStep>(D::load_shared(codes, lane()), to.a);
    if constexpr (D::kScaleGroups > 0) {
      MOESAIC_UNROLL
      for (int j = 0; j < kPartGroups; ++j) {
        Promotion& p = to.promotion[j];
        p = D::promotion(scales, kStep * D::kScaleGroups / 4 + j);
        if constexpr (D::kOffset) {
          MOESAIC_UNROLL
          for (int i = 0; i < 2; ++i) p.offset[i] += p.scale[i];
        }
      }
    }
    if constexpr (D::kMinima) {
      D::minima(scales, to.minima.a);
      to.minima.scale = D::minima_scale(scales);
    }
  }

  // The B words of 8 tokens for the steps of a part.
  template <int kStep>
  MOESAIC_DEV void load_x(const uint8_t* stage, int n,
                          uint32_t (&b)[kPlanes][2 * kPartSteps]) const {
    const int row = 8 * n + lane() / 4;
    MOESAIC_UNROLL
    for (int p = 0; p < kPlanes; ++p) {
      load_lane_cols<D::kLaneCols, kPartSteps>(
          [&](int at) {
            const int byte = p * kPlaneBytes + 32 * kStep + at + 2 * D::kLaneCols * (lane() % 4);
            return stage + row * kRowBytes + 16 * swizzled(row, byte / 16) + byte % 16;
          },
          b[p]);
    }
  }

  // The excess of a scale group of x, of tokens 2t and 2t + 1 of 8.
  static MOESAIC_DEV float2 load_excess(const uint8_t* stage, int n, int scale_group) {
    const auto* const sums = reinterpret_cast<const float*>(stage + kXBytes) +
                             (8 * n + lane() % 4 * 2) * kUnitSums +
                             scale_group * (kUnitSums / D::kScaleGroups);
    return make_float2(sums[0], sums[kUnitSums]);
  }

  // Adds the products of the kSteps steps of a part from the kAt-th on.
  template <int kAt, int kSteps>
  static MOESAIC_DEV void multiply(const Fragments& a, const uint32_t (&b)[kPlanes][2 * kPartSteps],
                                   float (&sum)[4]) {
    MOESAIC_UNROLL
    for (int s = kAt; s < kAt + kSteps; ++s) {
      MOESAIC_UNROLL
      for (int w = 0; w < D::kPlanes; ++w) {
        MOESAIC_UNROLL
        for (int p = 0; p < kPlanes; ++p) {
          const uint32_t words[2] = {b[p][2 * s], b[p][2 * s + 1]};
          dev::mma_m16n8k16_bf16(sum, a[w][s], words);
        }
      }
    }
  }

  // Multiplies 8 tokens by the scale groups of a part, from the kGroup-th on.
  template <int kStep, int kGroup = 0>
  MOESAIC_DEV void multiply_groups(const uint8_t* stage, int n,
                                   const uint32_t (&b)[kPlanes][2 * kPartSteps],
                                   const Operands (&w)[kRowBlocks]) {
    float2 excess{};
    if constexpr (D::kOffset) {
      excess = load_excess(stage, n, kStep * D::kScaleGroups / 4 + kGroup);
    }
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      float sum[4] = {};
      multiply<kGroup * kGroupSteps, kGroupSteps>(w[r].a, b, sum);
      const Promotion& p = w[r].promotion[kGroup];
      MOESAIC_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& to = total[r][n][i];
        to = fmaf(p.scale[i / 2], sum[i], to);
        if constexpr (D::kOffset) {
          to = fmaf(p.offset[i / 2], i % 2 == 0 ? excess.x : excess.y, to);
        }
      }
    }
    if constexpr (kGroup + 1 < kPartGroups) multiply_groups<kStep, kGroup + 1>(stage, n, b, w);
  }

  MOESAIC_DEV void subtract_minima(const uint8_t* stage, int n, const Operands (&w)[kRowBlocks]) {
    const uint32_t sums = reinterpret_cast<const uint32_t*>(stage + kXBytes)[32 * n + lane()];
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      float sum[4] = {};
      dev::mma_m16n8k8_bf16(sum, w[r].minima.a, sums);
      MOESAIC_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& to = total[r][n][i];
        to = fmaf(i < 2 ? -w[r].minima.scale.x : -w[r].minima.scale.y, sum[i], to);
      }
    }
  }

  // Steps kStep .. kStep + kPartSteps of a unit.
  template <int kStep>
  MOESAIC_DEV void multiply_part(uint8_t* stage, const typename D::Scales (&scales)[kRowBlocks]) {
    Operands w[kRowBlocks];
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) prepare<kStep>(codes_of(stage, r), scales[r], w[r]);
    MOESAIC_UNROLL
    for (int n = 0; n < kTokenTiles; ++n) {
      if (8 * n >= count) break;
      uint32_t b[kPlanes][2 * kPartSteps];
      load_x<kStep>(stage, n, b);
      if constexpr (D::kScaleGroups == 0) {
        MOESAIC_UNROLL
        for (int r = 0; r < kRowBlocks; ++r) multiply<0, kPartSteps>(w[r].a, b, total[r][n]);
      } else {
        multiply_groups<kStep>(stage, n, b, w);
        if constexpr (D::kMinima) subtract_minima(stage, n, w);
      }
    }
    if constexpr (kStep + kPartSteps < 4) multiply_part<kStep + kPartSteps>(stage, scales);
  }

  MOESAIC_DEV void run() {
    const int units = args.weight.units;
    const uint8_t* scale_rows[kRowBlocks];
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      scale_rows[r] = args.weight.scales(expert, existing_block(r));
    }
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < units) start(ring + s * kStageBytes);
      dev::cp_async_commit();
    }
    int now = 0, free = kStages - 1;
    for (int unit = 0; unit < units; ++unit) {
      typename D::Scales scales[kRowBlocks];
      MOESAIC_UNROLL
      for (int r = 0; r < kRowBlocks; ++r) {
        scales[r] = D::load_scales(scale_rows[r], D::scale_place(args.weight, 0, unit, lane() / 4));
      }
      dev::cp_async_wait<kStages - 2>();
      __syncthreads();  // the unit is there for all, and nobody reads the stage that is free
      if (unit + kStages - 1 < units) start(ring + free * kStageBytes);
      dev::cp_async_commit();
      if (has_block(0)) multiply_part<0>(ring + now * kStageBytes, scales);
      free = now;
      now = now + 1 == kStages ? 0 : now + 1;
    }
  }

  // One row block of a warp at a time goes through shared memory, so that lanes store neighbouring
  // rows of a token.
  MOESAIC_DEV void store() {
    dev::cp_async_wait<0>();
    __syncthreads();  // nobody reads the ring any more
    float* const part = reinterpret_cast<float*>(ring) + warp() * (kWideTokens * kTokenStride);
    const int block_rows = args.out.block_rows();
    const bool in_runs = args.out.in_runs();
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      if (!has_block(r)) return;
      MOESAIC_UNROLL
      for (int n = 0; n < kTokenTiles; ++n) {
        MOESAIC_UNROLL
        for (int i = 0; i < 4; ++i) {
          part[(8 * n + lane() % 4 * 2 + i % 2) * kTokenStride + lane() / 4 + i / 2 * 8] =
              total[r][n][i];
        }
      }
      __syncwarp();
      const int second = block_rows / kRun - 1;  // 1 where a token has two runs
      for (int i = lane(); in_runs && i < count << second; i += 32) {
        const int token = i >> second;
        args.out.store_run(shared.expert, first_block + r, i & second, shared.destination[token],
                           part + token * kTokenStride);
      }
      for (int i = lane(); !in_runs && i < count * block_rows; i += 32) {
        const int token = i / block_rows;
        args.out.store(shared.expert, first_block + r, i % block_rows, shared.destination[token],
                       [&](int unit_row) { return part[token * kTokenStride + unit_row]; });
      }
      __syncwarp();
    }
  }
};

template <class D, int kPlanes>
MOESAIC_KERNEL void __launch_bounds__(kWideThreads, Wide<D, kPlanes>::kResident)
    wide_kernel(ProductArgs args) {
  dev::begin_grid();
  using Loop = Wide<D, kPlanes>;
  MOESAIC_SHARED(typename Loop::Shared, shared);
  MOESAIC_DYN_SHARED(uint8_t, ring);
  const int thread = static_cast<int>(threadIdx.x);
  const int groups = (args.weight.row_blocks + Loop::kGroupBlocks - 1) / Loop::kGroupBlocks;
  const int group = static_cast<int>(blockIdx.x) % groups;
  Tile tile;
  if (!args.tiles.find(static_cast<int32_t>(blockIdx.x) / groups, tile)) return;
  const uint8_t* const expert = args.weight.expert(tile.expert);
  if (expert == nullptr) return;
  if (thread == 0) shared.expert = tile.expert;
  if (thread < kWideTokens) {
    const int32_t entry = tile.first + (thread < tile.count ? thread : 0);
    const int64_t destination = args.tiles.map.destination_of(entry);
    shared.destination[thread] = destination;
    const int64_t source =
        args.x.by_destination != 0 ? destination : args.tiles.map.source_of(entry);
    shared.planes[thread] = args.x.unit_planes(source, 0);
    if constexpr (Loop::kSums) {
      shared.sums[thread] = reinterpret_cast<const uint8_t*>(args.x.unit_sums(source, 0));
    }
  }
  __syncthreads();
  Loop loop(args, shared, ring, expert, group, tile.count);
  loop.run();
  loop.store();
}

template <class D, int kPlanes>
int32_t launch_wide_as(const ProductArgs& args, int64_t max_tiles, Stream stream) {
  using Loop = Wide<D, kPlanes>;
  const int64_t groups = blocks_of(args.weight.row_blocks, Loop::kGroupBlocks);
  if (max_tiles * groups > INT32_MAX) return kUnsupported;
  return dev::launch_dependent(wide_kernel<D, kPlanes>,
                               dim3(static_cast<unsigned>(max_tiles * groups)), dim3(kWideThreads),
                               Loop::kSharedBytes, static_cast<dev::Stream>(stream), args);
}

/// For tiles of kWideTokens.
template <class D>
int32_t launch_wide(const ProductArgs& args, int64_t max_tiles, Stream stream) {
  return args.x.num_planes == 2 ? launch_wide_as<D, 2>(args, max_tiles, stream)
                                : launch_wide_as<D, 1>(args, max_tiles, stream);
}

}  // namespace moesaic::cuda
