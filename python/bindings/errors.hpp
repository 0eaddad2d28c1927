#pragma once

/// Errors that only Python has.

#include <string>

#include "bindings.hpp"
#include "moesaic/error.hpp"

namespace moesaic::python {

/// Raises ArgumentError when the GIL is next looked at: PyErr_SetObject with the parts of `problem`
/// as text and as fields. Texts that would not fit in a line are cut, and a hint is left out then.
void set_argument_error(Problem problem);

/// Takes an error of ours that is in flight, and puts `called` in the place of an operation that
/// Python does not have: what C++ calls the part of the work that failed tells a caller nothing.
void name_called(const std::string& called);

/// Whether a class of exceptions is one of the family.
bool is_library_error(PyObject* type);

}  // namespace moesaic::python
