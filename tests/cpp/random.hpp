#pragma once

/// Random values for tests. Everything here follows from the seed alone: the distributions and the
/// shuffle are written out because those of the standard library differ from one to the next, and
/// a failure should be repeatable on another machine.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

namespace moesaic::testing {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

class Random {
 public:
  explicit Random(std::uint32_t seed) : engine_(seed) {}

  /// 32 random bits.
  std::uint32_t bits() { return static_cast<std::uint32_t>(engine_()); }
  std::byte byte() { return static_cast<std::byte>(bits() & 0xFFU); }
  /// 0 to bound - 1.
  std::int32_t below(std::int64_t bound) {
    return static_cast<std::int32_t>(bits() % static_cast<std::uint64_t>(bound));
  }
  /// From 0 to 1, without 1.
  float uniform() { return static_cast<float>(bits() >> 8) * 0x1p-24F; }
  /// A normal value around 0 with this deviation, by the transform of Box and Muller.
  float normal(float deviation = 1.0F) {
    constexpr double kTurn = 6.283185307179586;
    const double u = (static_cast<double>(bits()) + 1.0) / 4294967297.0;
    const double v = static_cast<double>(bits()) / 4294967296.0;
    return static_cast<float>(static_cast<double>(deviation) * std::sqrt(-2.0 * std::log(u)) *
                              std::cos(kTurn * v));
  }
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (std::size_t i = items.size(); i > 1; --i) {
      std::swap(items[i - 1], items[static_cast<std::size_t>(below(static_cast<std::int64_t>(i)))]);
    }
  }

 private:
  std::mt19937 engine_;
};

/// Normal values around 0.
inline Floats random_values(std::int64_t count, std::uint32_t seed, float deviation = 1.0F) {
  Random random(seed);
  Floats values(static_cast<std::size_t>(count));
  for (float& v : values) v = random.normal(deviation);
  return values;
}

/// Factors: normal values around 1, nearly all positive.
inline Floats random_factors(std::int64_t count, std::uint32_t seed) {
  Floats values = random_values(count, seed, 0.2F);
  for (float& v : values) v += 1.0F;
  return values;
}

}  // namespace moesaic::testing
