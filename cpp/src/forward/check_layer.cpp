#include <string>
#include <utility>

#include "forward/check_call.hpp"
#include "forward/parts.hpp"
#include "ops/check_tensor.hpp"
#include "weights/check_parts.hpp"

namespace moesaic::forward {

void check_layer(const char* operation, const LayerRef& layer) {
  require<ShapeError>(layer.stack != nullptr, [&] {
    return Problem{.operation = operation,
                   .what = "stack",
                   .expected = "an ExpertStack",
                   .got = "none",
                   .hint = {}};
  });
  const std::int64_t hidden = layer.hidden_size();
  weights::check_gate(operation, "stack", *layer.stack, layer.activation);
  if (layer.latent != nullptr) {
    weights::check_latent(operation, *layer.latent, layer.stack->shape());
  }
  if (layer.shared != nullptr) weights::check_shared(operation, *layer.shared, hidden);
  for (const auto& [name, norm] :
       {std::pair{"input norm", layer.input_norm}, std::pair{"router norm", layer.router_norm}}) {
    if (norm != nullptr) weights::check_norm(operation, name, *norm, hidden);
  }
}

void check_router_config(const char* operation, const LayerRef& layer) {
  require<ConfigError>(layer.router != nullptr, [&] {
    return Problem{.operation = operation,
                   .what = "router",
                   .expected = "a RouterConfig",
                   .got = "none",
                   .hint = "or give a routing"};
  });
  layer.router->validate();
  const std::int32_t experts = layer.stack->num_experts();
  require<ShapeError>(layer.router->weighted_experts() == experts, [&] {
    return Problem{.operation = operation,
                   .what = "router.num_experts",
                   .expected = std::to_string(layer.router_experts()),
                   .got = std::to_string(layer.router->num_experts),
                   .hint = {}};
  });
}

void check_router_weight(const char* operation, const LayerRef& layer) {
  const auto weights =
      layer.router_weight == nullptr ? 0 : static_cast<std::int64_t>(layer.router_weight->size());
  const std::int64_t expected = layer.router_experts() * layer.hidden_size();
  require<ShapeError>(weights == expected, [&] {
    return Problem{.operation = operation,
                   .what = "router weight",
                   .expected = std::to_string(expected) + " elements [E, H]",
                   .got = std::to_string(weights),
                   .hint = "a layer without a router needs logits or a routing"};
  });
}

void check_supported(const char* operation, const Context& context, const LayerRef& layer) {
  for (const ExpertStack* stack :
       {layer.stack, layer.shared != nullptr ? &layer.shared->stack : nullptr,
        layer.latent != nullptr ? &layer.latent->projections : nullptr}) {
    if (stack == nullptr) continue;
    for (const Role role : {Role::Gate, Role::Up, Role::Down}) {
      const WeightRef& ref = stack->role(role).ref;
      if (!ref) continue;
      ops::check_weights(operation, context, std::string(name_of(role)) + " weights", ref,
                         stack->device(), "load them with device=");
    }
  }
  for (const LayerPart part : kLayerParts) {
    if (!has_part(layer, part)) continue;
    const Support support = context.backend().supports_part(part);
    require<UnsupportedError>(support.ok, [&] {
      return Problem{.operation = operation,
                     .what = name_of(part),
                     .expected = "a backend that runs them",
                     .got = context.backend().info().name + ": " + std::string(support.reason),
                     .hint = {}};
    });
  }
}

}  // namespace moesaic::forward
