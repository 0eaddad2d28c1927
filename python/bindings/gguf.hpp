#pragma once

#include <memory>

#include "bindings.hpp"
#include "moesaic/gguf.hpp"

namespace moesaic::python {

/// The file that an argument is, or that it names: a GgufFile, or a path, which is opened. Throws
/// DTypeError for other objects, and what GgufFile::open throws.
std::shared_ptr<GgufFile> gguf_file(const py::object& file, const char* operation);

}  // namespace moesaic::python
