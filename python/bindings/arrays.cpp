#include "arrays.hpp"

#include <algorithm>
#include <new>
#include <optional>

#include "base/sizes.hpp"
#include "dlpack.hpp"
#include "dtypes.hpp"
#include "moesaic/error.hpp"

namespace moesaic::python {
namespace {

constexpr std::align_val_t kAlignment{64};

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

/// A masked array of numpy.ma shares its values with the masked ones among them, and nothing here
/// would look at the mask.
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
    return Problem{operation, name, "f32, f16, bf16, i32 or i64",
                   std::string("numpy ") + std::string(py::str(descriptor)),
                   descriptor.byteorder() == '>' ? "other byte order: it.astype('float32')" : ""};
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

/// Empty when the object has no buffer, or one of a format that only its DLPack knows.
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

/// Every way in but DLPack shares host memory only.
void require_host(const DeviceStream& target, const char* operation, const char* name) {
  require<DeviceError>(target.device.type == DeviceType::Cpu, [&] {
    return Problem{operation, name, "an array on " + to_string(target.device), "one in cpu memory",
                   "move it there first, e.g. torch.Tensor.to"};
  });
}

/// How what is no array is given instead.
std::string array_hint(py::handle object, std::string_view name) {
  if (PyList_Check(object.ptr()) || PyTuple_Check(object.ptr())) {
    const bool ids = name.find("ids") != std::string_view::npos;
    return std::string("numpy.asarray(it, '") + (ids ? "int32" : "float32") + "') makes one";
  }
  const std::string type = type_name(object);
  if (type == "moesaic.Routing") return "a Routing is given by name: routing=...";
  return {};
}

ArrayRef import_any(py::handle object, const char* operation, const char* name,
                    const DeviceStream& target) {
  if (target.device.type != DeviceType::Cpu && has_dlpack(object) &&
      !py::isinstance<py::array>(object) && !py::isinstance<Array>(object)) {
    return import_dlpack(object, operation, name, target);
  }
  require_host(target, operation, name);
  if (py::isinstance<py::array>(object))
    return from_numpy(py::reinterpret_borrow<py::array>(object), operation, name);
  if (py::isinstance<Array>(object)) {
    const auto& array = object.cast<const Array&>();
    return {.view = array.view,
            .read_only = array.read_only,
            .kind = ArrayKind::Own,
            .keep = py::reinterpret_borrow<py::object>(object)};
  }
  if (auto ref = from_buffer(object, operation, name)) {
    // Some packages with types of their own, such as jax, speak both protocols.
    if (has_dlpack(object)) ref->kind = ArrayKind::Foreign;
    return *std::move(ref);
  }
  require<DTypeError>(has_dlpack(object), [&] {
    return Problem{operation, name, "an array (buffer protocol or __dlpack__)", type_name(object),
                   array_hint(object, name)};
  });
  return import_dlpack(object, operation, name, target);
}

}  // namespace

ArrayRef import_array(py::handle object, const char* operation, const char* name,
                      const DeviceStream& target) {
  ArrayRef ref = import_any(object, operation, name, target);
  if (ref.view.empty()) {
    // Producers give the strides of an empty array as they like, so that no check may rest on them.
    const std::vector<std::int64_t> shape(ref.view.shape.begin(),
                                          ref.view.shape.begin() + ref.view.rank);
    ref.view = dense_view(ref.view.data, ref.view.dtype, shape);
  }
  return ref;
}

std::int64_t dense_bytes(DType dtype, const std::vector<std::int64_t>& shape,
                         const char* operation) {
  auto bytes = static_cast<std::int64_t>(size_of(dtype));
  for (const std::int64_t size : shape)
    bytes = product_of({bytes, size}, operation, "size of " + shape_text(shape));
  return bytes;
}

std::shared_ptr<Array> new_array(DType dtype, const std::vector<std::int64_t>& shape) {
  const auto bytes = static_cast<std::size_t>(dense_bytes(dtype, shape, "Array"));
  auto array = std::make_shared<Array>();
  array->view = dense_view(nullptr, dtype, shape);
  array->view.data = ::operator new(std::max<std::size_t>(bytes, 1), kAlignment, std::nothrow);
  require<OutOfMemoryError>(array->view.data != nullptr, [&] {
    return Problem{"Array", "allocation", std::to_string(bytes) + " bytes", "no memory", {}};
  });
  array->owner = std::shared_ptr<void>(array->view.data,
                                       [](void* memory) { ::operator delete(memory, kAlignment); });
  return array;
}

std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

}  // namespace moesaic::python
