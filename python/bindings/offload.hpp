#pragma once

/// What the files about pools and the expert store share.

#include <pybind11/stl.h>

#include <array>
#include <span>
#include <string>

#include "gil.hpp"
#include "moesaic/error.hpp"
#include "moesaic/offload.hpp"
#include "values.hpp"

namespace moesaic::python {

inline ExecMode parse_mode(const std::string& mode, const char* operation) {
  return parse_name<ExecMode>(mode, operation, "mode");
}

/// The options of a store by the names of its arguments, for its pickle.
inline py::dict given_options(const StoreOptions& options) {
  return py::dict(py::arg("memory_limit") = options.memory_limit,
                  py::arg("staging") = options.staging, py::arg("io_threads") = options.io_threads,
                  py::arg("read_ahead") = options.read_ahead,
                  py::arg("direct_io") = options.direct_io);
}

/// Lists, tuples and ranges of integers as an array; what else is in them keeps its type, for
/// import_ids to refuse.
inline py::array integers_of(const py::object& list, const char* operation, const char* name) {
  py::array values;
  try {
    values = call_python(py::module_::import("numpy").attr("asarray"), py::make_tuple(list));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_ValueError)) throw;  // lists of several lengths
    throw ShapeError(Problem{operation, name, "an array of integers", py::str(error.value()), {}});
  }
  const char kind = values.dtype().kind();
  const bool are_ids = kind == 'i' || (kind == 'u' && values.itemsize() < 8);
  return are_ids || values.size() == 0 ? py::array_t<std::int64_t>(values) : values;
}

/// Imports ids as import_ids does, and takes lists, tuples and ranges of integers too.
inline Ids import_id_list(const py::object& ids, const char* operation, const char* name) {
  const bool plain =
      py::isinstance<py::list>(ids) || py::isinstance<py::tuple>(ids) || PyRange_Check(ids.ptr());
  return import_ids(plain ? integers_of(ids, operation, name) : ids, operation, name);
}

/// All ids, whatever their shape.
inline std::span<const std::int32_t> id_span(const Ids& ids) {
  return {static_cast<const std::int32_t*>(ids.view.data),
          static_cast<std::size_t>(ids.view.num_elements())};
}

}  // namespace moesaic::python
