#include <algorithm>
#include <cmath>

#include "moesaic/config.hpp"

namespace moesaic {
namespace {

float sigmoid(float x) { return 1.0F / (1.0F + std::exp(-x)); }
float silu(float x) { return x / (1.0F + std::exp(-x)); }
float gelu_tanh(float x) {
  constexpr float kSqrt2OverPi = 0.79788456080286536F;
  return 0.5F * x * (1.0F + std::tanh(kSqrt2OverPi * x * (1.0F + 0.044715F * x * x)));
}
float relu(float x) { return x < 0.0F ? 0.0F : x; }

}  // namespace

float activate(const Activation& activation, float g, float u) {
  const float limit = activation.limit;
  switch (activation.kind) {
    case ActivationKind::SwiGlu:
      return silu(g) * u;
    case ActivationKind::SwiGluClampInput:
      return silu(std::min(g, limit)) * std::clamp(u, -limit, limit);
    case ActivationKind::SwiGluClampOutput:
      return std::min(silu(g), limit) * std::clamp(u, -limit, limit);
    case ActivationKind::SwiGluOai: {
      const float gate = std::min(g, limit);
      return gate * sigmoid(activation.alpha * gate) * (std::clamp(u, -limit, limit) + 1.0F);
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
      const float beta = activation.beta;
      const float linear = activation.linear_beta;
      const float up = linear == 0.0F ? u : linear * std::tanh(u / linear);
      return beta * std::tanh(g / beta) * sigmoid(g) * up;
    }
  }
  return 0.0F;
}

}  // namespace moesaic
