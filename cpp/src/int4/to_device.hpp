#pragma once

/// Panels on a device.

#include "moesaic/expert_stack.hpp"

namespace moesaic::int4 {

/// The panels [E, N, K] in the layout and memory of `options.backend`, with their bias. Errors:
/// UnsupportedError, OutOfMemoryError, OperationCancelled.
RoleWeights to_device(const RoleWeights& panels, const LoadOptions& options);

}  // namespace moesaic::int4
