// The activations of an expert, by the definitions of moesaic::activate.
#pragma once

#include "device.cuh"
#include "plugin.h"

namespace moesaic::cuda {

MOESAIC_DEV float sigmoid(float x) { return 1.0F / (1.0F + expf(-x)); }
MOESAIC_DEV float silu(float x) { return x / (1.0F + expf(-x)); }
MOESAIC_DEV float relu(float x) { return x < 0.0F ? 0.0F : x; }
// 0.5 * (1 + tanh(y)) is sigmoid(2 y).
MOESAIC_DEV float gelu_tanh(float x) {
  constexpr float kTwiceSqrt2OverPi = 1.5957691216057308F;
  return x * sigmoid(kTwiceSqrt2OverPi * x * (1.0F + 0.044715F * x * x));
}
// NaN stays NaN, as with std::min and std::clamp; fminf would drop it.
MOESAIC_DEV float at_most(float x, float limit) { return limit < x ? limit : x; }
MOESAIC_DEV float clamp_to(float x, float limit) { return x < -limit ? -limit : at_most(x, limit); }

MOESAIC_DEV float activate(const Activation& a, float g, float u) {
  switch (a.kind) {
    case ActivationKind::SwiGlu:
      return silu(g) * u;
    case ActivationKind::SwiGluClampInput:
      return silu(at_most(g, a.limit)) * clamp_to(u, a.limit);
    case ActivationKind::SwiGluClampOutput:
      return at_most(silu(g), a.limit) * clamp_to(u, a.limit);
    case ActivationKind::SwiGluOai: {
      const float gate = at_most(g, a.limit);
      return gate * sigmoid(a.alpha * gate) * (clamp_to(u, a.limit) + 1.0F);
    }
    case ActivationKind::GeGluTanh:
      return gelu_tanh(g) * u;
    case ActivationKind::ReGlu:
      return relu(g) * u;
    case ActivationKind::GeluTanh:
      return gelu_tanh(u);
    case ActivationKind::ReluSquared:
      return relu(u) * relu(u);
    case ActivationKind::SiTu: {
      const float up = a.linear_beta == 0.0F ? u : a.linear_beta * tanhf(u / a.linear_beta);
      return a.beta * tanhf(g / a.beta) * sigmoid(g) * up;
    }
  }
  return 0.0F;
}

}  // namespace moesaic::cuda
