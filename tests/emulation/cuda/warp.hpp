// Barriers, shuffles, votes, matches and reductions of a warp and a block.
#pragma once

#include "cuda/qualifiers.hpp"
#include "runtime/collectives.hpp"

inline void __syncthreads(MOESAIC_HERE) {
  moesaic::emulation::block_barrier({"__syncthreads", where});
}
inline void __syncwarp(unsigned mask = moesaic::emulation::kFullMask, MOESAIC_HERE) {
  moesaic::emulation::warp_barrier(mask, {"__syncwarp", where});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, MOESAIC_HERE) {
  const int first = static_cast<int>(moesaic::emulation::position.lane) & ~(width - 1);
  return moesaic::emulation::shuffle(mask, value, first + (source & (width - 1)), width,
                                     {"__shfl_sync", where});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, MOESAIC_HERE) {
  const int lane = static_cast<int>(moesaic::emulation::position.lane);
  return moesaic::emulation::shuffle(mask, value, lane - static_cast<int>(delta), width,
                                     {"__shfl_up_sync", where});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, MOESAIC_HERE) {
  const int lane = static_cast<int>(moesaic::emulation::position.lane);
  return moesaic::emulation::shuffle(mask, value, lane + static_cast<int>(delta), width,
                                     {"__shfl_down_sync", where});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, MOESAIC_HERE) {
  // A source in a lower segment is readable, one in a higher segment is not (as the manual says).
  const int lane = static_cast<int>(moesaic::emulation::position.lane);
  const int source = lane ^ lane_mask;
  const bool past_the_end = source >= (lane & ~(width - 1)) + width;
  return moesaic::emulation::shuffle(mask, value, past_the_end ? lane : source, 32,
                                     {"__shfl_xor_sync", where});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, MOESAIC_HERE) {
  return moesaic::emulation::ballot(mask, predicate != 0, {"__ballot_sync", where});
}
inline int __any_sync(unsigned mask, int predicate, MOESAIC_HERE) {
  return moesaic::emulation::ballot(mask, predicate != 0, {"__any_sync", where}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, MOESAIC_HERE) {
  return moesaic::emulation::ballot(mask, predicate == 0, {"__all_sync", where}) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, MOESAIC_HERE) {
  return moesaic::emulation::match(mask, value, {"__match_any_sync", where});
}

#define MOESAIC_REDUCE(name, T, combine)                                               \
  inline T name(unsigned mask, T value, MOESAIC_HERE) {                                \
    return moesaic::emulation::reduce<T, moesaic::emulation::combine>(mask, value,     \
                                                                      {#name, where}); \
  }
MOESAIC_REDUCE(__reduce_add_sync, unsigned, sum_of<unsigned>)
MOESAIC_REDUCE(__reduce_add_sync, int, sum_of<int>)
MOESAIC_REDUCE(__reduce_min_sync, unsigned, smaller_of<unsigned>)
MOESAIC_REDUCE(__reduce_min_sync, int, smaller_of<int>)
MOESAIC_REDUCE(__reduce_max_sync, unsigned, larger_of<unsigned>)
MOESAIC_REDUCE(__reduce_max_sync, int, larger_of<int>)
MOESAIC_REDUCE(__reduce_and_sync, unsigned, and_of)
MOESAIC_REDUCE(__reduce_or_sync, unsigned, or_of)
MOESAIC_REDUCE(__reduce_xor_sync, unsigned, xor_of)
#undef MOESAIC_REDUCE
