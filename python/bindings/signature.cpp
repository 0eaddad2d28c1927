#include "signature.hpp"

#include <pybind11/numpy.h>

#include <algorithm>

#include "arrays.hpp"
#include "base/nearest.hpp"

namespace moesaic::python {
namespace {

/// Steps over brackets and quoted text; `depth` is 0 outside of both.
class Nesting {
 public:
  /// Whether `c` is outside of brackets and quotes, itself included.
  bool outside(char c) {
    if (quote_ != 0) {
      if (c == quote_) quote_ = 0;
      return false;
    }
    if (c == '\'' || c == '"') {
      quote_ = c;
      return false;
    }
    if (c == ')' || c == ']' || c == '}') --depth_;
    const bool out = depth_ == 0;
    if (c == '(' || c == '[' || c == '{') ++depth_;
    return out;
  }

 private:
  int depth_ = 0;
  char quote_ = 0;
};

std::vector<std::string_view> split(std::string_view text, std::string_view separator) {
  std::vector<std::string_view> parts;
  Nesting nesting;
  std::size_t start = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (!nesting.outside(text[i]) || !text.substr(i).starts_with(separator)) continue;
    parts.push_back(text.substr(start, i - start));
    start = i + separator.size();
    i = start - 1;
  }
  parts.push_back(text.substr(start));
  return parts;
}

/// What stands between the first bracket and its partner.
std::string_view inside(std::string_view text, char open) {
  const std::size_t start = text.find(open);
  if (start == std::string_view::npos) return {};
  Nesting nesting;
  for (std::size_t i = start + 1; i < text.size(); ++i) {
    const bool closes = text[i] == ')' || text[i] == ']';
    if (closes) {
      // The partner would take the depth below that of the start.
      Nesting here = nesting;
      here.outside('(');
      if (here.outside(text[i])) return text.substr(start + 1, i - start - 1);
    }
    nesting.outside(text[i]);
  }
  return text.substr(start + 1);
}

bool is_text(py::handle object) {
  return PyUnicode_Check(object.ptr()) || PyBytes_Check(object.ptr()) ||
         PyByteArray_Check(object.ptr());
}

bool is_sequence(py::handle object) {
  return PySequence_Check(object.ptr()) != 0 && !is_text(object);
}

bool fits_number(py::handle object) {
  if (is_text(object)) return false;
  PyFloat_AsDouble(object.ptr());
  const bool bad = PyErr_Occurred() != nullptr;
  PyErr_Clear();
  return !bad;
}

/// As pybind11's caster of bool: what says by itself whether it is true.
bool fits_bool(py::handle object) {
  if (object.is_none() || PyBool_Check(object.ptr())) return true;
  const PyNumberMethods* methods = Py_TYPE(object.ptr())->tp_as_number;
  if (methods == nullptr || methods->nb_bool == nullptr) return false;
  const int truth = methods->nb_bool(object.ptr());
  PyErr_Clear();
  return truth == 0 || truth == 1;
}

bool fits_type(std::string_view type, py::handle object, const py::dict& classes);

bool fits_sequence(std::string_view element, py::handle object, const py::dict& classes) {
  if (!is_sequence(object)) return false;
  // A long one whose first elements fit is not what failed.
  constexpr py::ssize_t kLook = 64;
  const py::ssize_t size = PySequence_Size(object.ptr());
  for (py::ssize_t i = 0; i < std::min(size, kLook); ++i) {
    const auto item = py::reinterpret_steal<py::object>(PySequence_GetItem(object.ptr(), i));
    if (!item) {
      PyErr_Clear();
      return false;
    }
    if (!fits_type(element, item, classes)) return false;
  }
  PyErr_Clear();
  return size >= 0;
}

bool fits_tuple(std::string_view elements, py::handle object, const py::dict& classes) {
  if (!is_sequence(object)) return false;
  const auto types = split(elements, ", ");
  if (PySequence_Size(object.ptr()) != static_cast<py::ssize_t>(types.size())) return false;
  for (std::size_t i = 0; i < types.size(); ++i) {
    const auto item = py::reinterpret_steal<py::object>(
        PySequence_GetItem(object.ptr(), static_cast<py::ssize_t>(i)));
    if (!item || !fits_type(types[i], item, classes)) {
      PyErr_Clear();
      return false;
    }
  }
  return true;
}

bool fits_single(std::string_view type, py::handle object, const py::dict& classes) {
  if (type == "None") return object.is_none();
  if (type == "typing.SupportsInt" || type == "typing.SupportsIndex") {
    const PyNumberMethods* methods = Py_TYPE(object.ptr())->tp_as_number;
    return PyFloat_Check(object.ptr()) == 0 && methods != nullptr &&
           (methods->nb_index != nullptr || methods->nb_int != nullptr);
  }
  if (type == "typing.SupportsFloat") return fits_number(object);
  if (type == "bool") return fits_bool(object);
  if (type == "str") return is_text(object);
  if (type == "bytes") return PyBytes_Check(object.ptr());
  if (type == "os.PathLike") return py::hasattr(object, "__fspath__");
  if (type == "dict") return PyDict_Check(object.ptr());
  if (type == "list") return PyList_Check(object.ptr());
  if (type.starts_with("collections.abc.Callable")) return PyCallable_Check(object.ptr()) != 0;
  if (type.starts_with("collections.abc.Sequence[") || type.starts_with("list["))
    return fits_sequence(inside(type, '['), object, classes);
  if (type.starts_with("tuple[")) return fits_tuple(inside(type, '['), object, classes);
  if (type.starts_with("typing.Annotated[")) return is_sequence(object);
  const py::str name{std::string(last_part(type))};
  if (!classes.contains(name)) return true;
  return py::isinstance(object, classes[name]);
}

bool fits_type(std::string_view type, py::handle object, const py::dict& classes) {
  return std::ranges::any_of(
      split(type, " | "), [&](std::string_view one) { return fits_single(one, object, classes); });
}

std::string with_article(std::string_view name) {
  const bool vowel = std::string_view("AEIOUaeiou").find(name.front()) != std::string_view::npos;
  return (vowel ? "an " : "a ") + std::string(name);
}

/// One alternative in words; empty for what another alternative says already.
std::string type_text(std::string_view type) {
  if (type == "typing.SupportsIndex" || type == "bytes") return {};
  if (type == "None") return "None";
  if (type == "typing.SupportsInt") return "an int";
  if (type == "typing.SupportsFloat") return "a number";
  if (type == "bool") return "True or False";
  if (type == "os.PathLike") return "a path";
  if (type.starts_with("typing.Annotated[") || type.starts_with("collections.abc.Sequence[") ||
      type.starts_with("list[")) {
    const std::string_view element = inside(type, '[');
    const bool ours = element.starts_with("moesaic.") && split(element, " | ").size() == 1;
    return ours ? "a sequence of " + std::string(last_part(element)) : "a sequence";
  }
  if (type.starts_with("tuple["))
    return "a tuple of " + std::to_string(split(inside(type, '['), ", ").size());
  if (type.starts_with("collections.abc.Callable")) return "a callable";
  return with_article(last_part(type));
}

std::string array_text(py::handle object) {
  std::string text = type_name(object);
  try {
    text += " " + std::string(py::str(object.attr("dtype"))).substr(0, 20) + " [";
    const py::tuple shape = py::tuple(object.attr("shape"));
    for (std::size_t i = 0; i < std::min<std::size_t>(shape.size(), 4); ++i)
      text += (i == 0 ? "" : ", ") + std::string(py::str(shape[i])).substr(0, 20);
    text += shape.size() > 4 ? ", ...]" : "]";
  } catch (const py::error_already_set&) {
    return type_name(object);
  } catch (const py::cast_error&) {
    return type_name(object);
  }
  return text;
}

std::string short_name(py::handle object) {
  const std::string name = type_name(object);
  return name.starts_with("moesaic.") ? std::string(last_part(name)) : name;
}

/// "list of ExpertPool, int": the types of the first elements, each once.
std::string list_text(py::handle object) {
  constexpr py::ssize_t kLook = 64;
  constexpr std::size_t kTypes = 4;
  std::vector<std::string> names;
  const py::ssize_t size = std::min(PySequence_Size(object.ptr()), kLook);
  for (py::ssize_t i = 0; i < size && names.size() < kTypes; ++i) {
    const auto item = py::reinterpret_steal<py::object>(PySequence_GetItem(object.ptr(), i));
    if (!item) {
      PyErr_Clear();  // Another thread made it shorter.
      break;
    }
    std::string name = item.is_none() ? "None" : short_name(item);
    if (std::ranges::find(names, name) == names.end()) names.push_back(std::move(name));
  }
  std::string text = type_name(object);
  for (std::size_t i = 0; i < names.size(); ++i) text += (i == 0 ? " of " : ", ") + names[i];
  return text;
}

}  // namespace

std::string_view last_part(std::string_view name) {
  const std::size_t at = name.find_last_of(".:");
  return at == std::string_view::npos ? name : name.substr(at + 1);
}

Signature read_signature(std::string_view text) {
  Signature signature;
  const std::string_view list = inside(text, '(');
  if (list.empty()) return signature;
  bool keyword_only = false;
  for (const std::string_view part : split(list, ", ")) {
    if (part == "/") continue;
    if (part.starts_with("**")) {
      signature.any_keyword = true;
    } else if (part.starts_with('*')) {
      signature.any_positional = part.size() > 1;
      keyword_only = true;
    } else {
      Parameter parameter;
      parameter.keyword_only = keyword_only;
      const auto halves = split(part, " = ");
      parameter.required = halves.size() == 1;
      const std::size_t colon = halves.front().find(": ");
      parameter.name = std::string(halves.front().substr(0, colon));
      if (colon != std::string_view::npos) {
        for (const std::string_view type : split(halves.front().substr(colon + 2), " | "))
          parameter.types.emplace_back(type);
      }
      if (!parameter.required && halves.back() == "None" &&
          std::ranges::find(parameter.types, "None") == parameter.types.end()) {
        parameter.types.emplace_back("None");
      }
      signature.parameters.push_back(std::move(parameter));
    }
  }
  return signature;
}

bool fits(const Parameter& parameter, py::handle object, const py::dict& classes) {
  return parameter.types.empty() ||
         std::ranges::any_of(parameter.types, [&](const std::string& type) {
           return type == "object" || fits_single(type, object, classes);
         });
}

std::string types_text(const Parameter& parameter) {
  const bool path = std::ranges::find(parameter.types, "os.PathLike") != parameter.types.end();
  std::string text;
  for (const std::string& type : parameter.types) {
    const std::string one = path && type == "str" ? "" : type_text(type);
    if (!one.empty()) text += (text.empty() ? "" : " or ") + one;
  }
  return text;
}

std::string object_text(py::handle object) {
  if (object.is_none()) return "None";
  if (PyType_Check(object.ptr()) != 0)
    return "the class " +
           std::string(last_part(reinterpret_cast<PyTypeObject*>(object.ptr())->tp_name));
  const bool plain = PyBool_Check(object.ptr()) || PyFloat_CheckExact(object.ptr()) ||
                     PyUnicode_CheckExact(object.ptr());
  if (PyLong_CheckExact(object.ptr()) && !PyBool_Check(object.ptr())) {
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
    return overflow != 0 ? "an int of more than 64 bits" : "int " + std::to_string(value);
  }
  if (PyUnicode_CheckExact(object.ptr())) {
    const auto bytes = py::reinterpret_steal<py::bytes>(
        PyUnicode_AsEncodedString(object.ptr(), "utf-8", "backslashreplace"));
    if (bytes) return "str " + quoted_word(std::string(bytes));
    PyErr_Clear();
    return "a str";
  }
  if (plain) return type_name(object) + " " + std::string(py::repr(object));
  if (py::hasattr(object, "dtype") && py::hasattr(object, "shape")) return array_text(object);
  if (PyList_CheckExact(object.ptr()) || PyTuple_CheckExact(object.ptr())) return list_text(object);
  return short_name(object);
}

}  // namespace moesaic::python
