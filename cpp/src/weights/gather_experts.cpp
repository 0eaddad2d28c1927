#include <algorithm>
#include <memory>
#include <utility>

#include "moesaic/edit.hpp"
#include "weights/reencode.hpp"

namespace moesaic {
namespace {

using Sources = std::span<const ExpertSource>;

Problem problem(std::string what, std::string expected, std::string got, std::string hint = {}) {
  return {.operation = "gather_experts",
          .what = std::move(what),
          .expected = std::move(expected),
          .got = std::move(got),
          .hint = std::move(hint)};
}

const RoleWeights& role_of(const ExpertSource& source, Role role) {
  return source.stack->role(role);
}

/// Where the matrices of a gathered role lie.
struct Table {
  std::vector<const std::byte*> pointers;
  std::vector<std::shared_ptr<const void>> owners;
  std::vector<std::int32_t> gather;  ///< of INT4 columns, where the sources differ
  PanelShares shares{};              ///< where panels are dealt to nodes
};

/// Whether experts of both roles can share a table of panels.
bool dealt_alike(const PanelShares* a, const PanelShares* b) {
  if (a == nullptr || b == nullptr) return a == b;
  return std::equal(a->first, a->first + a->count + 1, b->first, b->first + b->count + 1);
}

bool same_groups(const Int4Format& a, const Int4Format& b) {
  return a.group_size == b.group_size && a.groups == b.groups && a.packed_cols == b.packed_cols &&
         a.scale_cols == b.scale_cols && a.scale_f32 == b.scale_f32 && a.zeros == b.zeros;
}

void check_source(const ExpertSource& source, Sources sources, Role role) {
  const WeightRef& first = role_of(sources.front(), role).ref;
  const WeightRef& ref = role_of(source, role).ref;
  require<ShapeError>(static_cast<bool>(ref) == static_cast<bool>(first), [&] {
    return problem(name_of(role), "gated experts, or ungated ones", "both");
  });
  if (!ref) return;
  require<DTypeError>(ref.type == first.type && same_groups(ref.int4, first.int4), [&] {
    const auto name = [](const WeightRef& r) {
      return std::string(traits(r.type).name) +
             (r.type == QuantType::INT4 ? " in groups of " + std::to_string(r.int4.group_size)
                                        : std::string());
    };
    return problem(name_of(role), "one type for all experts, " + name(first), name(ref),
                   "encode one of the stacks again");
  });
  require<UnsupportedError>(ref.layout == first.layout && ref.row_stride == first.row_stride, [&] {
    return problem(name_of(role), "weights that lie in one way",
                   std::string(name_of(first.layout)) + " and " + name_of(ref.layout),
                   "load the stacks with the same layout=");
  });
  require<UnsupportedError>(dealt_alike(ref.shares, first.shares), [&] {
    const auto nodes = [](const WeightRef& r) {
      return "panels dealt to " + std::to_string(r.shares != nullptr ? r.shares->count : 1) +
             " nodes";
    };
    return problem(name_of(role), nodes(first) + ", as those of the first expert", nodes(ref),
                   "load the stacks with the same MOESAIC_NUMA");
  });
  require<UnsupportedError>(ref.slot_map == nullptr || ref.slot_map[source.expert] >= 0, [&] {
    return problem("expert " + std::to_string(source.expert), "an expert in memory",
                   "one that is not kept", "stack.experts lists those that are");
  });
}

/// The column orders of all experts, one behind the other, in `table`, or the one they share.
void gather_columns(Sources sources, Role role, Table& table, Int4Format& format) {
  const auto order_of = [&](const ExpertSource& source) {
    return role_of(source, role).ref.int4.gather_of(source.expert);
  };
  const std::int32_t* const first = order_of(sources.front());
  format.gather = first;
  format.gather_stride = 0;
  const auto width = static_cast<std::size_t>(format.packed_cols);
  if (std::ranges::all_of(sources, [&](const auto& s) { return order_of(s) == first; })) return;
  table.gather.reserve(sources.size() * width);
  for (const ExpertSource& source : sources) {
    const std::int32_t* const order = order_of(source);
    const std::int64_t cols = role_of(source, role).ref.cols;
    for (std::int64_t i = 0; i < format.packed_cols; ++i) {
      const std::int64_t own = i < cols ? i : -1;
      table.gather.push_back(order != nullptr ? order[i] : static_cast<std::int32_t>(own));
    }
  }
  format.gather = table.gather.data();
  format.gather_stride = format.packed_cols;
}

/// values[e] of each source, `width` of them; null where no source has any. What a source lacks is
/// `missing`.
std::shared_ptr<const std::vector<float>> gather_values(
    Sources sources, Role role, std::shared_ptr<const std::vector<float>> RoleWeights::* part,
    std::int64_t width, float missing) {
  if (std::ranges::none_of(sources,
                           [&](const auto& s) { return role_of(s, role).*part != nullptr; })) {
    return nullptr;
  }
  std::vector<float> values;
  values.reserve(sources.size() * static_cast<std::size_t>(width));
  for (const ExpertSource& source : sources) {
    if (const auto& from = role_of(source, role).*part) {
      const auto begin = from->begin() + source.expert * width;
      values.insert(values.end(), begin, begin + width);
    } else {
      values.insert(values.end(), static_cast<std::size_t>(width), missing);
    }
  }
  return std::make_shared<const std::vector<float>>(std::move(values));
}

std::shared_ptr<const LowRankDelta> gather_deltas(Sources sources, Role role) {
  LowRankDelta out;
  bool same_scale = true;
  const LowRankDelta* first = nullptr;
  for (const ExpertSource& source : sources) {
    const LowRankDelta* const delta = role_of(source, role).delta.get();
    if (delta == nullptr) continue;
    if (first == nullptr) first = delta;
    out.rank = std::max(out.rank, delta->rank);
    same_scale = same_scale && delta->scale == first->scale;
  }
  if (first == nullptr) return nullptr;
  out.scale = same_scale ? first->scale : 1.0F;
  const WeightRef& ref = role_of(sources.front(), role).ref;
  const auto experts = static_cast<std::int64_t>(sources.size());
  out.a.resize(static_cast<std::size_t>(experts * out.rank * ref.cols));
  out.b.resize(static_cast<std::size_t>(experts * ref.rows * out.rank));
  // A smaller rank is filled up with zeros, which add nothing.
  for (std::int64_t i = 0; i < experts; ++i) {
    const ExpertSource& source = sources[static_cast<std::size_t>(i)];
    const LowRankDelta* const delta = role_of(source, role).delta.get();
    if (delta == nullptr) continue;
    const float factor = same_scale ? 1.0F : delta->scale;
    const std::int64_t rank = delta->rank;
    std::copy_n(delta->a.begin() + source.expert * rank * ref.cols, rank * ref.cols,
                out.a.begin() + i * out.rank * ref.cols);
    for (std::int64_t row = 0; row < ref.rows; ++row) {
      const auto from = delta->b.begin() + (source.expert * ref.rows + row) * rank;
      std::transform(from, from + rank, out.b.begin() + (i * ref.rows + row) * out.rank,
                     [factor](float value) { return factor * value; });
    }
  }
  return std::make_shared<const LowRankDelta>(std::move(out));
}

RoleWeights gather_role(Sources sources, Role role) {
  const auto table = std::make_shared<Table>();
  RoleWeights weights;
  WeightRef& ref = weights.ref;
  ref = role_of(sources.front(), role).ref;
  const std::int32_t shares = ref.shares != nullptr ? ref.shares->count : 1;
  for (std::int32_t s = 0; s < shares; ++s) {
    for (const ExpertSource& source : sources) {
      const WeightRef& from = role_of(source, role).ref;
      table->pointers.push_back(s == 0 ? from.expert(source.expert)
                                       : from.panel(source.expert, from.shares->first[s]));
    }
  }
  for (const ExpertSource& source : sources) {
    const RoleWeights& from = role_of(source, role);
    if (table->owners.empty() || table->owners.back() != from.owner) {
      table->owners.push_back(from.owner);
    }
  }
  ref.base = nullptr;
  ref.table = table->pointers.data();
  ref.expert_stride = 0;
  if (ref.shares != nullptr) {
    table->shares = *ref.shares;
    // The numbers of panels are the first stack's, which `owners` keeps.
    table->shares.table = table->pointers.data();
    table->shares.slots = static_cast<std::int64_t>(sources.size());
    ref.shares = &table->shares;
  }
  ref.slot_map = nullptr;
  ref.num_experts = static_cast<std::int32_t>(sources.size());
  if (ref.type == QuantType::INT4) gather_columns(sources, role, *table, ref.int4);
  weights.owner = table;
  weights.bias = gather_values(sources, role, &RoleWeights::bias, ref.rows, 0.0F);
  weights.scale = gather_values(sources, role, &RoleWeights::scale, 1, 1.0F);
  weights.delta = gather_deltas(sources, role);
  return weights;
}

}  // namespace

ExpertStack gather_experts(std::span<const ExpertSource> sources) {
  const auto start = weights::Clock::now();
  require<ShapeError>(!sources.empty(), [] { return problem("experts", "at least one", "none"); });
  const StackShape first = sources.front().stack->shape();
  for (const ExpertSource& source : sources) {
    const StackShape& shape = source.stack->shape();
    weights::check_on_host("gather_experts", *source.stack);
    require<ShapeError>(source.expert >= 0 && source.expert < shape.num_experts, [&] {
      return problem("expert", "0 to " + std::to_string(shape.num_experts - 1),
                     std::to_string(source.expert));
    });
    require<ShapeError>(shape.hidden_size == first.hidden_size &&
                            shape.intermediate_size == first.intermediate_size,
                        [&] {
                          const auto sizes = [](const StackShape& s) {
                            return "H " + std::to_string(s.hidden_size) + ", I " +
                                   std::to_string(s.intermediate_size);
                          };
                          return problem("experts", sizes(first), sizes(shape));
                        });
    for (const Role role : {Role::Gate, Role::Up, Role::Down}) check_source(source, sources, role);
  }
  ExpertStack::Parts parts;
  parts.shape = first;
  parts.shape.num_experts = static_cast<std::int32_t>(sources.size());
  for (const auto& [role, to] : {std::pair{Role::Gate, &parts.gate}, std::pair{Role::Up, &parts.up},
                                 std::pair{Role::Down, &parts.down}}) {
    if (!role_of(sources.front(), role).ref) continue;
    *to = gather_role(sources, role);
    weights::record(parts.report, role, *to, "experts", "referenced", "other stacks hold them");
    parts.report.roles.back().bytes = weights::role_bytes(*to);
  }
  return weights::finish(std::move(parts), {}, start);
}

}  // namespace moesaic
