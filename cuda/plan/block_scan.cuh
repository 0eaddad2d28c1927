// Exclusive prefix sums over a block.
#pragma once

#include "device.cuh"

namespace moesaic::cuda {

template <int kThreads>
struct ScanShared {
  int32_t warps[kThreads / 32];
};

struct Scan {
  int32_t before;  // sum over the threads before this one
  int32_t total;   // sum over the block
};

// All threads of the block call it; the barrier at the start lets `shared` serve again at once.
template <int kThreads>
MOESAIC_DEV Scan block_scan(int32_t value, ScanShared<kThreads>& shared) {
  constexpr int kWarps = kThreads / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  int32_t inclusive = value;
  MOESAIC_UNROLL
  for (int step = 1; step < 32; step *= 2) {
    const int32_t left = __shfl_up_sync(~0U, inclusive, step);
    if (lane >= step) inclusive += left;
  }
  __syncthreads();
  if (lane == 31) shared.warps[warp] = inclusive;
  __syncthreads();
  Scan scan{inclusive - value, 0};
  MOESAIC_UNROLL
  for (int w = 0; w < kWarps; ++w) {
    const int32_t sum = shared.warps[w];
    scan.before += w < warp ? sum : 0;
    scan.total += sum;
  }
  return scan;
}

}  // namespace moesaic::cuda
