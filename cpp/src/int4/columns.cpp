#include "int4/columns.hpp"

#include <algorithm>
#include <numeric>

namespace moesaic::int4 {
namespace {

constexpr std::int64_t kStep = 32;

/// The columns of each group, ascending.
using GroupColumns = std::vector<std::vector<std::int32_t>>;

GroupColumns columns_by_group(std::int64_t k, std::int64_t group_size, std::int64_t groups,
                              std::span<const std::int32_t> g_idx) {
  GroupColumns by_group(static_cast<std::size_t>(groups));
  for (std::int64_t i = 0; i < k; ++i) {
    const std::int64_t g = g_idx.empty() ? i / group_size : g_idx[static_cast<std::size_t>(i)];
    by_group[static_cast<std::size_t>(g)].push_back(static_cast<std::int32_t>(i));
  }
  return by_group;
}

/// Whether every group but the last one with columns ends at a multiple of `cols`.
bool fits(const GroupColumns& by_group, std::int64_t cols) {
  std::int64_t left = 0;
  for (const auto& b : by_group) {
    if (b.empty()) continue;
    if (left % cols != 0) return false;
    left = static_cast<std::int64_t>(b.size());
  }
  return true;
}

}  // namespace

ColumnOrder order_columns(std::int64_t k, std::int64_t group_size, std::int64_t groups,
                          std::span<const std::int32_t> g_idx) {
  const std::size_t orders = g_idx.empty() ? 1 : g_idx.size() / static_cast<std::size_t>(k);
  std::vector<GroupColumns> all(orders);
  ColumnOrder order;
  order.scale_cols = 256;
  for (std::size_t o = 0; o < orders; ++o) {
    const auto row =
        g_idx.empty() ? g_idx
                      : g_idx.subspan(o * static_cast<std::size_t>(k), static_cast<std::size_t>(k));
    all[o] = columns_by_group(k, group_size, groups, row);
    while (order.scale_cols > 32 && !fits(all[o], order.scale_cols)) order.scale_cols /= 2;
  }
  for (const GroupColumns& by_group : all) {
    std::int64_t cols = 0;
    for (const auto& b : by_group) {
      cols += (static_cast<std::int64_t>(b.size()) + kStep - 1) / kStep * kStep;
    }
    order.packed_cols = std::max(order.packed_cols, cols);
  }
  order.scale_groups = (order.packed_cols + order.scale_cols - 1) / order.scale_cols;
  order.column.assign(orders * static_cast<std::size_t>(order.packed_cols), -1);
  order.group.assign(orders * static_cast<std::size_t>(order.scale_groups), -1);
  for (std::size_t o = 0; o < orders; ++o) {
    std::int32_t* column = order.column.data() + o * static_cast<std::size_t>(order.packed_cols);
    std::int32_t* group = order.group.data() + o * static_cast<std::size_t>(order.scale_groups);
    std::int64_t at = 0;
    for (std::size_t g = 0; g < all[o].size(); ++g) {
      const auto& b = all[o][g];
      std::copy(b.begin(), b.end(), column + at);
      const std::int64_t end =
          at + (static_cast<std::int64_t>(b.size()) + kStep - 1) / kStep * kStep;
      for (std::int64_t c = at; c < end; c += order.scale_cols) {
        group[c / order.scale_cols] = static_cast<std::int32_t>(g);
      }
      at = end;
    }
    for (std::int64_t c = 0; c < order.packed_cols; ++c) order.identity &= column[c] == c;
  }
  order.identity &= order.packed_cols == k;
  return order;
}

std::vector<std::int32_t> sort_by_group(std::span<const std::int32_t> g_idx) {
  std::vector<std::int32_t> perm(g_idx.size());
  std::iota(perm.begin(), perm.end(), 0);
  std::stable_sort(perm.begin(), perm.end(), [&](std::int32_t a, std::int32_t b) {
    return g_idx[static_cast<std::size_t>(a)] < g_idx[static_cast<std::size_t>(b)];
  });
  return perm;
}

}  // namespace moesaic::int4
