#pragma once

/// Tensor views: how they lie in memory, and who keeps that.

#include <pybind11/numpy.h>

#include <memory>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "moesaic/types.hpp"

namespace moesaic::python {

/// A view of dense memory, row-major.
TensorView dense_view(void* data, DType dtype, const std::vector<std::int64_t>& shape);
bool is_dense(const ConstTensorView& view);

/// A shape as errors show it: "[5, 32, 64]".
std::string shape_text(const std::vector<std::int64_t>& shape);

/// A Python object as an owner that C++ may let go of on any thread.
std::shared_ptr<void> share_object(py::object object);

/// A read-only numpy array over memory that `owner` keeps alive.
py::array numpy_view(DType dtype, const std::vector<std::int64_t>& shape, const void* data,
                     std::shared_ptr<const void> owner);

}  // namespace moesaic::python
