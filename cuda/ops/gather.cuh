// out[r] = x[index[r]] as f32; zeros where the index is no row of x. A thread moves four
// columns; the grid is (column blocks, rows), rows beyond its limit in steps.
// Memory-bound: bytes are rows * cols * (size in + 4). Not measured on hardware.
#pragma once

#include "ops/rows.cuh"

namespace moesaic::cuda {

inline constexpr int kRowThreads = 128;
inline constexpr int64_t kMaxGridRows = 65535;

// Blocks of four columns a thread that cover a row.
inline unsigned row_blocks(int64_t cols) {
  return static_cast<unsigned>((cols + 4 * kRowThreads - 1) / (4 * kRowThreads));
}
inline unsigned grid_rows(int64_t rows) {
  return static_cast<unsigned>(rows < kMaxGridRows ? rows : kMaxGridRows);
}

MOESAIC_DEV int64_t quad_of_thread() { return int64_t{blockIdx.x} * kRowThreads + threadIdx.x; }

template <DType kIn>
MOESAIC_KERNEL void __launch_bounds__(kRowThreads) gather_kernel(op::Gather args) {
  dev::begin_grid();
  const int64_t cols = args.x.cols;
  const int64_t quad = quad_of_thread();
  if (4 * quad >= cols) return;
  for (int64_t r = blockIdx.y; r < args.rows; r += gridDim.y) {
    const int64_t from = args.index[r];
    Quad q{};
    if (from >= 0 && from < args.x.num_rows) {
      const int64_t offset = args.x.element_offset(from);
      const bool whole = cols % 4 == 0 && quads_allowed<kIn>(args.x.data, offset);
      q = load_columns<kIn>(args.x.data, offset, quad, cols, whole);
    }
    const bool whole = cols % 4 == 0 && quads_allowed<DType::F32>(args.out, r * cols);
    store_columns<DType::F32>(args.out, r * cols, quad, cols, whole, q);
  }
}

// Rows whose id is outside [0, num_experts) become zero.
MOESAIC_KERNEL void __launch_bounds__(kRowThreads) zero_skipped_kernel(op::ZeroSkipped args) {
  dev::begin_grid();
  const int64_t quad = quad_of_thread();
  if (4 * quad >= args.cols) return;
  for (int64_t r = blockIdx.y; r < args.rows; r += gridDim.y) {
    if (args.ids[r] >= 0 && args.ids[r] < args.num_experts) continue;
    const bool whole = args.cols % 4 == 0 && quads_allowed<DType::F32>(args.out, r * args.cols);
    store_columns<DType::F32>(args.out, r * args.cols, quad, args.cols, whole, Quad{});
  }
}

}  // namespace moesaic::cuda
