#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

int32_t launch_product_q4_k(const ProductArgs& args, int64_t max_tiles, Stream stream) {
  return launch_product<decoders::q4_k>(args, max_tiles, stream);
}

}  // namespace moesaic::cuda
