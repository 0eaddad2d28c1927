#include <string>

#include "forward/check_call.hpp"
#include "forward/parts.hpp"
#include "ops/check_tensor.hpp"

namespace moesaic::forward {
namespace {

void check_stack(const char* operation, const char* name, const ExpertStack& stack,
                 const Activation& activation) {
  require<ShapeError>(stack.gated() == activation.gated(), [&] {
    return Problem{.operation = operation,
                   .what = name,
                   .expected = std::string(activation.gated() ? "a" : "no") +
                               " gate tensor for activation " + name_of(activation.kind),
                   .got = stack.gated() ? "one" : "none",
                   .hint = {}};
  });
}

/// `count` values that may be left out.
void check_optional(const char* operation, const char* name, std::size_t got, std::int64_t count) {
  require<ShapeError>(got == 0 || static_cast<std::int64_t>(got) == count, [&] {
    return Problem{.operation = operation,
                   .what = name,
                   .expected = "no elements or " + std::to_string(count),
                   .got = std::to_string(got),
                   .hint = {}};
  });
}

void check_shared(const char* operation, const SharedExperts& shared, std::int64_t hidden) {
  const StackShape& shape = shared.stack.shape();
  require<ShapeError>(shape.num_experts == 1 && shape.hidden_size == hidden, [&] {
    return Problem{
        .operation = operation,
        .what = "shared experts",
        .expected = "one expert of hidden size " + std::to_string(hidden),
        .got = std::to_string(shape.num_experts) + " of " + std::to_string(shape.hidden_size),
        .hint = {}};
  });
  check_optional(operation, "shared gate", shared.gate.size(), hidden);
  check_stack(operation, "shared experts", shared.stack, shared.activation);
}

void check_latent(const char* operation, const LatentExperts& latent, const ExpertStack& stack) {
  const StackShape& shape = latent.projections.shape();
  const std::int64_t width = stack.shape().hidden_size;
  require<ShapeError>(
      shape.num_experts == 1 && shape.intermediate_size == width && !latent.projections.gated(),
      [&] {
        return Problem{.operation = operation,
                       .what = "latent projections",
                       .expected = "one ungated expert of intermediate size " +
                                   std::to_string(width) + ", the experts' hidden size",
                       .got = std::to_string(shape.num_experts) +
                              (latent.projections.gated() ? " gated" : " ungated") + " of " +
                              std::to_string(shape.intermediate_size),
                       .hint = {}};
      });
  check_optional(operation, "latent norm", latent.norm.weight.size(), width);
}

}  // namespace

void check_layer(const char* operation, const LayerRef& layer) {
  require<ShapeError>(layer.stack != nullptr, [&] {
    return Problem{.operation = operation,
                   .what = "stack",
                   .expected = "an ExpertStack",
                   .got = "none",
                   .hint = {}};
  });
  const std::int64_t hidden = layer.hidden_size();
  check_stack(operation, "stack", *layer.stack, layer.activation);
  if (layer.latent != nullptr) check_latent(operation, *layer.latent, *layer.stack);
  if (layer.shared != nullptr) check_shared(operation, *layer.shared, hidden);
  if (layer.input_norm != nullptr) {
    check_optional(operation, "input norm", layer.input_norm->weight.size(), hidden);
  }
  if (layer.router_norm != nullptr) {
    check_optional(operation, "router norm", layer.router_norm->weight.size(), hidden);
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
      check_weights(operation, context, std::string(name_of(role)) + " weights", ref,
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
