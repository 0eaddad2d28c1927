#pragma once

#include "moesaic/backend.hpp"

namespace moesaic {
class ThreadPool;
}

namespace moesaic::cpu {

/// Backend::rms_norm. The sum of squares has a fixed order, so a row's result does not depend on
/// the batch.
void rms_norm(ThreadPool& pool, const InputRows& x, const float* weight, float eps, float* out);

}  // namespace moesaic::cpu
