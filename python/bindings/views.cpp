/// Tensor views: how they lie in memory, and who keeps that.

#include "views.hpp"

#include <cstdint>
#include <utility>

#include "dtypes.hpp"
#include "gil.hpp"
#include "moesaic/error.hpp"

namespace moesaic::python {

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

bool is_dense(const ConstTensorView& view) {
  std::int64_t step = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    if (view.dim(i) > 1 && view.stride(i) != step) return false;
    step *= view.dim(i);
  }
  return true;
}

std::optional<TensorView> merge_first(const TensorView& view, int count) {
  TensorView merged = view;
  merged.rank = view.rank - count + 1;
  std::int64_t size = 1;
  // The stride of the merged dimension, and that which the next one out has to have.
  std::int64_t step = view.rank > count ? view.dim(count) : 1, next = 0;
  for (int i = count - 1; i >= 0; --i) {
    size *= view.dim(i);
    if (view.dim(i) == 1) continue;
    if (next == 0) step = view.stride(i);
    if (next != 0 && view.stride(i) != next) return std::nullopt;
    next = view.stride(i) * view.dim(i);
  }
  merged.shape[0] = size;
  merged.strides[0] = step;
  for (int i = 1; i < merged.rank; ++i) {
    merged.shape[static_cast<std::size_t>(i)] = view.dim(i + count - 1);
    merged.strides[static_cast<std::size_t>(i)] = view.stride(i + count - 1);
  }
  return merged;
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i)
    text += (i != 0 ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::shared_ptr<void> share_object(py::object object) {
  return {object.release().ptr(), [](void* held) {
            if (Py_IsInitialized() == 0) return;
            const HeldGil gil;
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

}  // namespace moesaic::python
