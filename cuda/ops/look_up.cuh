// topk_ids[t] = table[token_ids[t]], -1 for tokens outside the table: a thread per pair,
// neighbouring threads in neighbouring slots. Precondition: a grid of pairs. Not measured on
// hardware.
#pragma once

#include "device.cuh"
#include "plugin.h"

namespace moesaic::cuda {

inline constexpr int kLookUpThreads = 256;

MOESAIC_KERNEL void __launch_bounds__(kLookUpThreads)
    look_up_experts_kernel(op::LookUpExperts args) {
  dev::begin_grid();
  const int64_t pair = int64_t{blockIdx.x} * kLookUpThreads + threadIdx.x;
  if (pair >= args.out.num_pairs()) return;
  const int64_t token = args.token_ids[pair / args.out.top_k];
  const bool known = token >= 0 && token < args.num_rows;
  args.out.topk_ids[pair] = known ? args.table[token * args.out.top_k + pair % args.out.top_k] : -1;
}

}  // namespace moesaic::cuda
