#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

constinit const Launchers iq4_nl_launchers = launchers_of<decoders::iq4_nl>();

}  // namespace moesaic::cuda
