#include "logging.hpp"

namespace moesaic::python {
namespace {
py::object logger() { return py::module_::import("logging").attr("getLogger")("moesaic"); }
}  // namespace

void log(int level, const std::string& message) {
  logger().attr("log")(level, "%s", file_text(message));
}

py::str file_text(const std::string& bytes) {
  PyObject* const decoded =
      PyUnicode_DecodeUTF8(bytes.data(), static_cast<py::ssize_t>(bytes.size()), "surrogateescape");
  if (decoded == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(decoded);
}

std::string file_bytes(const py::str& text) {
  PyObject* const encoded = PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogateescape");
  if (encoded == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::bytes>(encoded);
}

bool log_enabled(int level) { return logger().attr("isEnabledFor")(level).cast<bool>(); }

}  // namespace moesaic::python
