#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

int32_t launch_product_q5_1(const ProductArgs& args, int64_t max_tiles, Stream stream) {
  return launch_product<decoders::q5_1>(args, max_tiles, stream);
}

}  // namespace moesaic::cuda
