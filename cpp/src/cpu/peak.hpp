#pragma once

/// Loops of the dot-product instruction that touch registers only, one per instruction set: their
/// speed is the peak that kernels are compared with.

#include <cstdint>

namespace moesaic::cpu {

// Each runs `rounds` rounds and returns the operations done (2 per multiply-add).
namespace scalar {
std::int64_t dot_peak(std::int64_t rounds);
}
namespace avx2 {
std::int64_t dot_peak(std::int64_t rounds);
}
namespace avxvnni {
std::int64_t dot_peak(std::int64_t rounds);
}
namespace avx512vnni {
std::int64_t dot_peak(std::int64_t rounds);
}
namespace amx {
std::int64_t dot_peak(std::int64_t rounds);
}
namespace neon {
std::int64_t dot_peak(std::int64_t rounds);
}

}  // namespace moesaic::cpu
