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
