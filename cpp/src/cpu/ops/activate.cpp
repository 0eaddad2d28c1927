#include <algorithm>

#include "cpu/cpu_backend.hpp"
#include "cpu/ops/ranges.hpp"
#include "cpu/ops/vec.hpp"
#include "moesaic/context.hpp"

namespace moesaic::cpu {
namespace {

F4 silu4(F4 x) { return x / (1.0F + exp4(-x)); }
F4 relu4(F4 x) { return select(x < F4{}, F4{}, x); }
/// 0.5 * (1 + tanh(y)) is sigmoid(2 y).
F4 gelu_tanh4(F4 x) {
  constexpr float kTwiceSqrt2OverPi = 1.5957691216057308F;
  return x * sigmoid4(kTwiceSqrt2OverPi * x * (1.0F + 0.044715F * x * x));
}
F4 clamp4(F4 x, float limit) { return max4(min4(x, splat(limit)), splat(-limit)); }

template <ActivationKind Kind>
F4 apply(const Activation& a, F4 g, F4 u) {
  if constexpr (Kind == ActivationKind::SwiGlu) {
    return silu4(g) * u;
  } else if constexpr (Kind == ActivationKind::SwiGluClampInput) {
    return silu4(min4(g, splat(a.limit))) * clamp4(u, a.limit);
  } else if constexpr (Kind == ActivationKind::SwiGluClampOutput) {
    return min4(silu4(g), splat(a.limit)) * clamp4(u, a.limit);
  } else if constexpr (Kind == ActivationKind::SwiGluOai) {
    const F4 gate = min4(g, splat(a.limit));
    return gate * sigmoid4(a.alpha * gate) * (clamp4(u, a.limit) + 1.0F);
  } else if constexpr (Kind == ActivationKind::GeGluTanh) {
    return gelu_tanh4(g) * u;
  } else if constexpr (Kind == ActivationKind::ReGlu) {
    return relu4(g) * u;
  } else if constexpr (Kind == ActivationKind::GeluTanh) {
    return gelu_tanh4(u);
  } else if constexpr (Kind == ActivationKind::ReluSquared) {
    return relu4(u) * relu4(u);
  } else {
    static_assert(Kind == ActivationKind::SiTu);
    const F4 up = a.linear_beta == 0.0F ? u : a.linear_beta * tanh4(u / a.linear_beta);
    return a.beta * tanh4(g / a.beta) * sigmoid4(g) * up;
  }
}

using Row = void (*)(const Activation& activation, const float* gate, const float* up,
                     std::int64_t count, float* hidden);

template <ActivationKind Kind>
void activate_row(const Activation& activation, const float* gate, const float* up,
                  std::int64_t count, float* hidden) {
  constexpr bool kGated = Kind != ActivationKind::GeluTanh && Kind != ActivationKind::ReluSquared;
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    F4 g{};
    if constexpr (kGated) g = load4(gate + i);
    store4(hidden + i, apply<Kind>(activation, g, load4(up + i)));
  }
  if (i < count) {
    float g[kLanes] = {};
    float u[kLanes] = {};
    if constexpr (kGated) std::copy(gate + i, gate + count, g);
    std::copy(up + i, up + count, u);
    float h[kLanes];
    store4(h, apply<Kind>(activation, load4(g), load4(u)));
    std::copy(h, h + (count - i), hidden + i);
  }
}

Row row_of(ActivationKind kind) {
  switch (kind) {
    case ActivationKind::SwiGlu:
      return activate_row<ActivationKind::SwiGlu>;
    case ActivationKind::SwiGluClampInput:
      return activate_row<ActivationKind::SwiGluClampInput>;
    case ActivationKind::SwiGluClampOutput:
      return activate_row<ActivationKind::SwiGluClampOutput>;
    case ActivationKind::SwiGluOai:
      return activate_row<ActivationKind::SwiGluOai>;
    case ActivationKind::GeGluTanh:
      return activate_row<ActivationKind::GeGluTanh>;
    case ActivationKind::ReGlu:
      return activate_row<ActivationKind::ReGlu>;
    case ActivationKind::GeluTanh:
      return activate_row<ActivationKind::GeluTanh>;
    case ActivationKind::ReluSquared:
      return activate_row<ActivationKind::ReluSquared>;
    case ActivationKind::SiTu:
      return activate_row<ActivationKind::SiTu>;
  }
  return activate_row<ActivationKind::SwiGlu>;
}

}  // namespace

void CpuBackend::activate(Context& context, const op::Activate& call) const {
  constexpr std::int64_t kOperations = 24;  // per element, mostly the exponential
  const Row row = row_of(call.activation.kind);
  const bool gated = call.activation.gated();
  const std::int64_t width = call.intermediate;
  parallel_ranges(context.pool(), call.rows, width * kOperations,
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t r = begin; r < end; ++r) {
                      const std::int64_t at = r * call.row_stride;
                      row(call.activation, gated ? call.gate + at : nullptr, call.up + at, width,
                          call.hidden + r * width);
                    }
                  });
}

}  // namespace moesaic::cpu
