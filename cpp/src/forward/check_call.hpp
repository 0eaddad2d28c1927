#pragma once

/// The rules of a forward: what its parts and tensors must be to each other. All of them run before
/// anything is written; later code trusts them.

#include <cstdint>

#include "moesaic/forward.hpp"

namespace moesaic::forward {

/// Sizes of one call, known to be consistent.
struct CallSizes {
  std::int64_t num_tokens = 0;
  std::int32_t top_k = 0;
  std::int64_t num_pairs = 0;
  bool ready_routing = false;  ///< ids and weights came with the call
};

/// Throws ShapeError, DTypeError, DeviceError, ConfigError or UnsupportedError naming `operation`.
/// No allocation unless it throws.
CallSizes check_forward(const char* operation, Device device, const LayerRef& layer,
                        const ForwardIo& io);

/// check_forward without what concerns `out`, for calls that write something else.
CallSizes check_inputs(const char* operation, Device device, const LayerRef& layer,
                       const ForwardIo& io);

/// Every expert that a routing in host memory asks for is in memory. Throws DeviceError naming the
/// first that LoadOptions::experts left out.
void check_kept(const char* operation, const ExpertStack& stack, const RoutingView& routing);
/// check_kept for the stack of a layer; experts that a store moves are never left out.
void check_kept(const char* operation, const LayerRef& layer, const RoutingView& routing);
/// How many experts a call of the layer may ask for.
std::int32_t reachable_experts(const LayerRef& layer);

/// The input alone, for callers that make an output like it before the call: [T, H] of the layer,
/// f32, f16 or bf16 on `device`, with a contiguous last dimension.
void check_x(const char* operation, Device device, const LayerRef& layer, const ConstTensorView& x);

/// Asks the backend about every role and part; with `strict` its slower ways are errors too.
void check_supported(const char* operation, const Context& context, const LayerRef& layer);

/// The layer alone (check_layer.cpp): its stacks, norms and projections fit together.
void check_layer(const char* operation, const LayerRef& layer);
/// There is a router, consistent in itself and with the stack.
void check_router_config(const char* operation, const LayerRef& layer);
/// There is a router weight of the right size.
void check_router_weight(const char* operation, const LayerRef& layer);

/// The token ids of the call, in host memory, are rows of the layer's table.
void check_token_ids(const char* operation, const LayerRef& layer, const ForwardIo& io);
/// With `strict` the ids and token ids in device memory are what they would have to be on the host.
/// Throws CaptureError where they cannot be read now.
void check_device_ids(const char* operation, Context& context, const LayerRef& layer,
                      const ForwardIo& io);

}  // namespace moesaic::forward
