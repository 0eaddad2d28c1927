#pragma once

/// What kernels are called with. Included by the .metal files and by C++, so one definition fixes
/// both layouts. Every kernel takes its argument struct in buffer 0 and its arrays in the buffers
/// that follow, in the order given here. A flag says whether an optional array is there; where it
/// is not, any buffer is bound.

#ifdef __METAL_VERSION__
#include <metal_stdlib>
#else
#include <cstdint>
#endif

namespace moesaic {
namespace metal_args {

#ifdef __METAL_VERSION__
using i32 = int;
using u32 = uint;
using i64 = long;
using u64 = ulong;
#else
using i32 = std::int32_t;
using u32 = std::uint32_t;
using i64 = std::int64_t;
using u64 = std::uint64_t;
#endif

// Tiles of the expert products and threads of the others. Threadgroups are one-dimensional.
enum {
  kSimdWidth = 32,     // on every Apple GPU; the host refuses a pipeline that has another
  kGemvThreads = 128,  // 4 simdgroups
  kGemvRows = 16,      // output features of a threadgroup
  kGateUpRows = 8,     // the same of expert_gate_up, whose features have two rows
  kGemmThreads = 128,
  kGemmRows = 64,      // output features of a tile
  kGemmMaxCols = 32,   // entries of the widest tile, all of one segment; others have 8 and 16
  kRouteThreads = 32,  // one row of logits
  kPlanThreads = 256,
  kRowThreads = 256,
  kLogitsThreads = 128,
};
// Limits of `route`.
enum { kRouteMaxGroups = 256, kRouteMaxTopK = 64 };

// Indices of the function constants.
enum {
  kConstantInput = 0,       // InputType of x
  kConstantOutput = 1,      // InputType of the output of combine_rows
  kConstantActivation = 2,  // moesaic::ActivationKind
  kConstantTile = 3,        // entries of a tile of expert_gemm and gemm_tiles: 8, 16 or 32
  kNumFunctionConstants = 4,
};
enum { kTypeF32 = 0, kTypeF16 = 1, kTypeBF16 = 2 };

// Values of moesaic::ActivationKind.
enum {
  kSwiGlu = 0,
  kSwiGluClampInput,
  kSwiGluClampOutput,
  kSwiGluOai,
  kGeGluTanh,
  kReGlu,
  kGeluTanh,
  kReluSquared,
  kSiTu,
};

/// moesaic::RowMap. Entries of segment s: [offsets[s], offsets[s + 1]) or [s * width, ...).
enum { kHasExpert = 1, kHasOffsets = 2, kHasSource = 4, kHasDestination = 8 };
struct RowMapArgs {
  i32 num_segments;
  i32 width;
  i32 source_divisor;
  i32 limit;
  u32 flags;
  u32 unused;
};
static_assert(sizeof(RowMapArgs) == 24, "layout");

/// One role [E, rows, cols]: expert e lies at byte base + slot * expert_stride of the weight
/// buffer, with slot = slot_map[e] (-1: skip) or e. y = (W x) * scale[e] + bias[e].
///
/// INT4 lies in panels of 16 rows (kernels/decode/int4.h), row_stride bytes apart. With kHasGather
/// column c in memory is column gather[e * gather_stride + c] of x, or padding where that is -1.
enum {
  kHasSlotMap = 1,
  kHasScale = 2,
  kHasBias = 4,
  kHasGather = 8,
  kInt4ScaleF32 = 16,  // else f16
  kInt4HasZeros = 32,  // else 8
};
struct WeightArgs {
  u64 base;
  i64 expert_stride;  // bytes
  i64 row_stride;     // bytes
  i32 num_experts;
  i32 rows;
  i32 cols;
  u32 flags;
  i32 stored_cols;    // in memory: cols, of INT4 a multiple of 32
  i32 scale_cols;     // INT4: columns of a scale
  i32 gather_stride;  // INT4: elements
  u32 unused;
};
static_assert(sizeof(WeightArgs) == 56, "layout");

/// moesaic::InputRows: row r begins at element
/// (r / inner_count) * outer_stride + (r % inner_count) * inner_stride.
struct InputArgs {
  i64 inner_count;
  i64 outer_stride;
  i64 inner_stride;
};
static_assert(sizeof(InputArgs) == 24, "layout");

struct ActivationArgs {
  float limit;
  float alpha;
  float beta;
  float linear_beta;
};
static_assert(sizeof(ActivationArgs) == 16, "layout");

/// expert_gemv_<format>: out[destination] = W[expert] * in[source], f32 [limit, rows].
/// Grid (row tiles of kGemvRows, segments): a threadgroup walks the entries of its segment.
/// 1 weights, 2 slot_map, 3 scale, 4 bias, 5 map.expert, 6 map.offsets, 7 map.source,
/// 8 map.destination, 9 x, 10 out, 11 gather
struct ExpertGemvArgs {
  WeightArgs weight;
  RowMapArgs map;
  InputArgs in;
};
static_assert(sizeof(ExpertGemvArgs) == 104, "layout");

/// expert_gate_up_<format>: out[destination] = activation(gate row, up row), f32 [limit, I].
/// Grid (row tiles of kGateUpRows, segments).
/// 1 to 4 of the gate, 5 to 11 as above, then 12 up weights, 13 slot_map, 14 scale, 15 bias.
/// Gated kinds only; both roles have the same format, rows, cols and gather.
struct ExpertGateUpArgs {
  WeightArgs gate;
  WeightArgs up;
  RowMapArgs map;
  InputArgs in;
  ActivationArgs activation;
};
static_assert(sizeof(ExpertGateUpArgs) == 176, "layout");

/// A column tile of the grouped GEMM: kConstantTile entries of a segment from `first` on, as far as
/// they belong to it.
struct GemmTile {
  i32 segment;
  i32 first;  // entry, not relative to the segment
};
static_assert(sizeof(GemmTile) == 8, "layout");

/// expert_gemm_<format> (f32 tiles) and expert_gemm_half_<format> (half tiles, f32 sums).
/// Grid (column tiles, row tiles of kGemmRows). Direct: tiles_per_segment > 0, column tile t is
/// number t % tiles_per_segment of segment t / tiles_per_segment. Indirect: tiles_per_segment is 0,
/// tile t is tiles[t], and the grid comes from the arguments that gemm_tiles wrote.
/// 1 to 11 as expert_gemv, 12 tiles
struct ExpertGemmArgs {
  WeightArgs weight;
  RowMapArgs map;
  InputArgs in;
  i32 tiles_per_segment;
  u32 unused;
};
static_assert(sizeof(ExpertGemmArgs) == 112, "layout");

/// What dispatchThreadgroupsWithIndirectBuffer reads: threadgroups per grid.
struct IndirectGrid {
  u32 x, y, z;
};
static_assert(sizeof(IndirectGrid) == 12, "layout");

/// gemm_tiles: the column tiles of all segments in order, and the grid of the two phases' GEMMs.
/// Grid (segments + 1). 1 map.expert, 2 map.offsets, 3 tiles, 4 IndirectGrid
struct GemmTilesArgs {
  RowMapArgs map;
  i32 num_experts;  // segments of other experts get no tile
  u32 row_tiles;
};
static_assert(sizeof(GemmTilesArgs) == 32, "layout");

/// route: moesaic::route_rows. Grid (tokens). Enumerators as in moesaic/routing.hpp.
/// 1 logits, 2 router_bias, 3 selection_bias, 4 topk_ids, 5 topk_weights, 6 nonfinite [tokens], 1
/// for a row with NaN or an infinity
enum { kHasRouterBias = 1, kHasSelectionBias = 2, kReportNonfinite = 4, kRenormalize = 8 };
struct RouteArgs {
  i64 row_stride;
  i32 num_experts;
  i32 top_k;
  i32 score;
  i32 guard;
  i32 select_on;
  i32 num_groups;
  i32 groups_used;
  i32 group_reduce;
  i32 group_mask;
  u32 flags;
  float guard_eps;
  float scale;
};
static_assert(sizeof(RouteArgs) == 56, "layout");

/// bucket_plan: moesaic::build_bucket_plan. Grid (experts + 1).
/// 1 topk_ids, 2 expert_offsets, 3 row_token, 4 row_pair, 5 pair_row
struct BucketPlanArgs {
  i32 num_pairs;
  i32 top_k;
  i32 num_experts;
  u32 unused;
};
static_assert(sizeof(BucketPlanArgs) == 16, "layout");

/// align_blocks: moesaic::align_block_size. Grid (experts + 1).
/// 1 expert_offsets, 2 row_pair, 3 sorted_ids, 4 block_experts, 5 num_post_pad
struct AlignArgs {
  i32 num_pairs;
  i32 num_experts;
  i32 block_size;
  i32 packed_rows;  // row space: 0 pairs, 1 packed rows
  i32 capacity;     // of sorted_ids
  i32 block_capacity;
};
static_assert(sizeof(AlignArgs) == 24, "layout");

/// gather_rows: out[r] = x[index[r]], zeros for a negative index. Grid (rows).
/// 1 x, 2 index, 3 out
struct GatherArgs {
  InputArgs in;
  i64 cols;
};
static_assert(sizeof(GatherArgs) == 32, "layout");

/// activate_rows: hidden = activation(gate, up). Grid (rows). 1 gate, 2 up, 3 hidden
struct ActivateArgs {
  i64 row_stride;  // elements between rows of gate and of up
  i64 cols;
  ActivationArgs activation;
};
static_assert(sizeof(ActivateArgs) == 32, "layout");

/// combine_rows: out[t] (+)= sum over slots of weight (or 1) * rows[pair_row], in slot order. Grid
/// (column tiles of kRowThreads, tokens).
/// 1 rows, 2 pair_row, 3 topk_ids, 4 topk_weights, 5 out
enum { kHasPairRow = 1, kAccumulate = 2, kHasPairWeights = 4 };
struct CombineArgs {
  i64 out_stride;  // elements between rows of out
  i32 cols;
  i32 top_k;
  i32 num_experts;  // ids from here on count as -1; 0: any id is good
  u32 flags;
};
static_assert(sizeof(CombineArgs) == 24, "layout");

/// router_logits: logits = x * weight^T, one simdgroup per expert and token. Grid (experts over
/// kLogitsThreads / kSimdWidth, tokens). 1 x, 2 weight, 3 logits
struct RouterLogitsArgs {
  InputArgs in;
  i64 cols;
  i32 num_experts;
  u32 unused;
};
static_assert(sizeof(RouterLogitsArgs) == 40, "layout");

/// shared_routing: ids 0 and weights sigmoid(logits[t]), or 1. Grid (tokens over kRowThreads).
/// 1 logits, 2 topk_ids, 3 topk_weights
struct SharedRoutingArgs {
  i32 num_tokens;
  i32 has_logits;
};
static_assert(sizeof(SharedRoutingArgs) == 8, "layout");

/// zero_skipped: rows whose id is outside [0, num_experts) become 0. Grid (rows).
/// 1 ids, 2 out
struct ZeroSkippedArgs {
  i64 cols;
  i32 num_experts;
  u32 unused;
};
static_assert(sizeof(ZeroSkippedArgs) == 16, "layout");

/// fill_words and copy_words: whole 32-bit words. Grid (words over kRowThreads).
/// 1 to | 1 from, 2 to
struct WordsArgs {
  i64 words;
  u32 value;
  u32 unused;
};
static_assert(sizeof(WordsArgs) == 16, "layout");

}  // namespace metal_args
}  // namespace moesaic
