#pragma once

/// Signatures and docstrings. They are written once, in python/moesaic/_core.pyi; the build turns
/// that file into the table below (generate_docs.py), so no binding states any.

#include <cstddef>
#include <iterator>

#include "bindings.hpp"

namespace moesaic::python {

struct Doc {
  const char*
      name;  ///< as written in Python: "route", "Routing", "Routing.topk_ids"; "": the module
  const char* text;  ///< "route(logits, top_k=None)\n--\n\nDocstring." or the docstring alone
};
extern const Doc kDocs[];
extern const std::size_t kNumDocs;

/// The builtin function inside a method, staticmethod or property of a class; null for other kinds
/// of attribute, such as the methods that GgufMetadata takes from collections.abc.Mapping.
PyCFunctionObject* builtin_in(py::handle attribute);

/// Gives everything in the module its text, and the module a function `_bound_signatures()` that
/// returns what pybind11 says of each, for the test that compares it with the stub. Call it when
/// all is bound.
void attach_docs(py::module_& m);

}  // namespace moesaic::python
