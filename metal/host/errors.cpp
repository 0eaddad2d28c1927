#include "metal/host/errors.hpp"

namespace moesaic::metal {

std::string text_of(const NS::Error* error) {
  if (error == nullptr) return "unknown";
  const NS::String* const text = error->localizedDescription();
  return text != nullptr ? text->utf8String() : "unknown";
}

void throw_command_error(const NS::Error* error) {
  const auto code = error != nullptr ? error->code() : 0;
  if (code == MTL::CommandBufferErrorOutOfMemory) {
    throw OutOfMemoryError(Problem{"metal", "command buffer", "memory for its resources",
                                   text_of(error), "use a smaller batch or fewer loaded layers"});
  }
  throw DeviceError(Problem{"metal", "command buffer", "completion",
                            "error " + std::to_string(code) + ": " + text_of(error),
                            "its results are lost; later calls can succeed"});
}

}  // namespace moesaic::metal
