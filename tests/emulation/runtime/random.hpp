// A small reproducible generator (xorshift64 of Marsaglia, seeded through a multiplicative hash).
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace moesaic::emulation {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15ull | 1) {}

  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ >> 8;
  }
  uint64_t below(uint64_t bound) { return next() % bound; }

  template <class T>
  void shuffle(std::vector<T>& items) {
    for (std::size_t i = items.size(); i > 1; i--) std::swap(items[i - 1], items[below(i)]);
  }

 private:
  uint64_t state_;
};

}  // namespace moesaic::emulation
