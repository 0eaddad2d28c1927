#include "text.hpp"

namespace moesaic::python {

namespace {

py::str decode(std::string_view text, const char* errors) {
  PyObject* const decoded =
      PyUnicode_DecodeUTF8(text.data(), static_cast<py::ssize_t>(text.size()), errors);
  if (decoded == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(decoded);
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
  const auto bytes = py::reinterpret_steal<py::bytes>(
      PyUnicode_AsEncodedString(object.ptr(), "utf-8", "surrogateescape"));
  if (!bytes) {
    PyErr_Clear();
    return std::nullopt;
  }
  return std::string(bytes);
}

}  // namespace moesaic::python
