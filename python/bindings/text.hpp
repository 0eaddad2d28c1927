#pragma once

/// Text that comes from files. It need not be UTF-8, and no such text may raise UnicodeDecodeError:
/// bytes that do not decode become surrogates, which encode back to them.

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "bindings.hpp"

namespace moesaic::python {

/// Names, keys and values: UTF-8 with surrogates.
py::str text_to_python(std::string_view text);
/// A message, which quotes such text: bytes that do not decode are escaped, for messages are printed.
py::str message_to_python(std::string_view text);
/// The bytes of any str, in which surrogates that stand for no byte are escaped.
std::string text_bytes(py::handle object);
/// A path, decoded as os.fsdecode does.
py::str path_to_python(const std::filesystem::path& path);
/// The bytes of a str that text_to_python may have made; empty for other objects and for surrogates
/// that stand for no byte.
std::optional<std::string> text_from_python(py::handle object);

/// A text as an argument, a field or a result: any str, whatever it holds, goes in and comes out.
struct Text {
  std::string bytes;
};

}  // namespace moesaic::python

namespace pybind11::detail {

template <>
struct type_caster<moesaic::python::Text> {
  PYBIND11_TYPE_CASTER(moesaic::python::Text, const_name("str"));
  bool load(handle source, bool) {
    if (!isinstance<str>(source)) return false;
    value.bytes = moesaic::python::text_bytes(source);
    return true;
  }
  static handle cast(const moesaic::python::Text& text, return_value_policy, handle) {
    return moesaic::python::text_to_python(text.bytes).release();
  }
};

}  // namespace pybind11::detail
