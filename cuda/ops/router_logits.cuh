// logits [T, E] = x [T, H] * weight [E, H]^T in f32.
//
// A warp owns a tile of kTokens x kExperts dot products. Lane l takes columns 4 l .. 4 l + 3 of
// every 128, from left to right; a tree over the lanes ends it. So the order of a sum depends on H
// alone, and a token's logits do not depend on its batch. Not measured on hardware.
#pragma once

#include "ops/rows.cuh"

namespace moesaic::cuda {

inline constexpr int kLogitWarps = 4;

template <DType kType, int kTokens, int kExperts>
MOESAIC_KERNEL void __launch_bounds__(32 * kLogitWarps)
    router_logits_kernel(op::RouterLogits args) {
  dev::begin_grid();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t cols = args.x.cols;
  const int64_t token_tiles = (args.x.num_rows + kTokens - 1) / kTokens;
  const int64_t expert_tiles = (args.num_experts + kExperts - 1) / kExperts;
  const int64_t tile = int64_t{blockIdx.x} * kLogitWarps + warp;
  if (tile >= token_tiles * expert_tiles) return;
  // Neighbouring warps share the tokens, which are re-read more often than the weights.
  const int64_t token = tile / expert_tiles * kTokens;
  const auto expert = static_cast<int32_t>(tile % expert_tiles) * kExperts;

  // Behind the last token or expert the last one is computed again, and not stored.
  int64_t x_at[kTokens];
  bool x_whole = cols % 4 == 0;
  MOESAIC_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    const int64_t last = args.x.num_rows - 1;
    x_at[t] = args.x.element_offset(token + t < last ? token + t : last);
    x_whole = x_whole && quads_allowed<kType>(args.x.data, x_at[t]);
  }
  int64_t w_at[kExperts];
  MOESAIC_UNROLL
  for (int e = 0; e < kExperts; ++e) {
    const int32_t last = args.num_experts - 1;
    w_at[e] = (expert + e < last ? expert + e : last) * cols;
  }
  const bool w_whole = cols % 4 == 0 && quads_allowed<DType::F32>(args.weight, 0);

  float sum[kTokens][kExperts] = {};
  for (int64_t quad = lane; 4 * quad < cols; quad += 32) {
    Quad w[kExperts];
    MOESAIC_UNROLL
    for (int e = 0; e < kExperts; ++e) {
      w[e] = load_columns<DType::F32>(args.weight, w_at[e], quad, cols, w_whole);
    }
    MOESAIC_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const Quad x = load_columns<kType>(args.x.data, x_at[t], quad, cols, x_whole);
      MOESAIC_UNROLL
      for (int e = 0; e < kExperts; ++e) {
        MOESAIC_UNROLL
        for (int c = 0; c < 4; ++c) sum[t][e] += x.v[c] * w[e].v[c];
      }
    }
  }
  MOESAIC_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    MOESAIC_UNROLL
    for (int e = 0; e < kExperts; ++e) {
      float total = sum[t][e];
      for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0U, total, step);
      if (lane == 0 && token + t < args.x.num_rows && expert + e < args.num_experts) {
        args.logits[(token + t) * args.num_experts + expert + e] = total;
      }
    }
  }
}

}  // namespace moesaic::cuda
