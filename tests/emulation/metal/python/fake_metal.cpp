// What a Python test asks of the fake device inside its moesaic._core.

#include "fake_runtime/fake_metal.hpp"

#include "backend/builtin.hpp"
#include "metal/host/errors.hpp"

#define EXPORTED extern "C" __attribute__((visibility("default")))

/// Registers the Metal backend over the fake device, for good: not at the start of the library, whose
/// other parts may not be ready then, nor up to its end, where they may be gone.
EXPORTED void fake_metal_register() {
  new auto(moesaic::register_backend(moesaic::metal::create_backend()));
}

/// A buffer as another package would make one; it stays.
EXPORTED void* fake_metal_buffer(std::size_t bytes, void** contents) {
  const moesaic::metal::AutoreleaseScope scope;
  static MTL::Device* const device = MTL::CreateSystemDefaultDevice();
  auto* const buffer = device->newBuffer(bytes, MTL::ResourceStorageModeShared);
  *contents = buffer->contents();
  return buffer;
}

/// The code with which commands fail from now on; 0: none does.
EXPORTED void fake_metal_fail(long code) { fake_metal::faults().command_error = code; }

EXPORTED long fake_metal_mapped_bytes() { return fake_metal::counters().mapped_bytes; }
EXPORTED long fake_metal_dispatches() { return fake_metal::counters().dispatches; }
