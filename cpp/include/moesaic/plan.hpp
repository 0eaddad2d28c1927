#pragma once

/// Plans: the order in which a grouped product takes the pairs of a routing. A bucket plan sorts
/// them by expert; an aligned routing pads each expert's pairs to whole blocks besides. A packed
/// row is the position of a pair after the stable sort by expert.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "moesaic/routing.hpp"

namespace moesaic {

struct Tuning;

/// Sorts the pairs by expert with a stable counting sort. The ids must have been checked. It does
/// not allocate.
void build_bucket_plan(const op::BucketPlan& call);

/// A bucket plan that owns its arrays. Only `build` and `rebuild` make one, so "sorted" is a fact.
class BucketPlan {
 public:
  /// Errors: ShapeError on ids < -1 or >= num_experts.
  static BucketPlan build(const Routing& routing, std::int32_t num_experts);
  /// Keeps the memory, so that it allocates only when T or E is larger than before.
  void rebuild(const Routing& routing);

  std::int32_t num_experts() const { return num_experts_; }
  std::int32_t top_k() const { return top_k_; }
  std::int64_t num_tokens() const { return num_tokens_; }
  std::int64_t num_pairs() const { return num_tokens_ * top_k_; }
  std::int64_t num_rows() const { return expert_offsets_.empty() ? 0 : expert_offsets_.back(); }
  std::span<const std::int32_t> expert_offsets() const { return expert_offsets_; }
  std::span<const std::int32_t> row_token() const { return row_token_; }
  std::span<const std::int32_t> row_pair() const { return row_pair_; }
  std::span<const std::int32_t> pair_row() const { return pair_row_; }

 private:
  BucketPlan() = default;
  std::int32_t num_experts_ = 0;
  std::int32_t top_k_ = 0;
  std::int64_t num_tokens_ = 0;
  std::vector<std::int32_t> expert_offsets_, row_token_, row_pair_, pair_row_;
};

/// Capacity of sorted_ids: P + E * (block_size - 1), but never more than P * block_size, rounded up
/// to a block.
std::int64_t aligned_capacity(std::int64_t num_pairs, std::int32_t num_experts,
                              std::int32_t block_size);
std::int64_t aligned_block_capacity(std::int64_t num_pairs, std::int32_t num_experts,
                                    std::int32_t block_size);

/// Pads each expert's rows to `block_size`, as vLLM's moe_align_block_size does, for any E. It does
/// not allocate.
void align_block_size(const op::Align& call);

/// An aligned routing that owns its arrays.
class AlignedRouting {
 public:
  /// block_size is 8, 16, 32, 48 or 64 (vLLM's documented example also uses 4, so any value >= 1 is
  /// accepted here). Errors: ShapeError on bad ids, ConfigError on block_size < 1.
  static AlignedRouting build(const Routing& routing, std::int32_t num_experts,
                              std::int32_t block_size, RowSpace row_space);
  std::int32_t block_size() const { return block_size_; }
  std::int32_t num_experts() const { return num_experts_; }
  std::int64_t num_pairs() const { return num_pairs_; }
  RowSpace row_space() const { return row_space_; }
  std::int32_t num_post_pad() const { return num_post_pad_; }
  std::int64_t num_blocks() const { return num_post_pad_ / block_size_; }
  /// [num_post_pad]
  std::span<const std::int32_t> sorted_ids() const { return sorted_ids_; }
  /// [block capacity]
  std::span<const std::int32_t> block_experts() const { return block_experts_; }

 private:
  AlignedRouting() = default;
  std::int32_t block_size_ = 1, num_experts_ = 0, num_post_pad_ = 0;
  std::int64_t num_pairs_ = 0;
  RowSpace row_space_ = RowSpace::TokenPairs;
  std::vector<std::int32_t> sorted_ids_, block_experts_;
};

inline constexpr std::int32_t kBlockSizes[] = {8, 16, 32, 48, 64};
inline constexpr std::int32_t kMaxBlockSize = 64;

/// The block size of the aligned GEMM. `expert_offsets` [E + 1] may be empty on the device route,
/// where the counts are not known to the host. tuning.block_size wins. Else the device route takes
/// large_m_block_size from large_m_min_pairs pairs on, and 16 below. Else it is the first of 64, 32
/// and 16 whose padded rows stay within 1.30 times the real ones; no pairs give 16.
std::int32_t pick_block_size(std::span<const std::int32_t> expert_offsets, bool device_route,
                             std::int64_t total_pairs, const Tuning& tuning);

}  // namespace moesaic
