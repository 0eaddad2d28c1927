#pragma once

/// Panels on a device.

#include "moesaic/expert_stack.hpp"

namespace moesaic::marlin {

/// The panels [E, N, K] in the layout and memory of `options.backend`, with their bias. Errors:
/// UnsupportedError, OutOfMemoryError, OperationCancelled.
RoleWeights place(const RoleWeights& panels, const LoadOptions& options);

}  // namespace moesaic::marlin
