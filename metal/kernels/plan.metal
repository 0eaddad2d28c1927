// bucket_plan, align_blocks, gemm_tiles: pairs sorted by expert, the same padded to blocks, and the
// column tiles of the grouped GEMM with their indirect grid.
//
//   one threadgroup per expert (or segment), and one more for what lies behind the last
//
//   start(e)    each threadgroup counts by itself everything before its e, so that none waits for
//               another and one dispatch is enough
//   entries     are written in order by a prefix sum over the threadgroup: the sort is stable, and
//               without atomics the result is the host's bit for bit
//
// Cost: every threadgroup reads all ids (plan) or all counts (align, tiles) once or twice.
// Preconditions: fewer than 2^31 pairs. Not measured on hardware.

#include "device.h"
#include "rows.h"

namespace plan {

constant int kSimdgroups = kPlanThreads / kSimdWidth;

/// The sum of `value` over the threadgroup; `parts` may be used again when it returns.
inline int sum_over_threadgroup(int value, threadgroup int* parts, uint simdgroup, uint lane) {
  const int part = simd_sum(value);
  if (lane == 0) parts[simdgroup] = part;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  int sum = 0;
  for (int i = 0; i < kSimdgroups; ++i) sum += parts[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return sum;
}

/// How many threads are marked.
struct Rank {
  int before;  // marked threads before this one
  int total;   // marked threads of the threadgroup
};
inline Rank rank_in_threadgroup(int mark, threadgroup int* parts, uint simdgroup, uint lane) {
  const int inside = simd_prefix_exclusive_sum(mark);
  const int part = simd_sum(mark);
  if (lane == 0) parts[simdgroup] = part;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  Rank rank = {inside, 0};
  for (int i = 0; i < kSimdgroups; ++i) {
    if (i < int(simdgroup)) rank.before += parts[i];
    rank.total += parts[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return rank;
}

inline int blocks_of(device const int* expert_offsets, int e, int block_size) {
  return (expert_offsets[e + 1] - expert_offsets[e] + block_size - 1) / block_size;
}

/// Tiles of a segment; none for an expert that does not exist.
inline int tiles_of(thread const RowMap& map, int num_experts, int s) {
  const int expert = segment_expert(map, s);
  if (expert < 0 || expert >= num_experts) return 0;
  return (segment_end(map, s) - segment_begin(map, s) + tile_cols - 1) / tile_cols;
}

}  // namespace plan

kernel void bucket_plan(constant BucketPlanArgs& args [[buffer(0)]],
                        device const int* topk_ids [[buffer(1)]],
                        device int* expert_offsets [[buffer(2)]],
                        device int* row_token [[buffer(3)]], device int* row_pair [[buffer(4)]],
                        device int* pair_row [[buffer(5)]], THREAD_POSITION) {
  THREADGROUP_ARRAY(int, parts, [kPlanThreads / kSimdWidth]);
  const int expert = int(position.x);
  const int thread_index = int(simdgroup) * kSimdWidth + int(lane);
  const int pairs = args.num_pairs;

  int before = 0;
  for (int p = thread_index; p < pairs; p += kPlanThreads) {
    const int id = topk_ids[p];
    before += id >= 0 && id < expert ? 1 : 0;
  }
  const int start = plan::sum_over_threadgroup(before, parts, simdgroup, lane);
  if (thread_index == 0) expert_offsets[expert] = start;

  if (expert == args.num_experts) {
    for (int p = thread_index; p < pairs; p += kPlanThreads) {
      if (topk_ids[p] < 0 || topk_ids[p] >= expert) pair_row[p] = -1;
      if (p >= start) {
        row_token[p] = -1;
        row_pair[p] = -1;
      }
    }
    return;
  }

  int cursor = start;
  for (int first = 0; first < pairs; first += kPlanThreads) {
    const int pair = first + thread_index;
    const bool mine = pair < pairs && topk_ids[pair] == expert;
    const plan::Rank rank = plan::rank_in_threadgroup(mine ? 1 : 0, parts, simdgroup, lane);
    if (mine) {
      const int row = cursor + rank.before;
      row_token[row] = pair / args.top_k;
      row_pair[row] = pair;
      pair_row[pair] = row;
    }
    cursor += rank.total;
  }
}

kernel void align_blocks(constant AlignArgs& args [[buffer(0)]],
                         device const int* expert_offsets [[buffer(1)]],
                         device const int* row_pair [[buffer(2)]],
                         device int* sorted_ids [[buffer(3)]],
                         device int* block_experts [[buffer(4)]],
                         device int* num_post_pad [[buffer(5)]], THREAD_POSITION) {
  THREADGROUP_ARRAY(int, parts, [kPlanThreads / kSimdWidth]);
  const int expert = int(position.x);
  const int thread_index = int(simdgroup) * kSimdWidth + int(lane);

  int before = 0;
  for (int e = thread_index; e < expert; e += kPlanThreads) {
    before += plan::blocks_of(expert_offsets, e, args.block_size);
  }
  const int first_block = plan::sum_over_threadgroup(before, parts, simdgroup, lane);
  const int first_id = first_block * args.block_size;

  if (expert == args.num_experts) {
    if (thread_index == 0) num_post_pad[0] = first_id;
    for (int i = first_id + thread_index; i < args.capacity; i += kPlanThreads) {
      sorted_ids[i] = args.num_pairs;
    }
    for (int b = first_block + thread_index; b < args.block_capacity; b += kPlanThreads) {
      block_experts[b] = -1;
    }
    return;
  }

  const int begin = expert_offsets[expert];
  const int count = expert_offsets[expert + 1] - begin;
  const int blocks = plan::blocks_of(expert_offsets, expert, args.block_size);
  for (int i = thread_index; i < blocks * args.block_size; i += kPlanThreads) {
    const int row = begin + i;
    sorted_ids[first_id + i] =
        i >= count ? args.num_pairs : (args.packed_rows != 0 ? row : row_pair[row]);
  }
  for (int b = thread_index; b < blocks; b += kPlanThreads) block_experts[first_block + b] = expert;
}

kernel void gemm_tiles(constant GemmTilesArgs& args [[buffer(0)]],
                       device const int* map_expert [[buffer(1)]],
                       device const int* map_offsets [[buffer(2)]],
                       device GemmTile* tiles [[buffer(3)]],
                       device IndirectGrid* grid [[buffer(4)]], THREAD_POSITION) {
  const RowMap map = {args.map, map_expert, map_offsets, map_offsets, map_offsets};
  const int segment = int(position.x);

  int before = 0;
  for (int s = lane; s < segment; s += kSimdWidth) {
    before += plan::tiles_of(map, args.num_experts, s);
  }
  const int first = simd_sum(before);

  if (segment == args.map.num_segments) {
    if (lane != 0) return;
    // A grid of nothing is not dispatched; the one tile of it has no entries.
    if (first == 0) {
      tiles[0].segment = 0;
      tiles[0].first = segment_end(map, 0);
    }
    grid[0].x = uint(max(first, 1));
    grid[0].y = args.row_tiles;
    grid[0].z = 1;
    return;
  }
  const int count = plan::tiles_of(map, args.num_experts, segment);
  for (int t = lane; t < count; t += kSimdWidth) {
    tiles[first + t].segment = segment;
    tiles[first + t].first = segment_begin(map, segment) + t * tile_cols;
  }
}
