#include "text.hpp"

#include <new>
#include <utility>

namespace moesaic::python {

namespace {

py::str decode(std::string_view text, const char* errors) {
  PyObject* const decoded =
      PyUnicode_DecodeUTF8(text.data(), static_cast<py::ssize_t>(text.size()), errors);
  if (decoded == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(decoded);
}

/// Empty when the error handler fails.
std::optional<std::string> encode(py::handle object, const char* errors) {
  const auto bytes =
      py::reinterpret_steal<py::bytes>(PyUnicode_AsEncodedString(object.ptr(), "utf-8", errors));
  if (!bytes) {
    PyErr_Clear();
    return std::nullopt;
  }
  return std::string(bytes);
}

}  // namespace

py::str text_to_python(std::string_view text) { return decode(text, "surrogateescape"); }

py::str message_to_python(std::string_view text) { return decode(text, "backslashreplace"); }

py::str path_to_python(const std::filesystem::path& path) {
  const std::string& bytes = path.native();
  PyObject* const decoded =
      PyUnicode_DecodeFSDefaultAndSize(bytes.data(), static_cast<py::ssize_t>(bytes.size()));
  if (decoded == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(decoded);
}

std::optional<std::string> text_from_python(py::handle object) {
  if (!py::isinstance<py::str>(object)) return std::nullopt;
  return encode(object, "surrogateescape");
}

std::string text_bytes(py::handle object) {
  if (auto bytes = encode(object, "surrogateescape")) return *std::move(bytes);
  auto escaped = encode(object, "backslashreplace");
  if (!escaped) throw std::bad_alloc();
  return *std::move(escaped);
}

}  // namespace moesaic::python
