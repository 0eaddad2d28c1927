#include <algorithm>

#include "moesaic/backend.hpp"
#include "moesaic/error.hpp"

namespace moesaic {

InputRows input_rows(const ConstTensorView& view, const char* operation, const char* name) {
  require<ShapeError>(view.rank >= 1 && view.rank <= 3, [&] {
    return Problem{operation, name, "1 to 3 dimensions", describe(view), ""};
  });
  require<DTypeError>(
      view.dtype == DType::F32 || view.dtype == DType::F16 || view.dtype == DType::BF16,
      [&] { return Problem{operation, name, "f32, f16 or bf16", name_of(view.dtype), ""}; });
  const int last = view.rank - 1;
  require<ShapeError>(view.stride(last) == 1 || view.dim(last) <= 1, [&] {
    return Problem{operation, name, "a contiguous last dimension",
                   "a stride of " + std::to_string(view.stride(last)), "make a contiguous copy"};
  });

  InputRows rows{.data = view.data, .dtype = view.dtype, .num_rows = 1, .cols = view.dim(last)};
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

}  // namespace moesaic
