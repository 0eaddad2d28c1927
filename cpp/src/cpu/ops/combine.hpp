#pragma once

#include "moesaic/backend.hpp"
#include "moesaic/thread_pool.hpp"

namespace moesaic::cpu {

/// What a pair's row counts; 1 in a routing without weights.
inline float pair_weight(const RoutingView& routing, std::int64_t pair) {
  return routing.topk_weights != nullptr ? routing.topk_weights[pair] : 1.0F;
}

/// out[t] = sum over slots of weight * rows[pair_row], in slot order in f32 and rounded once; with
/// `accumulate` the sum is added to out. Pairs of id -1 are skipped; a token of only such pairs
/// gets 0. Errors: DTypeError.
void combine(ThreadPool& pool, const CombineCall& call);

}  // namespace moesaic::cpu
