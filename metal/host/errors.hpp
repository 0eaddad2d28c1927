#pragma once

/// What the driver reports, as exceptions of this library.

#include <string>

#include "metal/host/metal_cpp.hpp"
#include "moesaic/error.hpp"

namespace moesaic::metal {

/// The driver's own words; "unknown" without an error.
std::string text_of(const NS::Error* error);
/// OutOfMemoryError or DeviceError for a command buffer that failed. Needs an AutoreleaseScope.
[[noreturn]] void throw_command_error(const NS::Error* error);

/// Temporary objects of the driver are released when it goes. Every public entry opens one, since
/// threads of a host program need have none; an Encoding has its own.
class AutoreleaseScope {
 public:
  AutoreleaseScope() : pool_(NS::AutoreleasePool::alloc()->init()) {}
  ~AutoreleaseScope() { pool_->release(); }
  AutoreleaseScope(const AutoreleaseScope&) = delete;
  AutoreleaseScope& operator=(const AutoreleaseScope&) = delete;

 private:
  NS::AutoreleasePool* pool_;
};

}  // namespace moesaic::metal
