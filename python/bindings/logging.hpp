#pragma once

#include <string>

#include "bindings.hpp"

namespace moesaic::python {

/// Levels of the logging module.
inline constexpr int kLogInfo = 20, kLogWarning = 30;

/// To logging.getLogger("moesaic"), the only way out for messages. Needs the GIL.
void log(int level, const std::string& message);
bool log_enabled(int level);

/// Text of a file, or the name of one. It need not be UTF-8: such bytes become surrogates, which
/// encode back to them.
py::str file_text(const std::string& bytes);
/// The bytes of such a text.
std::string file_bytes(const py::str& text);

}  // namespace moesaic::python
