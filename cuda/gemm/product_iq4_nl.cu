#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

int32_t launch_product_iq4_nl(const ProductArgs& args, int64_t max_tiles, Stream stream) {
  return launch_product<decoders::iq4_nl>(args, max_tiles, stream);
}

}  // namespace moesaic::cuda
