#pragma once

/// Matrices that are encoded again, for stacks made of others.

#include <cstdint>

#include "weights/load.hpp"

namespace moesaic::weights {

/// Throws UnsupportedError for a stack on a device, whose weights cannot be read.
void check_on_host(const char* operation, const ExpertStack& stack);

/// Bytes of a role in memory, with its delta.
std::int64_t role_bytes(const RoleWeights& weights);

/// Memory for [experts, rows, cols] in rows of `type`. Errors: ShapeError (columns that are no whole
/// blocks), OutOfMemoryError.
RoleWeights allocate_rows(QuantType type, std::int32_t experts, std::int64_t rows,
                          std::int64_t cols);

/// The memory of a role that allocate_rows made.
inline std::byte* writable_rows(const RoleWeights& weights) {
  return const_cast<std::byte*>(weights.ref.base);
}

/// The end of a stack that is to lie as `model` does: in panels where that has some.
ExpertStack finish_like(const ExpertStack& model, ExpertStack::Parts parts,
                        const LoadOptions& options, Clock::time_point start);

}  // namespace moesaic::weights
