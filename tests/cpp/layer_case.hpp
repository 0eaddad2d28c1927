#pragma once

/// A call of a layer, described.

#include "moesaic/forward.hpp"
#include "random.hpp"

namespace moesaic::testing {

/// What a layer is asked, without the memory for the answer. Without a routing and without logits
/// its own router chooses.
struct LayerCase {
  LayerRef layer = {};
  ConstTensorView x = {};  ///< [T, H]
  RoutingView routing = {};
  ConstTensorView logits = {};
  ConstTensorView router_input = {};
  ConstTensorView token_ids = {};
  DType out = DType::F32;
  const Floats* added_to = nullptr;  ///< accumulate: [T, H] that the output holds before

  ForwardIo io(const TensorView& output) const {
    ForwardIo io;
    io.x = x;
    io.logits = logits;
    io.routing = routing;
    io.out = output;
    io.accumulate = added_to != nullptr;
    io.router_input = router_input;
    io.token_ids = token_ids;
    return io;
  }
  std::int64_t tokens() const { return x.dim(0); }
  /// Experts per token: those of the routing that was given, else the router's.
  std::int32_t top_k() const { return routing.top_k > 0 ? routing.top_k : layer.router->top_k; }
  /// Whether the router has a choice to make, and with it a routing to report.
  bool routes() const { return routing.topk_weights == nullptr && layer.router != nullptr; }
};

}  // namespace moesaic::testing
