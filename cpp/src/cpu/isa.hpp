#pragma once

/// Instruction sets: what the CPU and the operating system allow, and which one a call uses.

#include <string>
#include <vector>

#include "moesaic/tuning.hpp"

namespace moesaic::cpu {

/// Whether this CPU and operating system have it, by cpuid and xgetbv (x86) or the auxiliary vector
/// (Arm). The first question about Amx asks Linux to permit it to this process, where the CPU has it.
bool cpu_has(CpuIsa isa) noexcept;
/// Why the system does not let this process use the AMX that its CPU has; else empty.
std::string amx_refusal();
/// Whether cpu_has(isa) holds and this build has its kernels.
bool supported(CpuIsa isa) noexcept;
/// The fastest supported instruction set.
CpuIsa best_isa() noexcept;
/// tuning.cpu_isa; for Auto what MOESAIC_CPU_ISA forces in this process, else the best one. Throws
/// UnsupportedError when a forced one cannot run here.
CpuIsa active_isa(const Tuning& tuning);
/// All supported ones by ascending speed, scalar first.
std::vector<CpuIsa> supported_isas();

}  // namespace moesaic::cpu
