#pragma once

#include <memory>
#include <optional>
#include <utility>

#include "arrays.hpp"

namespace moesaic::python {

bool has_dlpack(py::handle object);
/// The CUDA device that an array says it lies on; else the CPU, since every way in but DLPack
/// shares host memory. Throws DeviceError when it cannot say.
Device device_of(py::handle array, const char* operation, const char* name);
/// Borrows through __dlpack__; the producer makes the memory ready for the target's stream. Errors
/// as import_array.
ArrayRef import_dlpack(py::handle object, const char* operation, const char* name,
                       const DeviceStream& target);

/// A capsule over `array`: versioned when `max_version` is at least (1, 0), else legacy. Throws
/// BufferError when a read-only array is asked for without the versioned form.
py::capsule export_dlpack(const std::shared_ptr<Array>& array, bool versioned, bool copied);

inline constexpr int kDLPackCpu = 1, kDLPackCuda = 2;

}  // namespace moesaic::python
