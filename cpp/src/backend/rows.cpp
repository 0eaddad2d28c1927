#include <algorithm>

#include "moesaic/backend_facts.hpp"

namespace moesaic {

InputRows input_rows(const ConstTensorView& view) {
  InputRows rows{
      .data = view.data, .dtype = view.dtype, .num_rows = 1, .cols = view.dim(view.rank - 1)};
  if (view.rank >= 2) {
    rows.num_rows = view.dim(0);
    rows.outer_stride = view.stride(0);
  }
  if (view.rank == 3) {
    rows.num_rows *= view.dim(1);
    rows.inner_count = std::max<std::int64_t>(1, view.dim(1));
    rows.inner_stride = view.stride(1);
  }
  return rows;
}

OutputRows output_rows(const TensorView& view) {
  return {.data = view.data, .dtype = view.dtype, .cols = view.dim(1), .stride = view.stride(0)};
}

InputRows dense_rows(const void* data, DType dtype, std::int64_t num_rows, std::int64_t cols) {
  return {.data = data, .dtype = dtype, .num_rows = num_rows, .cols = cols, .outer_stride = cols};
}

}  // namespace moesaic
