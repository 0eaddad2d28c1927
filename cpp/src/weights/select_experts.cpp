#include <algorithm>
#include <string>
#include <utility>

#include "moesaic/edit.hpp"

namespace moesaic {
namespace {

Problem problem(std::string what, std::string expected, std::string got, std::string hint = {}) {
  return {.operation = "select_experts",
          .what = std::move(what),
          .expected = std::move(expected),
          .got = std::move(got),
          .hint = std::move(hint)};
}

/// Which expert of the old router each one of the new was: `ids`, then the identity experts.
std::vector<std::int32_t> old_experts(const RouterConfig& router,
                                      std::span<const std::int32_t> ids) {
  std::vector<std::int32_t> old(ids.begin(), ids.end());
  for (std::int32_t i = 0; i < router.identity_experts; ++i) {
    old.push_back(router.weighted_experts() + i);
  }
  return old;
}

/// Values [E, width] by old expert as values by new one; empty ones stay empty.
std::vector<float> select_rows(const std::vector<float>& values, std::int64_t width,
                               std::span<const std::int32_t> old) {
  std::vector<float> out;
  if (values.empty()) return out;
  out.reserve(old.size() * static_cast<std::size_t>(width));
  for (const std::int32_t e : old) {
    const auto begin = values.begin() + e * width;
    out.insert(out.end(), begin, begin + width);
  }
  return out;
}

/// A group is chosen as a whole, so its experts stay together and apart from those of others.
void check_groups(const RouterConfig& router, std::span<const std::int32_t> old) {
  if (router.num_groups <= 1) return;
  const auto groups = static_cast<std::size_t>(router.num_groups);
  require<ConfigError>(old.size() % groups == 0, [&] {
    return problem("experts", "as many for each of " + std::to_string(groups) + " groups",
                   std::to_string(old.size()));
  });
  const std::size_t width = old.size() / groups;
  const std::int32_t old_width = router.num_experts / router.num_groups;
  std::vector<bool> seen(groups, false);
  for (std::size_t i = 0; i < old.size(); ++i) {
    const auto from = static_cast<std::size_t>(old[i] / old_width);
    const auto of_group = static_cast<std::size_t>(old[i / width * width] / old_width);
    const bool first = i % width == 0;
    require<ConfigError>(from == of_group && !(first && seen[from]), [&] {
      return problem("expert " + std::to_string(old[i]),
                     "the " + std::to_string(width) + " experts of a group side by side",
                     "one of group " + std::to_string(from) + " at place " + std::to_string(i));
    });
    seen[from] = true;
  }
}

/// The ids of a table by token id, renumbered.
void select_table(std::vector<std::int32_t>& table, std::int32_t old_count,
                  std::span<const std::int32_t> old) {
  std::vector<std::int32_t> place(static_cast<std::size_t>(old_count), -1);
  for (std::size_t i = old.size(); i-- > 0;) {
    place[static_cast<std::size_t>(old[i])] = static_cast<std::int32_t>(i);
  }
  for (std::int32_t& id : table) {
    if (id < 0) continue;
    const std::int32_t to = place[static_cast<std::size_t>(id)];
    require<ConfigError>(to >= 0, [&] {
      return problem("experts", "all that the table by token id needs",
                     "none of number " + std::to_string(id),
                     "replace() takes another table and another stack together");
    });
    id = to;
  }
}

}  // namespace

MoeLayer select_experts(const MoeLayer& layer, std::span<const std::int32_t> ids) {
  require<UnsupportedError>(layer.parts().residency == nullptr, [] {
    return problem("experts", "experts that are all in fast memory", "experts of a store");
  });
  std::vector<ExpertSource> sources;
  for (const std::int32_t e : ids) sources.push_back({&layer.stack(), e});
  MoeLayer::Parts parts = layer.parts();
  parts.stack = std::make_shared<const ExpertStack>(gather_experts(sources));
  MoeConfig config = layer.config();
  RouterConfig& router = config.router;
  const std::vector<std::int32_t> old = old_experts(router, ids);
  require<ConfigError>(std::cmp_less_equal(router.top_k, old.size()), [&] {
    return problem("experts", "at least " + std::to_string(router.top_k) + ", the router's top_k",
                   std::to_string(old.size()));
  });
  check_groups(router, old);
  select_table(parts.token_experts, router.num_experts, old);
  parts.router_weight = select_rows(parts.router_weight, config.hidden_size, old);
  router.router_bias = select_rows(router.router_bias, 1, old);
  router.selection_bias = select_rows(router.selection_bias, 1, old);
  config.num_experts = static_cast<std::int32_t>(ids.size());
  router.num_experts = static_cast<std::int32_t>(old.size());
  return MoeLayer(std::move(config), std::move(parts));
}

}  // namespace moesaic
