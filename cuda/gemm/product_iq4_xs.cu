#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

constinit const Launchers iq4_xs_launchers = launchers_of<decoders::iq4_xs>();

}  // namespace moesaic::cuda
