#pragma once

/// Text that comes from files. It need not be UTF-8, and no such text may raise UnicodeDecodeError:
/// bytes that do not decode become surrogates, which encode back to them.

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "bindings.hpp"

namespace moesaic::python {

/// Names, keys, values, messages: UTF-8 with surrogates.
py::str text_to_python(std::string_view text);
/// A path, decoded as os.fsdecode does.
py::str path_to_python(const std::filesystem::path& path);
/// The bytes of a str that text_to_python may have made; empty for other objects and for surrogates
/// that stand for no byte.
std::optional<std::string> text_from_python(py::handle object);

}  // namespace moesaic::python
