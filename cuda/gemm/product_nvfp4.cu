#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

constinit const Launchers nvfp4_launchers = launchers_of<decoders::nvfp4>();

}  // namespace moesaic::cuda
