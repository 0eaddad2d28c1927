#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

constinit const Launchers int4_launchers = launchers_of<decoders::int4>();

}  // namespace moesaic::cuda
