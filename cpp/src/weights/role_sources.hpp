#pragma once

/// Arrays of the caller as the weights of one role, for stacks and for matrices on their own.

#include <string>

#include "moesaic/expert_stack.hpp"

namespace moesaic::weights {

/// The type of weights that are not encoded. Throws DTypeError unless they are f32, f16 or bf16.
QuantType dense_type(const char* operation, const char* name, const ConstTensorView& view);

/// A dense copy of a view [E, rows, cols] with strides of any kind, in memory of its own. Throws
/// OutOfMemoryError.
RoleWeights copy_role(const ConstTensorView& view);

/// Encoded bytes where they are. Throws ShapeError unless their number is that of the shape, and
/// ConfigError for E4M3 codes of NaN.
RoleWeights view_role(const char* operation, const std::string& name,
                      const ExpertStack::EncodedRole& source);

}  // namespace moesaic::weights
