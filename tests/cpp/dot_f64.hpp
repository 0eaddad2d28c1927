#pragma once

#include <cstdint>

namespace moesaic::testing {

/// sum of a[i] * b[i] in f64; four sums side by side, for one alone waits on itself.
template <class A, class B>
double dot_f64(const A* a, const B* b, std::int64_t count) {
  double sums[4] = {};
  const std::int64_t whole = count - count % 4;
  for (std::int64_t i = 0; i < whole; i += 4) {
    for (int k = 0; k < 4; ++k) {
      sums[k] += static_cast<double>(a[i + k]) * static_cast<double>(b[i + k]);
    }
  }
  for (std::int64_t i = whole; i < count; ++i)
    sums[0] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace moesaic::testing
