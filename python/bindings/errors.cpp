/// The error family in Python: each class derives from moesaic.Error and from the builtin that a
/// caller would catch. A failed system call becomes the OSError of its errno.

#include <new>

#include "bindings.hpp"
#include "moesaic/error.hpp"
#include "moesaic/expert_stack.hpp"

namespace moesaic::python {
namespace {

// Borrowed for the life of the process: exception classes are never unloaded.
struct Classes {
  PyObject *error, *shape, *format, *workspace, *config, *dtype, *unsupported, *device, *capture,
      *out_of_memory, *cancelled;
};
Classes classes{};

PyObject* make_class(py::module_& m, const char* name, const char* doc, PyObject* builtin,
                     PyObject* base) {
  py::list bases;
  bases.append(py::handle(base));
  if (builtin != nullptr) bases.append(py::handle(builtin));
  const std::string full = std::string("moesaic.") + name;
  PyObject* type = PyErr_NewExceptionWithDoc(full.c_str(), doc, py::tuple(bases).ptr(), nullptr);
  if (type == nullptr) throw py::error_already_set();
  m.attr(name) = py::handle(type);
  return type;
}

void raise_os_error(const IoError& error) {
  // OSError(errno, text, path) picks the subclass, e.g. FileNotFoundError.
  const py::object value =
      py::handle(PyExc_OSError)(error.code(), py::str(error.what()), py::str(error.path()));
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())), value.ptr());
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const IoError& e) {
    raise_os_error(e);
  } catch (const ShapeError& e) {
    PyErr_SetString(classes.shape, e.what());
  } catch (const FormatError& e) {
    PyErr_SetString(classes.format, e.what());
  } catch (const WorkspaceError& e) {
    PyErr_SetString(classes.workspace, e.what());
  } catch (const ConfigError& e) {
    PyErr_SetString(classes.config, e.what());
  } catch (const DTypeError& e) {
    PyErr_SetString(classes.dtype, e.what());
  } catch (const UnsupportedError& e) {
    PyErr_SetString(classes.unsupported, e.what());
  } catch (const DeviceError& e) {
    PyErr_SetString(classes.device, e.what());
  } catch (const CaptureError& e) {
    PyErr_SetString(classes.capture, e.what());
  } catch (const OutOfMemoryError& e) {
    PyErr_SetString(classes.out_of_memory, e.what());
  } catch (const std::bad_alloc&) {
    PyErr_SetString(classes.out_of_memory, "allocation failed: the sizes asked for are too large");
  } catch (const OperationCancelled& e) {
    PyErr_SetString(classes.cancelled, e.what());
  } catch (const Error& e) {
    PyErr_SetString(classes.error, e.what());
  }
}

}  // namespace

void bind_errors(py::module_& m) {
  PyObject* error =
      make_class(m, "Error", "Base of all errors of moesaic: operation, what, expected, got, hint.",
                 nullptr, PyExc_Exception);
  classes.error = error;
  classes.shape =
      make_class(m, "ShapeError", "A size or stride does not fit.", PyExc_ValueError, error);
  classes.format =
      make_class(m, "FormatError", "A file is malformed or inconsistent.", PyExc_ValueError, error);
  classes.workspace = make_class(m, "WorkspaceError", "A workspace is too small or in use.",
                                 PyExc_ValueError, error);
  classes.config =
      make_class(m, "ConfigError", "A setting has a bad value.", PyExc_ValueError, error);
  classes.dtype = make_class(m, "DTypeError", "An element type or kind of object is not accepted.",
                             PyExc_TypeError, error);
  classes.unsupported = make_class(m, "UnsupportedError", "Valid, but not available here.",
                                   PyExc_NotImplementedError, error);
  classes.device =
      make_class(m, "DeviceError", "A device or file is absent, closed, in use or failed.",
                 PyExc_RuntimeError, error);
  classes.capture = make_class(m, "CaptureError", "Not possible while a graph is captured.",
                               PyExc_RuntimeError, error);
  classes.out_of_memory =
      make_class(m, "OutOfMemoryError", "An allocation failed.", PyExc_MemoryError, error);
  classes.cancelled =
      make_class(m, "OperationCancelled", "A progress callback returned False.", nullptr, error);
  py::register_exception_translator(&translate);
}

}  // namespace moesaic::python
