#include "logging.hpp"

#include "text.hpp"

namespace moesaic::python {
namespace {
py::object logger() { return py::module_::import("logging").attr("getLogger")("moesaic"); }
}  // namespace

void log(int level, const std::string& message) {
  logger().attr("log")(level, "%s", message_to_python(message));
}

bool log_enabled(int level) { return logger().attr("isEnabledFor")(level).cast<bool>(); }

}  // namespace moesaic::python
