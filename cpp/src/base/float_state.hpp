#pragma once

/// How a thread rounds, and what it makes of denormal numbers.

#include <cstdint>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace moesaic {

#if defined(__SSE2__)
/// Everything in MXCSR but the flags of exceptions that have happened.
using FloatState = std::uint32_t;
inline constexpr FloatState kFloatFlags = 0x3f;
inline FloatState float_state() { return _mm_getcsr() & ~kFloatFlags; }
inline void set_float_state(FloatState state) {
  const FloatState now = _mm_getcsr();
  if ((now & ~kFloatFlags) != state) _mm_setcsr((now & kFloatFlags) | state);
}
#elif defined(__aarch64__)
using FloatState = std::uint64_t;  ///< FPCR
inline FloatState float_state() {
  FloatState state;
  asm volatile("mrs %0, fpcr" : "=r"(state));
  return state;
}
inline void set_float_state(FloatState state) {
  if (float_state() != state) asm volatile("msr fpcr, %0" : : "r"(state));
}
#else
using FloatState = std::uint32_t;
inline FloatState float_state() { return 0; }
inline void set_float_state(FloatState) {}
#endif

}  // namespace moesaic
