// Stable counting sort of the pairs by expert, bit for bit that of build_bucket_plan.
//
//   pairs      | warp 0's part | warp 1's part | ...      in pair order
//   counters   [warps][E]: pairs of an expert in a part, then the next row of that expert there
//   rows       expert 0: part 0, part 1, ... | expert 1: part 0, ...
//
// A warp walks its part 32 pairs at a time; lanes with the same expert find each other by
// __match_any_sync, and the lowest of them moves the counter on. So no atomics, and equal experts
// stay in pair order. Up to kSmallPairs pairs are one block's work; more are cut into tiles:
// count (tile by tile) -> scan (all tiles) -> place (tile by tile).
// Not measured on hardware.
#pragma once

#include "plan/block_scan.cuh"
#include "plugin.h"

namespace moesaic::cuda {

inline constexpr int kSortThreads = 1024;
inline constexpr int kSortCounters = 2 * kMaxExperts;  // of a block: 32 KiB
inline constexpr int64_t kSmallPairs = 4096;
inline constexpr int64_t kTilePairs = 2048;
inline constexpr int64_t kMaxSortTiles = 512;

// Warps of a block that sort: as many as have counters of their own.
MOESAIC_DEV int sorting_warps(int32_t num_experts) {
  const int fit = kSortCounters / num_experts;
  return fit < kSortThreads / 32 ? fit : kSortThreads / 32;
}

// The pairs [first, first + count) as one block sorts them.
struct SortJob {
  const int32_t* topk_ids;
  int64_t first;
  int32_t count;
  int32_t num_experts;
  int32_t warps;  // that sort
  int32_t part;   // pairs of a warp, a multiple of 32
};

MOESAIC_DEV SortJob sort_job(const op::BucketPlan& args, int64_t first, int64_t count) {
  const int warps = sorting_warps(args.num_experts);
  const auto pairs = static_cast<int32_t>(count);
  const int32_t part = (pairs + warps * 32 - 1) / (warps * 32) * 32;
  return {args.routing.topk_ids, first, pairs, args.num_experts, warps, part};
}

// Expert of the pair at `at` of the job; num_experts for a skipped pair, or behind the end.
MOESAIC_DEV int32_t expert_at(const SortJob& job, int32_t at) {
  if (at >= job.count) return job.num_experts;
  const int32_t id = job.topk_ids[job.first + at];
  return id >= 0 && id < job.num_experts ? id : job.num_experts;
}

// Calls visit(at, expert, row) for each pair of this warp's part, where `row` counts from what the
// warp's counter of the expert holds; leaves the counters moved on.
template <class Visit>
MOESAIC_DEV void walk_part(const SortJob& job, int32_t* counters, const Visit& visit) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp >= job.warps) return;
  int32_t* const mine = counters + warp * job.num_experts;
  for (int32_t step = 0; step < job.part; step += 32) {
    const int32_t at = warp * job.part + step + lane;
    const int32_t expert = expert_at(job, at);
    const unsigned same = __match_any_sync(~0U, static_cast<unsigned>(expert));
    const int rank = __popc(same & ((1U << lane) - 1U));
    const bool real = expert < job.num_experts;
    const int32_t start = real ? mine[expert] : 0;
    __syncwarp();
    if (real && rank == 0) mine[expert] = start + __popc(same);
    if (at < job.count) visit(at, real ? expert : -1, start + rank);
    __syncwarp();
  }
}

// counters[w][e] = pairs of expert e in part w.
MOESAIC_DEV void count_parts(const SortJob& job, int32_t* counters) {
  for (int i = static_cast<int>(threadIdx.x); i < job.warps * job.num_experts; i += kSortThreads) {
    counters[i] = 0;
  }
  __syncthreads();
  walk_part(job, counters, [](int32_t, int32_t, int32_t) {});
  __syncthreads();
}

// Column sums of counts [parts][E] become expert_offsets (exclusive prefix), and the counts the
// first row of each part. Returns the number of rows.
MOESAIC_DEV int32_t scan_columns(int32_t* counts, int32_t parts, int32_t num_experts,
                                 int32_t* expert_offsets, ScanShared<kSortThreads>& shared) {
  int32_t rows = 0;
  for (int32_t first = 0; first < num_experts; first += kSortThreads) {
    const int32_t e = first + static_cast<int32_t>(threadIdx.x);
    int32_t total = 0;
    if (e < num_experts) {
      for (int32_t part = 0; part < parts; ++part) total += counts[int64_t{part} * num_experts + e];
    }
    const Scan scan = block_scan(total, shared);
    if (e < num_experts) {
      int32_t row = rows + scan.before;
      expert_offsets[e] = row;
      for (int32_t part = 0; part < parts; ++part) {
        int32_t& count = counts[int64_t{part} * num_experts + e];
        const int32_t next = row + count;
        count = row;
        row = next;
      }
    }
    rows += scan.total;
  }
  if (threadIdx.x == 0) expert_offsets[num_experts] = rows;
  return rows;
}

// Writes the rows of a job whose counters hold first rows, and what lies behind the last row.
MOESAIC_DEV void write_rows(const SortJob& job, const op::BucketPlan& args, int32_t* counters,
                            int32_t rows) {
  walk_part(job, counters, [&](int32_t at, int32_t expert, int32_t row) {
    const int64_t pair = job.first + at;
    args.out.pair_row[pair] = expert < 0 ? -1 : row;
    if (expert < 0) return;
    args.out.row_pair[row] = static_cast<int32_t>(pair);
    args.out.row_token[row] = static_cast<int32_t>(pair / args.routing.top_k);
  });
  for (int32_t at = static_cast<int32_t>(threadIdx.x); at < job.count; at += kSortThreads) {
    const int64_t row = job.first + at;
    if (row < rows) continue;
    args.out.row_pair[row] = -1;
    args.out.row_token[row] = -1;
  }
}

MOESAIC_KERNEL void __launch_bounds__(kSortThreads, 1) sort_small_kernel(op::BucketPlan args) {
  dev::begin_grid();
  MOESAIC_SHARED(int32_t, counters, [kSortCounters]);
  MOESAIC_SHARED(ScanShared<kSortThreads>, scan);
  const SortJob job = sort_job(args, 0, args.routing.num_pairs());
  count_parts(job, counters);
  const int32_t rows =
      scan_columns(counters, job.warps, job.num_experts, args.out.expert_offsets, scan);
  __syncthreads();
  write_rows(job, args, counters, rows);
}

// --- many pairs: tiles of `tile` pairs, counts [tiles][E] in scratch

MOESAIC_DEV SortJob tile_job(const op::BucketPlan& args, int64_t tile) {
  const int64_t first = int64_t{blockIdx.x} * tile;
  const int64_t left = args.routing.num_pairs() - first;
  return sort_job(args, first, left < tile ? left : tile);
}

MOESAIC_KERNEL void __launch_bounds__(kSortThreads, 1)
    sort_count_kernel(op::BucketPlan args, int64_t tile) {
  dev::begin_grid();
  MOESAIC_SHARED(int32_t, counters, [kSortCounters]);
  const SortJob job = tile_job(args, tile);
  count_parts(job, counters);
  int32_t* const counts =
      reinterpret_cast<int32_t*>(args.out.scratch) + int64_t{blockIdx.x} * args.num_experts;
  for (int e = static_cast<int>(threadIdx.x); e < args.num_experts; e += kSortThreads) {
    int32_t total = 0;
    for (int w = 0; w < job.warps; ++w) total += counters[w * args.num_experts + e];
    counts[e] = total;
  }
}

MOESAIC_KERNEL void __launch_bounds__(kSortThreads, 1)
    sort_scan_kernel(op::BucketPlan args, int32_t tiles) {
  dev::begin_grid();
  MOESAIC_SHARED(ScanShared<kSortThreads>, scan);
  scan_columns(reinterpret_cast<int32_t*>(args.out.scratch), tiles, args.num_experts,
               args.out.expert_offsets, scan);
}

MOESAIC_KERNEL void __launch_bounds__(kSortThreads, 1)
    sort_place_kernel(op::BucketPlan args, int64_t tile) {
  dev::begin_grid();
  MOESAIC_SHARED(int32_t, counters, [kSortCounters]);
  const SortJob job = tile_job(args, tile);
  count_parts(job, counters);
  const int32_t* const starts =
      reinterpret_cast<const int32_t*>(args.out.scratch) + int64_t{blockIdx.x} * args.num_experts;
  for (int e = static_cast<int>(threadIdx.x); e < args.num_experts; e += kSortThreads) {
    int32_t row = starts[e];
    for (int w = 0; w < job.warps; ++w) {
      int32_t& count = counters[w * args.num_experts + e];
      const int32_t next = row + count;
      count = row;
      row = next;
    }
  }
  __syncthreads();
  write_rows(job, args, counters, args.out.expert_offsets[args.num_experts]);
}

}  // namespace moesaic::cuda
