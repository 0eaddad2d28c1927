#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

constinit const Launchers f16_launchers = launchers_of<decoders::f16>();

}  // namespace moesaic::cuda
