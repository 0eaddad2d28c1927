// Peak of 8-bit dot products without VNNI: vpmaddubsw, vpmaddwd, vpaddd.

#include "cpu/peak.hpp"

#include <immintrin.h>

namespace moesaic::cpu::avx2 {

std::int64_t dot_peak(std::int64_t rounds) {
  constexpr int kChains = 8;
  __m256i acc[kChains];
  __m256i a = _mm256_set1_epi8(3);
  const __m256i b = _mm256_set1_epi8(5);
  const __m256i ones = _mm256_set1_epi16(1);
  for (auto& x : acc) x = _mm256_setzero_si256();
  for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kChains; ++j) {
      asm volatile("" : "+x"(a));  // a fresh product every time
      acc[j] = _mm256_add_epi32(acc[j], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
    }
  }
  for (auto& x : acc) asm volatile("" ::"x"(x));
  return rounds * kChains * 32 * 2;
}

}  // namespace moesaic::cpu::avx2
