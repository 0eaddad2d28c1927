#pragma once

#include <cstddef>
#include <cstdint>

#include "moesaic/context.hpp"
#include "moesaic/workspace.hpp"

namespace moesaic::ops {

/// The workspace lies where the backend reaches it and has the `bytes` that a call over `count` of
/// `things` ("tokens") takes; they are poisoned when the tuning asks for it. Throws WorkspaceError.
void check_workspace(const char* operation, Context& context, Workspace& workspace,
                     std::size_t bytes, std::int64_t count, const char* things);

}  // namespace moesaic::ops
