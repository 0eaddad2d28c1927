#include "formats/decoders.cuh"
#include "gemm/kernels.h"

namespace moesaic::cuda {

constinit const Launchers int4_g32_f32_zeros_launchers =
    launchers_of<decoders::int4_g32_f32_zeros>();

}  // namespace moesaic::cuda
