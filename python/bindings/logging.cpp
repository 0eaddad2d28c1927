#include "logging.hpp"

#include "gil.hpp"
#include "text.hpp"

namespace moesaic::python {
namespace {
py::object logger() {
  return call_python(py::module_::import("logging").attr("getLogger"), py::make_tuple("moesaic"));
}
}  // namespace

void log(int level, const std::string& message) {
  call_python(logger().attr("log"), py::make_tuple(level, "%s", message_to_python(message)));
}

bool log_enabled(int level) {
  return call_python(logger().attr("isEnabledFor"), py::make_tuple(level)).cast<bool>();
}

void set_log_level(int level) { call_python(logger().attr("setLevel"), py::make_tuple(level)); }

}  // namespace moesaic::python
