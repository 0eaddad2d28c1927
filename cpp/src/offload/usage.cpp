#include <algorithm>
#include <mutex>
#include <string>
#include <utility>

#include "moesaic/error.hpp"
#include "moesaic/expert_pool.hpp"

namespace moesaic {

ExpertUsage::ExpertUsage(std::int32_t num_experts, bool coactivation)
    : num_experts_(num_experts), counts_(static_cast<std::size_t>(num_experts), 0) {
  const auto experts = static_cast<std::size_t>(num_experts);
  if (coactivation) coactivation_.resize(experts * experts, 0);
  history_.reserve(static_cast<std::size_t>(kMaxRows) * experts);  // the forward allocates nothing
}

ExpertUsage::ExpertUsage(Counted counted)
    : num_experts_(static_cast<std::int32_t>(counted.counts.size())),
      forwards_(counted.forwards),
      tokens_(counted.tokens),
      interval_(counted.interval),
      counts_(std::move(counted.counts)),
      history_(std::move(counted.history)),
      coactivation_(std::move(counted.coactivation)) {
  const std::size_t experts = counts_.size();
  const bool pairs = coactivation_.empty() || coactivation_.size() == experts * experts;
  require<ShapeError>(experts > 0 && interval_ >= 1 && history_.size() % experts == 0 &&
                          history_.size() <= static_cast<std::size_t>(kMaxRows) * experts && pairs,
                      [&] {
                        return Problem{"ExpertUsage",
                                       "history and coactivation",
                                       "[rows, " + std::to_string(experts) + "] and a square of it",
                                       std::to_string(history_.size()) + " and " +
                                           std::to_string(coactivation_.size()) + " numbers",
                                       {}};
                      });
}

void ExpertUsage::add(std::span<const std::int32_t> ids, std::int32_t top_k) {
  const auto experts = static_cast<std::size_t>(num_experts_);
  if (forwards_ % interval_ == 0) {
    if (history_.size() == static_cast<std::size_t>(kMaxRows) * experts) {
      for (std::size_t row = 0; row < static_cast<std::size_t>(kMaxRows) / 2; ++row) {
        for (std::size_t e = 0; e < experts; ++e) {
          history_[row * experts + e] =
              history_[2 * row * experts + e] + history_[(2 * row + 1) * experts + e];
        }
      }
      history_.resize(static_cast<std::size_t>(kMaxRows) / 2 * experts);
      interval_ *= 2;
    }
    history_.resize(history_.size() + experts, 0);
  }
  ++forwards_;
  if (top_k <= 0) return;
  const std::size_t last_row = history_.size() - experts;
  const auto width = static_cast<std::size_t>(top_k);
  tokens_ += static_cast<std::int64_t>(ids.size() / width);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0) continue;
    const auto e = static_cast<std::size_t>(ids[i]);
    ++counts_[e];
    ++history_[last_row + e];
    if (coactivation_.empty()) continue;
    const std::size_t token = i / width * width;
    for (std::size_t j = token; j < std::min(token + width, ids.size()); ++j) {
      if (ids[j] >= 0) ++coactivation_[e * experts + static_cast<std::size_t>(ids[j])];
    }
  }
}

void UsageCounter::add(std::span<const std::int32_t> ids, std::int32_t top_k) {
  const std::lock_guard lock(mutex_);
  usage_.add(ids, top_k);
}

ExpertUsage UsageCounter::usage() const {
  const std::lock_guard lock(mutex_);
  return usage_;
}

}  // namespace moesaic
