#pragma once

/// Instruction sets: what the CPU and the operating system allow, and which one a call uses.

#include <vector>

#include "moesaic/tuning.hpp"

namespace moesaic::cpu {

using moesaic::name_of;

/// By cpuid and xgetbv (x86) or the auxiliary vector (Arm).
bool cpu_has(CpuIsa isa) noexcept;
/// cpu_has, and this build has the kernels.
bool supported(CpuIsa isa) noexcept;
/// The best supported one.
CpuIsa best_isa() noexcept;
/// tuning.cpu_isa, or the best one for Auto. Throws UnsupportedError when a forced one cannot run
/// here.
CpuIsa active_isa(const Tuning& tuning);
/// In ascending speed, "scalar" first.
std::vector<CpuIsa> supported_isas();

}  // namespace moesaic::cpu
