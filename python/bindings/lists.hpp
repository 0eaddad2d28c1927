#pragma once

/// Lists of objects of this module as arguments.

#include <memory>
#include <string>
#include <vector>

#include "moesaic/error.hpp"

namespace moesaic::python {

/// Throws DTypeError for None among the objects, which pybind11 gives as a null pointer.
template <class Object>
void require_no_none(const std::vector<std::shared_ptr<Object>>& objects, const char* operation,
                     const char* argument, const std::string& class_name) {
  for (const auto& object : objects) {
    require<DTypeError>(object != nullptr, [&] {
      return Problem{operation, argument, "a list of " + class_name, "None in it", {}};
    });
  }
}

}  // namespace moesaic::python
