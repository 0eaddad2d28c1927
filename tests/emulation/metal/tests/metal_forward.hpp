#pragma once

/// A forward on Metal from logits to output, for tests.

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "metal_fixture.hpp"
#include "moesaic/forward.hpp"

namespace moesaic::testing {

/// Sums in f32, in another order than f64.
inline constexpr double kF32Bound = 1e-5;
/// Inputs and weights rounded to half tiles (10 bits), sums in f32.
inline constexpr double kHalfBound = 2e-3;

inline Case case_of(QuantType type, std::int64_t tokens) {
  Case c{"metal", tokens, 256, 256, 4, 2, type, type, type};
  if (traits(type).block_elems == 32) c.hidden = 96, c.intermediate = 160;
  if (traits(type).block_elems == 64) c.hidden = 128, c.intermediate = 192;
  if (traits(type).block_elems == 1) c.hidden = 37, c.intermediate = 71;
  return c;
}

class MetalForward : public MetalTest {
 protected:
  struct Result {
    Floats y;
    std::vector<std::int32_t> ids;
  };

  /// From logits to output, waiting at the end.
  Result forward(const TestLayer& layer, const ExpertStack& stack, const RouterConfig& router,
                 const Floats& x, const Floats& logits, const Tuning& tuning) {
    Context context = this->context(tuning);
    const std::int64_t tokens = static_cast<std::int64_t>(x.size()) / layer.shape.hidden;
    LayerRef ref;
    ref.stack = &stack;
    ref.router = &router;
    ref.activation = layer.activation;
    const auto bytes = workspace_bytes(context, ref, router.top_k, tokens);
    const auto memory = poisoned<std::byte>(static_cast<std::int64_t>(bytes));
    Workspace workspace(memory.data(), bytes);
    const auto in = array(x), scores = array(logits);
    const auto y = poisoned<float>(tokens * layer.shape.hidden);
    const auto ids = poisoned<std::int32_t>(tokens * router.top_k);
    const auto weights = poisoned<float>(tokens * router.top_k);
    ForwardIo io;
    io.x = ConstTensorView(in.data(), DType::F32, {tokens, layer.shape.hidden}, device());
    io.logits = ConstTensorView(scores.data(), DType::F32, {tokens, layer.shape.experts}, device());
    io.out = TensorView(y.data(), DType::F32, {tokens, layer.shape.hidden}, device());
    io.routing_out = {ids.data(), weights.data(), tokens, router.top_k};
    moe_forward(context, ref, io, workspace);
    backend().synchronize(context);
    return {y.host(), ids.host()};
  }

  static RouterConfig router_of(const Case& c) {
    RouterConfig router;
    router.num_experts = c.experts;
    router.top_k = c.top_k;
    return router;
  }
  static Routing route_on_host(const Case& c, const Floats& logits) {
    Routing routing;
    route(ConstTensorView(logits.data(), DType::F32, {c.tokens, c.experts}), router_of(c), routing);
    return routing;
  }
  static double bound(Precision precision) {
    return precision == Precision::Fast ? kHalfBound : kF32Bound;
  }
};

}  // namespace moesaic::testing
