#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

constinit const Launchers q2_k_launchers = launchers_of<decoders::q2_k>();

}  // namespace moesaic::cuda
