#pragma once

namespace moesaic::metal {

/// Whether this is macOS `major` or later. Needs an AutoreleaseScope.
bool is_macos(int major);

}  // namespace moesaic::metal
