#pragma once

/// The nearest point of a grid of the IQ1 to IQ3 types, exactly, under any weights.
///
/// The squared error of a point is a sum over its K levels. Both halves of a point have few
/// combinations of levels, so the errors of all of them are summed once per search; then a point
/// costs one addition, and whole groups of points that share an upper half are left out when it and
/// the best lower half of all cannot win.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "quant/iq_grids.hpp"

namespace moesaic::quant {

/// `Levels` levels per weight, K weights per point.
template <std::size_t N, std::size_t K, std::size_t Levels>
class GridSearch {
 public:
  static constexpr int kHalf = K / 2;
  static constexpr int kCombinations = [] {
    int n = 1;
    for (int k = 0; k < kHalf; ++k) n *= static_cast<int>(Levels);
    return n;
  }();
  static constexpr int kPoint = K;

  GridSearch(const Grid<N, K>& grid, const std::array<float, Levels>& levels)
      : grid_(grid), levels_(levels) {
    std::array<std::vector<Entry>, kCombinations> groups;
    for (std::size_t point = 0; point < N; ++point) {
      int low = 0, high = 0;
      for (int k = kHalf - 1; k >= 0; --k) {
        low = low * static_cast<int>(Levels) + level_of(grid[point][static_cast<std::size_t>(k)]);
        high = high * static_cast<int>(Levels) +
               level_of(grid[point][static_cast<std::size_t>(k + kHalf)]);
      }
      groups[static_cast<std::size_t>(high)].push_back(
          {static_cast<std::uint16_t>(low), static_cast<std::uint16_t>(point)});
    }
    for (std::size_t high = 0; high < groups.size(); ++high) {
      if (groups[high].empty()) continue;
      used_.push_back({static_cast<int>(high), static_cast<int>(entries_.size()),
                       static_cast<int>(entries_.size() + groups[high].size())});
      entries_.insert(entries_.end(), groups[high].begin(), groups[high].end());
    }
  }

  struct Nearest {
    int point;
    float cost;  ///< squared error less that of all zeros
  };

  /// For K values x under weights w, as scale * (level + shift).
  Nearest find(const float* x, const float* w, float scale, float shift) const {
    float low[kCombinations], high[kCombinations];
    combine(x, w, scale, shift, low);
    combine(x + kHalf, w + kHalf, scale, shift, high);
    const float least = *std::min_element(low, low + kCombinations);
    const Group* first = &used_.front();
    for (const Group& group : used_) {
      if (high[group.high] < high[first->high]) first = &group;
    }
    Nearest best{0, std::numeric_limits<float>::infinity()};
    const auto visit = [&](const Group& group) {
      const float base = high[group.high];
      for (int e = group.begin; e < group.end; ++e) {
        const Entry& entry = entries_[static_cast<std::size_t>(e)];
        const float cost = base + low[entry.low];
        if (cost < best.cost) best = {entry.point, cost};
      }
    };
    visit(*first);
    for (const Group& group : used_) {
      if (high[group.high] + least < best.cost && &group != first) visit(group);
    }
    return best;
  }

  float level(int point, int k) const {
    return static_cast<float>(grid_[static_cast<std::size_t>(point)][static_cast<std::size_t>(k)]);
  }
  float lowest() const { return levels_.front(); }
  float highest() const { return levels_.back(); }

 private:
  struct Entry {
    std::uint16_t low;
    std::uint16_t point;
  };
  struct Group {
    int high, begin, end;
  };

  int level_of(std::int8_t value) const {
    return static_cast<int>(std::find(levels_.begin(), levels_.end(), static_cast<float>(value)) -
                            levels_.begin());
  }

  /// Costs of all combinations of levels of kHalf values; the first value counts fastest.
  void combine(const float* x, const float* w, float scale, float shift, float* costs) const {
    costs[0] = 0.0f;
    int count = 1;
    for (int k = 0; k < kHalf; ++k) {
      float cost[Levels];
      for (std::size_t l = 0; l < Levels; ++l) {
        const float v = scale * (levels_[l] + shift);
        cost[l] = w[k] * v * (v - 2.0f * x[k]);
      }
      for (std::size_t l = Levels; l-- > 0;) {
        float* const to = costs + static_cast<int>(l) * count;
        for (int i = 0; i < count; ++i) to[i] = costs[i] + cost[l];
      }
      count *= static_cast<int>(Levels);
    }
  }

  const Grid<N, K>& grid_;
  std::array<float, Levels> levels_;
  std::vector<Entry> entries_;
  std::vector<Group> used_;
};

}  // namespace moesaic::quant
