// Pads the rows of each expert to whole blocks, bit for bit align_block_size.
//
// Every thread block counts the padded blocks before each expert anew (a scan over E, in shared
// memory), then each of its entries finds its expert by bisection. So one launch, no scratch, and
// all of sorted_ids and block_experts are written. Not measured on hardware.
#pragma once

#include "plan/block_scan.cuh"
#include "plugin.h"

namespace moesaic::cuda {

inline constexpr int kAlignThreads = 256;
inline constexpr int64_t kAlignEntries = 4 * kAlignThreads;  // of sorted_ids, per thread block

// The last position whose value is at most `key`, among `count` ascending ones of which the first
// is at most `key`.
MOESAIC_DEV int32_t last_not_above(const int32_t* ascending, int32_t count, int32_t key) {
  int32_t low = 0;
  int32_t high = count;
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (ascending[middle] <= key) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

MOESAIC_KERNEL void __launch_bounds__(kAlignThreads) align_kernel(op::Align args) {
  dev::begin_grid();
  MOESAIC_SHARED(int32_t, first_block, [kMaxExperts]);
  MOESAIC_SHARED(ScanShared<kAlignThreads>, scan);
  const auto thread = static_cast<int32_t>(threadIdx.x);

  int32_t blocks = 0;
  for (int32_t first = 0; first < args.num_experts; first += kAlignThreads) {
    const int32_t e = first + thread;
    int32_t mine = 0;
    if (e < args.num_experts) {
      const int32_t rows = args.plan.expert_offsets[e + 1] - args.plan.expert_offsets[e];
      mine = (rows + args.block_size - 1) / args.block_size;
    }
    const Scan before = block_scan(mine, scan);
    if (e < args.num_experts) first_block[e] = blocks + before.before;
    blocks += before.total;
  }
  __syncthreads();

  if (blockIdx.x == 0 && thread == 0) *args.out.num_post_pad = blocks * args.block_size;
  const auto padding = static_cast<int32_t>(args.num_pairs);
  const int64_t capacity = args.block_capacity * args.block_size;
  const int64_t begin = int64_t{blockIdx.x} * kAlignEntries;
  for (int64_t i = begin + thread; i < begin + kAlignEntries && i < capacity; i += kAlignThreads) {
    const auto block = static_cast<int32_t>(i / args.block_size);
    const auto place = static_cast<int32_t>(i % args.block_size);
    int32_t expert = -1;
    int32_t id = padding;
    if (block < blocks) {
      // Experts without rows share their first block with the next one: the last of them has rows.
      expert = last_not_above(first_block, args.num_experts, block);
      const int32_t row = args.plan.expert_offsets[expert] +
                          (block - first_block[expert]) * args.block_size + place;
      if (row < args.plan.expert_offsets[expert + 1]) {
        id = args.row_space == RowSpace::TokenPairs ? args.plan.row_pair[row] : row;
      }
    }
    args.out.sorted_ids[i] = id;
    if (place == 0) args.out.block_experts[block] = expert;
  }
}

}  // namespace moesaic::cuda
