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
