#pragma once

/// The kernels of this folder by weight format; one translation unit each, so that nvcc can run in
/// parallel.

#include "gemm/down_sum.cuh"
#include "gemm/narrow.cuh"
#include "gemm/wide.cuh"

namespace moesaic::cuda {

/// What a format offers.
struct Launchers {
  int32_t (*product)(const ProductArgs& args, int64_t max_tiles, Stream stream);
  int32_t (*down_sum)(const DownSumArgs& args, Stream stream);
  int32_t (*load)();  // all kernels that these launch
  // As StageArgs wants them; narrow kernels read no sums of excess.
  SumsOfX sums;
  int32_t scale_groups;
  int32_t shift;
};

template <class D, int kPlanes>
int32_t launch_narrow_as(const ProductArgs& args, int64_t max_tiles, Stream stream) {
  const int64_t blocks = max_tiles * blocks_of(args.weight.row_blocks, kRowBlocks);
  if (blocks > INT32_MAX) return kUnsupported;
  return dev::launch_dependent(narrow_kernel<D, kPlanes>, dim3(static_cast<unsigned>(blocks)),
                               dim3(32 * kNarrowWarps), 0, static_cast<dev::Stream>(stream), args);
}

/// The kernel for the tile width and the planes of x that `args` ask for.
template <class D>
int32_t launch_product(const ProductArgs& args, int64_t max_tiles, Stream stream) {
  if (args.tiles.width == kWideTokens) return launch_wide<D>(args, max_tiles, stream);
  return args.x.num_planes == 2 ? launch_narrow_as<D, 2>(args, max_tiles, stream)
                                : launch_narrow_as<D, 1>(args, max_tiles, stream);
}

template <class D, int kPlanes>
int32_t launch_down_sum_as(const DownSumArgs& args, Stream stream) {
  const int64_t blocks = args.weight.row_blocks * args.combine.routing.num_tokens;
  if (blocks > INT32_MAX) return kUnsupported;
  return dev::launch_dependent(down_sum_kernel<D, kPlanes>, dim3(static_cast<unsigned>(blocks)),
                               dim3(kDownSumThreads), 0, static_cast<dev::Stream>(stream), args);
}

template <class D>
int32_t launch_down_sum(const DownSumArgs& args, Stream stream) {
  return args.x.num_planes == 2 ? launch_down_sum_as<D, 2>(args, stream)
                                : launch_down_sum_as<D, 1>(args, stream);
}

template <class D>
int32_t load_kernels() {
  return dev::load(narrow_kernel<D, 1>, narrow_kernel<D, 2>, wide_kernel<D, 1>, wide_kernel<D, 2>,
                   down_sum_kernel<D, 1>, down_sum_kernel<D, 2>);
}

template <class D>
constexpr Launchers launchers_of() {
  return {.product = launch_product<D>,
          .down_sum = launch_down_sum<D>,
          .load = load_kernels<D>,
          .sums = D::kMinima   ? SumsOfX::Minima
                  : D::kOffset ? SumsOfX::Excess
                               : SumsOfX::None,
          .scale_groups = D::kScaleGroups > 0 ? D::kScaleGroups : 1,
          .shift = D::kShift};
}

#define MOESAIC_DECLARE(name) extern const Launchers name##_launchers;
#define MOESAIC_FORMAT(TYPE, value, name, unit_bytes, scale) MOESAIC_DECLARE(name)
#include "formats/formats.inc"
#undef MOESAIC_FORMAT
MOESAIC_DECLARE(int4)
MOESAIC_DECLARE(int4_zeros)
MOESAIC_DECLARE(int4_f32)
MOESAIC_DECLARE(int4_f32_zeros)
MOESAIC_DECLARE(int4_g32)
MOESAIC_DECLARE(int4_g32_zeros)
MOESAIC_DECLARE(int4_g32_f32)
MOESAIC_DECLARE(int4_g32_f32_zeros)
#undef MOESAIC_DECLARE

}  // namespace moesaic::cuda
