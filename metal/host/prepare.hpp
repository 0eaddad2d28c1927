#pragma once

/// Putting the weights of a stack where kernels can read them.

#include "metal/host/memory.hpp"
#include "moesaic/backend.hpp"

namespace moesaic::metal {

/// Mapped roles stay in the file; others are copied to Metal memory. Biases and scales follow.
/// Throws UnsupportedError naming a type without kernels, before anything has changed.
void hold_roles(const Backend& backend, Memory& memory, ExpertStack::Parts& parts,
                const LoadOptions& options);

}  // namespace moesaic::metal
