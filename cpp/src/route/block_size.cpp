#include <cstddef>

#include "moesaic/plan.hpp"
#include "moesaic/tuning.hpp"

namespace moesaic {
namespace {

constexpr std::int32_t kDefaultBlockSize = 16;

}  // namespace

std::int32_t pick_block_size(std::span<const std::int32_t> expert_offsets, bool device_route,
                             std::int64_t total_pairs, const Tuning& tuning) {
  if (tuning.block_size) return *tuning.block_size;
  if (device_route) {
    const bool large = tuning.large_m_block_size && total_pairs >= tuning.large_m_min_pairs;
    return large ? *tuning.large_m_block_size : kDefaultBlockSize;
  }
  if (expert_offsets.empty() || expert_offsets.back() == 0) return kDefaultBlockSize;

  const std::int64_t rows = expert_offsets.back();
  for (const std::int32_t block_size : {64, 32, 16}) {
    std::int64_t padded = 0;
    for (std::size_t e = 0; e + 1 < expert_offsets.size(); ++e) {
      const std::int64_t count = expert_offsets[e + 1] - expert_offsets[e];
      padded += (count + block_size - 1) / block_size * block_size;
    }
    if (padded * 100 <= rows * 130) return block_size;
  }
  return kDefaultBlockSize;
}

}  // namespace moesaic
