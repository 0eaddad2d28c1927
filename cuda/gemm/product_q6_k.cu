#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

constinit const Launchers q6_k_launchers = launchers_of<decoders::q6_k>();

}  // namespace moesaic::cuda
