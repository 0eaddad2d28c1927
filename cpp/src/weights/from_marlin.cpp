#include <string>
#include <utility>

#include "moesaic/marlin_stack.hpp"
#include "weights/load.hpp"

namespace moesaic {
namespace {

constexpr std::int64_t kPanelRows = 16;

Problem problem(std::string what, std::string expected, std::string got) {
  return {.operation = "from_marlin",
          .what = std::move(what),
          .expected = std::move(expected),
          .got = std::move(got),
          .hint = {}};
}

}  // namespace

ExpertStack ExpertStack::from_marlin(std::shared_ptr<const MarlinExpertStack> gate_up,
                                     std::shared_ptr<const MarlinExpertStack> down,
                                     const LoadOptions& options, Epilogues epilogues) {
  const auto start = weights::Clock::now();
  require<ShapeError>(gate_up != nullptr && down != nullptr,
                      [] { return problem("gate_up, down", "two Marlin stacks", "null"); });
  require<ShapeError>(gate_up->n_per_expert() % 2 == 0, [&] {
    return problem("gate_up.n_per_expert", "2I, columns [gate | up]",
                   std::to_string(gate_up->n_per_expert()));
  });
  const std::int64_t intermediate = gate_up->n_per_expert() / 2;
  require<ShapeError>(gate_up->num_experts() == down->num_experts(), [&] {
    return problem("down.num_experts", std::to_string(gate_up->num_experts()),
                   std::to_string(down->num_experts()));
  });
  require<ShapeError>(down->k() == intermediate && down->n_per_expert() == gate_up->k(), [&] {
    return problem(
        "down [K, N]",
        "[" + std::to_string(intermediate) + ", " + std::to_string(gate_up->k()) + "]",
        "[" + std::to_string(down->k()) + ", " + std::to_string(down->n_per_expert()) + "]");
  });
  Parts parts;
  parts.shape = {gate_up->num_experts(), gate_up->k(), intermediate};
  const bool shared = intermediate % kPanelRows == 0;
  parts.gate = gate_up->columns(0, intermediate);
  // Where the up rows begin inside a panel that gate rows share, they are copied to panels of their
  // own; else both roles refer to the memory of the stack.
  parts.up = shared ? gate_up->columns(intermediate, intermediate)
                    : gate_up->copy_columns(intermediate, intermediate);
  parts.down = down->weights();
  const std::string source = "MarlinExpertStack";
  weights::record(parts.report, Role::Gate, parts.gate, source, "referenced", "columns [0, I)");
  weights::record(
      parts.report, Role::Up, parts.up, source, shared ? "referenced" : "copied",
      shared ? "columns [I, 2I)" : "I is not a multiple of 16, so up had no panels of its own");
  weights::record(parts.report, Role::Down, parts.down, source, "referenced", "all columns");
  if (!options.dequantize) {
    parts.gate_up_marlin = std::move(gate_up);
    parts.down_marlin = std::move(down);
  }
  weights::take_epilogues("from_marlin", parts, std::move(epilogues));
  return weights::finish(std::move(parts), options, start);
}

const std::shared_ptr<const MarlinExpertStack>& ExpertStack::marlin(Role role) const {
  return role == Role::Down ? parts_.down_marlin : parts_.gate_up_marlin;
}

}  // namespace moesaic
