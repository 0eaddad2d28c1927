#include <algorithm>

#include "cpu/cpu_backend.hpp"
#include "cpu/ops/convert.hpp"
#include "cpu/ops/ranges.hpp"
#include "cpu/ops/vec.hpp"
#include "moesaic/context.hpp"

namespace moesaic::cpu {
namespace {

constexpr int kTokens = 2;               ///< tokens that share a pass over the weights
constexpr std::int64_t kColumns = 1024;  ///< columns of x that are held as f32 at a time
constexpr int kExperts = 16;             ///< experts of a tile: 64 KiB of weights per column block
constexpr std::int64_t kTokenTile = 32;  ///< tokens that use a tile of weights while it is in cache

/// The 8 partial sums of one product.
struct Lanes {
  F4 low, high;
  float total() const {
    const F4 sum = low + high;
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
  }
};

/// sums[t * kExperts + e] += x[t][0:count] * weight[e][0:count] lane by lane; x holds zeros up to a
/// multiple of 8.
template <int T, int E>
void multiply(const float (*x)[kColumns], const float* weight, std::int64_t stride,
              std::int64_t count, Lanes* sums) {
  Lanes acc[T][E];
  for (int t = 0; t < T; ++t) {
    for (int e = 0; e < E; ++e) acc[t][e] = sums[t * kExperts + e];
  }
  const auto step = [&](const float* const* w, std::int64_t w_at, std::int64_t x_at) {
    F4 low[T];
    F4 high[T];
    for (int t = 0; t < T; ++t) {
      low[t] = load4(x[t] + x_at);
      high[t] = load4(x[t] + x_at + kLanes);
    }
    for (int e = 0; e < E; ++e) {
      const F4 w_low = load4(w[e] + w_at);
      const F4 w_high = load4(w[e] + w_at + kLanes);
      for (int t = 0; t < T; ++t) {
        acc[t][e].low += low[t] * w_low;
        acc[t][e].high += high[t] * w_high;
      }
    }
  };
  const float* rows[E];
  for (int e = 0; e < E; ++e) rows[e] = weight + e * stride;
  std::int64_t k = 0;
  for (; k + 2 * kLanes <= count; k += 2 * kLanes) step(rows, k, k);
  if (k < count) {
    float tail[E][2 * kLanes] = {};
    const float* tails[E];
    for (int e = 0; e < E; ++e) {
      std::copy(rows[e] + k, rows[e] + count, tail[e]);
      tails[e] = tail[e];
    }
    step(tails, 0, k);
  }
  for (int t = 0; t < T; ++t) {
    for (int e = 0; e < E; ++e) sums[t * kExperts + e] = acc[t][e];
  }
}

/// Logits of T tokens from `token` and of experts [first, last), at most kExperts of them.
template <int T>
void tile(const InputRows& x, std::int64_t token, const float* weight, std::int32_t first,
          std::int32_t last, std::int32_t num_experts, float* logits) {
  constexpr int kGroup = T == 1 ? 4 : 2;  // as many sums as fit the 16 registers
  Lanes sums[T * kExperts] = {};
  alignas(16) float block[T][kColumns];
  for (std::int64_t begin = 0; begin < x.cols; begin += kColumns) {
    const std::int64_t count = std::min(kColumns, x.cols - begin);
    for (int t = 0; t < T; ++t) {
      row_to_f32(x, token + t, begin, count, block[t]);
      const std::int64_t padded = (count + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
      std::fill(block[t] + count, block[t] + padded, 0.0F);
    }
    std::int32_t e = first;
    const auto at = [&] { return weight + e * x.cols + begin; };
    for (; e + kGroup <= last; e += kGroup)
      multiply<T, kGroup>(block, at(), x.cols, count, sums + (e - first));
    for (; e < last; ++e) multiply<T, 1>(block, at(), x.cols, count, sums + (e - first));
  }
  for (int t = 0; t < T; ++t) {
    for (std::int32_t e = first; e < last; ++e) {
      logits[(token + t) * num_experts + e] = sums[t * kExperts + (e - first)].total();
    }
  }
}

}  // namespace

void CpuBackend::router_logits(Context& context, const op::RouterLogits& call) const {
  const InputRows& x = call.x;
  const std::int32_t num_experts = call.num_experts;
  const std::int64_t expert_tiles = (num_experts + kExperts - 1) / kExperts;
  const std::int64_t token_tiles = (x.num_rows + kTokenTile - 1) / kTokenTile;
  const std::int64_t tokens = std::min(x.num_rows, kTokenTile);
  parallel_ranges(context.pool(), expert_tiles * token_tiles, tokens * kExperts * x.cols,
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t i = begin; i < end; ++i) {
                      const auto first = static_cast<std::int32_t>(i % expert_tiles * kExperts);
                      const std::int32_t last = std::min(num_experts, first + kExperts);
                      std::int64_t t = i / expert_tiles * kTokenTile;
                      const std::int64_t stop = std::min(x.num_rows, t + kTokenTile);
                      for (; t + kTokens <= stop; t += kTokens) {
                        tile<kTokens>(x, t, call.weight, first, last, num_experts, call.logits);
                      }
                      for (; t < stop; ++t)
                        tile<1>(x, t, call.weight, first, last, num_experts, call.logits);
                    }
                  });
}

}  // namespace moesaic::cpu
