/// moesaic.asarray: a view of an array, or its values in another element type.

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "arrays.hpp"
#include "dtypes.hpp"
#include "gil.hpp"
#include "moesaic/error.hpp"

namespace moesaic::python {
namespace {

using SharedArray = std::shared_ptr<Array>;
constexpr const char* kAsArray = "asarray";

std::vector<std::int64_t> sizes_of(const TensorView& view) {
  return {view.shape.begin(), view.shape.begin() + view.rank};
}

SharedArray view_of_array(const ArrayRef& ref) {
  auto array = std::make_shared<Array>();
  array->view = ref.view;
  array->read_only = ref.read_only;
  array->owner = share_object(ref.keep);
  return array;
}

/// numpy's bfloat16 is that of another package, so that values go to and from it here.
SharedArray f32_of_bf16(const TensorView& from) {
  auto values = new_array(DType::F32, sizes_of(from));
  auto* to = static_cast<float*>(values->view.data);
  for_each_element(from, [&](const std::byte* element) {
    *to++ = bf16_to_f32(*reinterpret_cast<const std::uint16_t*>(element));
  });
  return values;
}

SharedArray bf16_of_f32(const TensorView& from) {
  auto bits = new_array(DType::BF16, sizes_of(from));
  auto* to = static_cast<std::uint16_t*>(bits->view.data);
  for_each_element(from, [&](const std::byte* element) {
    *to++ = f32_to_bf16(*reinterpret_cast<const float*>(element));
  });
  return bits;
}

/// numpy's own conversion, of whatever it makes an array of.
SharedArray by_numpy(const py::object& x, DType wanted) {
  const py::dtype descriptor = numpy_dtype(wanted == DType::BF16 ? DType::F32 : wanted);
  py::object converted;
  try {
    // Not astype of a list: numpy decides here whether it is one of numbers.
    converted = call_python(py::module_::import("numpy").attr("array"), py::make_tuple(x));
    converted = call_python(converted.attr("astype"), py::make_tuple(descriptor));
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_ValueError) && !error.matches(PyExc_TypeError)) throw;
    throw DTypeError(Problem{kAsArray, "x", "numbers, in lists of equal lengths", type_name(x),
                             "numpy made no array of numbers of it"});
  }
  const SharedArray array = view_of_array(import_array(converted, kAsArray, "x"));
  return wanted == DType::BF16 ? bf16_of_f32(array->view) : array;
}

SharedArray convert(const SharedArray& source, DType wanted) {
  const SharedArray from = source->view.dtype == DType::BF16 ? f32_of_bf16(source->view) : source;
  if (from->view.dtype == wanted) return from;
  return by_numpy(py::cast(from), wanted);
}

/// Whether numpy has to make an array of it before anything here can: numbers, lists, and arrays of
/// numpy whose element type has no name here.
bool needs_numpy(const py::object& x) {
  if (py::isinstance<py::array>(x))
    return !dtype_of(py::reinterpret_borrow<py::array>(x).dtype()).has_value();
  return PyList_Check(x.ptr()) || PyTuple_Check(x.ptr()) || PyLong_Check(x.ptr()) ||
         PyFloat_Check(x.ptr());
}

void require_copy_allowed(std::optional<bool> copy) {
  require<ConfigError>(copy.value_or(true), [] {
    return Problem{kAsArray, "copy", "None or True where values are converted", "False", {}};
  });
}

SharedArray asarray(const py::object& x, const py::object& dtype, std::optional<bool> copy) {
  std::optional<DType> wanted;
  if (!dtype.is_none()) wanted = parse_dtype(dtype, kAsArray, "dtype");
  if (needs_numpy(x) && (wanted || !py::isinstance<py::array>(x))) {
    require<DTypeError>(wanted.has_value(), [&] {
      return Problem{kAsArray, "dtype", "the type to convert to", "None beside " + type_name(x),
                     "asarray(x, 'f32')"};
    });
    require_copy_allowed(copy);
    return by_numpy(x, *wanted);
  }
  const SharedArray array = view_of_array(import_array(x, kAsArray, "x"));
  const bool bits = array->view.dtype == DType::U16 && wanted &&
                    (*wanted == DType::BF16 || *wanted == DType::F16);
  if (bits) array->view.dtype = *wanted;
  if (wanted && *wanted != array->view.dtype) {
    require_copy_allowed(copy);
    return convert(array, *wanted);
  }
  return copy.value_or(false) ? copy_of(*array) : array;
}

/// Memory of another package that has bfloat16, which numpy and the buffer protocol lack: by DLPack
/// it costs several times as much.
SharedArray bf16_view(std::uintptr_t address, const std::vector<std::int64_t>& shape,
                      const std::vector<std::int64_t>& strides, const py::object& owner) {
  require<ShapeError>(shape.size() <= kMaxRank && shape.size() == strides.size(), [&] {
    return Problem{"bf16_view",
                   "shape",
                   "at most 4 dimensions, and as many strides",
                   std::to_string(shape.size()) + " and " + std::to_string(strides.size()),
                   {}};
  });
  auto array = std::make_shared<Array>();
  array->view.data = reinterpret_cast<void*>(address);
  array->view.dtype = DType::BF16;
  array->view.rank = static_cast<int>(shape.size());
  std::ranges::copy(shape, array->view.shape.begin());
  std::ranges::copy(strides, array->view.strides.begin());
  array->owner = share_object(owner);
  return array;
}

}  // namespace

SharedArray copy_of(const Array& source) {
  auto copy = new_array(source.view.dtype, sizes_of(source.view));
  // numpy copies any strides. It has no bfloat16, but sees the bits as uint16, which are copied.
  const auto bits = py::cast(source, py::return_value_policy::reference);
  call_python(py::array(py::cast(copy)).attr("__setitem__"), py::make_tuple(py::ellipsis(), bits));
  return copy;
}

py::object numpy_values(const SharedArray& array) {
  return py::array(py::cast(array->view.dtype == DType::BF16 ? f32_of_bf16(array->view) : array));
}

void bind_asarray(py::module_& m) {
  m.def("asarray", &asarray, py::arg("x"), py::arg("dtype") = py::none(), py::kw_only(),
        py::arg("copy") = py::none());
  m.def("_bf16_view", &bf16_view, py::arg("address"), py::arg("shape"), py::arg("strides"),
        py::arg("owner"));
}

}  // namespace moesaic::python
