/// Arrays whose elements lie or count otherwise than a call reads them: copied on the way in.

#include <string>

#include "arrays.hpp"
#include "dtypes.hpp"
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

/// The element at `offset` elements from the view's begin.
float element(const ConstTensorView& view, std::int64_t offset) {
  if (view.dtype == DType::F32) return static_cast<const float*>(view.data)[offset];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(view.data)[offset];
  return view.dtype == DType::F16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

/// Calls visit(offset) for each element in row-major order.
template <class Visit>
void for_each_offset(const ConstTensorView& view, Visit&& visit, int dim = 0,
                     std::int64_t offset = 0) {
  if (dim == view.rank) return visit(offset);
  for (std::int64_t i = 0; i < view.dim(dim); ++i)
    for_each_offset(view, visit, dim + 1, offset + i * view.stride(dim));
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

}  // namespace

ArrayRef import_rows(py::handle object, const char* operation, const char* name,
                     const DeviceStream& target) {
  ArrayRef ref = import_array(object, operation, name, target);
  if (target.device.type != DeviceType::Cpu || fits(ref.view, RowLayout::Rows)) return ref;
  log_copy(operation, name, ref.view, "its columns lie apart");
  if (py::isinstance<py::array>(ref.keep)) {
    // A result takes the descriptor of a numpy array, so the copy stays one.
    return import_array(ref.keep.attr("copy")(), operation, name, target);
  }
  if (!is_float(ref.view.dtype)) return ref;  // the call refuses the type
  const auto copy = new_array(ref.view.dtype, shape_of(ref.view));
  if (ref.view.dtype == DType::F32) {
    auto* to = static_cast<float*>(copy->view.data);
    for_each_offset(ref.view, [&](std::int64_t at) { *to++ = element(ref.view, at); });
  } else {
    auto* to = static_cast<std::uint16_t*>(copy->view.data);
    const auto* from = static_cast<const std::uint16_t*>(ref.view.data);
    for_each_offset(ref.view, [&](std::int64_t at) { *to++ = from[at]; });
  }
  hold(ref, copy);
  return ref;
}

ArrayRef import_f32(py::handle object, const char* operation, const char* name,
                    const DeviceStream& target, RowLayout layout) {
  ArrayRef ref = import_array(object, operation, name, target);
  const DType dtype = ref.view.dtype;
  if (!is_float(dtype) || (dtype == DType::F32 && fits(ref.view, layout))) return ref;
  const char* const why = dtype == DType::F32 ? "its elements lie apart" : "read as f32";
  if (target.device.type != DeviceType::Cpu) {
    // The package that holds GPU memory converts it, on its own current stream.
    if (dtype == DType::F32 || !py::hasattr(object, "float")) return ref;
    log_copy(operation, name, ref.view, why);
    return import_array(object.attr("float")(), operation, name, target);
  }
  log_copy(operation, name, ref.view, why);
  const auto copy = new_array(DType::F32, shape_of(ref.view));
  auto* to = static_cast<float*>(copy->view.data);
  for_each_offset(ref.view, [&](std::int64_t at) { *to++ = element(ref.view, at); });
  hold(ref, copy);
  return ref;
}

}  // namespace moesaic::python
