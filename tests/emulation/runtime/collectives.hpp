// Shuffles, votes, matches and reductions over the lanes of a warp, in no language's spelling.
#pragma once

#include <cstring>
#include <type_traits>

#include "runtime/emulator.hpp"

// The call site of a wrapper: its last, defaulted parameter.
#define MOESAIC_HERE std::source_location where = std::source_location::current()

namespace moesaic::emulation {

// --- shuffles

template <class T>
struct ShuffleLane {
  T value, result;
  unsigned source;
};

// The value of a lane that takes no part is undefined: all ones.
template <class T>
MOESAIC_UNCHECKED void shuffle_body(void* const* lanes, uint32_t) {
  for (unsigned i = 0; i < kWarpSize; i++) {
    auto* lane = static_cast<ShuffleLane<T>*>(lanes[i]);
    if (!lane) continue;
    auto* source = static_cast<ShuffleLane<T>*>(lanes[lane->source]);
    if (source) {
      lane->result = source->value;
    } else {
      unsigned char* bytes = reinterpret_cast<unsigned char*>(&lane->result);
      for (std::size_t b = 0; b < sizeof(T); b++) bytes[b] = 0xFF;
    }
  }
}

// `source` outside the lane's segment of `width` lanes means the lane itself.
template <class T>
T shuffle(unsigned mask, T value, int source, int width, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1))) fail("a width is a power of two", site);
  const int lane = static_cast<int>(position.lane);
  const int first = lane & ~(width - 1);
  if (source < first || source >= first + width) source = lane;
  ShuffleLane<T> mine{value, value, static_cast<unsigned>(source)};
  warp_collective(mask, &mine, shuffle_body<T>, site);
  return mine.result;
}

// --- votes

struct VoteLane {
  bool predicate;
  uint32_t ballot;
};

MOESAIC_UNCHECKED inline void ballot_body(void* const* lanes, uint32_t) {
  uint32_t ballot = 0;
  for (unsigned i = 0; i < kWarpSize; i++) {
    if (lanes[i] && static_cast<VoteLane*>(lanes[i])->predicate) ballot |= 1u << i;
  }
  for (unsigned i = 0; i < kWarpSize; i++) {
    if (lanes[i]) static_cast<VoteLane*>(lanes[i])->ballot = ballot;
  }
}

inline uint32_t ballot(unsigned mask, bool predicate, Site site) {
  VoteLane mine{predicate, 0};
  warp_collective(mask, &mine, ballot_body, site);
  return mine.ballot;
}

// --- matches: the lanes that hold the same bits

struct MatchLane {
  uint64_t bits;
  uint32_t same;
};

MOESAIC_UNCHECKED inline void match_body(void* const* lanes, uint32_t) {
  for (unsigned i = 0; i < kWarpSize; i++) {
    auto* lane = static_cast<MatchLane*>(lanes[i]);
    if (!lane) continue;
    lane->same = 0;
    for (unsigned j = 0; j < kWarpSize; j++) {
      if (lanes[j] && static_cast<MatchLane*>(lanes[j])->bits == lane->bits) lane->same |= 1u << j;
    }
  }
}

template <class T>
uint32_t match(unsigned mask, T value, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  MatchLane mine{0, 0};
  std::memcpy(&mine.bits, &value, sizeof value);
  warp_collective(mask, &mine, match_body, site);
  return mine.same;
}

// --- reductions

template <class T>
struct ReduceLane {
  T value, result;
};

template <class T, T (*combine)(T, T)>
MOESAIC_UNCHECKED void reduce_body(void* const* lanes, uint32_t) {
  bool any = false;
  T total{};
  for (unsigned i = 0; i < kWarpSize; i++) {
    if (!lanes[i]) continue;
    const T value = static_cast<ReduceLane<T>*>(lanes[i])->value;
    total = any ? combine(total, value) : value;
    any = true;
  }
  for (unsigned i = 0; i < kWarpSize; i++) {
    if (lanes[i]) static_cast<ReduceLane<T>*>(lanes[i])->result = total;
  }
}

template <class T, T (*combine)(T, T)>
T reduce(unsigned mask, T value, Site site) {
  ReduceLane<T> mine{value, value};
  warp_collective(mask, &mine, reduce_body<T, combine>, site);
  return mine.result;
}

template <class T>
MOESAIC_UNCHECKED T sum_of(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));  // may wrap
  } else {
    return a + b;
  }
}
template <class T>
MOESAIC_UNCHECKED T smaller_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
MOESAIC_UNCHECKED T larger_of(T a, T b) {
  return a < b ? b : a;
}
MOESAIC_UNCHECKED inline unsigned and_of(unsigned a, unsigned b) { return a & b; }
MOESAIC_UNCHECKED inline unsigned or_of(unsigned a, unsigned b) { return a | b; }
MOESAIC_UNCHECKED inline unsigned xor_of(unsigned a, unsigned b) { return a ^ b; }

}  // namespace moesaic::emulation
