#include "cpu/ops/convert.hpp"
#include "cpu/role_product.hpp"

namespace moesaic::cpu {
namespace {

/// Stores products as elements of `dtype`, which T has room for, or adds them to what is there.
template <class T>
struct PutRounded {
  DType dtype;
  bool accumulate;

  void operator()(int rows, float* values, T* to) const {
    if (accumulate) {
      float before[kPanel];
      to_f32(to, dtype, 0, rows, before);
      for (int i = 0; i < rows; ++i) values[i] = before[i] + values[i];
    }
    from_f32(values, rows, dtype, to, 0);
  }
};

template <class T>
void linear_to(Context& context, const op::Linear& call) {
  const auto rows = static_cast<std::int32_t>(call.in.num_rows);
  role_product(context, call.weight, {.num_segments = 1, .width = rows, .limit = rows}, call.in,
               call.precision, call.scratch, static_cast<T*>(call.out.data),
               // One row has any stride, none included.
               rows == 1 ? call.out.cols : call.out.stride,
               PutRounded<T>{call.out.dtype, call.accumulate});
}

}  // namespace

void CpuBackend::linear(Context& context, const op::Linear& call) const {
  if (call.out.dtype == DType::F32) {
    linear_to<float>(context, call);
  } else {
    linear_to<std::uint16_t>(context, call);
  }
}

}  // namespace moesaic::cpu
