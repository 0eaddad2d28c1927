/// moesaic.Array and asarray: memory that leaves by DLPack or the buffer protocol.

#include <pybind11/stl.h>

#include <optional>

#include "dlpack.hpp"
#include "dtypes.hpp"
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

std::shared_ptr<Array> copy_of(const Array& source) {
  const std::vector<std::int64_t> shape(source.view.shape.begin(),
                                        source.view.shape.begin() + source.view.rank);
  auto copy = new_array(source.view.dtype, shape);
  // numpy copies any strides. It has no bfloat16, but sees the bits as uint16, which are copied.
  const auto bits = py::cast(source, py::return_value_policy::reference);
  py::array(py::cast(copy)).attr("__setitem__")(py::ellipsis(), bits);
  return copy;
}

DType parse_dtype(const std::string& text) {
  const std::optional<DType> dtype = find_name<DType>(text);
  require<DTypeError>(dtype.has_value(), [&] {
    return Problem{"asarray", "dtype", list_names<DType>(" | "), "'" + text + "'", {}};
  });
  return *dtype;
}

std::shared_ptr<Array> asarray(const py::object& x, const std::optional<std::string>& dtype,
                               std::optional<bool> copy) {
  const ArrayRef ref = import_array(x, "asarray", "x");
  auto array = std::make_shared<Array>();
  array->view = ref.view;
  array->read_only = ref.read_only;
  array->owner = share_object(ref.keep);
  if (dtype) {
    const DType wanted = parse_dtype(*dtype);
    const auto bits_of = [](DType t) {
      return t == DType::BF16 || t == DType::F16 ? DType::U16 : t;
    };
    require<DTypeError>(wanted == ref.view.dtype || bits_of(wanted) == ref.view.dtype, [&] {
      return Problem{"asarray", "dtype", std::string(name_of(ref.view.dtype)), *dtype,
                     "only uint16 bits can be given another name, f16 or bf16"};
    });
    array->view.dtype = wanted;
  }
  return copy.value_or(false) ? copy_of(*array) : array;
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
      .def("__repr__",
           [](const Array& a) { return "moesaic.Array(" + describe(a.view) + ", cpu)"; })
      .def("__dlpack__", &dlpack, py::kw_only(), py::arg("stream") = py::none(),
           py::arg("max_version") = py::none(), py::arg("dl_device") = py::none(),
           py::arg("copy") = py::none())
      .def("__dlpack_device__", [](const Array&) { return std::pair{kDLPackCpu, 0}; });

  m.def("asarray", &asarray, py::arg("x"), py::arg("dtype") = py::none(), py::kw_only(),
        py::arg("copy") = py::none());
}

}  // namespace moesaic::python
