#pragma once

/// What pybind11 says of a function's parameters, read back from the line that it made.

#include <string>
#include <string_view>
#include <vector>

#include "bindings.hpp"

namespace moesaic::python {

struct Parameter {
  std::string name;
  std::vector<std::string> types;  ///< the alternatives, as pybind11 spells them
  bool required = false;
  bool keyword_only = false;
};

struct Signature {
  std::vector<Parameter> parameters;
  bool any_positional = false;  ///< has *args
  bool any_keyword = false;     ///< has **kwargs
};

/// Reads "(self: moesaic.X, a: str = 'b', *, c: object = None) -> int".
Signature read_signature(std::string_view text);

/// Whether an object is of one of the types of a parameter. True for types unknown here: the
/// question is only asked of calls that failed.
bool fits(const Parameter& parameter, py::handle object, const py::dict& classes);

/// The types for a message: "an int or None".
std::string types_text(const Parameter& parameter);

/// An object for a message: "str '8'", "numpy.ndarray float32 [3, 8]", "MoeLayer", "list of int";
/// never contents of arrays.
std::string object_text(py::handle object);

/// The last part of a name with dots or colons.
std::string_view last_part(std::string_view name);

}  // namespace moesaic::python
