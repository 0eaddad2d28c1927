#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

constinit const Launchers q8_0_launchers = launchers_of<decoders::q8_0>();

}  // namespace moesaic::cuda
