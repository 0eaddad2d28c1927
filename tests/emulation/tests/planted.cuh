// Small kernels that are right, and the same kernels with one mistake planted by a template
// argument.
#pragma once

#include "device.cuh"

namespace moesaic::planted {

enum class Mistake {
  none,
  missing_barrier,                  // shared memory read without waiting for its writers
  warp_synchronous_tail,            // a tree that trusts lanes to run in step
  missing_barrier_after_copy_wait,  // a thread sees its own copies only
  overwriting_next_stage,           // a stage refilled while others still read it
  missing_mbarrier_wait,            // the consumer does not wait for the slot to be full
  shuffle_as_barrier,               // a shuffle orders no memory
  last_block_without_fence,         // partial sums published without a fence
  read_before_grid_wait,            // a dependent grid reads what its predecessor writes
  write_before_grid_wait            // a dependent grid writes what its predecessor reads
};

// out[block] = sum of the block's 128 values.
template <Mistake kMistake>
MOESAIC_KERNEL void sum_tree(const float* __restrict__ x, float* __restrict__ out) {
  MOESAIC_SHARED(float, part, [128]);
  const unsigned i = threadIdx.x;
  part[i] = x[128 * blockIdx.x + i];
  if (kMistake != Mistake::missing_barrier) __syncthreads();
  for (unsigned step = 64; step > 0; step /= 2) {
    if (i < step) part[i] += part[i + step];
    if (kMistake != Mistake::warp_synchronous_tail || step > 16) __syncthreads();
  }
  if (i == 0) out[blockIdx.x] = part[0];
}

// y[n] = 2 * x[n] reversed inside each run of 256 words, through two stages of shared memory filled
// by asynchronous copies; 64 threads copy 16 bytes each.
template <Mistake kMistake>
MOESAIC_KERNEL void staged_reverse(const uint32_t* __restrict__ x, uint32_t* __restrict__ y,
                                   int runs) {
  MOESAIC_SHARED(uint32_t, stage, [2][256]);
  const int i = static_cast<int>(threadIdx.x);
  auto fill = [&](int run) {
    dev::cp_async16(&stage[run & 1][4 * i], x + 256 * run + 4 * i);
    dev::cp_async_commit();
  };
  fill(0);
  for (int run = 0; run < runs; run++) {
    if (run + 1 < runs) {
      fill(run + 1);
      dev::cp_async_wait<1>();
    } else {
      dev::cp_async_wait<0>();
    }
    if (kMistake != Mistake::missing_barrier_after_copy_wait) __syncthreads();
    for (int j = 0; j < 4; j++) y[256 * run + 64 * j + i] = 2 * stage[run & 1][255 - 64 * j - i];
    if (kMistake != Mistake::overwriting_next_stage) __syncthreads();
  }
}

// Warp 0 produces, warp 1 consumes, two slots between them.
template <Mistake kMistake>
MOESAIC_KERNEL void handed_over(const float* __restrict__ x, float* __restrict__ y, int runs) {
  MOESAIC_SHARED(float, slot, [2][32]);
  MOESAIC_SHARED(uint64_t, full, [2]);
  MOESAIC_SHARED(uint64_t, empty, [2]);
  const unsigned lane = threadIdx.x % 32;
  if (threadIdx.x < 2) {
    dev::mbarrier_init(&full[threadIdx.x], 32);
    dev::mbarrier_init(&empty[threadIdx.x], 32);
  }
  __syncthreads();
  for (int run = 0; run < runs; run++) {
    const int s = run & 1;
    const unsigned parity = run / 2 & 1;
    if (threadIdx.x < 32) {
      if (run >= 2) dev::mbarrier_wait(&empty[s], parity ^ 1);
      slot[s][lane] = x[32 * run + lane];
      dev::mbarrier_arrive(&full[s]);
    } else {
      if (kMistake != Mistake::missing_mbarrier_wait) dev::mbarrier_wait(&full[s], parity);
      y[32 * run + lane] = slot[s][31 - lane];
      dev::mbarrier_arrive(&empty[s]);
    }
  }
}

// Each lane passes its value to the next one through shared memory, 8 times.
template <Mistake kMistake>
MOESAIC_KERNEL void rotate_lanes(const float* __restrict__ x, float* __restrict__ y) {
  MOESAIC_SHARED(float, cell, [32]);
  const unsigned lane = threadIdx.x;
  float value = x[lane];
  for (int round = 0; round < 8; round++) {
    cell[lane] = value;
    if (kMistake == Mistake::shuffle_as_barrier) {
      __shfl_xor_sync(0xFFFFFFFFu, value, 1);
    } else {
      __syncwarp();
    }
    value = cell[(lane + 1) % 32];
    __syncwarp();
  }
  y[lane] = value;
}

// The last block to finish adds up what all blocks left in `partial`.
template <Mistake kMistake>
MOESAIC_KERNEL void sum_by_last_block(const float* __restrict__ x, float* __restrict__ partial,
                                      unsigned* __restrict__ finished, float* __restrict__ out) {
  MOESAIC_SHARED(bool, last, [1]);
  partial[32 * blockIdx.x + threadIdx.x] = x[32 * blockIdx.x + threadIdx.x];
  if (kMistake != Mistake::last_block_without_fence) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last[0] = atomicAdd(finished, 1u) + 1 == gridDim.x;
  __syncthreads();
  if (!last[0]) return;
  if (kMistake != Mistake::last_block_without_fence) __threadfence();
  float sum = 0;
  for (unsigned block = 0; block < gridDim.x; block++) sum += partial[32 * block + threadIdx.x];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  if (threadIdx.x == 0) out[0] = sum;
}

template <Mistake>
MOESAIC_KERNEL void doubled(const float* __restrict__ x, float* __restrict__ y) {
  const unsigned i = 32 * blockIdx.x + threadIdx.x;
  y[i] = 2 * x[i];
}

// After `doubled`, before which it may begin: x += 1, z = y + 1.
template <Mistake kMistake>
MOESAIC_KERNEL void follow_doubled(float* __restrict__ x, const float* __restrict__ y,
                                   float* __restrict__ z) {
  const unsigned i = 32 * blockIdx.x + threadIdx.x;
  float value = 0;
  if (kMistake == Mistake::read_before_grid_wait) value = y[i];
  if (kMistake == Mistake::write_before_grid_wait) x[i] += 1;
  dev::griddepcontrol_wait();
  if (kMistake != Mistake::read_before_grid_wait) value = y[i];
  if (kMistake != Mistake::write_before_grid_wait) x[i] += 1;
  z[i] = value + 1;
}

}  // namespace moesaic::planted
