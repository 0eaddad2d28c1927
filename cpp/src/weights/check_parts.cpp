#include "weights/check_parts.hpp"

#include <string>

#include "moesaic/error.hpp"

namespace moesaic::weights {
namespace {

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

}  // namespace

void check_gate(const char* operation, const char* name, const ExpertStack& stack,
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

void check_norm(const char* operation, const char* name, const RmsNorm& norm, std::int64_t size) {
  check_optional(operation, name, norm.weight.size(), size);
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
  check_gate(operation, "shared experts", shared.stack, shared.activation);
}

void check_latent(const char* operation, const LatentExperts& latent, const StackShape& experts) {
  const StackShape& shape = latent.projections.shape();
  const std::int64_t width = experts.hidden_size;
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
  check_norm(operation, "latent norm", latent.norm, width);
}

}  // namespace moesaic::weights
