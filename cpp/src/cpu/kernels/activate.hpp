#pragma once

/// hidden = activation(gate, up) for every ActivationKind, kLanes values at a time, with an
/// exponential good to about 1e-7. The scalar definitions are in ops/activation.cpp.

#include <utility>

#include "cpu/kernels/decode.hpp"
#include "cpu/kernels/kernel.hpp"

namespace moesaic::cpu {
namespace {

/// e^x = scale * (1 + rest), with |rest| < 0.42. x is clamped to where the result is a normal
/// number; NaN stays.
struct Exponential {
  F scale, rest;
};
MOESAIC_ALWAYS_INLINE Exponential split_exponential(F x) {
  x = clamp(x, set_f(-87.0F), set_f(88.0F));
  const F n = round_f(mul(x, set_f(1.44269504F)));
  // ln 2 is subtracted in two parts; the first ends in zero bits, so that n times it is exact.
  F r = fma(n, set_f(-0.693145752F), x);
  r = fma(n, set_f(-1.42860677e-6F), r);
  F p = set_f(1.0F / 720.0F);
  p = fma(p, r, set_f(1.0F / 120.0F));
  p = fma(p, r, set_f(1.0F / 24.0F));
  p = fma(p, r, set_f(1.0F / 6.0F));
  p = fma(p, r, set_f(0.5F));
  p = fma(p, r, set_f(1.0F));
  return {power_of_two(n), mul(p, r)};
}

/// 1 + e^-x
MOESAIC_ALWAYS_INLINE F one_plus_exp_minus(F x) {
  const Exponential e = split_exponential(sub(set_f(0.0F), x));
  return add(set_f(1.0F), fma(e.scale, e.rest, e.scale));
}
MOESAIC_ALWAYS_INLINE F sigmoid(F x) { return div(set_f(1.0F), one_plus_exp_minus(x)); }
MOESAIC_ALWAYS_INLINE F silu(F x) { return div(x, one_plus_exp_minus(x)); }
/// Computed from e^2x - 1, which keeps its digits near 0.
MOESAIC_ALWAYS_INLINE F hyperbolic_tangent(F x) {
  const Exponential e = split_exponential(add(x, x));
  const F less_one = fma(e.scale, e.rest, sub(e.scale, set_f(1.0F)));
  return div(less_one, add(less_one, set_f(2.0F)));
}
/// Uses that 0.5 * (1 + tanh(y)) is sigmoid(2 y).
MOESAIC_ALWAYS_INLINE F gelu_tanh(F x) {
  constexpr float kTwiceSqrt2OverPi = 1.5957691216057308F;
  const F cubic = fma(mul(x, x), set_f(0.044715F), set_f(1.0F));
  return mul(x, sigmoid(mul(mul(set_f(kTwiceSqrt2OverPi), x), cubic)));
}
MOESAIC_ALWAYS_INLINE F at_most(F x, float limit) {
  return clamp(x, set_f(-__builtin_inff()), set_f(limit));
}
MOESAIC_ALWAYS_INLINE F within(F x, float limit) { return clamp(x, set_f(-limit), set_f(limit)); }
MOESAIC_ALWAYS_INLINE F relu(F x) { return clamp(x, set_f(0.0F), set_f(__builtin_inff())); }

template <ActivationKind kKind>
MOESAIC_ALWAYS_INLINE F activate_lanes(const Activation& a, F g, F u) {
  if constexpr (kKind == ActivationKind::SwiGlu) {
    return mul(silu(g), u);
  } else if constexpr (kKind == ActivationKind::SwiGluClampInput) {
    return mul(silu(at_most(g, a.limit)), within(u, a.limit));
  } else if constexpr (kKind == ActivationKind::SwiGluClampOutput) {
    return mul(at_most(silu(g), a.limit), within(u, a.limit));
  } else if constexpr (kKind == ActivationKind::SwiGluOai) {
    const F gate = at_most(g, a.limit);
    return mul(mul(gate, sigmoid(mul(set_f(a.alpha), gate))), add(within(u, a.limit), set_f(1.0F)));
  } else if constexpr (kKind == ActivationKind::GeGluTanh) {
    return mul(gelu_tanh(g), u);
  } else if constexpr (kKind == ActivationKind::ReGlu) {
    return mul(relu(g), u);
  } else if constexpr (kKind == ActivationKind::GeluTanh) {
    return gelu_tanh(u);
  } else if constexpr (kKind == ActivationKind::ReluSquared) {
    return mul(relu(u), relu(u));
  } else {
    static_assert(kKind == ActivationKind::SiTu);
    const F beta = set_f(a.beta);
    const F linear = set_f(a.linear_beta);
    const F up = a.linear_beta == 0.0F ? u : mul(linear, hyperbolic_tangent(div(u, linear)));
    return mul(mul(mul(beta, hyperbolic_tangent(div(g, beta))), sigmoid(g)), up);
  }
}

template <ActivationKind kKind>
MOESAIC_ALWAYS_INLINE void activate_step(const Activation& a, float* hidden, const float* up) {
  constexpr bool kGated = kKind != ActivationKind::GeluTanh && kKind != ActivationKind::ReluSquared;
  F g = set_f(0.0F);
  if constexpr (kGated) g = load_f(hidden);
  store_f(hidden, activate_lanes<kKind>(a, g, load_f(up)));
}

/// An ActivateKernel. Values behind the last whole vector go through a padded copy.
template <ActivationKind kKind>
void activate_row(const Activation& activation, float* hidden, const float* up, int n) {
  const Activation a = activation;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) activate_step<kKind>(a, hidden + i, up + i);
  if (i == n) return;
  float h[kLanes] = {};
  float u[kLanes] = {};
  const std::size_t bytes = sizeof(float) * static_cast<std::size_t>(n - i);
  std::memcpy(h, hidden + i, bytes);
  std::memcpy(u, up + i, bytes);
  activate_step<kKind>(a, h, u);
  std::memcpy(hidden + i, h, bytes);
}

template <int... kKinds>
constexpr void add_activations(ActivateKernel* kernels, std::integer_sequence<int, kKinds...>) {
  ((kernels[kKinds] = &activate_row<static_cast<ActivationKind>(kKinds)>), ...);
}

}  // namespace
}  // namespace moesaic::cpu
