#pragma once

/// What the registry starts with.

#include <memory>
#include <string>
#include <vector>

#include "moesaic/backend.hpp"

namespace moesaic {

/// A backend that this build lacks: listed with its reason, every operation throws a DeviceError.
std::shared_ptr<const Backend> absent_backend(DeviceType type, std::string name,
                                              std::string reason);

/// One for each GPU, or one absent backend (cuda/backend/load_plugin.cpp). Loads the driver.
std::vector<std::shared_ptr<const Backend>> cuda_backends();
std::shared_ptr<const Backend> metal_backend();
namespace metal {
/// metal/host/metal_backend.cpp, in builds that have it.
std::shared_ptr<const Backend> create_backend();
}  // namespace metal

}  // namespace moesaic
