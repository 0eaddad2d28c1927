#pragma once

/// Lists of experts that an edit takes.

#include <cstdint>
#include <vector>

#include "bindings.hpp"

namespace moesaic::python {

/// A sequence of numbers, or an int32 or int64 array [n]. Errors: DTypeError, ShapeError.
std::vector<std::int32_t> import_expert_ids(const py::object& ids, const char* operation,
                                            const char* name);
/// Throws ShapeError, naming the place in `ids`, for one that is no number of `experts` experts.
void check_experts(const std::vector<std::int32_t>& ids, std::int32_t experts,
                   const char* operation);
/// Throws ShapeError unless each of `experts` experts is named once.
void check_permutation(const std::vector<std::int32_t>& order, std::int32_t experts,
                       const char* operation);

}  // namespace moesaic::python
