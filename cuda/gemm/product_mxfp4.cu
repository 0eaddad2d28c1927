#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

constinit const Launchers mxfp4_launchers = launchers_of<decoders::mxfp4>();

}  // namespace moesaic::cuda
