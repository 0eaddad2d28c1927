#pragma once

#include "moesaic/backend.hpp"
#include "moesaic/thread_pool.hpp"

namespace moesaic::cpu {

/// out[t] = sum over slots of weight * rows[pair_row], in slot order in f32 and rounded once; with
/// `accumulate` the sum is added to out. Pairs of id -1 are skipped; a token of only such pairs
/// gets 0. Errors: DTypeError.
void combine(ThreadPool& pool, const CombineCall& call);

}  // namespace moesaic::cpu
