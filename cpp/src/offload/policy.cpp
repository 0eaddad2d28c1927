#include <algorithm>
#include <string>

#include "moesaic/error.hpp"
#include "moesaic/expert_pool.hpp"

namespace moesaic {

std::vector<std::int64_t> count_hits(std::span<const std::int32_t> ids, std::int32_t num_experts) {
  std::vector<std::int64_t> counts(static_cast<std::size_t>(num_experts), 0);
  for (const std::int32_t id : ids) {
    if (id >= 0 && id < num_experts) ++counts[static_cast<std::size_t>(id)];
  }
  return counts;
}

std::vector<std::int32_t> target_from_counts(std::span<const std::int64_t> counts,
                                             std::int32_t budget) {
  std::vector<std::int32_t> target;
  for (std::size_t e = 0; e < counts.size(); ++e) {
    if (counts[e] > 0) target.push_back(static_cast<std::int32_t>(e));
  }
  std::ranges::stable_sort(target, [&](std::int32_t a, std::int32_t b) {
    return counts[static_cast<std::size_t>(a)] > counts[static_cast<std::size_t>(b)];
  });
  if (target.size() > static_cast<std::size_t>(std::max(budget, 0))) {
    target.resize(static_cast<std::size_t>(std::max(budget, 0)));
  }
  return target;
}

std::int32_t budget_from_memory(std::int64_t free, std::int64_t reserve, std::int64_t expert_bytes,
                                std::int64_t layers, std::int32_t num_experts) {
  const std::int64_t smallest =
      std::min({free, reserve, expert_bytes, layers, static_cast<std::int64_t>(num_experts)});
  require<ConfigError>(smallest >= 0, [&] {
    return Problem{.operation = "budget_from_memory",
                   .what = "sizes",
                   .expected = "none below 0",
                   .got = std::to_string(smallest),
                   .hint = {}};
  });
  if (expert_bytes == 0 || layers == 0) return num_experts;
  const std::int64_t usable = std::max<std::int64_t>(free - reserve, 0);
  // Divided twice: the product of the two could overflow.
  return static_cast<std::int32_t>(
      std::min<std::int64_t>(usable / expert_bytes / layers, num_experts));
}

std::vector<std::uint8_t> merged_resident_mask(std::span<const ExpertPool* const> pools) {
  std::vector<std::uint8_t> merged;
  for (const ExpertPool* pool : pools) {
    const std::vector<std::uint8_t> mask = pool->resident_mask();
    if (merged.empty()) merged.resize(mask.size(), 0);
    require<ShapeError>(mask.size() == merged.size(), [&] {
      return Problem{.operation = "merged_resident_mask",
                     .what = "pools",
                     .expected = std::to_string(merged.size()) + " experts in each",
                     .got = std::to_string(mask.size()),
                     .hint = {}};
    });
    for (std::size_t e = 0; e < mask.size(); ++e) merged[e] |= mask[e];
  }
  return merged;
}

}  // namespace moesaic
