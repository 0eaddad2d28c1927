#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

int32_t launch_product_q6_k(const ProductArgs& args, int64_t max_tiles, Stream stream) {
  return launch_product<decoders::q6_k>(args, max_tiles, stream);
}

}  // namespace moesaic::cuda
