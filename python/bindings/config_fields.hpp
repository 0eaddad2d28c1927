#pragma once

/// What the immutable configuration classes share: everything follows from one dict of fields.

#include <pybind11/stl.h>

#include <initializer_list>
#include <string>
#include <utility>

#include "bindings.hpp"

namespace moesaic::python {

/// Defines to_dict, replace, ==, repr and one read-only property per field, all from the dict that
/// `to_dict` gives.
template <class T>
void define_fields(py::class_<T>& type, const char* name, py::dict (*to_dict)(const T&),
                   std::initializer_list<const char*> fields) {
  type.def("to_dict", [to_dict](const T& self) { return to_dict(self); })
      .def("replace",
           [to_dict](const py::object& self, const py::kwargs& changes) {
             const py::dict all = to_dict(self.cast<const T&>());
             all.attr("update")(changes);
             return py::type::of(self)(**all);
           })
      .def("__eq__",
           [to_dict](const T& a, const py::object& b) -> py::object {
             if (!py::isinstance<T>(b))
               return py::reinterpret_borrow<py::object>(Py_NotImplemented);
             return py::bool_(to_dict(a).equal(to_dict(b.cast<const T&>())));
           })
      .def("__repr__", [to_dict, label = std::string(name)](const T& self) {
        std::string text;
        for (const auto& [key, value] : to_dict(self))
          text += (text.empty() ? "" : ", ") + std::string(py::str(key)) + "=" +
                  std::string(py::repr(value));
        return "moesaic." + label + "(" + text + ")";
      });
  for (const char* field : fields) {
    type.def_property_readonly(field, [to_dict, key = std::string(field)](const T& self) {
      return py::object(to_dict(self)[key.c_str()]);
    });
  }
}

}  // namespace moesaic::python
