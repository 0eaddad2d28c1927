// hidden [rows, I] = activation(gate row, up row); f32, four columns a thread, grid as in gather.
// Not measured on hardware.
#pragma once

#include "ops/activation.cuh"
#include "ops/gather.cuh"

namespace moesaic::cuda {

MOESAIC_KERNEL void __launch_bounds__(kRowThreads) activate_kernel(op::Activate args) {
  dev::begin_grid();
  const int64_t cols = args.intermediate;
  const int64_t quad = quad_of_thread();
  if (4 * quad >= cols) return;
  for (int64_t r = blockIdx.y; r < args.rows; r += gridDim.y) {
    const int64_t from = r * args.row_stride;
    Quad g{};
    if (args.gate != nullptr) {
      const bool whole = cols % 4 == 0 && quads_allowed<DType::F32>(args.gate, from);
      g = load_columns<DType::F32>(args.gate, from, quad, cols, whole);
    }
    const bool whole_up = cols % 4 == 0 && quads_allowed<DType::F32>(args.up, from);
    const Quad u = load_columns<DType::F32>(args.up, from, quad, cols, whole_up);
    Quad h;
    MOESAIC_UNROLL
    for (int i = 0; i < 4; ++i) h.v[i] = cuda::activate(args.activation, g.v[i], u.v[i]);
    const bool whole = cols % 4 == 0 && quads_allowed<DType::F32>(args.hidden, r * cols);
    store_columns<DType::F32>(args.hidden, r * cols, quad, cols, whole, h);
  }
}

}  // namespace moesaic::cuda
