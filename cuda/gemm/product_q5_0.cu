#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

constinit const Launchers q5_0_launchers = launchers_of<decoders::q5_0>();

}  // namespace moesaic::cuda
