#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

constinit const Launchers f32_launchers = launchers_of<decoders::f32>();

}  // namespace moesaic::cuda
