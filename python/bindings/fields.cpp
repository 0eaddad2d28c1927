/// What all value classes do with the list of their fields.

#include "fields.hpp"

#include <pybind11/numpy.h>

#include <algorithm>

#include "arrays.hpp"
#include "base/nearest.hpp"
#include "errors.hpp"
#include "moesaic/error.hpp"
#include "quant.hpp"

namespace moesaic::python {
namespace {

/// A value of a field as JSON knows it.
py::object plain_of(const py::object& value) {
  if (py::isinstance<py::array>(value)) {
    const auto array = py::reinterpret_borrow<py::array>(value);
    const bool rows = array.ndim() > 1;
    if (!rows && !array.dtype().equal(py::dtype::of<float>())) return array.attr("tolist")();
    py::list list;
    for (const py::handle item : array) {
      list.append(rows ? plain_of(py::reinterpret_borrow<py::object>(item))
                       : FieldCast<float>::to(item.cast<float>()));
    }
    return list;
  }
  if (py::isinstance<py::list>(value) || py::isinstance<py::tuple>(value)) {
    py::list list;
    for (const py::handle item : value) {
      list.append(plain_of(py::reinterpret_borrow<py::object>(item)));
    }
    return list;
  }
  if (py::hasattr(value, "to_dict")) return value.attr("to_dict")();
  // An array of a GPU's package.
  if (py::hasattr(value, "tolist")) return value.attr("tolist")();
  return value;
}

/// A value of a field as something that compares and has a hash.
py::object key_of(const py::object& value) {
  if (py::isinstance<py::list>(value) || py::isinstance<py::tuple>(value)) {
    py::list list;
    for (const py::handle item : value) {
      list.append(key_of(py::reinterpret_borrow<py::object>(item)));
    }
    return py::tuple(list);
  }
  if (py::hasattr(value, "tobytes")) {
    return py::make_tuple(value.attr("shape"), value.attr("tobytes")());
  }
  if (py::hasattr(value, "tolist")) return key_of(value.attr("tolist")());
  return value;
}

}  // namespace

double as_written(float value) {
  constexpr int kEnough = 9;  // digits tell every float from its neighbours
  for (int digits = 1; digits <= kEnough; ++digits) {
    char* const text = PyOS_double_to_string(static_cast<double>(value), 'g', digits, 0, nullptr);
    if (text == nullptr) throw py::error_already_set();
    const double written = PyOS_string_to_double(text, nullptr, nullptr);
    PyMem_Free(text);
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (static_cast<float>(written) == value) return written;
  }
  return static_cast<double>(value);
}

py::object FieldCast<std::vector<float>>::to(const std::vector<float>& values) {
  py::list list(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) list[i] = FieldCast<float>::to(values[i]);
  return list;
}

std::vector<float> FieldCast<std::vector<float>>::from(py::handle object, const char*,
                                                       const char*) {
  return object.cast<std::vector<float>>();
}

std::string FieldCast<std::string>::from(py::handle object, const char* label, const char* name) {
  const std::optional<std::string> text = text_from_python(object);
  require<DTypeError>(text.has_value(), [&] {
    return Problem{label, name, "a str", Py_TYPE(object.ptr())->tp_name, {}};
  });
  return *text;
}

QuantType FieldCast<QuantType>::from(py::handle object, const char* label, const char* name) {
  const auto text = object.cast<std::string>();
  // No file has it, so the table of ggml's types does not name it.
  if (text == traits(QuantType::INT4).name) return QuantType::INT4;
  return parse_quant_type(text, label, name);
}

py::object FieldCast<std::vector<Device>>::to(const std::vector<Device>& devices) {
  py::list list;
  for (const Device device : devices) list.append(to_string(device));
  return list;
}

std::vector<Device> FieldCast<std::vector<Device>>::from(py::handle object, const char*,
                                                         const char*) {
  std::vector<Device> devices;
  for (const std::string& name : object.cast<std::vector<std::string>>()) {
    devices.push_back(parse_device(name));
  }
  return devices;
}

void check_fields(const py::dict& values, const char* operation,
                  std::initializer_list<const char*> names) {
  for (const char* name : names) {
    require<ConfigError>(values.contains(name), [&] {
      return Problem{operation, name, "a field of the class", "none", {}};
    });
  }
}

py::dict ValueClass::values(const void* self) const {
  py::dict all;
  for (const Field& field : fields) all[py::str(field.name)] = field.get(self);
  return all;
}

py::dict ValueClass::plain(const void* self) const {
  py::dict all;
  for (const Field& field : fields) all[py::str(field.name)] = plain_of(field.get(self));
  return all;
}

py::tuple ValueClass::key(const void* self) const {
  py::list all;
  for (const Field& field : fields) all.append(key_of(field.get(self)));
  return py::tuple(all);
}

std::string ValueClass::repr(const void* self) const {
  std::string text;
  for (const Field& field : fields) {
    text += (text.empty() ? "" : ", ") + field.name + "=" + std::string(py::repr(field.get(self)));
  }
  return "moesaic." + label + "(" + text + ")";
}

void ValueClass::check_names(const py::dict& given, const std::string& operation) const {
  std::vector<std::string_view> known;
  for (const Field& field : fields) known.push_back(field.name);
  for (const auto& [name, value] : given) {
    const std::string text = text_bytes(py::str(name));
    if (std::ranges::find(known, text) != known.end()) continue;
    // The nearest in any case: a field that is far from all others is misspelt all the more.
    const auto distance = [&](std::string_view one) { return edit_distance(text, one); };
    const std::string nearest(*std::ranges::min_element(known, {}, distance));
    set_argument_error(
        {operation, text.substr(0, 40), {}, "an unknown field", "nearest: " + nearest});
    throw py::error_already_set();
  }
}

py::object ValueClass::from_plain(const py::object& mapping) const {
  const std::string operation = label + ".from_dict";
  if (PyMapping_Check(mapping.ptr()) == 0 || !py::hasattr(mapping, "keys")) {
    set_argument_error({operation, "fields", "a mapping", type_name(mapping), {}});
    throw py::error_already_set();
  }
  py::dict given(mapping);
  check_names(given, operation);
  for (const Field& field : fields) {
    const py::str name(field.name);
    if (field.revive && given.contains(name)) given[name] = field.revive(given[name]);
  }
  return make(given);
}

py::object ValueClass::replaced(const void* self, const py::dict& changes) const {
  check_names(changes, label + ".replace");
  py::dict all = values(self);
  all.attr("update")(changes);
  return make(all);
}

}  // namespace moesaic::python
