#pragma once

/// What the files about pools and the expert store share.

#include <array>
#include <span>
#include <string>

#include "moesaic/offload.hpp"
#include "values.hpp"

namespace moesaic::python {

inline ExecMode parse_mode(const std::string& mode, const char* operation) {
  return parse_name<ExecMode>(mode, operation, "mode");
}

/// Imports ids as import_ids does, and takes lists, tuples and ranges of integers too.
inline Ids import_id_list(const py::object& ids, const char* operation, const char* name) {
  const bool plain =
      py::isinstance<py::list>(ids) || py::isinstance<py::tuple>(ids) || PyRange_Check(ids.ptr());
  return import_ids(plain ? py::array_t<std::int64_t>(ids) : ids, operation, name);
}

/// All ids, whatever their shape.
inline std::span<const std::int32_t> id_span(const Ids& ids) {
  return {static_cast<const std::int32_t*>(ids.view.data),
          static_cast<std::size_t>(ids.view.num_elements())};
}

}  // namespace moesaic::python
