#pragma once

/// INT4 panels brought to a device.

#include "moesaic/expert_stack.hpp"

namespace moesaic::int4 {

/// Copies the panels [E, N, K] and their bias to the memory of `options.backend`, in its layout.
/// Errors: UnsupportedError, OutOfMemoryError, OperationCancelled.
RoleWeights to_device(const RoleWeights& panels, const LoadOptions& options);

}  // namespace moesaic::int4
