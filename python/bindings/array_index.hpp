#pragma once

#include "arrays.hpp"

namespace moesaic::python {

/// array[key]: a view, or a number where every dimension has an index. Throws IndexError, and
/// DTypeError for indices of other kinds.
py::object index_array(const std::shared_ptr<Array>& array, const py::object& key);

}  // namespace moesaic::python
