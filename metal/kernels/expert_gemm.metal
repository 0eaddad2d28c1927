/// expert_gemm_<format>, expert_gemm_half_<format>: out[destination] = W[expert] * x[source] for
/// many entries per expert.
///
///   threadgroup = 64 output features x 8, 16 or 32 entries (tile_cols) of one segment; a step is two
///   pieces (64 columns)
///
///     weights 64 x 64      x tile_cols x 64   simdgroup g: rows 16g .. 16g + 15, all entries,
///     one piece per        4 columns per      as 2 x (tile_cols / 8) tiles of 8 x 8
///     thread, decoded      thread and turn
///
/// The columns of a piece are two runs of 16 (decode/block.h); a sum over columns takes them in any
/// order as long as both tiles agree. Tiles are f32, or half with f32 sums: then each weight and
/// each input is rounded once, and for |x| and |w| below 65504
///     |error| <= 2^-10 (1 + 2^-12) sum |w x| + 2^-25 sum (|w| + |x|)
/// where the last term is for values below 2^-14. What is infinite in half is infinite in the
/// result. Threads write four elements at once: neighbouring threads to neighbouring rows of the
/// weight tile and to neighbouring columns of the input tile, both without bank conflicts.
/// Preconditions: ExpertGemmArgs in arguments.h. Not measured on hardware.

#include <metal_simdgroup_matrix>

#include "expert_dot.h"

constant constexpr int kStepPieces = 2;
constant constexpr int kStepCols = kStepPieces * kPieceCols;
constant constexpr int kStepQuads = kStepCols / 4;
/// Quads of elements from row to row of a tile: odd, so that rows start in different banks.
constant constexpr int kTileQuads = kStepQuads + 1;
constant constexpr int kTileStride = 4 * kTileQuads;
constant constexpr int kWeightTile = kGemmRows * kTileQuads;
constant constexpr int kInputTile = kGemmMaxCols * kTileQuads;
/// Elements from row to row of the sums, which go through the tiles' memory at the end.
constant constexpr int kSumStride = kGemmMaxCols + 1;
/// Rows of 8 x 8 matrices that a simdgroup has.
constant constexpr int kSimdTiles = kGemmRows / 8 / (kGemmThreads / kSimdWidth);
constant constexpr int kMaxColTiles = kGemmMaxCols / 8;
/// Entries whose columns the threads fill in one turn, a quad each.
constant constexpr int kTurnEntries = kGemmThreads / kStepQuads;
constant constexpr int kMaxTurns = kGemmMaxCols / kTurnEntries;

/// Fills this thread's part of the weight tile: one piece of one row, decoded.
template <class Decoder, class T, class T4, class Row>
inline void fill_weight_tile(thread const WeightArgs& args, Row row, int piece,
                             threadgroup T4* to) {
  float codes[kPieceCols];
  const Scales scales = decode_piece<Decoder>(args, row, piece, codes);
  for (int quad = 0; quad < kPieceQuads; quad++) {
    const float scale = scales.scale[quad / 4], min = scales.min[quad / 4];
    T4 four;
    for (int k = 0; k < 4; k++) {
      const float code = codes[4 * quad + k];
      four[k] = T(Decoder::kHasMin != 0 ? fma(scale, code, -min) : scale * code);
    }
    to[quad] = four;
  }
}

/// The same where a step has no second piece.
template <class T, class T4>
inline void clear_weight_tile(threadgroup T4* to) {
  for (int quad = 0; quad < kPieceQuads; quad++) to[quad] = T4(T(0));
}

template <class Decoder, class T, class T4, class Matrix>
inline void expert_gemm(thread const ExpertGemmArgs& args, device const uchar* weights,
                        device const int* slot_map, device const float* scale,
                        device const float* bias, thread const RowMap& map, device const uchar* x,
                        device float* out, device const int* gather, device const GemmTile* tiles,
                        threadgroup float* memory, uint3 position, uint simdgroup, uint lane) {
  int segment, first;
  if (args.tiles_per_segment > 0) {
    segment = int(position.x) / args.tiles_per_segment;
    first = segment_begin(map, segment) + int(position.x) % args.tiles_per_segment * tile_cols;
  } else {
    segment = tiles[position.x].segment;
    first = tiles[position.x].first;
  }
  const int end = min(first + tile_cols, segment_end(map, segment));
  const int expert = segment_expert(map, segment);
  const int slot = expert_slot(args.weight, slot_map, expert);
  if (slot < 0 || first >= end) return;
  device const uchar* at = weights + expert_offset(args.weight, slot);
  device const int* columns = gather_of(args.weight, gather, expert);
  const int first_row = int(position.y) * kGemmRows;
  const int thread_index = int(simdgroup) * kSimdWidth + int(lane);
  threadgroup T4* weight_tile = (threadgroup T4*)memory;
  threadgroup T4* input_tile = weight_tile + kWeightTile;
  const int col_tiles = tile_cols / 8;

  // Weights: this thread's row, and which of the two pieces. Rows behind the last one repeat it;
  // their sums are not stored.
  const int own_row = thread_index % kGemmRows;
  const int own_piece = thread_index / kGemmRows;
  const auto row = Decoder::row_at(args.weight, at, min(first_row + own_row, args.weight.rows - 1));
  threadgroup T4* own_weights = weight_tile + own_row * kTileQuads + own_piece * kPieceQuads;
  // Inputs: this thread's quad of columns, for an entry in each turn.
  const int own_entry = thread_index / kStepQuads;
  const int own_quad = thread_index % kStepQuads;
  const int turns = tile_cols / kTurnEntries;
  device const uchar* x_row[kMaxTurns];
  bool used[kMaxTurns];
  for (int turn = 0; turn < turns; turn++) {
    const int entry = first + turn * kTurnEntries + own_entry;
    used[turn] = entry < end && entry_destination(map, entry) >= 0;
    x_row[turn] = used[turn] ? input_row(x, args.in, entry_source(map, entry)) : x;
  }

  simdgroup_float8x8 sums[kSimdTiles][kMaxColTiles];
  for (int i = 0; i < kSimdTiles; i++) {
    for (int j = 0; j < col_tiles; j++) sums[i][j] = simdgroup_float8x8(0.0f);
  }
  const int pieces = pieces_in(args.weight.stored_cols);
  for (int step = 0; step < pieces; step += kStepPieces) {
    if (step + own_piece < pieces) {
      fill_weight_tile<Decoder, T, T4>(args.weight, row, step + own_piece, own_weights);
    } else {
      clear_weight_tile<T, T4>(own_weights);
    }
    const int piece = step + own_quad / kPieceQuads;
    const int column = column_of<Decoder>(piece, own_quad % kPieceQuads * 4);
    for (int turn = 0; turn < turns; turn++) {
      T4 four = T4(T(0));
      if (used[turn] && piece < pieces) {
        const float4 quad = input_quad<Decoder>(args.weight, columns, x_row[turn], column);
        for (int k = 0; k < 4; k++) four[k] = T(quad[k]);
      }
      input_tile[(turn * kTurnEntries + own_entry) * kTileQuads + own_quad] = four;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    threadgroup const T* weight_elements = (threadgroup const T*)weight_tile;
    threadgroup const T* input_elements = (threadgroup const T*)input_tile;
    for (int k = 0; k < kStepCols; k += 8) {
      Matrix a[kSimdTiles];
      for (int i = 0; i < kSimdTiles; i++) {
        const int tile_row = (int(simdgroup) * kSimdTiles + i) * 8;
        simdgroup_load(a[i], weight_elements + tile_row * kTileStride + k, kTileStride);
      }
      for (int j = 0; j < col_tiles; j++) {
        Matrix b;
        simdgroup_load(b, input_elements + 8 * j * kTileStride + k, kTileStride, ulong2(0), true);
        for (int i = 0; i < kSimdTiles; i++) {
          simdgroup_multiply_accumulate(sums[i][j], a[i], b, sums[i][j]);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  for (int i = 0; i < kSimdTiles; i++) {
    const int tile_row = (int(simdgroup) * kSimdTiles + i) * 8;
    for (int j = 0; j < col_tiles; j++) {
      simdgroup_store(sums[i][j], memory + tile_row * kSumStride + 8 * j, kSumStride);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = thread_index; i < kGemmRows * tile_cols; i += kGemmThreads) {
    const int out_row = first_row + i % kGemmRows;
    const int entry = first + i / kGemmRows;
    const int destination = entry < end ? entry_destination(map, entry) : -1;
    if (out_row >= args.weight.rows || destination < 0) continue;
    out[long(destination) * args.weight.rows + out_row] =
        finished(args.weight, scale, bias, expert, out_row,
                 memory[i % kGemmRows * kSumStride + i / kGemmRows]);
  }
}

#define EXPERT_GEMM_KERNEL(name, Decoder, T, T4, Matrix)                                          \
  kernel void name(                                                                               \
      constant ExpertGemmArgs& args [[buffer(0)]], device const uchar* weights [[buffer(1)]],     \
      device const int* slot_map [[buffer(2)]], device const float* scale [[buffer(3)]],          \
      device const float* bias [[buffer(4)]], device const int* map_expert [[buffer(5)]],         \
      device const int* map_offsets [[buffer(6)]], device const int* map_source [[buffer(7)]],    \
      device const int* map_destination [[buffer(8)]], device const uchar* x [[buffer(9)]],       \
      device float* out [[buffer(10)]], device const int* gather [[buffer(11)]],                  \
      device const GemmTile* tiles [[buffer(12)]], THREAD_POSITION) {                             \
    THREADGROUP_ARRAY(T4, memory, [kWeightTile + kInputTile]);                                    \
    const ExpertGemmArgs own = args;                                                              \
    const RowMap map = {own.map, map_expert, map_offsets, map_source, map_destination};           \
    expert_gemm<Decoder, T, T4, Matrix>(own, weights, slot_map, scale, bias, map, x, out, gather, \
                                        tiles, (threadgroup float*)memory, position, simdgroup,   \
                                        lane);                                                    \
  }
#define EXPERT_GEMM(suffix, Decoder)                                                   \
  EXPERT_GEMM_KERNEL(expert_gemm_##suffix, Decoder, float, float4, simdgroup_float8x8) \
  EXPERT_GEMM_KERNEL(expert_gemm_half_##suffix, Decoder, half, half4, simdgroup_half8x8)
EXPERT_FORMATS(EXPERT_GEMM)
