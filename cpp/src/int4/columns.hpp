#pragma once

/// The order of an INT4 stack's columns in memory: group after group, however g_idx scatters them.

#include <cstdint>
#include <span>
#include <vector>

namespace moesaic::int4 {

/// Which column of x each packed column is, for one order that all experts share or for one each.
/// Every group starts at a multiple of `scale_cols`, so that a stored scale serves one group only;
/// groups are filled up with columns -1.
struct ColumnOrder {
  std::int64_t packed_cols = 0;   ///< one number for all experts, a multiple of 32
  std::int32_t scale_cols = 32;   ///< 32, 64, 128 or 256
  std::int64_t scale_groups = 0;  ///< packed_cols / scale_cols, rounded up
  bool identity = true;  ///< whether every packed column is the column of x with its number
  std::vector<std::int32_t> column;  ///< [orders, packed_cols]: column of x, -1 = padding
  std::vector<std::int32_t> group;   ///< [orders, scale_groups]: its group, -1 behind the last
};

/// The order for each row of `g_idx` ([orders, K], groups in range); an empty g_idx means k /
/// group_size. Columns of a group keep their order, so the sort is stable.
ColumnOrder order_columns(std::int64_t k, std::int64_t group_size, std::int64_t groups,
                          std::span<const std::int32_t> g_idx);

/// The stable argsort of one g_idx: what Marlin kernels gather activations by.
std::vector<std::int32_t> sort_by_group(std::span<const std::int32_t> g_idx);

}  // namespace moesaic::int4
