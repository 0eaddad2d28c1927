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

}  // namespace

std::optional<void*> current_stream(py::handle like, int index) {
  const py::object package = package_of(like);
  if (package.is_none() || !py::hasattr(package, "cuda")) return std::nullopt;
  const py::object cuda = package.attr("cuda");
  if (py::hasattr(cuda, "current_stream")) {  // torch
    return to_pointer(
        call_python(cuda.attr("current_stream"), py::make_tuple(index)).attr("cuda_stream"));
  }
  if (py::hasattr(cuda, "get_current_stream")) {  // cupy
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
    return {device, nullptr};
  }
  return {device, stream.is_none() ? current_stream(like, device.index).value_or(nullptr)
                                   : stream_of(stream, operation)};
}

py::object foreign_empty(py::handle like, bool same_dtype, DType dtype,
                         const std::vector<std::int64_t>& shape, const char* operation) {
  const char* const name = dtype == DType::F32   ? "float32"
                           : dtype == DType::I32 ? "int32"
                           : dtype == DType::F16 ? "float16"
                                                 : "bfloat16";
  const py::object package = package_of(like);
  const bool torch = py::hasattr(like, "new_empty");
  const bool cupy = !package.is_none() && py::hasattr(package, "empty_like");
  require<UnsupportedError>((torch || cupy) && (same_dtype || py::hasattr(package, name)), [&] {
    return Problem{operation, "result", "an array package that makes empty arrays", type_name(like),
                   "pass out="};
  });
  const py::object type = same_dtype ? py::object(like.attr("dtype")) : package.attr(name);
  const py::tuple sizes = py::tuple(py::cast(shape));
  py::dict named(py::arg("dtype") = type);
  if (torch) return call_python(like.attr("new_empty"), py::make_tuple(sizes), named);
  named["shape"] = sizes;
  return call_python(package.attr("empty_like"), py::make_tuple(like), named);
}

}  // namespace moesaic::python
