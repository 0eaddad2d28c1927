#pragma once

/// How close results are: one measure of the error, and equality of bits.

#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <vector>

namespace moesaic::testing {

/// The relative error |got - want| / |want| of all values together. Infinite where it cannot be
/// computed (another number of values, or NaN on either side), so that no bound lets it pass.
template <class A, class B>
double rel_l2(const std::vector<A>& got, const std::vector<B>& want) {
  constexpr double kFails = std::numeric_limits<double>::infinity();
  if (got.size() != want.size()) return kFails;
  double difference = 0.0, norm = 0.0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double w = static_cast<double>(want[i]);
    const double d = static_cast<double>(got[i]) - w;
    difference += d * d;
    norm += w * w;
  }
  if (difference == 0.0) return 0.0;
  const double error = std::sqrt(difference / norm);
  return std::isnan(error) ? kFails : error;
}

/// Equal bit by bit, so that NaN equals itself and -0 is not 0.
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

}  // namespace moesaic::testing
