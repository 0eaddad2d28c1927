#pragma once

/// Putting the weights of a stack where kernels can read them.

#include "metal/host/memory.hpp"
#include "moesaic/backend.hpp"

namespace moesaic::metal {

/// Mapped roles stay in the file and INT4 panels where they are; others are copied to Metal memory.
/// Biases and scales follow. Throws, before anything has changed, UnsupportedError naming a type without
/// kernels, and OutOfMemoryError for a role that is larger than the device's largest buffer.
void hold_roles(const Backend& backend, Memory& memory, ExpertStack::Parts& parts,
                const LoadOptions& options);

}  // namespace moesaic::metal
