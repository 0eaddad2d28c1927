#pragma once

/// What array packages say of GPUs: their current stream, their empty arrays, their stream objects.
/// A package is asked only when an array of it was passed in, so none is ever imported here.

#include <optional>

#include "arrays.hpp"

namespace moesaic::python {

/// A GPU as the current device of the package of `like` while alive: packages export arrays of it
/// and make new ones there only. Nothing for the CPU and for packages without a current device.
class CurrentDevice {
 public:
  CurrentDevice(py::handle like, Device device);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  py::object entered_;  ///< the package's context manager, where it had to be entered
};

/// The stream that the package of `like` uses now; empty for packages that do not say.
std::optional<void*> current_stream(py::handle like, int index);

/// Whether launches on the device can use arrays of the host (HostArrays).
inline bool shares_host_memory(Device device) { return device.type == DeviceType::Metal; }

/// Where a call on `device` takes its arrays. `stream` is None (the current stream of the package of `like`,
/// else the default stream), an address, or an object with __cuda_stream__, cuda_stream (torch) or
/// ptr (cupy). Errors: DeviceError (a stream where
/// there are none), DTypeError (no stream).
DeviceStream device_stream(Device device, py::handle stream, py::handle like,
                           const char* operation);

/// A dense array of the package and on the device of `like`; of its own element type when
/// `same_dtype`, else of `dtype`. Null when the package makes no empty arrays that can be written to
/// (jax), or has no such element type.
py::object foreign_empty(py::handle like, Device device, bool same_dtype, DType dtype,
                         const std::vector<std::int64_t>& shape);

}  // namespace moesaic::python
