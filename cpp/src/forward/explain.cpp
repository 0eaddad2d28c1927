#include <algorithm>
#include <cmath>
#include <utility>

#include "forward/check_call.hpp"
#include "forward/choose_path.hpp"
#include "forward/parts.hpp"
#include "moesaic/forward.hpp"

namespace moesaic {
namespace {

using Facts = std::vector<std::pair<std::string, std::string>>;

/// Experts that `pairs` reach when every expert is as likely.
double expected_experts(std::int64_t tokens, std::int32_t top_k, std::int32_t experts) {
  const double missed = 1.0 - std::min(1.0, static_cast<double>(top_k) / experts);
  return experts * (1.0 - std::pow(missed, static_cast<double>(tokens)));
}

/// The pairs that a stack's down product is given.
struct Pairs {
  std::int64_t count;
  bool sorted;  ///< by expert, or each a segment of its own
};

std::string kernel_of(const Context& context, Role role, const WeightRef& ref, Pairs pairs) {
  const Backend& backend = context.backend();
  return role == Role::Down ? backend.down_name(ref, context.tuning(), pairs.count, pairs.sorted)
                            : backend.kernel_name(ref, context.tuning());
}

void add_role(const Context& context, const ExpertStack& stack, Role role, Pairs pairs,
              const std::string& prefix, Facts& facts) {
  const WeightRef& ref = stack.role(role).ref;
  if (!ref) return;
  const Support support = context.backend().supports(ref);
  const std::string name = prefix + name_of(role);
  facts.emplace_back(name + " type", traits(ref.type).name);
  facts.emplace_back(name + " layout", name_of(ref.layout));
  facts.emplace_back(name + " kernel", support.ok ? kernel_of(context, role, ref, pairs)
                                                  : "unsupported: " + std::string(support.reason));
  if (const auto& delta = stack.role(role).delta; delta != nullptr) {
    facts.emplace_back(name + " low-rank delta", "rank " + std::to_string(delta->rank));
  }
  if (support.ok && !support.reason.empty()) facts.emplace_back(name + " note", support.reason);
}

std::string block_size_fact(const Tuning& tuning) {
  if (tuning.block_size) return std::to_string(*tuning.block_size) + " (asked for)";
  return "64, 32 or 16: the largest that pads at most 30 %, chosen from the routing of each call";
}

/// The part of a role's bytes that threads read from other nodes' memory.
double remote_part(const ThreadPool& pool, const WeightRef& ref) {
  const int nodes = pool.nodes();
  if (nodes == 1 || (ref.shares != nullptr && ref.shares->count == nodes)) return 0.0;
  return 1.0 - 1.0 / nodes;
}

/// Where the panels of each role lie, and what an expected call reads from other nodes.
void add_placement(const Context& context, const LayerRef& layer, double experts,
                   std::int64_t pairs, std::int64_t tokens, Precision precision, Facts& facts) {
  const ThreadPool& pool = context.pool();
  if (context.backend().device_type() != DeviceType::Cpu) return;
  facts.emplace_back("numa", pool.topology().text());
  const int nodes = pool.nodes();
  if (nodes == 1) return;
  double weights = 0;
  for (const Role role : {Role::Gate, Role::Up, Role::Down}) {
    const WeightRef& ref = layer.stack->role(role).ref;
    if (!ref) continue;
    const double part = remote_part(pool, ref);
    std::string where = "not dealt to nodes";
    if (ref.shares != nullptr) {
      where = "panels dealt to " + std::to_string(ref.shares->count) + " nodes: ";
      for (std::int32_t s = 0; s < ref.shares->count; ++s) {
        where +=
            (s == 0 ? "" : " + ") + std::to_string(ref.shares->first[s + 1] - ref.shares->first[s]);
      }
      if (part > 0) where += "; the threads have " + std::to_string(nodes);
    }
    facts.emplace_back(std::string(name_of(role)) + " placement", where);
    weights += part * experts * static_cast<double>(ref.expert_bytes());
  }
  facts.emplace_back("remote weight bytes (uniform routing)",
                     std::to_string(std::llround(weights)));
  // Every node reads the quantised rows of both phases once, from where one node wrote them.
  const std::int64_t planes = precision == Precision::Fast ? 1 : 2;
  const StackShape& shape = layer.stack->shape();
  facts.emplace_back("remote activation bytes", std::to_string((nodes - 1) * planes *
                                                               (tokens * shape.hidden_size +
                                                                pairs * shape.intermediate_size)));
}

/// The rarer parts of the layer, by name.
std::string parts_fact(const LayerRef& layer) {
  std::string names;
  for (const LayerPart part : forward::kLayerParts) {
    if (!forward::has_part(layer, part)) continue;
    names += (names.empty() ? "" : ", ") + std::string(name_of(part));
  }
  return names;
}

}  // namespace

Explanation explain(const Context& context, const LayerRef& layer, std::int32_t top_k,
                    std::int64_t num_tokens) {
  const std::size_t scratch = workspace_bytes(context, layer, top_k, num_tokens);
  const ExpertStack& stack = *layer.stack;
  const Tuning& tuning = context.tuning();
  const std::int32_t kept = forward::reachable_experts(layer);
  const PathChoice choice = choose_path(num_tokens, num_tokens * top_k, kept, tuning);
  const forward::PrecisionChoice precision =
      forward::choose_precision(num_tokens * top_k, kept, tuning);

  Explanation explanation;
  Facts& facts = explanation.facts;
  facts.emplace_back("backend", context.backend().info().name);
  facts.emplace_back("threads", std::to_string(context.pool().threads()));
  facts.emplace_back("tokens", std::to_string(num_tokens));
  facts.emplace_back("pairs", std::to_string(num_tokens * top_k));
  if (kept != stack.num_experts()) {
    facts.emplace_back("experts in memory",
                       std::to_string(kept) + " of " + std::to_string(stack.num_experts()));
  }
  facts.emplace_back("path", name_of(choice.path));
  facts.emplace_back("path reason", choice.reason);
  facts.emplace_back("row_space", name_of(choice.row_space));
  if (choice.path == Path::Aligned) facts.emplace_back("block_size", block_size_fact(tuning));
  facts.emplace_back("precision", name_of(choice.precision));
  facts.emplace_back("precision reason", precision.reason);
  facts.emplace_back("activation", name_of(layer.activation.kind));
  facts.emplace_back("activation fused with gate_up",
                     context.backend().fuses_activation() ? "yes" : "no");
  for (const Role role : {Role::Gate, Role::Up, Role::Down}) {
    add_role(context, stack, role, {num_tokens * top_k, choice.path != Path::Gemv}, "", facts);
  }
  if (const std::string parts = parts_fact(layer); !parts.empty()) {
    facts.emplace_back("parts", parts);
  }
  const double experts =
      expected_experts(num_tokens, top_k, stack.num_experts()) * kept / stack.num_experts();
  const Pairs every_token{num_tokens, num_tokens > 1};
  double weight_bytes = experts * static_cast<double>(stack.bytes_per_expert());
  if (layer.shared != nullptr) {
    for (const Role role : {Role::Gate, Role::Up, Role::Down}) {
      add_role(context, layer.shared->stack, role, every_token, "shared ", facts);
    }
    if (num_tokens > 0) weight_bytes += static_cast<double>(layer.shared->stack.nbytes());
  }
  if (layer.latent != nullptr) {
    for (const Role role : {Role::Up, Role::Down}) {
      add_role(context, layer.latent->projections, role, every_token, "latent ", facts);
    }
    if (num_tokens > 0) weight_bytes += static_cast<double>(layer.latent->projections.nbytes());
  }
  facts.emplace_back("experts touched (uniform routing)",
                     std::to_string(std::llround(experts)) + " of " + std::to_string(kept));
  facts.emplace_back("weight bytes read (uniform routing)",
                     std::to_string(std::llround(weight_bytes)));
  add_placement(context, layer, experts, num_tokens * top_k, num_tokens, choice.precision, facts);
  facts.emplace_back("workspace bytes", std::to_string(scratch));
  return explanation;
}

}  // namespace moesaic
