#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

constinit const Launchers q4_1_launchers = launchers_of<decoders::q4_1>();

}  // namespace moesaic::cuda
