#pragma once

/// From an instruction set to its kernels, and from a weight type to the activations they read.

#include "cpu/kernels/kernel.hpp"
#include "moesaic/tuning.hpp"

namespace moesaic::cpu {

/// The kernels of `isa`, which must be supported().
const IsaKernels& kernels_of(CpuIsa isa);

/// Planes of the activations that weights of `type` meet: 0 for f32 formats, 1 for Fast, 2 for
/// Exact (kernels/activations.hpp).
int planes_of(QuantType type, Precision precision) noexcept;

/// Bytes of one token's activations; never more than 4 * cols, with cols rounded up to 32.
std::int64_t activation_bytes(std::int64_t cols, int planes) noexcept;

}  // namespace moesaic::cpu
