/// moesaic.Array: memory that leaves by DLPack or the buffer protocol.

#include <pybind11/stl.h>

#include <optional>

#include "array_index.hpp"
#include "dlpack.hpp"
#include "dtypes.hpp"
#include "gil.hpp"
#include "moesaic/error.hpp"

namespace moesaic::python {
namespace {

std::vector<py::ssize_t> shape_of(const Array& array) {
  return {array.view.shape.begin(), array.view.shape.begin() + array.view.rank};
}

py::buffer_info buffer_of(Array& array) {
  const auto item = static_cast<py::ssize_t>(size_of(array.view.dtype));
  std::vector<py::ssize_t> strides;
  for (int i = 0; i < array.view.rank; ++i) strides.push_back(array.view.stride(i) * item);
  return {array.view.data,
          item,
          buffer_format(array.view.dtype),
          array.view.rank,
          shape_of(array),
          strides,
          array.read_only};
}

py::tuple to_tuple(const std::array<std::int64_t, kMaxRank>& values, int rank) {
  py::tuple result(rank);
  for (int i = 0; i < rank; ++i)
    result[static_cast<std::size_t>(i)] = values[static_cast<std::size_t>(i)];
  return result;
}

py::capsule dlpack(const std::shared_ptr<Array>& array, const py::object& stream,
                   const std::optional<std::pair<int, int>>& max_version,
                   const std::optional<std::pair<int, int>>& device, std::optional<bool> copy) {
  if (!stream.is_none()) {
    throw py::buffer_error("moesaic.Array.__dlpack__: stream must be None for cpu memory");
  }
  if (device && (device->first != kDLPackCpu || device->second != 0)) {
    throw py::buffer_error("moesaic.Array.__dlpack__: dl_device must be (1, 0), the cpu");
  }
  const bool copied = copy.value_or(false);
  return export_dlpack(copied ? copy_of(*array) : array, max_version && max_version->first >= 1,
                       copied);
}

/// The values as numpy writes them, which leaves most of a large array out.
std::string array_repr(const std::shared_ptr<Array>& array) {
  constexpr const char* kName = "moesaic.Array(";
  const py::object text = call_python(
      py::module_::import("numpy").attr("array2string"), py::make_tuple(numpy_values(array)),
      py::dict(py::arg("separator") = ", ", py::arg("prefix") = kName));
  return kName + std::string(py::str(text)) + ", dtype='" + name_of(array->view.dtype) + "')";
}

}  // namespace

void bind_array(py::module_& m) {
  py::class_<Array, std::shared_ptr<Array>>(m, "Array", py::buffer_protocol(), py::is_final())
      .def_buffer(&buffer_of)
      .def_property_readonly("dtype", [](const Array& a) { return name_of(a.view.dtype); })
      .def_property_readonly("shape",
                             [](const Array& a) { return to_tuple(a.view.shape, a.view.rank); })
      .def_property_readonly("strides",
                             [](const Array& a) { return to_tuple(a.view.strides, a.view.rank); })
      .def_property_readonly("device", [](const Array& a) { return to_string(a.view.device); })
      .def_property_readonly("nbytes",
                             [](const Array& a) {
                               return a.view.num_elements() *
                                      static_cast<std::int64_t>(size_of(a.view.dtype));
                             })
      .def_property_readonly("readonly", [](const Array& a) { return a.read_only; })
      .def("__len__",
           [](const Array& a) {
             if (a.view.rank == 0) throw py::type_error("len() of a 0-d Array");
             return a.view.dim(0);
           })
      .def("__getitem__", &index_array, py::arg("index"))
      .def("__repr__", &array_repr)
      .def("__str__", [](const std::shared_ptr<Array>& a) { return py::str(numpy_values(a)); })
      .def("__dlpack__", &dlpack, py::kw_only(), py::arg("stream") = py::none(),
           py::arg("max_version") = py::none(), py::arg("dl_device") = py::none(),
           py::arg("copy") = py::none())
      .def("__dlpack_device__", [](const Array&) { return std::pair{kDLPackCpu, 0}; });
}

}  // namespace moesaic::python
