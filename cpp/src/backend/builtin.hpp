#pragma once

/// What the registry starts with.

#include <memory>

#include "moesaic/backend.hpp"

namespace moesaic {

/// A backend that this build lacks: listed with its reason, every operation throws a DeviceError.
std::shared_ptr<const Backend> absent_backend(DeviceType type, std::string name,
                                              std::string reason);

std::shared_ptr<const Backend> cuda_backend();
std::shared_ptr<const Backend> metal_backend();

}  // namespace moesaic
