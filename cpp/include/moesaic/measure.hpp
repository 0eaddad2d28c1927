#pragma once

/// The limits of this machine, measured: what the bench divides by.

#include <cstddef>
#include <cstdint>

#include "moesaic/tuning.hpp"

namespace moesaic {

class ThreadPool;

/// Bytes per second of one pass over `buffer`, every thread of the pool reading its own contiguous
/// part. `buffer` should be several times the last-level cache and in huge pages.
double measure_bandwidth(ThreadPool& pool, const std::byte* buffer, std::size_t bytes);

/// Integer operations per second (2 per multiply-add) of 8-bit dot products in registers, on every
/// thread of the pool at once. `isa` Auto means what layers run: the one that MOESAIC_CPU_ISA
/// forces, else the best one. Throws UnsupportedError when it cannot run here.
double measure_dot_peak(ThreadPool& pool, CpuIsa isa = CpuIsa::Auto);

}  // namespace moesaic
