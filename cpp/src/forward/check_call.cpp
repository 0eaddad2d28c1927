#include "forward/check_call.hpp"

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "ops/check_tensor.hpp"

namespace moesaic::forward {
namespace {

/// Room for the padding of an aligned routing inside int32.
constexpr std::int64_t kMaxPairs = std::numeric_limits<std::int32_t>::max() / 2;

/// A routing in the caller's memory, given or to be filled.
void check_routing_view(const char* operation, const char* name, const RoutingView& routing,
                        std::int64_t num_tokens) {
  require<ShapeError>(routing.num_tokens == num_tokens && routing.top_k >= 1, [&] {
    return Problem{.operation = operation,
                   .what = name,
                   .expected = "[" + std::to_string(num_tokens) + ", top_k]",
                   .got = "[" + std::to_string(routing.num_tokens) + ", " +
                          std::to_string(routing.top_k) + "]",
                   .hint = {}};
  });
}

void check_top_k(const char* operation, const char* what, std::int32_t expected, std::int32_t got) {
  require<ShapeError>(expected == got, [&] {
    return Problem{.operation = operation,
                   .what = what,
                   .expected = std::to_string(expected),
                   .got = std::to_string(got),
                   .hint = {}};
  });
}

/// A ready routing stands alone: nothing else may say where the tokens go.
void check_stands_alone(const char* operation, const ForwardIo& io) {
  const char* const other = io.logits.data != nullptr         ? "router_logits"
                            : io.token_ids.data != nullptr    ? "token_ids"
                            : io.router_input.data != nullptr ? "router_input"
                                                              : nullptr;
  require<ConfigError>(other == nullptr, [&] {
    return Problem{.operation = operation,
                   .what = std::string(other) + " and routing",
                   .expected = "one of them",
                   .got = "both",
                   .hint = {}};
  });
}

/// Logits from outside.
void check_logits(const char* operation, Device device, const LayerRef& layer,
                  const ForwardIo& io) {
  ops::check_shape(operation, "router_logits", io.logits, {io.x.dim(0), layer.router_experts()});
  require<DTypeError>(io.logits.dtype == DType::F32, [&] {
    return Problem{.operation = operation,
                   .what = "router_logits.dtype",
                   .expected = "f32",
                   .got = name_of(io.logits.dtype),
                   .hint = {}};
  });
  ops::check_input(operation, "router_logits", device, io.logits);
  ops::check_apart(operation, "router_logits", io.logits, io.out);
}

/// What the router reads to make logits of its own.
void check_router_input(const char* operation, Device device, const LayerRef& layer,
                        const ForwardIo& io) {
  check_router_weight(operation, layer);
  const bool given = io.router_input.data != nullptr;
  require<ConfigError>(given || !layer.separate_router_input, [&] {
    return Problem{.operation = operation,
                   .what = "router_input",
                   .expected = "a tensor: this router does not read what the experts read",
                   .got = "none",
                   .hint = "or give logits or a routing"};
  });
  if (!given) return;
  ops::check_shape(operation, "router_input", io.router_input, {io.x.dim(0), layer.hidden_size()});
  ops::check_input(operation, "router_input", device, io.router_input);
  ops::check_apart(operation, "router_input", io.router_input, io.out);
}

/// Ids that come with the call, for a router that only weighs them.
void check_given_ids(const char* operation, Device device, const LayerRef& layer,
                     const ForwardIo& io) {
  const bool ids = io.routing.topk_ids != nullptr;
  const bool tokens = io.token_ids.data != nullptr;
  const bool given = layer.router->select_on == SelectOn::Given;
  require<ConfigError>(given ? ids != tokens : !ids && !tokens, [&] {
    const char* from_table = layer.token_experts.empty() ? "topk_ids" : "token_ids or topk_ids";
    return Problem{.operation = operation,
                   .what = "topk_ids and token_ids",
                   .expected = given ? from_table : "neither: this router selects",
                   .got = ids && tokens ? "both"
                          : ids         ? "topk_ids"
                          : tokens      ? "token_ids"
                                        : "none",
                   .hint = {}};
  });
  if (!tokens) return;
  require<ConfigError>(!layer.token_experts.empty(), [&] {
    return Problem{.operation = operation,
                   .what = "token_ids",
                   .expected = "none: the layer has no table of experts by token",
                   .got = "some",
                   .hint = "give topk_ids"};
  });
  ops::check_dense(operation, "token_ids", device, io.token_ids, DType::I32, {io.x.dim(0)});
  if (device.type == DeviceType::Cpu) check_token_ids(operation, layer, io);
}

/// How the tokens find their experts, unless a ready routing says it.
void check_router(const char* operation, Device device, const LayerRef& layer,
                  const ForwardIo& io) {
  check_router_config(operation, layer);
  check_given_ids(operation, device, layer, io);
  if (io.logits.data != nullptr) {
    check_logits(operation, device, layer, io);
  } else {
    check_router_input(operation, device, layer, io);
  }
}

}  // namespace

namespace {

/// What a caller may have meant by an input of another shape.
const char* shape_hint(const ConstTensorView& x, std::int64_t hidden) {
  if (x.rank == 1 && x.dim(0) == hidden) return "one token is [1, H]: x[None]";
  if (x.rank == 2 && x.dim(0) == hidden) return "transposed: x.T";
  return "";
}

}  // namespace

void check_x(const char* operation, Device device, const LayerRef& layer,
             const ConstTensorView& x) {
  const std::int64_t hidden = layer.hidden_size();
  require<ShapeError>(x.rank == 2 && x.dim(1) == hidden, [&] {
    return Problem{.operation = operation,
                   .what = "x.shape",
                   .expected = "[T, " + std::to_string(hidden) + "]",
                   .got = describe(x),
                   .hint = shape_hint(x, hidden)};
  });
  ops::check_input(operation, "x", device, x);
}

void check_token_ids(const char* operation, const LayerRef& layer, const ForwardIo& io) {
  const auto* const tokens = static_cast<const std::int32_t*>(io.token_ids.data);
  const std::int64_t vocabulary =
      static_cast<std::int64_t>(layer.token_experts.size()) / layer.router->top_k;
  for (std::int64_t t = 0; t < io.x.dim(0); ++t) {
    require<ShapeError>(tokens[t] >= 0 && tokens[t] < vocabulary, [&] {
      return Problem{.operation = operation,
                     .what = "token_ids[" + std::to_string(t) + "]",
                     .expected = "0 to " + std::to_string(vocabulary - 1),
                     .got = std::to_string(tokens[t]),
                     .hint = {}};
    });
  }
}

void check_device_ids(const char* operation, Context& context, const LayerRef& layer,
                      const ForwardIo& io) {
  const Backend& backend = context.backend();
  if (io.routing.topk_ids != nullptr) {
    backend.check_ids(context, io.routing, layer.router_experts(), operation);
  }
  if (io.token_ids.data == nullptr || !context.tuning().strict) return;
  require<CaptureError>(!backend.capturing(context), [&] {
    return Problem{.operation = operation,
                   .what = "token_ids",
                   .expected = "a stream that records no graph",
                   .got = "a capture",
                   .hint = "strict mode reads them; turn it off for captures"};
  });
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(io.x.dim(0)));
  backend.copy_on_stream(context, tokens.data(), io.token_ids.data,
                         tokens.size() * sizeof(std::int32_t));
  backend.synchronize(context);
  ForwardIo on_host = io;
  on_host.token_ids.data = tokens.data();
  check_token_ids(operation, layer, on_host);
}

void check_kept(const char* operation, const ExpertStack& stack, const RoutingView& routing) {
  if (stack.num_kept() == stack.num_experts()) return;
  for (std::int64_t pair = 0; pair < routing.num_pairs(); ++pair) {
    const std::int32_t id = routing.topk_ids[pair];
    require<DeviceError>(id < 0 || id >= stack.num_experts() || stack.keeps(id), [&] {
      return Problem{.operation = operation,
                     .what = "topk_ids[" + std::to_string(pair / routing.top_k) + ", " +
                             std::to_string(pair % routing.top_k) + "]",
                     .expected = "one of the " + std::to_string(stack.num_kept()) +
                                 " experts in memory, or -1",
                     .got = std::to_string(id) + ", which is not kept",
                     .hint = "stack.experts lists those that are"};
    });
  }
}

void check_kept(const char* operation, const LayerRef& layer, const RoutingView& routing) {
  if (layer.residency == nullptr) check_kept(operation, *layer.stack, routing);
}

std::int32_t reachable_experts(const LayerRef& layer) {
  return layer.residency != nullptr ? layer.stack->num_experts() : layer.stack->num_kept();
}

CallSizes check_forward(const char* operation, Device device, const LayerRef& layer,
                        const ForwardIo& io) {
  const CallSizes sizes = check_inputs(operation, device, layer, io);
  ops::check_out(operation, device, io.out, sizes.num_tokens, layer.hidden_size());
  ops::check_apart(operation, "x", io.x, io.out);
  return sizes;
}

CallSizes check_inputs(const char* operation, Device device, const LayerRef& layer,
                       const ForwardIo& io) {
  check_layer(operation, layer);
  check_x(operation, device, layer, io.x);
  CallSizes sizes;
  sizes.num_tokens = io.x.dim(0);
  sizes.ready_routing = io.routing.topk_ids != nullptr && io.routing.topk_weights != nullptr;
  if (io.routing.topk_ids != nullptr) {
    check_routing_view(operation, "routing", io.routing, sizes.num_tokens);
    sizes.top_k = io.routing.top_k;
  }
  if (sizes.ready_routing) {
    check_stands_alone(operation, io);
  } else if (sizes.num_tokens > 0) {
    check_router(operation, device, layer, io);
    if (sizes.top_k != 0) check_top_k(operation, "topk_ids", layer.router->top_k, sizes.top_k);
    sizes.top_k = layer.router->top_k;
  }
  require<ShapeError>(sizes.num_tokens <= kMaxPairs / std::max<std::int64_t>(sizes.top_k, 1), [&] {
    return Problem{.operation = operation,
                   .what = "x.shape[0]",
                   .expected = "at most " + std::to_string(kMaxPairs) + " token-expert pairs",
                   .got = std::to_string(sizes.num_tokens) + " tokens",
                   .hint = "split the batch"};
  });
  sizes.num_pairs = sizes.num_tokens * sizes.top_k;
  // Ids in device memory are the business of the backend's plan.
  if (io.routing.topk_ids != nullptr && device.type == DeviceType::Cpu) {
    check_ids(io.routing, layer.router_experts(), operation);
  }
  if (io.routing_out.topk_ids != nullptr && sizes.num_tokens > 0) {
    check_routing_view(operation, "routing_out", io.routing_out, sizes.num_tokens);
    check_top_k(operation, "routing_out.top_k", sizes.top_k, io.routing_out.top_k);
  }
  return sizes;
}

}  // namespace moesaic::forward
