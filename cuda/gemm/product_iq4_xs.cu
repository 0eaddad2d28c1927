#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

int32_t launch_product_iq4_xs(const ProductArgs& args, int64_t max_tiles, Stream stream) {
  return launch_product<decoders::iq4_xs>(args, max_tiles, stream);
}

}  // namespace moesaic::cuda
