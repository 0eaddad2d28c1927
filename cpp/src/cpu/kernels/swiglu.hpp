#pragma once

/// silu(gate) * up, with an exponential good to about 1e-7.

#include "cpu/kernels/decode.hpp"

namespace moesaic::cpu {
namespace {

/// e^x; x is clamped to where the result is a normal number. NaN stays.
MOESAIC_ALWAYS_INLINE F exponential(F x) {
  x = clamp(x, set_f(-87.0F), set_f(88.0F));
  const F n = round_f(mul(x, set_f(1.44269504F)));
  F r = fma(n, set_f(-0.693145752F), x);  // ln 2 in two parts
  r = fma(n, set_f(-1.42860677e-6F), r);
  F p = set_f(1.0F / 720.0F);
  p = fma(p, r, set_f(1.0F / 120.0F));
  p = fma(p, r, set_f(1.0F / 24.0F));
  p = fma(p, r, set_f(1.0F / 6.0F));
  p = fma(p, r, set_f(0.5F));
  p = fma(p, r, set_f(1.0F));
  p = fma(p, r, set_f(1.0F));
  return mul(p, power_of_two(n));
}

MOESAIC_ALWAYS_INLINE void swiglu_lanes(float* gate, const float* up) {
  const F g = load_f(gate);
  const F e = exponential(sub(set_f(0.0F), g));
  store_f(gate, mul(div(g, add(set_f(1.0F), e)), load_f(up)));
}

/// IsaKernels::swiglu
inline void swiglu(float* gate, const float* up, int n) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) swiglu_lanes(gate + i, up + i);
  if (i == n) return;
  float g[kLanes] = {};
  float u[kLanes] = {};
  const std::size_t bytes = sizeof(float) * static_cast<std::size_t>(n - i);
  std::memcpy(g, gate + i, bytes);
  std::memcpy(u, up + i, bytes);
  swiglu_lanes(g, u);
  std::memcpy(gate + i, g, bytes);
}

}  // namespace
}  // namespace moesaic::cpu
