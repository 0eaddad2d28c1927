#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

constinit const Launchers bf16_launchers = launchers_of<decoders::bf16>();

}  // namespace moesaic::cuda
