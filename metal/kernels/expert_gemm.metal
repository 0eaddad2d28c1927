/// expert_gemm_<format>, expert_gemm_half_<format>: out[destination] = W[expert] * x[source] for
/// many entries per expert.
///
///   threadgroup = 64 output features x 32 entries of one segment; a step is two pieces (64
///   columns)
///
///     weights 64 x 64      x 32 x 64         simdgroup g: rows 16g .. 16g + 15, all entries,
///     one piece per        16 columns per    as 2 x 4 tiles of 8 x 8
///     thread, decoded      thread
///
/// The columns of a piece are two runs of 16 (decode/block.h); a sum over columns takes them in any
/// order as long as both tiles agree. Tiles are f32, or half with f32 sums: then each weight and
/// each input is rounded once, and for |x| and |w| below 65504
///     |error| <= 2^-10 (1 + 2^-12) sum |w x| + 2^-25 sum (|w| + |x|)
/// where the last term is for values below 2^-14. What is infinite in half is infinite in the
/// result. Preconditions: ExpertGemmArgs in arguments.h. Not measured on hardware.

#include <metal_simdgroup_matrix>

#include "expert_dot.h"

constant constexpr int kStepPieces = 2;
constant constexpr int kStepCols = kStepPieces * kPieceCols;
/// Elements from row to row of a tile: a multiple of 4, and odd when counted in 16 bytes, so that
/// rows start in different banks.
constant constexpr int kTileStride = kStepCols + 4;
constant constexpr int kWeightTile = kGemmRows * kTileStride;
constant constexpr int kInputTile = kGemmCols * kTileStride;
/// Elements from row to row of the sums, which go through the tiles' memory at the end.
constant constexpr int kSumStride = kGemmCols + 1;
/// Rows of 8 x 8 matrices that a simdgroup has.
constant constexpr int kSimdTiles = kGemmRows / 8 / (kGemmThreads / kSimdWidth);
constant constexpr int kColTiles = kGemmCols / 8;

/// Fills this thread's part of the weight tile: one piece of one row, decoded.
template <class Decoder, class T>
inline void fill_weight_tile(thread const WeightArgs& args, device const uchar* weights,
                             int first_row, int step, int thread_index, threadgroup T* tile) {
  const int r = thread_index / kStepPieces;
  const int p = thread_index % kStepPieces;
  const int piece = step * kStepPieces + p;
  threadgroup T* to = tile + r * kTileStride + p * kPieceCols;
  float decoded[kPieceCols];
  if (first_row + r < args.rows && piece < pieces_in(args.cols)) {
    Decoder::decode(weights + ulong(first_row + r) * ulong(args.row_stride), piece, args.cols,
                    decoded);
  } else {
    for (int i = 0; i < kPieceCols; i++) decoded[i] = 0.0f;
  }
  for (int i = 0; i < kPieceCols; i++) to[i] = T(decoded[i]);
}

/// Fills this thread's part of the input tile. `x_row` is the element of x at which the input row
/// of its entry begins, negative when there is no entry.
template <class Decoder, class T>
inline void fill_input_tile(device const uchar* x, long x_row, int cols, int step, int thread_index,
                            threadgroup T* tile) {
  const int runs = kStepCols / kRunCols;
  const int entry = thread_index / runs;
  const int run = thread_index % runs;
  const int first =
      Decoder::first_column(step * kStepPieces + run / 2) + run % 2 * int(Decoder::kGap);
  threadgroup T* to = tile + entry * kTileStride + run * kRunCols;
  for (int i = 0; i < kRunCols; i++) {
    to[i] = x_row >= 0 && first + i < cols ? T(load_input(x, x_row + first + i)) : T(0.0f);
  }
}

template <class Decoder, class T, class Matrix>
inline void expert_gemm(thread const ExpertGemmArgs& args, device const uchar* weights,
                        device const int* slot_map, device const float* scale,
                        device const float* bias, thread const RowMap& map, device const uchar* x,
                        device float* out, device const GemmTile* tiles, threadgroup float* memory,
                        uint3 position, uint simdgroup, uint lane) {
  int segment, first;
  if (args.tiles_per_segment > 0) {
    segment = int(position.x) / args.tiles_per_segment;
    first = segment_begin(map, segment) + int(position.x) % args.tiles_per_segment * kGemmCols;
  } else {
    segment = tiles[position.x].segment;
    first = tiles[position.x].first;
  }
  const int end = min(first + kGemmCols, segment_end(map, segment));
  const int expert = segment_expert(map, segment);
  const int slot = expert_slot(args.weight, slot_map, expert);
  if (slot < 0 || first >= end) return;
  device const uchar* at = weights + expert_offset(args.weight, slot);
  const int first_row = int(position.y) * kGemmRows;
  const int thread_index = int(simdgroup) * kSimdWidth + int(lane);
  threadgroup T* weight_tile = (threadgroup T*)memory;
  threadgroup T* input_tile = weight_tile + kWeightTile;

  const int own_entry = first + thread_index / (kStepCols / kRunCols);
  const bool used = own_entry < end && entry_destination(map, own_entry) >= 0;
  const long x_row = used ? row_offset(args.in, entry_source(map, own_entry)) : -1;

  simdgroup_float8x8 sums[kSimdTiles][kColTiles];
  for (int i = 0; i < kSimdTiles; i++) {
    for (int j = 0; j < kColTiles; j++) sums[i][j] = simdgroup_float8x8(0.0f);
  }
  const int steps = (pieces_in(args.weight.cols) + kStepPieces - 1) / kStepPieces;
  for (int step = 0; step < steps; step++) {
    fill_weight_tile<Decoder>(args.weight, at, first_row, step, thread_index, weight_tile);
    fill_input_tile<Decoder>(x, x_row, args.weight.cols, step, thread_index, input_tile);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int k = 0; k < kStepCols; k += 8) {
      Matrix a[kSimdTiles];
      for (int i = 0; i < kSimdTiles; i++) {
        const int row = (int(simdgroup) * kSimdTiles + i) * 8;
        simdgroup_load(a[i], weight_tile + row * kTileStride + k, kTileStride);
      }
      for (int j = 0; j < kColTiles; j++) {
        Matrix b;
        simdgroup_load(b, input_tile + 8 * j * kTileStride + k, kTileStride, ulong2(0), true);
        for (int i = 0; i < kSimdTiles; i++) {
          simdgroup_multiply_accumulate(sums[i][j], a[i], b, sums[i][j]);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  for (int i = 0; i < kSimdTiles; i++) {
    const int row = (int(simdgroup) * kSimdTiles + i) * 8;
    for (int j = 0; j < kColTiles; j++) {
      simdgroup_store(sums[i][j], memory + row * kSumStride + 8 * j, kSumStride);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = thread_index; i < kGemmRows * kGemmCols; i += kGemmThreads) {
    const int row = first_row + i % kGemmRows;
    const int entry = first + i / kGemmRows;
    const int destination = entry < end ? entry_destination(map, entry) : -1;
    if (row >= args.weight.rows || destination < 0) continue;
    out[long(destination) * args.weight.rows + row] = finished(
        args.weight, scale, bias, expert, row, memory[i % kGemmRows * kSumStride + i / kGemmRows]);
  }
}

#define EXPERT_GEMM_KERNEL(name, Decoder, T, Matrix)                                            \
  kernel void name(                                                                             \
      constant ExpertGemmArgs& args [[buffer(0)]], device const uchar* weights [[buffer(1)]],   \
      device const int* slot_map [[buffer(2)]], device const float* scale [[buffer(3)]],        \
      device const float* bias [[buffer(4)]], device const int* map_expert [[buffer(5)]],       \
      device const int* map_offsets [[buffer(6)]], device const int* map_source [[buffer(7)]],  \
      device const int* map_destination [[buffer(8)]], device const uchar* x [[buffer(9)]],     \
      device float* out [[buffer(10)]], device const GemmTile* tiles [[buffer(11)]],            \
      THREAD_POSITION) {                                                                        \
    THREADGROUP_ARRAY(float, memory, [(kWeightTile + kInputTile) * sizeof(T) / sizeof(float)]); \
    const ExpertGemmArgs own = args;                                                            \
    const RowMap map = {own.map, map_expert, map_offsets, map_source, map_destination};         \
    expert_gemm<Decoder, T, Matrix>(own, weights, slot_map, scale, bias, map, x, out, tiles,    \
                                    memory, position, simdgroup, lane);                         \
  }
#define EXPERT_GEMM(suffix, Decoder)                                           \
  EXPERT_GEMM_KERNEL(expert_gemm_##suffix, Decoder, float, simdgroup_float8x8) \
  EXPERT_GEMM_KERNEL(expert_gemm_half_##suffix, Decoder, half, simdgroup_half8x8)
EXPERT_FORMATS(EXPERT_GEMM)
