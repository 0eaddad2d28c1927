#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

constinit const Launchers int4_zeros_launchers = launchers_of<decoders::int4_zeros>();

}  // namespace moesaic::cuda
