#include "metal/host/system.hpp"

#include "metal/host/metal_cpp.hpp"

namespace moesaic::metal {

bool is_macos(int major) {
  return NS::ProcessInfo::processInfo()->isOperatingSystemAtLeastVersion({major, 0, 0});
}

}  // namespace moesaic::metal
