#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

constinit const Launchers q5_k_launchers = launchers_of<decoders::q5_k>();

}  // namespace moesaic::cuda
