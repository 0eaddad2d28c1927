/// The error family in Python: each class derives from moesaic.Error and from the builtin that a
/// caller would catch. A failed system call becomes the OSError of its errno.

#include <cerrno>
#include <cstring>
#include <new>

#include "bindings.hpp"
#include "gil.hpp"
#include "moesaic/error.hpp"
#include "moesaic/expert_stack.hpp"
#include "text.hpp"

namespace moesaic::python {
namespace {

// Borrowed for the life of the process: exception classes are never unloaded.
struct Classes {
  PyObject *error, *shape, *format, *workspace, *config, *dtype, *unsupported, *device, *capture,
      *out_of_memory, *cancelled;
};
Classes classes{};

PyObject* make_class(py::module_& m, const char* name, PyObject* builtin, PyObject* base) {
  py::list bases;
  bases.append(py::handle(base));
  if (builtin != nullptr) bases.append(py::handle(builtin));
  const std::string full = std::string("moesaic.") + name;
  PyObject* type = PyErr_NewException(full.c_str(), py::tuple(bases).ptr(), nullptr);
  if (type == nullptr) throw py::error_already_set();
  m.attr(name) = py::handle(type);
  return type;
}

void set_error(PyObject* type, const char* text) {
  PyErr_SetObject(type, message_to_python(text).ptr());
}

void raise_os_error(const IoError& error) {
  if (error.code() == ENOMEM) {
    set_error(classes.out_of_memory, error.what());
    return;
  }
  // OSError(errno, text, path) picks the subclass, e.g. FileNotFoundError.
  const py::object value = py::handle(PyExc_OSError)(error.code(), message_to_python(error.what()),
                                                     path_to_python(error.path()));
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())), value.ptr());
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const IoError& e) {
    raise_os_error(e);
  } catch (const ShapeError& e) {
    set_error(classes.shape, e.what());
  } catch (const FormatError& e) {
    set_error(classes.format, e.what());
  } catch (const WorkspaceError& e) {
    set_error(classes.workspace, e.what());
  } catch (const ConfigError& e) {
    set_error(classes.config, e.what());
  } catch (const DTypeError& e) {
    set_error(classes.dtype, e.what());
  } catch (const UnsupportedError& e) {
    set_error(classes.unsupported, e.what());
  } catch (const DeviceError& e) {
    set_error(classes.device, e.what());
  } catch (const CaptureError& e) {
    set_error(classes.capture, e.what());
  } catch (const OutOfMemoryError& e) {
    set_error(classes.out_of_memory, e.what());
  } catch (const std::bad_alloc&) {
    set_error(classes.out_of_memory, "allocation failed: the sizes asked for are too large");
  } catch (const OperationCancelled& e) {
    if (!restore_interrupt()) set_error(classes.cancelled, e.what());
  } catch (const py::cast_error& e) {
    // pybind11 makes it a RuntimeError, but what it says is that an object is of another type.
    PyErr_SetString(PyExc_TypeError, e.what());
  } catch (const Error& e) {
    set_error(classes.error, e.what());
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
  py::register_exception_translator(&translate);
}

}  // namespace moesaic::python
