#pragma once

/// Errors that only Python has.

#include "bindings.hpp"
#include "moesaic/error.hpp"

namespace moesaic::python {

/// Raises ArgumentError when the GIL is next looked at: PyErr_SetObject with the parts of `problem`
/// as text and as fields. Texts that would not fit in a line are cut, and a hint is left out then.
void set_argument_error(Problem problem);

}  // namespace moesaic::python
