#pragma once

#include <cstdint>

#include "moesaic/backend.hpp"
#include "moesaic/thread_pool.hpp"

namespace moesaic::cpu {

/// out f32 [rows, cols], dense: out[r] = x[index[r]], or zeros where index[r] is negative.
/// Errors: DTypeError.
void gather(ThreadPool& pool, const InputRows& x, const std::int32_t* index, std::int64_t rows,
            float* out);

}  // namespace moesaic::cpu
