#pragma once

#include <cstdint>

#include "moesaic/config.hpp"
#include "moesaic/thread_pool.hpp"

namespace moesaic::cpu {

/// hidden f32 [rows, I], dense, from gate and up rows that lie `row_stride` elements apart; `gate`
/// is not read by ungated kinds. Within a few ulp of moesaic::activate, and of its f64 value.
void activate(ThreadPool& pool, const Activation& activation, const float* gate, const float* up,
              std::int64_t row_stride, std::int64_t rows, std::int64_t intermediate, float* hidden);

}  // namespace moesaic::cpu
