/// The only file that knows DLPack capsules.
///
/// The buffer protocol (PEP 3118) shares CPU memory and describes elements by format characters, of
/// which there is none for bfloat16. DLPack shares memory of any device and knows bfloat16. A
/// producer's __dlpack__() returns a PyCapsule around a managed tensor:
///
///   name             holds                         from
///   dltensor         DLManagedTensor               any version; cannot say "read-only"
///   dltensor_versioned DLManagedTensorVersioned    max_version >= (1, 0); flags, version
///
/// A consumer that keeps the tensor renames the capsule to used_dltensor(_versioned) and calls the
/// deleter itself when done. A consumer that only borrows may leave the name alone and keep the
/// capsule: its destructor then calls the deleter. We borrow, so no path can forget the deleter.
/// Our own capsules' destructor does the same for a capsule that nobody took.

#include "dlpack.hpp"

#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <utility>

#include "devices.hpp"
#include "gil.hpp"
#include "moesaic/error.hpp"

namespace moesaic::python {
namespace {

// The DLPack ABI, version 1.
struct DLDevice {
  std::int32_t type;
  std::int32_t id;
};
struct DLDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  ///< in elements; null means dense
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
struct DLManagedTensorVersioned {
  std::uint32_t major, minor;
  void* context;
  void (*deleter)(DLManagedTensorVersioned*);
  std::uint64_t flags;
  DLTensor tensor;
};
constexpr std::uint64_t kFlagReadOnly = 1;
constexpr std::uint64_t kFlagCopied = 2;
enum Code : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kComplex = 5, kBool = 6 };
constexpr int kCudaHost = 3, kMetal = 8, kRocmHost = 11, kCudaManaged = 13;
/// What __dlpack__(stream=) calls the default stream of CUDA.
constexpr std::uintptr_t kLegacyStream = 1;

constexpr const char* kLegacyName = "dltensor";
constexpr const char* kVersionedName = "dltensor_versioned";

struct TypePair {
  DType dtype;
  DLDataType dl;
};
constexpr TypePair kTypes[] = {
    {DType::F32, {kFloat, 32, 1}}, {DType::F16, {kFloat, 16, 1}}, {DType::BF16, {kBFloat, 16, 1}},
    {DType::F64, {kFloat, 64, 1}}, {DType::I32, {kInt, 32, 1}},   {DType::I64, {kInt, 64, 1}},
    {DType::U8, {kUInt, 8, 1}},    {DType::U16, {kUInt, 16, 1}},  {DType::Bool, {kBool, 8, 1}},
};

/// A type that there is no DType for, as a message names it.
std::string name_of_other(const DLDataType& type) {
  constexpr std::pair<std::uint8_t, const char*> kWords[] = {
      {kInt, "i"}, {kUInt, "u"}, {kFloat, "f"}, {kBFloat, "bf"}, {kComplex, "complex"}};
  const std::string bits = std::to_string(type.bits);
  const std::string lanes = type.lanes == 1 ? "" : " x " + std::to_string(type.lanes);
  for (const auto& [code, word] : kWords) {
    if (code == type.code) return word + bits + lanes;
  }
  return "DLPack type " + std::to_string(type.code) + " of " + bits + " bits" + lanes;
}

DType dtype_of(const DLDataType& type, const char* operation, const char* name) {
  for (const auto& pair : kTypes) {
    if (pair.dl.code == type.code && pair.dl.bits == type.bits && type.lanes == 1)
      return pair.dtype;
  }
  throw DTypeError(Problem{operation, name, "f32, f16, bf16, i32 or i64", name_of_other(type), {}});
}

const char* device_name(int type) {
  switch (type) {
    case 2:
      return "cuda";
    case 4:
      return "opencl";
    case 7:
      return "vulkan";
    case 8:
      return "metal";
    case 10:
      return "rocm";
    case 13:
      return "cuda managed";
    case 14:
      return "oneapi";
    default:
      return "device type";
  }
}

bool matches(int type, int id, const DeviceStream& target) {
  const Device device = target.device;
  if (type == kMetal) return target.handles != nullptr;
  if (device.type == DeviceType::Cuda)
    return (type == kDLPackCuda || type == kCudaManaged) && id == device.index;
  return device.type == DeviceType::Cpu &&
         (type == kDLPackCpu || type == kCudaHost || type == kRocmHost);
}

void require_device(int type, int id, const char* operation, const char* name,
                    const DeviceStream& target) {
  const Device device = target.device;
  require<DeviceError>(matches(type, id, target), [&] {
    const std::string label = device_name(type);
    const bool cpu = device.type == DeviceType::Cpu;
    return Problem{operation, name,
                   !cpu                        ? "an array on " + to_string(device)
                   : target.handles != nullptr ? "an array in cpu or metal memory"
                                               : "an array in cpu memory",
                   label + (label == "device type" ? " " + std::to_string(type) : "") + ":" +
                       std::to_string(id),
                   cpu ? "copy it to the cpu first" : "move it there first"};
  });
}

/// What __dlpack_device__() says; empty for an object without it. Throws DeviceError.
std::optional<std::pair<int, int>> dlpack_device(py::handle object, const char* operation,
                                                 const char* name) {
  if (!py::hasattr(object, "__dlpack_device__")) return std::nullopt;
  try {
    return call_python(object.attr("__dlpack_device__"), py::tuple()).cast<std::pair<int, int>>();
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;
    throw DeviceError(
        Problem{operation, name, "an array with a device", py::str(error.value()), {}});
  } catch (const py::cast_error&) {
    throw DeviceError(
        Problem{operation, name, "(type, id) from __dlpack_device__", "something else", {}});
  }
}

/// The stream argument of __dlpack__: None for host memory, -1 where the producer uses the stream
/// of the call already and nothing has to wait.
py::object stream_argument(py::handle object, const DeviceStream& target) {
  if (target.device.type == DeviceType::Cpu) return py::none();
  if (current_stream(object, target.device.index) == target.stream) return py::int_(-1);
  const auto stream = reinterpret_cast<std::uintptr_t>(target.stream);
  return py::int_(stream == 0 ? kLegacyStream : stream);
}

py::object call_dlpack(py::handle object, const char* operation, const char* name,
                       const DeviceStream& target) {
  const py::object method = object.attr("__dlpack__");
  const CurrentDevice current(object, target.device);
  const py::object stream = stream_argument(object, target);
  py::dict given;
  if (!stream.is_none()) given["stream"] = stream;
  try {
    try {
      py::dict keywords = given.attr("copy")();
      keywords["max_version"] = py::make_tuple(1, 0);
      return call_python(method, py::tuple(), keywords);
    } catch (py::error_already_set& error) {
      // Producers from before DLPack 1.0 do not know the keyword.
      if (!error.matches(PyExc_TypeError)) throw;
    }
    return call_python(method, py::tuple(), given);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;  // an interrupt or exit
    const bool gradient =
        py::hasattr(object, "requires_grad") && py::bool_(py::object(object.attr("requires_grad")));
    require<UnsupportedError>(!gradient, [&] {
      return Problem{operation, name, "an array without gradients",
                     "a tensor with requires_grad=True",
                     std::string("there is no backward; pass ") + name + ".detach()"};
    });
    throw UnsupportedError(Problem{
        operation, name, "an array that exports itself by __dlpack__", py::str(error.value()), {}});
  }
}

/// What keeps an exported tensor alive, and the arrays its DLTensor points to.
template <class Managed>
struct Exported {
  Managed managed{};
  std::shared_ptr<Array> array;
  std::int64_t shape[kMaxRank]{}, strides[kMaxRank]{};
};

template <class Managed>
Managed* make_managed(const std::shared_ptr<Array>& array) {
  auto owned = std::make_unique<Exported<Managed>>();
  owned->array = array;
  const TensorView& view = array->view;
  for (int i = 0; i < view.rank; ++i) {
    owned->shape[i] = view.dim(i);
    owned->strides[i] = view.stride(i);
  }
  DLTensor& tensor = owned->managed.tensor;
  tensor.data = view.data;
  tensor.device = view.device.type == DeviceType::Cuda
                      ? DLDevice{kDLPackCuda, static_cast<std::int32_t>(view.device.index)}
                      : DLDevice{kDLPackCpu, 0};
  tensor.ndim = view.rank;
  for (const auto& pair : kTypes) {
    if (pair.dtype == view.dtype) tensor.dtype = pair.dl;
  }
  tensor.shape = owned->shape;
  tensor.strides = owned->strides;
  owned->managed.context = owned.get();
  // The owner may hold Python objects, and consumers may let go on any thread.
  owned->managed.deleter = [](Managed* managed) {
    if (Py_IsInitialized() == 0) return;
    const HeldGil gil;
    delete static_cast<Exported<Managed>*>(managed->context);
  };
  return &owned.release()->managed;
}

template <class Managed>
void destroy_capsule(PyObject* capsule, const char* name) {
  if (PyCapsule_IsValid(capsule, name) == 0) return;  // taken by a consumer
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, name));
  if (managed->deleter != nullptr) managed->deleter(managed);
}

}  // namespace

bool has_dlpack(py::handle object) { return py::hasattr(object, "__dlpack__"); }

Device device_of(py::handle array, const char* operation, const char* name) {
  if (py::isinstance<py::array>(array)) return {};
  const auto device = dlpack_device(array, operation, name);
  if (!device || (device->first != kDLPackCuda && device->first != kCudaManaged)) return {};
  return {DeviceType::Cuda, device->second};
}

ArrayRef import_dlpack(py::handle object, const char* operation, const char* name,
                       const DeviceStream& target) {
  if (const auto device = dlpack_device(object, operation, name)) {
    require_device(device->first, device->second, operation, name, target);
  }
  ArrayRef ref;
  ref.keep = call_dlpack(object, operation, name, target);
  ref.kind = ArrayKind::Foreign;
  const DLTensor* tensor = nullptr;
  if (PyCapsule_IsValid(ref.keep.ptr(), kVersionedName) != 0) {
    const auto* managed = static_cast<DLManagedTensorVersioned*>(
        PyCapsule_GetPointer(ref.keep.ptr(), kVersionedName));
    require<UnsupportedError>(managed->major == 1, [&] {
      return Problem{
          operation, name, "DLPack version 1", "version " + std::to_string(managed->major), {}};
    });
    ref.read_only = (managed->flags & kFlagReadOnly) != 0;
    tensor = &managed->tensor;
  } else if (PyCapsule_IsValid(ref.keep.ptr(), kLegacyName) != 0) {
    tensor =
        &static_cast<DLManagedTensor*>(PyCapsule_GetPointer(ref.keep.ptr(), kLegacyName))->tensor;
  } else {
    throw DTypeError(
        Problem{operation, name, "a DLPack capsule from __dlpack__", type_name(ref.keep), {}});
  }
  require_device(tensor->device.type, tensor->device.id, operation, name, target);
  require<ShapeError>(tensor->ndim >= 0 && tensor->ndim <= kMaxRank, [&] {
    return Problem{operation, name, "at most 4 dimensions", std::to_string(tensor->ndim), {}};
  });
  require<ShapeError>(tensor->ndim == 0 || tensor->shape != nullptr, [&] {
    return Problem{operation, name, "a DLPack tensor with a shape", "null", {}};
  });
  ref.view.dtype = dtype_of(tensor->dtype, operation, name);
  const std::vector<std::int64_t> shape(tensor->shape, tensor->shape + tensor->ndim);
  const bool empty = dense_bytes(ref.view.dtype, shape, operation) == 0;
  require<ShapeError>(empty || tensor->data != nullptr, [&] {
    return Problem{operation, name, "a DLPack tensor with data", "null", {}};
  });
  if (tensor->data != nullptr) {
    void* data = tensor->data;
    if (tensor->device.type == kMetal) {
      // On Metal `data` is no address but an MTLBuffer.
      ref.handle = target.handles->share_handle(data);
      data = ref.handle.data;
    }
    ref.view.data = static_cast<std::byte*>(data) + tensor->byte_offset;
  }
  ref.view.device = target.device;
  ref.view.rank = tensor->ndim;
  std::int64_t step = 1;
  for (int i = tensor->ndim - 1; i >= 0; --i) {
    const auto at = static_cast<std::size_t>(i);
    ref.view.shape[at] = tensor->shape[i];
    ref.view.strides[at] = tensor->strides != nullptr ? tensor->strides[i] : step;
    step *= tensor->shape[i];
  }
  return ref;
}

py::capsule export_dlpack(const std::shared_ptr<Array>& array, bool versioned, bool copied) {
  if (versioned) {
    auto* managed = make_managed<DLManagedTensorVersioned>(array);
    managed->major = 1;
    managed->flags = (array->read_only ? kFlagReadOnly : 0) | (copied ? kFlagCopied : 0);
    return py::capsule(managed, kVersionedName, [](PyObject* capsule) {
      destroy_capsule<DLManagedTensorVersioned>(capsule, kVersionedName);
    });
  }
  if (array->read_only) {
    throw py::buffer_error(
        "moesaic.Array.__dlpack__: read-only memory needs max_version >= (1, 0)");
  }
  return py::capsule(make_managed<DLManagedTensor>(array), kLegacyName, [](PyObject* capsule) {
    destroy_capsule<DLManagedTensor>(capsule, kLegacyName);
  });
}

}  // namespace moesaic::python
