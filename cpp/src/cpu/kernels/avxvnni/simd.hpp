#pragma once

/// AVX-VNNI: AVX2 with a dot product of its own.

#define MOESAIC_AVX_VNNI 1
#include "cpu/kernels/avx2/simd.hpp"
