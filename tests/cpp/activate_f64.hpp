#pragma once

/// The activations by their formulas, in double, apart from every other implementation.

#include <algorithm>
#include <cmath>

#include "moesaic/config.hpp"

namespace moesaic::testing {

inline double activate_f64(const Activation& a, double g, double u) {
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  const auto gelu = [](double x) {
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  };
  const double limit = static_cast<double>(a.limit);
  const double clamped = std::clamp(u, -limit, limit);
  const double capped = std::min(g, limit);
  const double beta = static_cast<double>(a.beta), linear = static_cast<double>(a.linear_beta);
  switch (a.kind) {
    case ActivationKind::SwiGlu:
      return g * sigmoid(g) * u;
    case ActivationKind::SwiGluClampInput:
      return capped * sigmoid(capped) * clamped;
    case ActivationKind::SwiGluClampOutput:
      return std::min(g * sigmoid(g), limit) * clamped;
    case ActivationKind::SwiGluOai:
      return capped * sigmoid(static_cast<double>(a.alpha) * capped) * (clamped + 1);
    case ActivationKind::GeGluTanh:
      return gelu(g) * u;
    case ActivationKind::ReGlu:
      return std::max(g, 0.0) * u;
    case ActivationKind::GeluTanh:
      return gelu(u);
    case ActivationKind::ReluSquared:
      return std::max(u, 0.0) * std::max(u, 0.0);
    case ActivationKind::SiTu:
      return beta * std::tanh(g / beta) * sigmoid(g) *
             (linear == 0 ? u : linear * std::tanh(u / linear));
  }
  return 0;
}

}  // namespace moesaic::testing
