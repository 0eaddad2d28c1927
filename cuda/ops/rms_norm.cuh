// out = x / sqrt(mean(x^2) + eps) * weight, row by row, in f32.
//
//   columns  0..3 | 4..7 | .. | 1020..1023 | 1024..1027 | ..      a block = one row
//   thread     0  |   1  | .. |     255    |      0     | ..
//
// A thread adds the squares of its columns from left to right, a tree joins the lanes of a warp,
// and every thread adds the warps in their order: the order depends on the number of columns alone.
// The row is then read a second time, from the cache. Memory-bound: bytes are rows * cols * (size
// in + 4). Preconditions: kNormThreads threads, a grid of rows. Not measured on hardware.
#pragma once

#include "ops/rows.cuh"

namespace moesaic::cuda {

inline constexpr int kNormWarps = 8;
inline constexpr int kNormThreads = 32 * kNormWarps;

MOESAIC_DEV float sum_over_block(float value, float (&parts)[kNormWarps]) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0U, value, step);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0F;
  MOESAIC_UNROLL
  for (int w = 0; w < kNormWarps; ++w) sum += parts[w];
  return sum;
}

template <DType kType>
MOESAIC_KERNEL void __launch_bounds__(kNormThreads) rms_norm_kernel(op::RmsNorm args) {
  dev::begin_grid();
  MOESAIC_SHARED(float, parts, [kNormWarps]);
  const int64_t row = blockIdx.x;
  const int64_t cols = args.x.cols;
  const int64_t from = args.x.element_offset(row);
  const bool whole = cols % 4 == 0 && quads_allowed<kType>(args.x.data, from);

  float square = 0.0F;
  for (int64_t quad = threadIdx.x; 4 * quad < cols; quad += kNormThreads) {
    const Quad q = load_columns<kType>(args.x.data, from, quad, cols, whole);
    MOESAIC_UNROLL
    for (int c = 0; c < 4; ++c) square += q.v[c] * q.v[c];
  }
  const float mean = sum_over_block(square, parts) / static_cast<float>(cols);
  const float factor = 1.0F / sqrtf(mean + args.eps);

  const bool whole_weight = cols % 4 == 0 && quads_allowed<DType::F32>(args.weight, 0);
  const bool whole_out = cols % 4 == 0 && quads_allowed<DType::F32>(args.out, row * cols);
  for (int64_t quad = threadIdx.x; 4 * quad < cols; quad += kNormThreads) {
    Quad q = load_columns<kType>(args.x.data, from, quad, cols, whole);
    const Quad w = load_columns<DType::F32>(args.weight, 0, quad, cols, whole_weight);
    MOESAIC_UNROLL
    for (int c = 0; c < 4; ++c) q.v[c] = q.v[c] * factor * w.v[c];
    store_columns<DType::F32>(args.out, row * cols, quad, cols, whole_out, q);
  }
}

}  // namespace moesaic::cuda
