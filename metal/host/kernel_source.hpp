#pragma once

namespace moesaic::metal {

/// All files of metal/kernels as one text, made by embed.cmake.
extern const char* const kKernelSource;

}  // namespace moesaic::metal
