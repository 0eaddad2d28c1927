#pragma once

/// The activations, as moesaic::activate (ops/activation.cpp) defines them; the kind is the
/// function constant `activation_kind`, so that each pipeline holds one of them.

#include "device.h"

inline float sigmoid(float x) { return 1.0f / (1.0f + precise::exp(-x)); }
inline float silu(float x) { return x / (1.0f + precise::exp(-x)); }
inline float relu(float x) { return x < 0.0f ? 0.0f : x; }
/// 0.5 * (1 + tanh(y)) is sigmoid(2 y), which does not overflow.
inline float gelu_tanh(float x) {
  return x * sigmoid(1.5957691216057308f * x * (1.0f + 0.044715f * x * x));
}
/// Both keep a NaN in x, as std::clamp and std::min do.
inline float at_most(float x, float limit) { return limit < x ? limit : x; }
inline float clamped(float x, float limit) { return x < -limit ? -limit : at_most(x, limit); }

inline float activate(ActivationArgs a, float g, float u) {
  switch (activation_kind) {
    case kSwiGlu:
      return silu(g) * u;
    case kSwiGluClampInput:
      return silu(at_most(g, a.limit)) * clamped(u, a.limit);
    case kSwiGluClampOutput:
      return at_most(silu(g), a.limit) * clamped(u, a.limit);
    case kSwiGluOai: {
      const float gate = at_most(g, a.limit);
      return gate * sigmoid(a.alpha * gate) * (clamped(u, a.limit) + 1.0f);
    }
    case kGeGluTanh:
      return gelu_tanh(g) * u;
    case kReGlu:
      return relu(g) * u;
    case kGeluTanh:
      return gelu_tanh(u);
    case kReluSquared:
      return relu(u) * relu(u);
    default: {  // kSiTu
      const float up = a.linear_beta == 0.0f ? u : a.linear_beta * precise::tanh(u / a.linear_beta);
      return a.beta * precise::tanh(g / a.beta) * sigmoid(g) * up;
    }
  }
}
