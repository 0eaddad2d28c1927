/// The rules that hold for all classes, so that no class states them and none can lack them.

#include "seal.hpp"

#include <cstdlib>
#include <cstring>
#include <new>

#include "docs.hpp"
#include "errors.hpp"
#include "pickling.hpp"

namespace moesaic::python {
namespace {

/// tp_new of the base. It differs from the one that classes got from it before, so that CPython
/// itself refuses Class.__new__(Class), and nothing is made that no constructor has filled.
PyObject* refuse_new(PyTypeObject* type, PyObject*, PyObject*) {
  PyErr_Format(PyExc_TypeError, "%s: objects of this class cannot be made", type->tp_name);
  return nullptr;
}

/// The static methods of a class, which make its objects.
std::string makers_of(py::handle type) {
  std::string names;
  for (const auto& [name, value] : type.attr("__dict__").attr("copy")().cast<py::dict>()) {
    if (PyObject_TypeCheck(value.ptr(), &PyStaticMethod_Type) == 0) continue;
    constexpr std::size_t kRoom = 110;
    if (names.size() > kRoom) return names + ", ...";
    names += (names.empty() ? "" : ", ") + std::string(py::str(name));
  }
  return names;
}

/// tp_init of the classes without a constructor.
int refuse_call(PyObject* self, PyObject*, PyObject*) {
  const py::handle type(reinterpret_cast<PyObject*>(Py_TYPE(self)));
  const std::string name = py::str(type.attr("__name__")), makers = makers_of(type);
  set_argument_error({name,
                      {},
                      {},
                      "a call of the class",
                      makers.empty() ? "other calls return its objects" : "made by: " + makers});
  return -1;
}

/// What the classes say stands in for what Python would do, protocol or not (pickling.hpp).
void define_reduce(PyTypeObject* base, const char* name) {
  const py::object method =
      py::cpp_function([](const py::object& self, const py::args&) { return reduce(self); },
                       py::name(name), py::is_method(reinterpret_cast<PyObject*>(base)));
  py::handle(reinterpret_cast<PyObject*>(base)).attr(name) = method;
}

/// A pointer to no object would be what a method sees for None, so no method takes it for self.
void require_self(PyCFunctionObject* function) {
  for (auto* record = py::detail::function_record_ptr_from_PyObject(function->m_self);
       record != nullptr; record = record->next) {
    if (!record->is_method || !record->args.empty()) continue;
    // pybind11 lets go of the name with free().
    char* const name = strdup("self");
    if (name == nullptr) throw std::bad_alloc();
    record->args.emplace_back(name, nullptr, py::handle(), true, false);
  }
}

/// Type objects that Python may change allow `object.__class__ = other`, under which C++ would read
/// the memory of one class as that of another.
void freeze(PyTypeObject* type) {
  type->tp_flags |= Py_TPFLAGS_IMMUTABLETYPE;
  type->tp_flags &= ~Py_TPFLAGS_BASETYPE;
  PyType_Modified(type);
}

}  // namespace

void seal_classes(py::module_& m) {
  auto* const base = reinterpret_cast<PyTypeObject*>(py::detail::get_internals().instance_base);
  define_reduce(base, "__reduce__");
  define_reduce(base, "__reduce_ex__");
  for (const auto& [name, value] : m.attr("__dict__").cast<py::dict>()) {
    if (PyType_Check(value.ptr()) == 0) continue;
    auto* const type = reinterpret_cast<PyTypeObject*>(value.ptr());
    if (PyType_IsSubtype(type, base) == 0) continue;
    for (const auto& [member, attribute] : value.attr("__dict__").attr("copy")().cast<py::dict>()) {
      PyCFunctionObject* const function = builtin_in(attribute);
      if (function != nullptr) require_self(function);
    }
    if (type->tp_init == base->tp_init) type->tp_init = &refuse_call;
    freeze(type);
  }
  base->tp_new = &refuse_new;
  freeze(base);
  freeze(Py_TYPE(base));
}

}  // namespace moesaic::python
