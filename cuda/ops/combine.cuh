// out[t] (+)= sum over the slots of a token, in order, of weight * row. f32 accumulators, one fused
// multiply-add per slot under nvcc; a value to add to comes last. A thread owns four columns of a
// token, so nothing is shared and the order is that of the slots. Rows are asked for four slots at
// a time, before the first of them is added. Not measured on hardware.
#pragma once

#include "ops/gather.cuh"
#include "ops/pairs.cuh"

namespace moesaic::cuda {

inline constexpr int kSlotsAhead = 4;

template <DType kRows, DType kOut>
MOESAIC_KERNEL void __launch_bounds__(kRowThreads) combine_kernel(op::Combine args) {
  dev::begin_grid();
  const int64_t cols = args.out.cols;
  const int64_t quad = quad_of_thread();
  if (4 * quad >= cols) return;
  const bool whole_rows = cols % 4 == 0 && quads_allowed<kRows>(args.rows, 0);
  for (int64_t token = blockIdx.y; token < args.routing.num_tokens; token += gridDim.y) {
    Quad sum{};
    for (int32_t first = 0; first < args.routing.top_k; first += kSlotsAhead) {
      int64_t row[kSlotsAhead];
      Quad value[kSlotsAhead];
      MOESAIC_UNROLL
      for (int i = 0; i < kSlotsAhead; ++i) {
        const int64_t pair = token * args.routing.top_k + first + i;
        row[i] = first + i < args.routing.top_k ? combined_row(args, pair) : -1;
        if (row[i] >= 0) {
          value[i] = load_columns<kRows>(args.rows, row[i] * cols, quad, cols, whole_rows);
        }
      }
      MOESAIC_UNROLL
      for (int i = 0; i < kSlotsAhead; ++i) {
        if (row[i] < 0) continue;
        const float weight = combined_weight(args, token * args.routing.top_k + first + i);
        MOESAIC_UNROLL
        for (int c = 0; c < 4; ++c) sum.v[c] += weight * value[i].v[c];
      }
    }
    const int64_t offset = token * args.out.stride;
    const bool whole = cols % 4 == 0 && quads_allowed<kOut>(args.out.data, offset);
    if (args.accumulate) {
      const Quad before = load_columns<kOut>(args.out.data, offset, quad, cols, whole);
      MOESAIC_UNROLL
      for (int c = 0; c < 4; ++c) sum.v[c] = before.v[c] + sum.v[c];
    }
    store_columns<kOut>(args.out.data, offset, quad, cols, whole, sum);
  }
}

}  // namespace moesaic::cuda
