#pragma once

/// Value classes. A class lists its fields, and all that a value can do follows from the list:
/// properties, ==, hash, pickle, copy, to_dict for JSON, and a table in notebooks; where it has a
/// constructor, from_dict, replace and a repr besides.

#include <pybind11/stl.h>

#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "gil.hpp"
#include "moesaic/backend_facts.hpp"
#include "moesaic/names.hpp"
#include "moesaic/quant.hpp"
#include "pickling.hpp"
#include "text.hpp"

namespace moesaic::python {

/// The double of the shortest decimal that is this float: 1.702, not 1.7020000219345093. It
/// converts back to the same float.
double as_written(float value);

/// Between a member and what Python sees of it. `from` throws what names the field.
template <class V>
struct FieldCast {
  static py::object to(const V& value) { return py::cast(value); }
  static V from(py::handle object, const char*, const char*) { return object.cast<V>(); }
};
template <>
struct FieldCast<float> {
  static py::object to(float value) { return py::float_(as_written(value)); }
  static float from(py::handle object, const char*, const char*) { return object.cast<float>(); }
};
template <>
struct FieldCast<std::vector<float>> {
  static py::object to(const std::vector<float>& values);
  static std::vector<float> from(py::handle object, const char*, const char*);
};
/// Some text comes from files, whose bytes need not be UTF-8.
template <>
struct FieldCast<std::string> {
  static py::object to(const std::string& value) { return text_to_python(value); }
  static std::string from(py::handle object, const char* label, const char* name);
};
template <class E>
  requires std::is_enum_v<E>
struct FieldCast<E> {
  static py::object to(E value) { return py::str(name_of(value)); }
  static E from(py::handle object, const char* label, const char* name) {
    return parse_name<E>(object.cast<std::string>(), label, name);
  }
};
template <>
struct FieldCast<QuantType> {
  static py::object to(QuantType value) { return py::str(std::string(traits(value).name)); }
  static QuantType from(py::handle object, const char* label, const char* name);
};
template <>
struct FieldCast<std::vector<Device>> {
  static py::object to(const std::vector<Device>& devices);
  static std::vector<Device> from(py::handle object, const char*, const char*);
};

struct Field {
  std::string name;
  std::function<py::object(const void* self)> get{};
  /// Empty where only a constructor can make the class.
  std::function<void(void* self, py::handle value)> set{};
  /// The object that a dict in JSON stands for; other values stay.
  std::function<py::object(const py::object& plain)> revive{};
};

/// The fields of T in their order.
template <class T>
class Fields {
 public:
  explicit Fields(const char* label) : label_(label) {}
  /// A member, by its pointer or by a function that gives a reference to it.
  template <class Access>
  Fields& add(const char* name, Access access) {
    using V = std::remove_cvref_t<std::invoke_result_t<Access, T&>>;
    Field field{name};
    field.get = [access](const void* self) {
      return FieldCast<V>::to(std::invoke(access, *static_cast<const T*>(self)));
    };
    field.set = [access, name, label = label_](void* self, py::handle value) {
      std::invoke(access, *static_cast<T*>(self)) = FieldCast<V>::from(value, label, name);
    };
    if constexpr (std::is_class_v<V> &&
                  std::is_base_of_v<py::detail::type_caster_generic, py::detail::make_caster<V>>) {
      field.revive = [](const py::object& plain) -> py::object {
        if (!py::isinstance<py::dict>(plain)) return plain;
        return call_python(py::type::of<V>().attr("from_dict"), py::make_tuple(plain));
      };
    }
    all_.push_back(std::move(field));
    return *this;
  }
  /// What is computed from the object, which only a constructor can give back to a new one.
  template <class Get>
  Fields& view(const char* name, Get get) {
    all_.push_back({name, [get](const void* self) -> py::object {
                      return get(*static_cast<const T*>(self));
                    }});
    return *this;
  }
  const char* label() const { return label_; }
  const std::vector<Field>& all() const { return all_; }

 private:
  const char* label_;
  std::vector<Field> all_;
};

/// Throws ConfigError naming the first of these fields that a dict of them lacks.
void check_fields(const py::dict& values, const char* operation,
                  std::initializer_list<const char*> names);

/// The functions of a value class, which know no type.
struct ValueClass {
  std::string label;
  std::vector<Field> fields;
  /// Makes an object of a dict with a value for each field.
  std::function<py::object(const py::dict& values)> make{};

  /// The fields as the properties give them.
  py::dict values(const void* self) const;
  /// The fields as numbers, text, lists and dicts.
  py::dict plain(const void* self) const;
  /// The fields as a tuple that can be compared and hashed; arrays count by their bytes.
  py::tuple key(const void* self) const;
  std::string repr(const void* self) const;
  /// Throws ArgumentError naming the field nearest to a name that is none.
  void check_names(const py::dict& given, const std::string& operation) const;
  py::object from_plain(const py::object& mapping) const;
  py::object replaced(const void* self, const py::dict& changes) const;
};

/// What a value class can do besides. A class whose objects change has no hash.
struct ValueOptions {
  bool hash = true;
  bool from_dict = false;
  bool replace = false;
  bool repr = false;
  /// How an object is made of its fields; member by member when empty.
  std::function<py::object(const py::dict& values)> make{};
};

/// Those of a class whose constructor takes the fields by name.
template <class T>
ValueOptions constructed() {
  return {.from_dict = true, .replace = true, .repr = true, .make = [](const py::dict& values) {
            return py::type::of<T>()(**values);
          }};
}

template <class T, class... Extra>
void define_value(py::class_<T, Extra...>& type, const Fields<T>& fields,
                  ValueOptions options = {}) {
  const auto value = std::make_shared<ValueClass>(ValueClass{fields.label(), fields.all()});
  if (options.make) {
    value->make = std::move(options.make);
  } else if constexpr (std::is_default_constructible_v<T>) {
    value->make = [fields](const py::dict& values) -> py::object {
      T made{};
      for (const Field& field : fields.all()) {
        if (values.contains(field.name)) field.set(&made, values[py::str(field.name)]);
      }
      return py::cast(std::move(made));
    };
  }
  for (const Field& field : fields.all()) {
    type.def_property_readonly(field.name.c_str(),
                               [get = field.get](const T& self) { return get(&self); });
  }
  type.def("to_dict", [value](const T& self) { return value->plain(&self); })
      .def("__eq__",
           [value](const T& a, const py::object& b) -> py::object {
             if (!py::isinstance<T>(b)) {
               return py::reinterpret_borrow<py::object>(Py_NotImplemented);
             }
             return py::bool_(value->key(&a).equal(value->key(&b.cast<const T&>())));
           })
      .def("_repr_html_",
           [value](const T& self) { return html_of(value->label, value->plain(&self)); })
      .def_static("_from_fields", [value](const py::dict& values) { return value->make(values); });
  if (options.hash) {
    type.def("__hash__", [value](const T& self) { return py::hash(value->key(&self)); });
  }
  if (options.from_dict) {
    type.def_static(
        "from_dict", [value](const py::object& fields) { return value->from_plain(fields); },
        py::arg("fields"));
  }
  if (options.replace) {
    type.def("replace", [value](const T& self, const py::kwargs& changes) {
      return value->replaced(&self, changes);
    });
  }
  if (options.repr) {
    type.def("__repr__", [value](const T& self) { return value->repr(&self); });
  }
  reduce_by(type, [value](py::handle self) -> py::object {
    const T& held = self.cast<const T&>();
    return reduced("value", py::type::of(self), value->values(&held));
  });
}

}  // namespace moesaic::python
