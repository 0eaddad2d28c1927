// out[t] += x[t] * the weights of the token's identity experts, which are added in slot order
// first. One fused multiply-add per column under nvcc. Tokens without such weights are left alone,
// whatever x holds. Four columns a thread, grid as in gather. Not measured on hardware.
#pragma once

#include "ops/gather.cuh"

namespace moesaic::cuda {

MOESAIC_DEV float identity_weight(const IdentityArgs& args, int64_t token) {
  float sum = 0.0F;
  for (int64_t pair = token * args.top_k; pair < (token + 1) * args.top_k; ++pair) {
    const int32_t id = args.topk_ids[pair];
    if (id >= args.first && id < args.first + args.count) sum += args.topk_weights[pair];
  }
  return sum;
}

template <int32_t kType>
MOESAIC_KERNEL void __launch_bounds__(kRowThreads) add_identity_kernel(IdentityArgs args) {
  const int64_t cols = args.x.cols;
  const int64_t quad = quad_of_thread();
  if (4 * quad >= cols) return;
  for (int64_t token = blockIdx.y; token < args.x.num_rows; token += gridDim.y) {
    const float weight = identity_weight(args, token);
    if (weight == 0.0F) continue;
    const int64_t from = element_offset(args.x, token);
    const int64_t to = token * args.out_stride;
    const bool whole = cols % 4 == 0 && quads_allowed<kType>(args.x.data, from);
    const bool whole_out = cols % 4 == 0 && quads_allowed<kF32>(args.out, to);
    const Quad x = load_columns<kType>(args.x.data, from, quad, cols, whole);
    Quad y = load_columns<kF32>(args.out, to, quad, cols, whole_out);
    MOESAIC_UNROLL
    for (int c = 0; c < 4; ++c) y.v[c] += weight * x.v[c];
    store_columns<kF32>(args.out, to, quad, cols, whole_out, y);
  }
}

}  // namespace moesaic::cuda
