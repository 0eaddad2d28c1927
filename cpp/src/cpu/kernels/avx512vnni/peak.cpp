// Peak of vpdpbusd on 512-bit registers: 16 independent accumulators hide its latency.

#include "cpu/peak.hpp"

#include <immintrin.h>

namespace moesaic::cpu::avx512vnni {

std::int64_t dot_peak(std::int64_t rounds) {
  constexpr int kChains = 16;
  __m512i acc[kChains];
  const __m512i a = _mm512_set1_epi8(3);
  const __m512i b = _mm512_set1_epi8(5);
  for (auto& x : acc) x = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kChains; ++j) acc[j] = _mm512_dpbusd_epi32(acc[j], a, b);
    asm volatile("" ::"v"(acc[0]));  // keeps the loop
  }
  for (auto& x : acc) asm volatile("" ::"v"(x));
  return rounds * kChains * 64 * 2;
}

}  // namespace moesaic::cpu::avx512vnni
