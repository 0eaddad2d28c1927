#pragma once

#include <string>

#include "bindings.hpp"

namespace moesaic::python {

/// Levels of the logging module.
inline constexpr int kLogDebug = 10, kLogInfo = 20, kLogWarning = 30;

/// To logging.getLogger("moesaic"), the only way out for messages. Needs the GIL.
void log(int level, const std::string& message);
bool log_enabled(int level);
/// What the logger lets pass from now on.
void set_log_level(int level);

}  // namespace moesaic::python
