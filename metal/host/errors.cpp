#include "metal/host/errors.hpp"

namespace moesaic::metal {

std::string text_of(const NS::Error* error) {
  if (error == nullptr) return "unknown";
  const NS::String* const text = error->localizedDescription();
  return text != nullptr ? text->utf8String() : "unknown";
}

namespace {

/// What the driver says when it ends work that kept the screen waiting: no constant names it.
constexpr NS::Integer kImpactingInteractivity = 14;

}  // namespace

void throw_command_error(const NS::Error* error) {
  const auto code = error != nullptr ? error->code() : 0;
  if (code == MTL::CommandBufferErrorOutOfMemory) {
    throw OutOfMemoryError(Problem{"metal", "command buffer", "memory for its resources",
                                   text_of(error), "use a smaller batch or fewer loaded layers"});
  }
  const bool killed = code == MTL::CommandBufferErrorTimeout || code == kImpactingInteractivity;
  throw DeviceError(Problem{"metal", "command buffer", "completion",
                            "error " + std::to_string(code) + ": " + text_of(error),
                            killed ? "the system ended work that took too long; use a smaller batch"
                                   : "its results are lost; later calls can succeed"});
}

}  // namespace moesaic::metal
