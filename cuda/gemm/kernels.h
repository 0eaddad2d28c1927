#pragma once

/// The kernels of this folder by weight format; one translation unit each, so that nvcc can run in
/// parallel.

#include "gemm/narrow.cuh"
#include "gemm/wide.cuh"

namespace moesaic::cuda {

using LaunchProduct = int32_t (*)(const ProductArgs& args, int64_t max_tiles, Stream stream);

template <class D, int kPlanes>
int32_t launch_narrow_as(const ProductArgs& args, int64_t max_tiles, Stream stream) {
  const int64_t blocks = max_tiles * blocks_of(args.weight.row_blocks, kRowBlocks);
  if (blocks > INT32_MAX) return kUnsupported;
  return dev::launch(narrow_kernel<D, kPlanes>, dim3(static_cast<unsigned>(blocks)),
                     dim3(32 * kNarrowWarps), 0, static_cast<dev::Stream>(stream), args);
}

/// The kernel for the tile width and the planes of x that `args` ask for.
template <class D>
int32_t launch_product(const ProductArgs& args, int64_t max_tiles, Stream stream) {
  if (args.tiles.width == kWideTokens) return launch_wide<D>(args, max_tiles, stream);
  return args.x.num_planes == 2 ? launch_narrow_as<D, 2>(args, max_tiles, stream)
                                : launch_narrow_as<D, 1>(args, max_tiles, stream);
}

#define MOESAIC_DECLARE(name) \
  int32_t launch_product_##name(const ProductArgs& args, int64_t max_tiles, Stream stream);
#define MOESAIC_FORMAT(TYPE, value, name, unit_bytes, scale) MOESAIC_DECLARE(name)
#include "formats/formats.inc"
#undef MOESAIC_FORMAT
MOESAIC_DECLARE(int4)
MOESAIC_DECLARE(int4_g32)
#undef MOESAIC_DECLARE

}  // namespace moesaic::cuda
