#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

constinit const Launchers q3_k_launchers = launchers_of<decoders::q3_k>();

}  // namespace moesaic::cuda
