#pragma once

#include "bindings.hpp"

namespace moesaic::python {

/// Puts one function before pybind11's in every call of the module. It looks at a call only when
/// that failed: where the arguments did not fit, pybind11's pages become one ArgumentError that
/// names the parameter, and an error that names a function of C++ names the one that was called.
/// Call it when all is bound.
void guard_calls(py::module_& m);

}  // namespace moesaic::python
