// Peak of vpdpbusd (VEX) on 256-bit registers.

#include "cpu/peak.hpp"

#include <immintrin.h>

namespace moesaic::cpu::avxvnni {

std::int64_t dot_peak(std::int64_t rounds) {
  constexpr int kChains = 12;
  __m256i acc[kChains];
  const __m256i a = _mm256_set1_epi8(3);
  const __m256i b = _mm256_set1_epi8(5);
  for (auto& x : acc) x = _mm256_setzero_si256();
  for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) acc[j] = _mm256_dpbusd_avx_epi32(acc[j], a, b);
    asm volatile("" ::"x"(acc[0]));  // keeps the loop
  }
  for (auto& x : acc) asm volatile("" ::"x"(x));
  return rounds * kChains * 32 * 2;
}

}  // namespace moesaic::cpu::avxvnni
