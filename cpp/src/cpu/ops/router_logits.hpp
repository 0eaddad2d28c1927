#pragma once

#include <cstdint>

#include "moesaic/backend.hpp"
#include "moesaic/thread_pool.hpp"

namespace moesaic::cpu {

/// logits f32 [T, E] = x [T, H] * weight [E, H]^T. Each product is summed in 8 lanes (column modulo
/// 8), which are then added in a fixed tree: a token's logits do not depend on its batch. Errors:
/// DTypeError.
void router_logits(ThreadPool& pool, const InputRows& x, const float* weight,
                   std::int32_t num_experts, float* logits);

}  // namespace moesaic::cpu
