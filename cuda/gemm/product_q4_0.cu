#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

constinit const Launchers q4_0_launchers = launchers_of<decoders::q4_0>();

}  // namespace moesaic::cuda
