#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

constinit const Launchers q5_1_launchers = launchers_of<decoders::q5_1>();

}  // namespace moesaic::cuda
