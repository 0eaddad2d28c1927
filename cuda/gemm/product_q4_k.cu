#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

constinit const Launchers q4_k_launchers = launchers_of<decoders::q4_k>();

}  // namespace moesaic::cuda
