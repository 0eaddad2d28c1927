#include "docs.hpp"

#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>

namespace moesaic::python {

PyCFunctionObject* builtin_in(py::handle attribute) {
  PyObject* object = attribute.ptr();
  if (PyInstanceMethod_Check(object)) object = PyInstanceMethod_GET_FUNCTION(object);
  py::object inner;
  for (const char* name : {"fget", "__func__"}) {
    if (PyCFunction_Check(object)) break;
    if (!py::hasattr(object, name)) continue;
    inner = py::handle(object).attr(name);
    object = inner.ptr();
  }
  if (!PyCFunction_Check(object)) return nullptr;
  return reinterpret_cast<PyCFunctionObject*>(object);
}

namespace {

/// pybind11 lets go of this text with free().
char* allocated(const char* text) {
  const std::size_t size = std::strlen(text) + 1;
  auto* copy = static_cast<char*>(std::malloc(size));
  if (copy == nullptr) throw std::bad_alloc();
  std::memcpy(copy, text, size);
  return copy;
}

/// CPython takes __doc__ and __text_signature__ of a builtin function out of this one text.
void set_function_text(PyCFunctionObject* function, const char* text) {
  std::free(const_cast<char*>(function->m_ml->ml_doc));
  function->m_ml->ml_doc = allocated(text);
}

/// A class has its docstring in its dictionary, and the signature in tp_doc, which CPython frees.
void set_class_text(py::handle type, const char* text) {
  auto* object = reinterpret_cast<PyTypeObject*>(type.ptr());
  const std::size_t size = std::strlen(text) + 1;
#if PY_VERSION_HEX >= 0x030D0000
  PyMem_Free(const_cast<char*>(object->tp_doc));
  void* copy = PyMem_Malloc(size);
#else
  PyObject_Free(const_cast<char*>(object->tp_doc));
  void* copy = PyObject_Malloc(size);
#endif
  if (copy == nullptr) throw std::bad_alloc();
  std::memcpy(copy, text, size);
  object->tp_doc = static_cast<const char*>(copy);
  constexpr std::string_view kSeparator = "\n--\n\n";
  const std::string_view whole = text;
  const std::size_t at = whole.find(kSeparator);
  type.attr("__doc__") =
      std::string(at == std::string_view::npos ? whole : whole.substr(at + kSeparator.size()));
}

/// The first line that pybind11 made: name, parameters, defaults, result.
std::string bound_signature(const PyCFunctionObject* function) {
  const std::string_view text = function->m_ml->ml_doc != nullptr ? function->m_ml->ml_doc : "";
  return std::string(text.substr(0, text.find('\n')));
}

py::object* bound_signatures = nullptr;

void attach(py::module_& m, const Doc& doc) {
  const std::string name = doc.name;
  const std::size_t dot = name.find('.');
  if (name.empty()) {
    m.attr("__doc__") = doc.text;
    return;
  }
  // The class's own dictionary: what it inherits is not ours to change.
  const py::object scope =
      dot == std::string::npos ? py::object(m) : m.attr(name.substr(0, dot).c_str());
  const py::object members = scope.attr("__dict__");
  const py::str key(dot == std::string::npos ? name : name.substr(dot + 1));
  if (!members.contains(key)) return;
  const py::object attribute = members[key];
  if (PyType_Check(attribute.ptr()) != 0) {
    set_class_text(attribute, doc.text);
  } else if (PyObject_TypeCheck(attribute.ptr(), &PyProperty_Type) != 0) {
    attribute.attr("__doc__") = doc.text;
  } else if (PyCFunctionObject* function = builtin_in(attribute)) {
    (*bound_signatures)[py::str(name)] = bound_signature(function);
    set_function_text(function, doc.text);
  }
}

}  // namespace

void attach_docs(py::module_& m) {
  // Never released, as the module is not.
  bound_signatures = new py::object(py::dict());
  for (std::size_t i = 0; i < kNumDocs; ++i) attach(m, kDocs[i]);
  // help() names the class of what a builtin is bound to, which is a record of pybind11's.
  const py::object record = m.attr("route").attr("__self__").attr("__class__");
  for (const char* name : {"__name__", "__qualname__"})
    py::setattr(record, name, py::str("builtin"));
  py::setattr(record, "__module__", py::str("moesaic"));
  m.def("_bound_signatures", [] { return *bound_signatures; });
}

}  // namespace moesaic::python
