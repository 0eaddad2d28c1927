#pragma once

/// From an instruction set to its kernels.

#include "cpu/kernels/kernel.hpp"
#include "moesaic/tuning.hpp"

namespace moesaic::cpu {

/// The kernels of `isa`, which must be supported().
const IsaKernels& kernels_of(CpuIsa isa);

/// Activations of one row for weights of `type`: 0 = f32, 1 = Fast, 2 = Exact (activations.hpp).
int planes_of(QuantType type, Precision precision) noexcept;

/// Bytes of one token's activations. Never more than 4 * cols (cols rounded up to 32).
std::int64_t activation_bytes(std::int64_t cols, int planes) noexcept;

}  // namespace moesaic::cpu
