#include "logging.hpp"

#include "gil.hpp"
#include "text.hpp"

namespace moesaic::python {
namespace {
py::object logger() { return py::module_::import("logging").attr("getLogger")("moesaic"); }
}  // namespace

void log(int level, const std::string& message) {
  call_python(logger().attr("log"), py::make_tuple(level, "%s", message_to_python(message)));
}

bool log_enabled(int level) { return logger().attr("isEnabledFor")(level).cast<bool>(); }

}  // namespace moesaic::python
