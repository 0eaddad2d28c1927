#include "result.hpp"

#include <pybind11/stl.h>

#include <optional>
#include <utility>

#include "devices.hpp"
#include "dlpack.hpp"
#include "dtypes.hpp"
#include "gil.hpp"
#include "moesaic/backend.hpp"
#include "moesaic/context.hpp"
#include "moesaic/error.hpp"

namespace moesaic::python {
namespace {

/// The from_dlpack of the package that the type of `like` lives in; None when it has none.
py::object foreign_from_dlpack(py::handle like) {
  if (py::hasattr(like, "__array_namespace__")) {
    const py::object space = call_python(like.attr("__array_namespace__"), py::tuple());
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

/// Memory of a GPU on its way to a package that makes no empty arrays. Its values are there.
struct DeviceMemory {
  std::shared_ptr<Array> array;
};

std::shared_ptr<Array> new_device_array(DType dtype, const std::vector<std::int64_t>& shape,
                                        Device device, const char* operation) {
  const Backend& backend = backend_for(device);
  const auto bytes = static_cast<std::size_t>(dense_bytes(dtype, shape, operation));
  auto array = std::make_shared<Array>();
  void* const memory = backend.allocate(bytes);
  array->owner =
      std::shared_ptr<void>(memory, [&backend, bytes](void* p) { backend.deallocate(p, bytes); });
  array->view = dense_view(memory, dtype, shape);
  array->view.device = device;
  return array;
}

std::vector<py::ssize_t> byte_strides(const TensorView& view) {
  std::vector<py::ssize_t> strides;
  for (int i = 0; i < view.rank; ++i)
    strides.push_back(view.stride(i) * static_cast<py::ssize_t>(size_of(view.dtype)));
  return strides;
}

}  // namespace

py::object device_memory(DType dtype, const std::vector<std::int64_t>& shape, Device device,
                         const char* operation) {
  return py::cast(DeviceMemory{new_device_array(dtype, shape, device, operation)});
}

Result::Result(py::handle like, const ArrayRef& like_ref, DType dtype,
               const std::vector<std::int64_t>& shape, py::handle out, const char* operation,
               bool any_float, const DeviceStream& target)
    : like_(like), target_(target) {
  dense_bytes(dtype, shape, operation);
  if (!out.is_none()) {
    write_to(py::reinterpret_borrow<py::object>(out), operation, target);
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
  if (target.device.type != DeviceType::Cpu) {
    make_on_device(like_ref, dtype, shape, operation, target);
    return;
  }
  if (like_ref.kind == ArrayKind::Numpy) {
    // Several packages register a bfloat16 with numpy: take the descriptor of x, so that a result
    // has the type that x has.
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

void Result::write_to(py::object object, const char* operation, const DeviceStream& target) {
  out_ = import_array(object, operation, "out", target);
  view_ = out_.view;
  object_ = std::move(object);
}

void Result::make_on_device(const ArrayRef& like_ref, DType dtype,
                            const std::vector<std::int64_t>& shape, const char* operation,
                            const DeviceStream& target) {
  if (py::object made =
          foreign_empty(like_, target.device, dtype == like_ref.view.dtype, dtype, shape)) {
    write_to(std::move(made), operation, target);
    return;
  }
  require<UnsupportedError>(!foreign_from_dlpack(like_).is_none(), [&] {
    return Problem{operation, "result", "an array package with empty arrays or from_dlpack",
                   type_name(like_), "pass out="};
  });
  array_ = new_device_array(dtype, shape, target.device, operation);
  view_ = array_->view;
}

/// The package may read on any stream, so the values have to be there.
py::object Result::hand_over() {
  {
    const ReleasedGil release;
    Context context(backend_for(target_.device), Tuning{}, ThreadPool::shared(1));
    context.set_stream(target_.stream);
    context.backend().synchronize(context);
  }
  return foreign_from_dlpack(like_)(py::cast(DeviceMemory{array_}));
}

py::object Result::finish() {
  if (object_) return std::move(object_);
  if (target_.device.type != DeviceType::Cpu) return hand_over();
  return foreign_ ? ArrayMaker(like_, ArrayKind::Foreign)(array_) : py::cast(array_);
}

ArrayMaker::ArrayMaker(py::handle like, ArrayKind kind) : kind_(kind) {
  if (kind == ArrayKind::Foreign) from_dlpack_ = foreign_from_dlpack(like);
}

ArrayMaker ArrayMaker::like(py::handle array) {
  if (py::isinstance<py::array>(array)) return {};
  if (py::isinstance<Array>(array)) return {array, ArrayKind::Own};
  return has_dlpack(array) ? ArrayMaker(array, ArrayKind::Foreign) : ArrayMaker();
}

py::object ArrayMaker::operator()(const std::shared_ptr<Array>& array) const {
  py::object own = py::cast(array);
  if (kind_ == ArrayKind::Own) return own;
  if (kind_ == ArrayKind::Foreign && !from_dlpack_.is_none()) return from_dlpack_(own);
  const TensorView& view = array->view;
  return py::array(numpy_dtype(view.dtype),
                   std::vector<py::ssize_t>(view.shape.begin(), view.shape.begin() + view.rank),
                   byte_strides(view), view.data, own);
}

void bind_results(py::module_& m) {
  py::class_<DeviceMemory>(m, "_DeviceMemory", py::is_final())
      .def(
          "__dlpack__",
          [](const DeviceMemory& memory, const py::object&,
             const std::optional<std::pair<int, int>>& max_version, const py::object&,
             const py::object&) {
            return export_dlpack(memory.array, max_version && max_version->first >= 1, false);
          },
          py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
          py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
      .def("__dlpack_device__", [](const DeviceMemory& memory) {
        return std::pair{kDLPackCuda, memory.array->view.device.index};
      });
}

}  // namespace moesaic::python
