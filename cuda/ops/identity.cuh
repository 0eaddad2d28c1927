// out[t] += x[t] * the weights of the token's identity experts, which are added in slot order
// first. One fused multiply-add per column under nvcc. Tokens without such weights are left alone,
// whatever x holds. Four columns a thread, grid as in gather. Not measured on hardware.
#pragma once

#include "ops/gather.cuh"

namespace moesaic::cuda {

MOESAIC_DEV float identity_weight(const op::AddIdentity& args, int64_t token) {
  float sum = 0.0F;
  for (int64_t pair = token * args.routing.top_k; pair < (token + 1) * args.routing.top_k; ++pair) {
    const int32_t id = args.routing.topk_ids[pair];
    if (id >= args.first && id < args.first + args.count) sum += args.routing.topk_weights[pair];
  }
  return sum;
}

template <DType kType>
MOESAIC_KERNEL void __launch_bounds__(kRowThreads) add_identity_kernel(op::AddIdentity args) {
  dev::begin_grid();
  const int64_t cols = args.x.cols;
  const int64_t quad = quad_of_thread();
  if (4 * quad >= cols) return;
  for (int64_t token = blockIdx.y; token < args.x.num_rows; token += gridDim.y) {
    const float weight = identity_weight(args, token);
    if (weight == 0.0F) continue;
    const int64_t from = args.x.element_offset(token);
    const int64_t to = token * args.out.stride;
    const bool whole = cols % 4 == 0 && quads_allowed<kType>(args.x.data, from);
    const bool whole_out = cols % 4 == 0 && quads_allowed<DType::F32>(args.out.data, to);
    const Quad x = load_columns<kType>(args.x.data, from, quad, cols, whole);
    Quad y = load_columns<DType::F32>(args.out.data, to, quad, cols, whole_out);
    MOESAIC_UNROLL
    for (int c = 0; c < 4; ++c) y.v[c] += weight * x.v[c];
    store_columns<DType::F32>(args.out.data, to, quad, cols, whole_out, y);
  }
}

}  // namespace moesaic::cuda
