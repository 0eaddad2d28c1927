/// Arrays whose elements lie or count otherwise than a call reads them: copied on the way in.

#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "arrays.hpp"
#include "dtypes.hpp"
#include "gil.hpp"
#include "logging.hpp"
#include "moesaic/error.hpp"
#include "moesaic/types.hpp"

namespace moesaic::python {
namespace {

bool is_float(DType dtype) {
  return dtype == DType::F32 || dtype == DType::F16 || dtype == DType::BF16;
}

/// Whether rows can be read one element behind the other.
bool fits(const ConstTensorView& view, RowLayout layout) {
  if (layout == RowLayout::Dense) return is_dense(view);
  return view.rank == 0 || view.dim(view.rank - 1) <= 1 || view.stride(view.rank - 1) == 1;
}

/// The element of a float type at `from`.
float as_f32(const std::byte* from, DType dtype) {
  if (dtype == DType::F32) return *reinterpret_cast<const float*>(from);
  const std::uint16_t bits = *reinterpret_cast<const std::uint16_t*>(from);
  return dtype == DType::F16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

void log_copy(const char* operation, const char* name, const ConstTensorView& view,
              const char* why) {
  if (!log_enabled(kLogDebug)) return;
  log(kLogDebug, std::string(operation) + ": copied " + name + " " + describe(view) + ", " + why);
}

std::vector<std::int64_t> shape_of(const ConstTensorView& view) {
  return {view.shape.begin(), view.shape.begin() + view.rank};
}

/// Takes the memory of a new array in place of the caller's; the kind stays, which results follow.
void hold(ArrayRef& ref, std::shared_ptr<Array> copy) {
  ref.view = copy->view;
  ref.keep = py::cast(std::move(copy));
}

/// A dense copy in host memory in place of what came.
void make_dense(ArrayRef& ref, const char* operation, const char* name, const char* why) {
  log_copy(operation, name, ref.view, why);
  if (py::isinstance<py::array>(ref.keep)) {
    // A result takes the descriptor of a numpy array, so the copy stays one.
    ref = import_array(call_python(ref.keep.attr("copy"), py::tuple()), operation, name);
    return;
  }
  const auto copy = new_array(ref.view.dtype, shape_of(ref.view));
  const std::size_t item = size_of(ref.view.dtype);
  auto* to = static_cast<std::byte*>(copy->view.data);
  for_each_element(ref.view, [&](const std::byte* from) {
    std::memcpy(to, from, item);
    to += item;
  });
  hold(ref, copy);
}

TokenRows merge_rows(ArrayRef ref, const char* operation, const char* name,
                     const DeviceStream& target) {
  const int leading = ref.view.rank - 1;
  const TensorView rows = leading > 1 ? merged_in(ref, leading, operation, name, target) : ref.view;
  return {std::move(ref), rows};
}

}  // namespace

void require_float(const ArrayRef& ref, py::handle object, const char* operation,
                   const char* name) {
  require<DTypeError>(is_float(ref.view.dtype), [&] {
    const char* hint = "moesaic.asarray(it, 'f32') converts it";
    if (py::isinstance<py::array>(object)) hint = "it.astype('float32') converts it";
    if (py::hasattr(object, "float")) hint = "it.float() converts it";
    return Problem{operation, name, "f32, f16 or bf16", name_of(ref.view.dtype), hint};
  });
}

ArrayRef import_rows(py::handle object, const char* operation, const char* name,
                     const DeviceStream& target) {
  ArrayRef ref = import_array(object, operation, name, target);
  require_float(ref, object, operation, name);
  if (target.device.type == DeviceType::Cpu && !fits(ref.view, RowLayout::Rows))
    make_dense(ref, operation, name, "its columns lie apart");
  return ref;
}

ArrayRef import_f32(py::handle object, const char* operation, const char* name,
                    const DeviceStream& target, RowLayout layout) {
  ArrayRef ref = import_array(object, operation, name, target);
  require_float(ref, object, operation, name);
  const DType dtype = ref.view.dtype;
  if (dtype == DType::F32 && fits(ref.view, layout)) return ref;
  const char* const why = dtype == DType::F32 ? "its elements lie apart" : "read as f32";
  if (target.device.type != DeviceType::Cpu) {
    // The package that holds GPU memory converts it, on its own current stream.
    if (dtype == DType::F32 || !py::hasattr(object, "float")) return ref;
    log_copy(operation, name, ref.view, why);
    return import_array(call_python(object.attr("float"), py::tuple()), operation, name, target);
  }
  log_copy(operation, name, ref.view, why);
  const auto copy = new_array(DType::F32, shape_of(ref.view));
  auto* to = static_cast<float*>(copy->view.data);
  for_each_element(ref.view, [&](const std::byte* from) { *to++ = as_f32(from, dtype); });
  hold(ref, copy);
  return ref;
}

std::vector<std::int64_t> TokenRows::shape(std::int64_t width) const {
  std::vector<std::int64_t> shape = shape_of(array.view);
  if (!shape.empty()) shape.back() = width;
  return shape;
}

TokenRows import_tokens(py::handle object, const char* operation, const char* name,
                        const DeviceStream& target) {
  return merge_rows(import_rows(object, operation, name, target), operation, name, target);
}

TokenRows import_f32_tokens(py::handle object, const char* operation, const char* name,
                            const DeviceStream& target, RowLayout layout) {
  return merge_rows(import_f32(object, operation, name, target, layout), operation, name, target);
}

TensorView merged_in(ArrayRef& ref, int count, const char* operation, const char* name,
                     const DeviceStream& target) {
  require<ShapeError>(ref.view.rank >= count, [&] {
    return Problem{operation,
                   name,
                   "at least " + std::to_string(count) + " dimensions",
                   describe(ref.view),
                   {}};
  });
  if (const auto merged = merge_first(ref.view, count)) return *merged;
  require<ShapeError>(target.device.type == DeviceType::Cpu, [&] {
    return Problem{operation, name, "rows at one distance from each other", describe(ref.view),
                   "pass a contiguous copy"};
  });
  make_dense(ref, operation, name, "its rows lie apart");
  return *merge_first(ref.view, count);
}

TensorView merged_out(const TensorView& out, int count, const char* operation) {
  if (count <= 1) return out;
  const std::optional<TensorView> merged = merge_first(out, count);
  require<ShapeError>(merged.has_value(), [&] {
    return Problem{operation, "out", "rows at one distance from each other", describe(out),
                   "pass a contiguous one"};
  });
  return *merged;
}

}  // namespace moesaic::python
