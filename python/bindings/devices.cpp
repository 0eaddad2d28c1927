#include "devices.hpp"

#include <pybind11/stl.h>

#include "gil.hpp"
#include "moesaic/error.hpp"

namespace moesaic::python {
namespace {

/// The package that the type of `object` lives in ("torch"), or None.
py::object package_of(py::handle object) {
  const std::string module = py::str(py::type::handle_of(object).attr("__module__"));
  const py::dict modules = py::module_::import("sys").attr("modules");
  const py::str root(module.substr(0, module.find('.')));
  return modules.contains(root) ? py::object(modules[root]) : py::none();
}

void* to_pointer(const py::object& address) {
  return reinterpret_cast<void*>(address.cast<std::uintptr_t>());
}

/// The current device of a package; empty for one that has none.
std::optional<int> current_device(const py::object& cuda) {
  if (py::hasattr(cuda, "current_device")) {  // torch
    return call_python(cuda.attr("current_device"), py::tuple()).cast<int>();
  }
  if (py::hasattr(cuda, "Device")) {  // cupy
    return call_python(cuda.attr("Device"), py::tuple()).attr("id").cast<int>();
  }
  return std::nullopt;
}

}  // namespace

CurrentDevice::CurrentDevice(py::handle like, Device device) {
  if (device.type != DeviceType::Cuda) return;
  const py::object package = package_of(like);
  if (package.is_none() || !py::hasattr(package, "cuda")) return;
  const py::object cuda = package.attr("cuda");
  const std::optional<int> current = current_device(cuda);
  if (!current || *current == device.index) return;
  const char* const manager = py::hasattr(cuda, "current_device") ? "device" : "Device";
  entered_ = call_python(cuda.attr(manager), py::make_tuple(device.index));
  call_python(entered_.attr("__enter__"), py::tuple());
}

CurrentDevice::~CurrentDevice() {
  if (!entered_) return;
  py::error_scope kept;  // an error on its way to the caller
  try {
    call_python(entered_.attr("__exit__"), py::make_tuple(py::none(), py::none(), py::none()));
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable("leaving a CUDA device");
  }
}

std::optional<void*> current_stream(py::handle like, int index) {
  const py::object package = package_of(like);
  if (package.is_none() || !py::hasattr(package, "cuda")) return std::nullopt;
  const py::object cuda = package.attr("cuda");
  if (py::hasattr(cuda, "current_stream")) {  // torch
    return to_pointer(
        call_python(cuda.attr("current_stream"), py::make_tuple(index)).attr("cuda_stream"));
  }
  if (py::hasattr(cuda, "get_current_stream")) {  // cupy
    const CurrentDevice current(like, {DeviceType::Cuda, index});
    return to_pointer(call_python(cuda.attr("get_current_stream"), py::tuple()).attr("ptr"));
  }
  return std::nullopt;
}

namespace {

void* stream_of(py::handle stream, const char* operation) {
  if (py::isinstance<py::int_>(stream)) {
    return to_pointer(py::reinterpret_borrow<py::object>(stream));
  }
  if (py::hasattr(stream, "__cuda_stream__")) {
    return to_pointer(
        call_python(stream.attr("__cuda_stream__"), py::tuple()).cast<py::tuple>()[1]);
  }
  for (const char* name : {"cuda_stream", "ptr"}) {
    if (py::hasattr(stream, name)) return to_pointer(stream.attr(name));
  }
  throw DTypeError(
      Problem{operation, "stream", "a CUDA stream, its address, or None", type_name(stream), {}});
}

}  // namespace

DeviceStream device_stream(Device device, py::handle stream, py::handle like,
                           const char* operation) {
  if (device.type != DeviceType::Cuda) {
    require<DeviceError>(stream.is_none(), [&] {
      return Problem{
          operation, "stream", "None on the " + to_string(device), type_name(stream), {}};
    });
    if (shares_host_memory(device)) return {.handles = &backend_for(device)};
    return {.device = device};
  }
  return {.device = device,
          .stream = stream.is_none() ? current_stream(like, device.index).value_or(nullptr)
                                     : stream_of(stream, operation)};
}

py::object foreign_empty(py::handle like, Device device, bool same_dtype, DType dtype,
                         const std::vector<std::int64_t>& shape) {
  const char* const name = dtype == DType::F32   ? "float32"
                           : dtype == DType::I32 ? "int32"
                           : dtype == DType::F16 ? "float16"
                                                 : "bfloat16";
  const py::object package = package_of(like);
  const bool torch = py::hasattr(like, "new_empty");
  const bool cupy = !package.is_none() && py::hasattr(package, "empty_like");
  if (!(torch || cupy) || !(same_dtype || py::hasattr(package, name))) return {};
  const py::object type = same_dtype ? py::object(like.attr("dtype")) : package.attr(name);
  const py::tuple sizes = py::tuple(py::cast(shape));
  py::dict named(py::arg("dtype") = type);
  if (torch) return call_python(like.attr("new_empty"), py::make_tuple(sizes), named);
  named["shape"] = sizes;
  const CurrentDevice current(like, device);
  return call_python(package.attr("empty_like"), py::make_tuple(like), named);
}

}  // namespace moesaic::python
