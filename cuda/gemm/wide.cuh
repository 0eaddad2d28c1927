// Products for many tokens per expert: out[token] = W[expert] x[token], bound by the tensor cores.
//
//   block = one tile of up to 64 tokens of one expert x 4 warps of 1 or 2 row blocks
//
//                     64 tokens, staged as B fragments
//                   +----+----+----+----+--    a stage of the ring: one unit (64 columns) of
//                   | n0 | n1 | n2 | n3 | ..     x     [64][planes x 128 B], swizzled
//   rows            +----+----+----+----+--      sums  [64][4] f32, where offsets differ by row
//   0 .. 15   warp 0| f32 accumulators  |        codes [4 warps][row blocks][unit bytes]
//   16.. 31   warp 0| in registers      |      all brought by cp.async, one or two stages ahead;
//   32.. 47   warp 1|                   |      a warp decodes the codes of its own rows into A
//   ..              +----+----+----+----+--    fragments and multiplies them by all tokens
//
// A warp decodes the A fragments of a scale group's k16 steps of a unit once; then for each 8 tokens
// it reads their B words, multiplies, and promotes the sums of the scale group to the accumulators
// (scale * sum + offset * sum of x). Eights of tokens behind the tile's last are
// left out, so a tile's cost follows its count. K runs from left to right in one warp: a token's
// result depends on nothing but K. Each code byte is read once per tile.
//
// Banks: the 8 lanes of one phase of a 16-byte read are two rows x four lanes t; the swizzle gives
// them eight different 16-byte slots.
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

  static constexpr int kRowBytes = kPlanes * 4 * kPlaneWords;  // of a token and unit
  static constexpr int kRowPieces = kRowBytes / 16;
  static constexpr int kXBytes = kWideTokens * kRowBytes;
  // A fixed shift is subtracted from the fragments, exactly: they meet many tokens. Other offsets
  // are multiplied by the sums of x.
  static constexpr bool kSums = D::kOffset && D::kFixedShift == 0;
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
    const uint8_t* planes[kWideTokens];  // of the staged row; of row 0 behind the tile
    const uint8_t* sums[kWideTokens];
    int64_t destination[kWideTokens];
    int32_t expert;
  };
  // How many k16 steps are multiplied before their sums are promoted: those of a scale group.
  // Without scales nothing is promoted, and two steps fit in registers.
  static constexpr int kSteps = D::kScaleGroups == 0 ? 2 : 4 / D::kScaleGroups;
  struct Fragments {
    uint32_t a[D::kPlanes][kSteps][4];
  };

  const ProductArgs& args;
  const Shared& shared;
  uint8_t* ring;
  const uint8_t* expert;
  int first_block;  // of this warp
  int count;        // tokens
  float total[kRowBlocks][kTokenTiles][4] = {};

  MOESAIC_DEV Wide(const ProductArgs& product, const Shared& memory, uint8_t* stages,
                   const uint8_t* weights, int group, int tokens)
      : args(product),
        shared(memory),
        ring(stages),
        expert(weights),
        first_block(group * kGroupBlocks + warp() * kRowBlocks),
        count(tokens) {}

  static MOESAIC_DEV int thread() { return static_cast<int>(threadIdx.x); }
  static MOESAIC_DEV int lane() { return thread() % 32; }
  static MOESAIC_DEV int warp() { return thread() / 32; }

  // Rows of the tile's last 8 tokens included.
  MOESAIC_DEV int live_rows() const { return (count + 7) / 8 * 8; }
  MOESAIC_DEV bool has_block(int r) const { return first_block + r < args.weight.row_blocks; }

  // Where piece `piece` (16 bytes: lane t, plane, half) of a row lies in the row.
  static MOESAIC_DEV int swizzled(int row, int piece) {
    if constexpr (kPlanes == 1) {
      return piece ^ (row & 1);
    } else {
      static_assert(kPlanes == 2);
      return piece ^ (piece >> 3 & 1) ^ (row & 1) << 1;
    }
  }

  MOESAIC_DEV uint8_t* codes_of(uint8_t* stage, int r) const {
    return stage + kXBytes + kSumBytes + (warp() * kRowBlocks + r) * D::kUnitBytes;
  }

  // Starts the copies of one unit; rows that no 8 tokens of the tile read are left out.
  MOESAIC_DEV void start(int unit, uint8_t* stage) const {
    const int64_t at = int64_t{unit} * kRowBytes;
    MOESAIC_UNROLL
    for (int i = 0; i < kXBytes / 16; i += kWideThreads) {
      const int row = (i + thread()) / kRowPieces, piece = thread() % kRowPieces;
      if (row >= live_rows()) break;
      dev::cp_async16(stage + row * kRowBytes + 16 * swizzled(row, piece),
                      shared.planes[row] + at + 16 * piece, row < count);
    }
    if constexpr (kSums) {
      if (thread() < live_rows()) {
        dev::cp_async16(stage + kXBytes + 16 * thread(), shared.sums[thread()] + 16 * unit,
                        thread() < count);
      }
    }
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      if (!has_block(r)) break;
      const uint8_t* const from =
          args.weight.codes(expert, first_block + r) + static_cast<int64_t>(unit) * D::kUnitBytes;
      uint8_t* const to = codes_of(stage, r);
      MOESAIC_UNROLL
      for (int i = 0; i < D::kUnitBytes; i += 16 * 32) {
        const int at = i + 16 * lane();
        if (i + 16 * 32 <= D::kUnitBytes || at < D::kUnitBytes) {
          dev::cp_async_weight16(to + at, from + at);
        }
      }
    }
  }

  // Decodes steps kStep .. kStep + kSteps of the unit, from the kAt-th of them on.
  template <int kStep, int kPlane = 0, int kAt = 0>
  static MOESAIC_DEV void decode(const typename D::Codes& codes, Fragments& to) {
    uint32_t(&a)[4] = to.a[kPlane][kAt];
    D::template fragment<kStep + kAt, kPlane>(codes, a);
    if constexpr (D::kFixedShift != 0) {
      MOESAIC_UNROLL
      for (uint32_t& pair : a) pair = dev::bf16x2_add(pair, bf16_pair<-D::kFixedShift>());
    }
    if constexpr (kAt + 1 < kSteps) {
      decode<kStep, kPlane, kAt + 1>(codes, to);
    } else if constexpr (kPlane + 1 < D::kPlanes) {
      decode<kStep, kPlane + 1>(codes, to);
    }
  }

  // The B words of 8 tokens for the steps of a part.
  template <int kStep>
  MOESAIC_DEV void load_x(const uint8_t* stage, int n, uint32_t (&b)[kPlanes][2 * kSteps]) const {
    const int row = 8 * n + lane() / 4, t = lane() % 4;
    MOESAIC_UNROLL
    for (int p = 0; p < kPlanes; ++p) {
      MOESAIC_UNROLL
      for (int i = 0; i < (kSteps + 1) / 2; ++i) {
        const uint8_t* const piece =
            stage + row * kRowBytes + 16 * swizzled(row, (t * kPlanes + p) * 2 + kStep / 2 + i);
        uint32_t* const to = b[p] + 4 * i;
        if constexpr (kSteps > 1) {
          const uint4 words = *reinterpret_cast<const uint4*>(piece);
          to[0] = words.x;
          to[1] = words.y;
          to[2] = words.z;
          to[3] = words.w;
        } else {
          const uint2 words = *reinterpret_cast<const uint2*>(piece + kStep % 2 * 8);
          to[0] = words.x;
          to[1] = words.y;
        }
      }
    }
  }

  // Sums of x over the scale group of a part, of tokens 2t and 2t + 1 of 8.
  template <int kStep>
  MOESAIC_DEV float2 load_sums(const uint8_t* stage, int n) const {
    const auto* const sums = reinterpret_cast<const float*>(stage + kXBytes) +
                             (8 * n + lane() % 4 * 2) * kUnitSums + kStep;
    return make_float2(sums[0], sums[kUnitSums]);
  }

  static MOESAIC_DEV void multiply(const Fragments& f, const uint32_t (&b)[kPlanes][2 * kSteps],
                                   float (&sum)[4]) {
    MOESAIC_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      MOESAIC_UNROLL
      for (int w = 0; w < D::kPlanes; ++w) {
        MOESAIC_UNROLL
        for (int p = 0; p < kPlanes; ++p) {
          const uint32_t words[2] = {b[p][2 * s], b[p][2 * s + 1]};
          dev::mma_m16n8k16_bf16(sum, f.a[w][s], words);
        }
      }
    }
  }

  static MOESAIC_DEV void promote(const Promotion& p, const float (&sum)[4], float2 x,
                                  float (&to)[4]) {
    MOESAIC_UNROLL
    for (int i = 0; i < 4; ++i) {
      to[i] = fmaf(p.scale[i / 2], sum[i], to[i]);
      if constexpr (kSums) to[i] = fmaf(p.offset[i / 2], i % 2 == 0 ? x.x : x.y, to[i]);
    }
  }

  // Steps kStep .. kStep + kSteps of a unit.
  template <int kStep>
  MOESAIC_DEV void multiply_part(uint8_t* stage, const typename D::Scales (&scales)[kRowBlocks]) {
    Fragments a[kRowBlocks];
    Promotion promotion[kRowBlocks];
    MOESAIC_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      decode<kStep>(D::load_shared(codes_of(stage, r), lane()), a[r]);
      if constexpr (D::kScaleGroups > 0) {
        promotion[r] = D::promotion(scales[r], kStep * D::kScaleGroups / 4);
      }
    }
    MOESAIC_UNROLL
    for (int n = 0; n < kTokenTiles; ++n) {
      if (8 * n >= count) break;
      uint32_t b[kPlanes][2 * kSteps];
      load_x<kStep>(stage, n, b);
      if constexpr (D::kScaleGroups == 0) {
        MOESAIC_UNROLL
        for (int r = 0; r < kRowBlocks; ++r) multiply(a[r], b, total[r][n]);
      } else {
        float2 x{};
        if constexpr (kSums) x = load_sums<kStep>(stage, n);
        MOESAIC_UNROLL
        for (int r = 0; r < kRowBlocks; ++r) {
          float sum[4] = {};
          multiply(a[r], b, sum);
          promote(promotion[r], sum, x, total[r][n]);
        }
      }
    }
    if constexpr (kStep + kSteps < 4) multiply_part<kStep + kSteps>(stage, scales);
  }

  MOESAIC_DEV void run() {
    const int units = args.weight.units;
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < units) start(s, ring + s * kStageBytes);
      dev::cp_async_commit();
    }
    int now = 0, free = kStages - 1;
    for (int unit = 0; unit < units; ++unit) {
      typename D::Scales scales[kRowBlocks];
      MOESAIC_UNROLL
      for (int r = 0; r < kRowBlocks; ++r) {
        // Behind the last row block the one before it is read again; its sums go nowhere.
        const int block = has_block(r) ? first_block + r : args.weight.row_blocks - 1;
        scales[r] = D::load_scales(
            D::scale_place(args.weight, args.weight.scales(expert, block), unit, lane() / 4));
      }
      dev::cp_async_wait<kStages - 2>();
      __syncthreads();  // the unit is there for all, and nobody reads the stage that is free
      if (unit + kStages - 1 < units) start(unit + kStages - 1, ring + free * kStageBytes);
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
      for (int i = lane(); i < count * block_rows; i += 32) {
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
    const bool real = thread < tile.count;
    const int32_t entry = tile.first + thread;
    const int64_t destination = real ? args.tiles.map.destination_of(entry) : 0;
    const int64_t source =
        !real || args.x.by_destination != 0 ? destination : args.tiles.map.source_of(entry);
    shared.destination[thread] = destination;
    shared.planes[thread] = reinterpret_cast<const uint8_t*>(args.x.unit_planes(source, 0));
    shared.sums[thread] = reinterpret_cast<const uint8_t*>(args.x.unit_sums(source, 0));
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
  return dev::launch(wide_kernel<D, kPlanes>, dim3(static_cast<unsigned>(max_tiles * groups)),
                     dim3(kWideThreads), Loop::kSharedBytes, static_cast<dev::Stream>(stream),
                     args);
}

/// For tiles of kWideTokens.
template <class D>
int32_t launch_wide(const ProductArgs& args, int64_t max_tiles, Stream stream) {
  return args.x.num_planes == 2 ? launch_wide_as<D, 2>(args, max_tiles, stream)
                                : launch_wide_as<D, 1>(args, max_tiles, stream);
}

}  // namespace moesaic::cuda
