#pragma once

#include <cstdint>

#include "moesaic/routing.hpp"
#include "moesaic/thread_pool.hpp"

namespace moesaic::cpu {

/// route_rows over the pool. `scratch` has route_scratch_elems(config) f32 for each thread of the
/// pool.
RouteStats route(ThreadPool& pool, const float* logits, std::int64_t row_stride,
                 const RouterConfig& config, RoutingView out, float* scratch);

}  // namespace moesaic::cpu
