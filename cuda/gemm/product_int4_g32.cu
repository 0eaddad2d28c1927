#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

int32_t launch_product_int4_g32(const ProductArgs& args, int64_t max_tiles, Stream stream) {
  return launch_product<decoders::int4_g32>(args, max_tiles, stream);
}

}  // namespace moesaic::cuda
