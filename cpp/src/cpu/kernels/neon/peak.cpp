// Peak of sdot on 128-bit registers.

#include "cpu/peak.hpp"

#include <arm_neon.h>

namespace moesaic::cpu::neon {

std::int64_t dot_peak(std::int64_t rounds) {
  constexpr int kChains = 16;
  int32x4_t acc[kChains];
  const int8x16_t a = vdupq_n_s8(3);
  const int8x16_t b = vdupq_n_s8(5);
  for (auto& x : acc) x = vdupq_n_s32(0);
  for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kChains; ++j) acc[j] = vdotq_s32(acc[j], a, b);
    asm volatile("" ::"w"(acc[0]));  // keeps the loop
  }
  for (auto& x : acc) asm volatile("" ::"w"(x));
  return rounds * kChains * 16 * 2;
}

}  // namespace moesaic::cpu::neon
