#include "arrays.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>

#include "devices.hpp"
#include "dlpack.hpp"
#include "moesaic/error.hpp"

namespace moesaic::python {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr int kNumpyHalf = 23;

std::optional<DType> dtype_of(const py::dtype& dtype) {
  switch (dtype.num()) {
    case py::detail::npy_api::NPY_FLOAT_:
      return DType::F32;
    case kNumpyHalf:
      return DType::F16;
    case py::detail::npy_api::NPY_DOUBLE_:
      return DType::F64;
    case py::detail::npy_api::NPY_UBYTE_:
      return DType::U8;
    case py::detail::npy_api::NPY_USHORT_:
      return DType::U16;
    case py::detail::npy_api::NPY_BOOL_:
      return DType::Bool;
    default:
      break;
  }
  if (dtype.kind() == 'i' && dtype.itemsize() == 4) return DType::I32;
  if (dtype.kind() == 'i' && dtype.itemsize() == 8) return DType::I64;
  // ml_dtypes registers bfloat16 under a number that differs from process to process.
  if (dtype.itemsize() == 2 && py::str(dtype.attr("name")).equal(py::str("bfloat16")))
    return DType::BF16;
  return std::nullopt;
}

std::optional<DType> dtype_of_format(const char* format) {
  if (format == nullptr) return DType::U8;
  if (*format == '@' || *format == '=' || *format == '<') ++format;
  if (std::strlen(format) != 1) return std::nullopt;
  switch (*format) {
    case 'f':
      return DType::F32;
    case 'e':
      return DType::F16;
    case 'd':
      return DType::F64;
    case 'i':
      return DType::I32;
    case 'q':
      return DType::I64;
    case 'l':
      return sizeof(long) == 8 ? DType::I64 : DType::I32;
    case 'B':
    case 'b':
    case 'c':
      return DType::U8;
    case 'H':
      return DType::U16;
    case '?':
      return DType::Bool;
    default:
      return std::nullopt;
  }
}

void check_rank(py::ssize_t rank, const char* operation, const char* name) {
  require<ShapeError>(rank <= kMaxRank, [&] {
    return Problem{operation, name, "at most 4 dimensions", std::to_string(rank), {}};
  });
}

void set_dim(TensorView& view, int i, py::ssize_t size, py::ssize_t stride_bytes,
             const char* operation, const char* name) {
  const auto item = static_cast<py::ssize_t>(size_of(view.dtype));
  require<ShapeError>(size <= 1 || stride_bytes % item == 0, [&] {
    return Problem{operation, name, "strides of whole elements",
                   std::to_string(stride_bytes) + " bytes", "pass a contiguous copy"};
  });
  view.shape[static_cast<std::size_t>(i)] = size;
  view.strides[static_cast<std::size_t>(i)] = stride_bytes / item;
}

void check_alignment(const TensorView& view, const char* operation, const char* name) {
  require<ShapeError>(reinterpret_cast<std::uintptr_t>(view.data) % size_of(view.dtype) == 0, [&] {
    return Problem{operation, name, "aligned memory", "an address between elements", "pass a copy"};
  });
}

/// numpy.ma's data lies in memory under its mask, which nothing here would heed.
void refuse_masked(const py::array& array, const char* operation, const char* name) {
  const std::string type = type_name(array);
  if (type == "numpy.ndarray") return;
  require<DTypeError>(!py::hasattr(array, "mask"), [&] {
    return Problem{operation, name, "an array without a mask", type, "fill it first: .filled(0)"};
  });
}

ArrayRef from_numpy(const py::array& array, const char* operation, const char* name) {
  refuse_masked(array, operation, name);
  const py::dtype descriptor = array.dtype();
  const auto dtype = descriptor.byteorder() == '>' ? std::nullopt : dtype_of(descriptor);
  require<DTypeError>(dtype.has_value(), [&] {
    return Problem{operation,
                   name,
                   "f32, f16, bf16, i32 or i64",
                   std::string("numpy ") + std::string(py::str(descriptor)),
                   {}};
  });
  check_rank(array.ndim(), operation, name);
  ArrayRef ref;
  ref.view.data = const_cast<void*>(array.data());
  ref.view.dtype = *dtype;
  ref.view.rank = static_cast<int>(array.ndim());
  for (int i = 0; i < ref.view.rank; ++i)
    set_dim(ref.view, i, array.shape(i), array.strides(i), operation, name);
  check_alignment(ref.view, operation, name);
  ref.read_only = !array.writeable();
  ref.keep = array;
  return ref;
}

/// Empty when the object has no usable buffer.
std::optional<ArrayRef> from_buffer(py::handle object, const char* operation, const char* name) {
  if (PyObject_CheckBuffer(object.ptr()) == 0) return std::nullopt;
  PyObject* memory = PyMemoryView_FromObject(object.ptr());
  if (memory == nullptr) {
    PyErr_Clear();
    return std::nullopt;
  }
  ArrayRef ref;
  ref.keep = py::reinterpret_steal<py::object>(memory);
  const Py_buffer* buffer = PyMemoryView_GET_BUFFER(memory);
  const auto dtype = dtype_of_format(buffer->format);
  if (!dtype && has_dlpack(object)) return std::nullopt;
  require<DTypeError>(dtype.has_value(), [&] {
    return Problem{operation,
                   name,
                   "f32, f16, bf16, i32 or i64",
                   std::string("buffer format '") + buffer->format + "'",
                   {}};
  });
  check_rank(buffer->ndim, operation, name);
  ref.view.data = buffer->buf;
  ref.view.dtype = *dtype;
  ref.view.rank = buffer->ndim;
  for (int i = 0; i < buffer->ndim; ++i)
    set_dim(ref.view, i, buffer->shape[i], buffer->strides[i], operation, name);
  check_alignment(ref.view, operation, name);
  ref.read_only = buffer->readonly != 0;
  return ref;
}

/// from_dlpack of the package that the type of `like` lives in; None when there is none.
py::object foreign_from_dlpack(py::handle like) {
  if (py::hasattr(like, "__array_namespace__")) {
    const py::object space = like.attr("__array_namespace__")();
    if (py::hasattr(space, "from_dlpack")) return space.attr("from_dlpack");
  }
  const py::dict modules = py::module_::import("sys").attr("modules");
  std::string module = py::str(py::type::handle_of(like).attr("__module__"));
  while (!module.empty()) {
    const py::str key(module);
    if (modules.contains(key)) {
      const py::object found = modules[key];
      if (py::hasattr(found, "from_dlpack")) return found.attr("from_dlpack");
    }
    const auto dot = module.rfind('.');
    module.resize(dot == std::string::npos ? 0 : dot);
  }
  return py::none();
}

std::vector<py::ssize_t> byte_strides(const TensorView& view) {
  std::vector<py::ssize_t> strides;
  for (int i = 0; i < view.rank; ++i)
    strides.push_back(view.stride(i) * static_cast<py::ssize_t>(size_of(view.dtype)));
  return strides;
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i)
    text += (i != 0 ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

TensorView dense_view(void* data, DType dtype, const std::vector<std::int64_t>& shape) {
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  view.rank = static_cast<int>(shape.size());
  std::int64_t step = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    view.shape[i] = shape[i];
    view.strides[i] = step;
    step *= shape[i];
  }
  return view;
}

}  // namespace

std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

namespace {

/// Memory that every door but DLPack leads to.
void require_host_place(const Place& place, const char* operation, const char* name) {
  require<DeviceError>(place.device.type == DeviceType::Cpu, [&] {
    return Problem{operation, name, "an array on " + to_string(place.device), "one in cpu memory",
                   "move it there first, e.g. torch.Tensor.to"};
  });
}

ArrayRef import_any(py::handle object, const char* operation, const char* name,
                    const Place& place) {
  if (place.device.type != DeviceType::Cpu && has_dlpack(object) &&
      !py::isinstance<py::array>(object) && !py::isinstance<Array>(object)) {
    return import_dlpack(object, operation, name, place);
  }
  require_host_place(place, operation, name);
  if (py::isinstance<py::array>(object))
    return from_numpy(py::reinterpret_borrow<py::array>(object), operation, name);
  if (py::isinstance<Array>(object)) {
    const auto& array = object.cast<const Array&>();
    return {array.view, array.read_only, ArrayKind::Own,
            py::reinterpret_borrow<py::object>(object)};
  }
  if (auto ref = from_buffer(object, operation, name)) return *std::move(ref);
  require<DTypeError>(has_dlpack(object), [&] {
    return Problem{
        operation, name, "an array (buffer protocol or __dlpack__)", type_name(object), {}};
  });
  return import_dlpack(object, operation, name, place);
}

}  // namespace

ArrayRef import_array(py::handle object, const char* operation, const char* name,
                      const Place& place) {
  ArrayRef ref = import_any(object, operation, name, place);
  if (ref.view.empty()) {
    // Producers give the strides of an empty array as they like.
    const std::vector<std::int64_t> shape(ref.view.shape.begin(),
                                          ref.view.shape.begin() + ref.view.rank);
    ref.view = dense_view(ref.view.data, ref.view.dtype, shape);
  }
  return ref;
}

std::shared_ptr<Array> new_array(DType dtype, const std::vector<std::int64_t>& shape) {
  auto array = std::make_shared<Array>();
  array->view = dense_view(nullptr, dtype, shape);
  const auto bytes = static_cast<std::size_t>(array->view.num_elements()) * size_of(dtype);
  array->view.data = ::operator new(std::max<std::size_t>(bytes, 1), kAlignment, std::nothrow);
  require<OutOfMemoryError>(array->view.data != nullptr, [&] {
    return Problem{"Array", "allocation", std::to_string(bytes) + " bytes", "no memory", {}};
  });
  array->owner = std::shared_ptr<void>(array->view.data,
                                       [](void* memory) { ::operator delete(memory, kAlignment); });
  return array;
}

py::dtype numpy_dtype(DType dtype) {
  switch (dtype) {
    case DType::F32:
      return py::dtype::of<float>();
    case DType::F16:
      return py::dtype(kNumpyHalf);
    case DType::F64:
      return py::dtype::of<double>();
    case DType::I32:
      return py::dtype::of<std::int32_t>();
    case DType::I64:
      return py::dtype::of<std::int64_t>();
    case DType::U8:
      return py::dtype::of<std::uint8_t>();
    case DType::U16:
      return py::dtype::of<std::uint16_t>();
    case DType::Bool:
      return py::dtype::of<bool>();
    case DType::BF16:
      break;
  }
  return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"));
}

Result::Result(py::handle like, const ArrayRef& like_ref, DType dtype,
               const std::vector<std::int64_t>& shape, py::handle out, const char* operation,
               bool any_float, const Place& place)
    : like_(like) {
  if (!out.is_none()) {
    write_to(py::reinterpret_borrow<py::object>(out), operation, place);
    require<ConfigError>(!out_.read_only, [&] {
      return Problem{operation, "out", "a writable array", "a read-only one", {}};
    });
    bool same = view_.rank == static_cast<int>(shape.size());
    for (int i = 0; same && i < view_.rank; ++i)
      same = view_.dim(i) == shape[static_cast<std::size_t>(i)];
    require<ShapeError>(
        same, [&] { return Problem{operation, "out", shape_text(shape), describe(view_), {}}; });
    const bool fits = any_float ? view_.dtype == DType::F32 || view_.dtype == DType::F16 ||
                                      view_.dtype == DType::BF16
                                : view_.dtype == dtype;
    require<DTypeError>(fits, [&] {
      return Problem{operation,
                     "out",
                     any_float ? "f32, f16 or bf16" : name_of(dtype),
                     name_of(view_.dtype),
                     {}};
    });
    return;
  }
  if (place.device.type != DeviceType::Cpu) {
    write_to(foreign_empty(like, dtype == like_ref.view.dtype, dtype, shape, operation), operation,
             place);
    return;
  }
  if (like_ref.kind == ArrayKind::Numpy) {
    // x's own descriptor: bfloat16 comes back as the type that it came in.
    const py::dtype descriptor = dtype == DType::BF16 && like_ref.view.dtype == dtype
                                     ? py::reinterpret_borrow<py::array>(like_ref.keep).dtype()
                                     : numpy_dtype(dtype);
    py::array array(descriptor, std::vector<py::ssize_t>(shape.begin(), shape.end()));
    view_ = dense_view(array.mutable_data(), dtype, shape);
    object_ = std::move(array);
    return;
  }
  array_ = new_array(dtype, shape);
  view_ = array_->view;
  foreign_ = like_ref.kind == ArrayKind::Foreign;
}

void Result::write_to(py::object object, const char* operation, const Place& place) {
  out_ = import_array(object, operation, "out", place);
  view_ = out_.view;
  object_ = std::move(object);
}

py::object Result::finish() {
  if (object_) return std::move(object_);
  py::object own = py::cast(array_);
  if (!foreign_) return own;
  const py::object from_dlpack = foreign_from_dlpack(like_);
  if (!from_dlpack.is_none()) return from_dlpack(own);
  py::array result(numpy_dtype(view_.dtype),
                   std::vector<py::ssize_t>(view_.shape.begin(), view_.shape.begin() + view_.rank),
                   byte_strides(view_), view_.data, own);
  return result;
}

std::shared_ptr<void> share_object(py::object object) {
  return {object.release().ptr(), [](void* held) {
            if (Py_IsInitialized() == 0) return;
            const py::gil_scoped_acquire gil;
            Py_DECREF(static_cast<PyObject*>(held));
          }};
}

py::array numpy_view(DType dtype, const std::vector<std::int64_t>& shape, const void* data,
                     std::shared_ptr<const void> owner) {
  auto held = std::make_unique<std::shared_ptr<const void>>(std::move(owner));
  const py::capsule base(
      held.get(), [](void* memory) { delete static_cast<std::shared_ptr<const void>*>(memory); });
  held.release();
  py::array array(numpy_dtype(dtype), std::vector<py::ssize_t>(shape.begin(), shape.end()), data,
                  base);
  array.attr("setflags")(py::arg("write") = false);
  return array;
}

bool is_dense(const ConstTensorView& view) {
  std::int64_t step = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    if (view.dim(i) > 1 && view.stride(i) != step) return false;
    step *= view.dim(i);
  }
  return true;
}

namespace {

/// Calls visit(element pointer) in row-major order.
template <class Visit>
void for_each_element(const ConstTensorView& view, Visit&& visit) {
  const auto* base = static_cast<const std::byte*>(view.data);
  const auto item = static_cast<std::int64_t>(size_of(view.dtype));
  std::array<std::int64_t, kMaxRank> index{};
  for (std::int64_t n = view.num_elements(); n > 0; --n) {
    std::int64_t offset = 0;
    for (int i = 0; i < view.rank; ++i)
      offset += index[static_cast<std::size_t>(i)] * view.stride(i);
    visit(base + offset * item);
    for (int i = view.rank - 1; i >= 0; --i) {
      auto& at = index[static_cast<std::size_t>(i)];
      if (++at < view.dim(i)) break;
      at = 0;
    }
  }
}

template <class T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

}  // namespace

Ids import_ids(py::handle object, const char* operation, const char* name, const Place& place) {
  Ids ids;
  ids.array = import_array(object, operation, name, place);
  ids.view = ids.array.view;
  const DType dtype = ids.view.dtype;
  if (place.device.type != DeviceType::Cpu) {
    require<DTypeError>(dtype == DType::I32, [&] {
      return Problem{operation, name, "int32 on " + to_string(place.device), name_of(dtype), {}};
    });
    require<ShapeError>(is_dense(ids.view), [&] {
      return Problem{operation, name, "a dense array", "strides", "pass a contiguous copy"};
    });
    return ids;
  }
  require<DTypeError>(dtype == DType::I32 || dtype == DType::I64, [&] {
    return Problem{operation, name, "int32 or int64", name_of(dtype), {}};
  });
  if (dtype == DType::I32 && is_dense(ids.view)) return ids;
  ids.copy.reserve(static_cast<std::size_t>(ids.view.num_elements()));
  for_each_element(ids.view, [&](const std::byte* element) {
    const std::int64_t value =
        dtype == DType::I32 ? load<std::int32_t>(element) : load<std::int64_t>(element);
    require<ShapeError>(
        value >= std::numeric_limits<std::int32_t>::min() &&
            value <= std::numeric_limits<std::int32_t>::max(),
        [&] {
          return Problem{operation, name, "ids in the range of int32", std::to_string(value), {}};
        });
    ids.copy.push_back(static_cast<std::int32_t>(value));
  });
  std::vector<std::int64_t> shape(ids.view.shape.begin(), ids.view.shape.begin() + ids.view.rank);
  ids.view = dense_view(ids.copy.data(), DType::I32, shape);
  return ids;
}

std::vector<float> import_floats(py::handle object, const char* operation, const char* name) {
  const ArrayRef ref = import_array(object, operation, name);
  const DType dtype = ref.view.dtype;
  require<DTypeError>(dtype == DType::F32 || dtype == DType::F16 || dtype == DType::BF16, [&] {
    return Problem{operation, name, "f32, f16 or bf16", name_of(dtype), {}};
  });
  std::vector<float> values;
  values.reserve(static_cast<std::size_t>(ref.view.num_elements()));
  for_each_element(ref.view, [&](const std::byte* element) {
    if (dtype == DType::F32)
      values.push_back(load<float>(element));
    else if (dtype == DType::F16)
      values.push_back(f16_to_f32(load<std::uint16_t>(element)));
    else
      values.push_back(bf16_to_f32(load<std::uint16_t>(element)));
  });
  return values;
}

bool overlaps(const ConstTensorView& a, const ConstTensorView& b) {
  if (a.data == nullptr || b.data == nullptr || a.empty() || b.empty()) return false;
  const auto range = [](const ConstTensorView& view) {
    std::int64_t low = 0, high = 0;
    for (int i = 0; i < view.rank; ++i) {
      const std::int64_t last = (view.dim(i) - 1) * view.stride(i);
      (last < 0 ? low : high) += last;
    }
    const auto base = reinterpret_cast<std::intptr_t>(view.data);
    const auto item = static_cast<std::intptr_t>(size_of(view.dtype));
    return std::pair{base + low * item, base + (high + 1) * item};
  };
  const auto [a_begin, a_end] = range(a);
  const auto [b_begin, b_end] = range(b);
  return a_begin < b_end && b_begin < a_end;
}

void require_disjoint(const ConstTensorView& out, const ConstTensorView& in, const char* operation,
                      const char* name) {
  require<ShapeError>(!overlaps(out, in), [&] {
    return Problem{operation,
                   "out",
                   std::string("memory of its own"),
                   std::string("memory shared with ") + name,
                   {}};
  });
}

}  // namespace moesaic::python
