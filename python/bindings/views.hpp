#pragma once

/// Tensor views: how they lie in memory, and who keeps that.

#include <pybind11/numpy.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "moesaic/types.hpp"

namespace moesaic::python {

/// A view of dense memory, row-major.
TensorView dense_view(void* data, DType dtype, const std::vector<std::int64_t>& shape);
bool is_dense(const ConstTensorView& view);
/// The view with its first `count` dimensions as one; empty when no single stride walks them.
std::optional<TensorView> merge_first(const TensorView& view, int count);

/// Calls visit(pointer to an element) for each, in row-major order.
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

/// A shape as errors show it: "[5, 32, 64]".
std::string shape_text(const std::vector<std::int64_t>& shape);

/// A Python object as an owner that C++ may let go of on any thread.
std::shared_ptr<void> share_object(py::object object);

/// A read-only numpy array over memory that `owner` keeps alive.
py::array numpy_view(DType dtype, const std::vector<std::int64_t>& shape, const void* data,
                     std::shared_ptr<const void> owner);

}  // namespace moesaic::python
