#pragma once

#include "bindings.hpp"

namespace moesaic::python {

/// Takes from every class of the module what Python could do to its objects behind the back of
/// C++: make one without its constructor, give one another class, change a class, pass
/// None as self, pickle one whose class does not say how (pickling.hpp). Each raises TypeError. Call
/// it when all is bound.
void seal_classes(py::module_& m);

}  // namespace moesaic::python
