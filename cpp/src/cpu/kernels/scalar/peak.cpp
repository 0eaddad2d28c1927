// Peak of 8-bit dot products in plain C++, as the compiler vectorises it for the baseline.

#include "cpu/peak.hpp"

#include <array>

namespace moesaic::cpu::scalar {

std::int64_t dot_peak(std::int64_t rounds) {
  constexpr int kLength = 1024;
  std::array<std::int8_t, kLength> a{};
  std::array<std::int8_t, kLength> b{};
  a.fill(3);
  b.fill(5);
  volatile std::int32_t sink = 0;
  for (std::int64_t i = 0; i < rounds; ++i) {
    std::int32_t sum = 0;
    a[0] = static_cast<std::int8_t>(i);
    for (int j = 0; j < kLength; ++j) sum += static_cast<std::int16_t>(a[j]) * b[j];
    sink = sink + sum;
  }
  return rounds * kLength * 2;
}

}  // namespace moesaic::cpu::scalar
