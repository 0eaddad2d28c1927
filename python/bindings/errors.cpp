/// The error family in Python: each class derives from moesaic.Error and from the builtin that a
/// caller would catch. A failed system call becomes the OSError of its errno.

#include "errors.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "docs.hpp"
#include "gil.hpp"
#include "moesaic/error.hpp"
#include "moesaic/expert_stack.hpp"
#include "text.hpp"

namespace moesaic::python {
namespace {

// Borrowed for the life of the process: exception classes are never unloaded.
struct Classes {
  PyObject *error, *shape, *format, *workspace, *config, *dtype, *unsupported, *device, *capture,
      *out_of_memory, *cancelled, *argument;
};
Classes classes{};

/// The parts of a message by the names of the fields of an error.
constexpr std::pair<const char*, std::string Problem::*> kFields[] = {
    {"operation", &Problem::operation}, {"what", &Problem::what},
    {"expected", &Problem::expected},   {"got", &Problem::got},
    {"hint", &Problem::hint},
};

PyObject* make_class(py::module_& m, const char* name, PyObject* builtin, PyObject* base) {
  py::list bases;
  bases.append(py::handle(base));
  if (builtin != nullptr) bases.append(py::handle(builtin));
  const std::string full = std::string("moesaic.") + name;
  // An error that Python code makes without parts has empty ones.
  py::dict fields;
  if (base == PyExc_Exception) {
    for (const auto& [field, part] : kFields) fields[field] = "";
  }
  PyObject* type = PyErr_NewException(full.c_str(), py::tuple(bases).ptr(), fields.ptr());
  if (type == nullptr) throw py::error_already_set();
  m.attr(name) = py::handle(type);
  return type;
}

/// Functions of C++ are written with colons, those of Python with dots.
std::string with_dots(std::string name) {
  for (std::size_t at = 0; (at = name.find("::", at)) != std::string::npos;)
    name.replace(at, 2, ".");
  return name;
}

/// Whether help() has the function: one with a docstring, or one that is written in Python.
bool is_python_operation(std::string_view name) {
  constexpr std::string_view kWrittenInPython[] = {
      "convert", "environment", "pickle", "profile", "tuning", "unpickle",
  };
  return std::ranges::find(kWrittenInPython, name) != std::end(kWrittenInPython) ||
         std::ranges::any_of(std::span(kDocs, kNumDocs),
                             [&](const Doc& doc) { return doc.name == name; });
}

py::object make_error(py::handle type, Problem problem) {
  problem.operation = with_dots(problem.operation);
  py::object error = type(message_to_python(format_problem(problem)));
  for (const auto& [name, field] : kFields) error.attr(name) = message_to_python(problem.*field);
  return error;
}

void set_error(PyObject* type, const Problem& problem) {
  PyErr_SetObject(type, make_error(type, problem).ptr());
}

void set_error(PyObject* type, const Error& error) { set_error(type, error.problem()); }

void raise_os_error(const IoError& error) {
  if (error.code() == ENOMEM) {
    set_error(classes.out_of_memory, error);
    return;
  }
  // OSError(errno, text, path) picks the subclass, e.g. FileNotFoundError, and says the path itself.
  std::string text = error.problem().got;
  if (error.code() == EISDIR) text += " (MoeLayer.from_safetensors opens a checkpoint folder)";
  const py::object value = py::handle(PyExc_OSError)(error.code(), message_to_python(text),
                                                     path_to_python(error.path()));
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())), value.ptr());
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const IoError& e) {
    raise_os_error(e);
  } catch (const ShapeError& e) {
    set_error(classes.shape, e);
  } catch (const FormatError& e) {
    set_error(classes.format, e);
  } catch (const WorkspaceError& e) {
    set_error(classes.workspace, e);
  } catch (const ConfigError& e) {
    set_error(classes.config, e);
  } catch (const DTypeError& e) {
    set_error(classes.dtype, e);
  } catch (const UnsupportedError& e) {
    set_error(classes.unsupported, e);
  } catch (const DeviceError& e) {
    set_error(classes.device, e);
  } catch (const CaptureError& e) {
    set_error(classes.capture, e);
  } catch (const OutOfMemoryError& e) {
    set_error(classes.out_of_memory, e);
  } catch (const std::bad_alloc&) {
    set_error(classes.out_of_memory,
              {"allocation", {}, {}, "no memory", "the sizes asked for are too large"});
  } catch (const OperationCancelled& e) {
    if (!restore_interrupt()) set_error(classes.cancelled, e);
  } catch (const py::cast_error& e) {
    // pybind11 makes it a RuntimeError, but what it says is that an object is of another type.
    PyErr_SetString(PyExc_TypeError, e.what());
  } catch (const Error& e) {
    set_error(classes.error, e);
  }
}

}  // namespace

void bind_errors(py::module_& m) {
  PyObject* error = make_class(m, "Error", nullptr, PyExc_Exception);
  const auto derive = [&](const char* name, PyObject* builtin) {
    return make_class(m, name, builtin, error);
  };
  classes.error = error;
  classes.shape = derive("ShapeError", PyExc_ValueError);
  classes.format = derive("FormatError", PyExc_ValueError);
  classes.workspace = derive("WorkspaceError", PyExc_ValueError);
  classes.config = derive("ConfigError", PyExc_ValueError);
  classes.dtype = derive("DTypeError", PyExc_TypeError);
  classes.unsupported = derive("UnsupportedError", PyExc_NotImplementedError);
  classes.device = derive("DeviceError", PyExc_RuntimeError);
  classes.capture = derive("CaptureError", PyExc_RuntimeError);
  classes.out_of_memory = derive("OutOfMemoryError", PyExc_MemoryError);
  classes.cancelled = derive("OperationCancelled", nullptr);
  classes.argument = derive("ArgumentError", PyExc_TypeError);
  py::register_exception_translator(&translate);
  // What Python code of this package raises; its errors have the same fields.
  m.def(
      "make_error",
      [](const py::object& kind, const std::string& operation, const std::string& what,
         const std::string& expected, const std::string& got, const std::string& hint) {
        return make_error(kind, {operation, what, expected, got, hint});
      },
      py::arg("kind"), py::arg("operation"), py::arg("what"), py::arg("expected") = "",
      py::arg("got") = "", py::arg("hint") = "");
}

void name_called(const std::string& called) {
  py::error_already_set error;
  const py::object value = error.value();
  try {
    Problem problem;
    for (const auto& [name, field] : kFields) {
      problem.*field = text_from_python(value.attr(name)).value_or("");
    }
    if (!problem.operation.empty() && !is_python_operation(problem.operation)) {
      problem.operation = called;
      value.attr("operation") = called;
      value.attr("args") = py::make_tuple(message_to_python(format_problem(problem)));
    }
  } catch (const std::exception&) {
    // The message as it was says more than an error about it.
    PyErr_Clear();
  }
  error.restore();
}

bool is_library_error(PyObject* type) {
  return classes.error != nullptr && PyErr_GivenExceptionMatches(type, classes.error) != 0;
}

void set_argument_error(Problem problem) {
  constexpr std::size_t kLine = 200, kPart = 70;
  for (std::string* part : {&problem.expected, &problem.got}) {
    if (part->size() > kPart) *part = part->substr(0, kPart) + "...";
  }
  if (format_problem(problem).size() > kLine) problem.hint.clear();
  set_error(classes.argument, problem);
}

}  // namespace moesaic::python
