#pragma once

/// What pickle and copy make of the objects of the module. Those of a class that says nothing are
/// refused (seal.cpp), because Python would make one without its constructor.

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "bindings.hpp"

namespace moesaic {
class GgufFile;
}

namespace moesaic::python {

/// What `__reduce__` returns for an object of a class.
using Reduce = std::function<py::object(py::handle self)>;
void reduce_by(py::handle type, Reduce reduce);
/// Throws TypeError for an object whose class says nothing.
py::object reduce(const py::object& self);

py::object pickling_function(const char* name);
/// (function of moesaic._pickling, arguments), which is what pickle calls to make the object again.
template <class... Arguments>
py::tuple reduced(const char* function, Arguments&&... arguments) {
  return py::make_tuple(pickling_function(function),
                        py::make_tuple(std::forward<Arguments>(arguments)...));
}

/// Notes how an object that was read from files is read from them again. `reduced` is what
/// `__reduce__` will return.
void remember_origin(const std::shared_ptr<const void>& object, py::object reduced);
/// What was noted. Throws DTypeError for an object made of arrays.
py::object origin_of(const std::shared_ptr<const void>& object, const char* label);
/// What was noted, or None.
py::object find_origin(const std::shared_ptr<const void>& object);

/// Notes what tells the file from a later one of the same name. Call it where a file is opened.
void remember_file(const std::shared_ptr<GgufFile>& file);
/// The moesaic._pickling.GgufSource of a file; all that was read from one file shares it.
py::object source_of(const std::shared_ptr<GgufFile>& file);

/// The table that a notebook shows for the fields of an object.
py::object html_of(const std::string& label, const py::dict& fields);

}  // namespace moesaic::python
