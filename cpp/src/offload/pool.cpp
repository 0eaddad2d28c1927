#include <algorithm>
#include <string>

#include "moesaic/error.hpp"
#include "moesaic/expert_pool.hpp"

namespace moesaic {
namespace {

std::size_t at(std::int32_t expert) { return static_cast<std::size_t>(expert); }

ExpertPoolConfig checked(ExpertPoolConfig config) {
  const auto check = [](bool ok, const char* what, const char* expected, const std::string& got) {
    require<ConfigError>(ok, [&] {
      return Problem{
          .operation = "ExpertPool", .what = what, .expected = expected, .got = got, .hint = {}};
    });
  };
  check(config.num_experts >= 1, "num_experts", "at least 1", std::to_string(config.num_experts));
  check(config.budget >= 0, "budget", "at least 0", std::to_string(config.budget));
  check(config.refresh.steps >= 1, "refresh.steps", "at least 1",
        std::to_string(config.refresh.steps));
  check(config.decay >= 0.0 && config.decay <= 1.0, "decay", "0 to 1",
        std::to_string(config.decay));
  check(config.margin >= 0.0, "margin", "at least 0", std::to_string(config.margin));
  check(config.min_dwell >= 0, "min_dwell", "at least 0", std::to_string(config.min_dwell));
  config.budget = std::min(config.budget, config.num_experts);
  return config;
}

void check_experts(std::span<const std::int32_t> ids, std::int32_t num_experts,
                   std::int32_t smallest, const char* what) {
  for (const std::int32_t id : ids) {
    require<ShapeError>(id >= smallest && id < num_experts, [&] {
      return Problem{
          .operation = "ExpertPool",
          .what = what,
          .expected = std::to_string(smallest) + " to " + std::to_string(num_experts - 1),
          .got = std::to_string(id),
          .hint = {}};
    });
  }
}

}  // namespace

ExpertPool::ExpertPool(const ExpertPoolConfig& config, bool coactivation)
    : config_(checked(config)),
      scores_(at(config_.num_experts), 0.0),
      slots_(at(config_.num_experts), -1),
      pins_(at(config_.num_experts), 0),
      placed_at_(at(config_.num_experts), 0),
      usage_(config_.num_experts, coactivation) {
  for (std::int32_t e = 0; e < config_.budget; ++e) slots_[at(e)] = e;
}

bool ExpertPool::should_refresh(std::int64_t step, bool is_prefill_block, ExecMode mode) const {
  if (!offload_enabled()) return false;
  if (mode == ExecMode::Refresh || is_prefill_block) return true;
  switch (config_.refresh.every) {
    case RefreshPolicy::Every::Forward:
      return true;
    case RefreshPolicy::Every::Manual:
      return false;
    default:
      return step % config_.refresh.steps == 0;
  }
}

void ExpertPool::observe(std::span<const std::int32_t> ids) {
  check_experts(ids, config_.num_experts, -1, "ids");
  const std::lock_guard lock(mutex_);
  observe_locked(ids);
}

void ExpertPool::observe_locked(std::span<const std::int32_t> ids) {
  ++clock_;
  if (config_.ranking == Ranking::Hits) {
    for (double& score : scores_) score *= config_.decay;
  }
  for (const std::int32_t id : ids) {
    if (id < 0) continue;
    if (config_.ranking == Ranking::Hits) scores_[at(id)] += 1.0;
    if (config_.ranking == Ranking::Recency) scores_[at(id)] = static_cast<double>(clock_);
  }
}

/// All experts, best first.
std::vector<std::int32_t> ExpertPool::ranked_locked() const {
  std::vector<std::int32_t> order(scores_.size());
  for (std::size_t e = 0; e < order.size(); ++e) order[e] = static_cast<std::int32_t>(e);
  std::ranges::stable_sort(
      order, [&](std::int32_t a, std::int32_t b) { return scores_[at(a)] > scores_[at(b)]; });
  return order;
}

std::vector<std::int32_t> ExpertPool::target_locked() const {
  std::vector<std::int32_t> order = ranked_locked();
  std::erase_if(order, [&](std::int32_t e) { return scores_[at(e)] <= 0.0; });
  if (order.size() > at(config_.budget)) order.resize(at(config_.budget));
  return order;
}

std::vector<std::int32_t> ExpertPool::target() const {
  const std::lock_guard lock(mutex_);
  return target_locked();
}

/// Residents that may leave, coldest first: the order of ranked_locked from its end.
std::vector<std::int32_t> ExpertPool::victims_locked(std::span<const std::uint8_t> kept) const {
  std::vector<std::int32_t> order = ranked_locked();
  std::ranges::reverse(order);
  std::erase_if(order, [&](std::int32_t e) {
    return slots_[at(e)] < 0 || kept[at(e)] != 0 || pins_[at(e)] > 0;
  });
  return order;
}

bool ExpertPool::beats_locked(std::int32_t challenger, std::int32_t incumbent) const {
  if (config_.min_dwell > 0 && clock_ - placed_at_[at(incumbent)] < config_.min_dwell) return false;
  return config_.margin == 0.0 ||
         scores_[at(challenger)] > scores_[at(incumbent)] * (1.0 + config_.margin);
}

void ExpertPool::swap_locked(std::int32_t promoted, std::int32_t victim,
                             std::vector<SlotLoad>& loads) {
  const std::int32_t slot = slots_[at(victim)];
  slots_[at(victim)] = -1;
  slots_[at(promoted)] = slot;
  placed_at_[at(promoted)] = clock_;
  loads.push_back({promoted, slot, victim});
  ++stats_.promotions;
  ++stats_.demotions;
}

RefreshResult ExpertPool::place_locked(std::vector<std::int32_t> target, bool guarded) {
  RefreshResult result;
  result.refreshed = true;
  std::vector<std::uint8_t> kept(scores_.size(), 0);
  for (const std::int32_t e : target) kept[at(e)] = 1;
  std::vector<std::int32_t> victims = victims_locked(kept);
  for (const std::int32_t e : target) {
    if (slots_[at(e)] >= 0) continue;
    const auto loser = std::ranges::find_if(
        victims, [&](std::int32_t v) { return !guarded || beats_locked(e, v); });
    if (loser == victims.end()) continue;
    result.demotions.push_back(*loser);
    swap_locked(e, *loser, result.promotions);
    victims.erase(loser);
  }
  result.target = std::move(target);
  ++stats_.refreshes;
  return result;
}

RefreshResult ExpertPool::refresh() {
  const std::lock_guard lock(mutex_);
  return refresh_locked();
}

RefreshResult ExpertPool::refresh_locked() {
  // With fixed residents the target is empty whatever the scores are, so nobody moves.
  const bool fixed = config_.ranking == Ranking::Fixed;
  return place_locked(fixed ? std::vector<std::int32_t>() : target_locked(), true);
}

RefreshResult ExpertPool::refresh_from_indices(std::span<const std::int32_t> ids) {
  check_experts(ids, config_.num_experts, -1, "ids");
  const std::lock_guard lock(mutex_);
  observe_locked(ids);
  return refresh_locked();
}

RefreshResult ExpertPool::apply_target(std::span<const std::int32_t> target) {
  check_experts(target, config_.num_experts, 0, "target");
  std::vector<std::int32_t> sorted(target.begin(), target.end());
  std::ranges::sort(sorted);
  const bool unique = std::ranges::adjacent_find(sorted) == sorted.end();
  require<ShapeError>(unique && target.size() <= at(config_.budget), [&] {
    return Problem{.operation = "ExpertPool",
                   .what = "target",
                   .expected = "at most " + std::to_string(config_.budget) + " different experts",
                   .got = std::to_string(target.size()) + (unique ? "" : ", one of them twice"),
                   .hint = {}};
  });
  const std::lock_guard lock(mutex_);
  return place_locked({target.begin(), target.end()}, false);
}

RefreshResult ExpertPool::warm(std::span<const double> scores) {
  require<ShapeError>(scores.size() == scores_.size() &&
                          std::ranges::all_of(scores, [](double s) { return s >= 0.0; }),
                      [&] {
                        return Problem{
                            .operation = "ExpertPool",
                            .what = "scores",
                            .expected = std::to_string(scores_.size()) + " values, none negative",
                            .got = std::to_string(scores.size()) + " values",
                            .hint = {}};
                      });
  const std::lock_guard lock(mutex_);
  scores_.assign(scores.begin(), scores.end());
  if (config_.ranking == Ranking::Recency) {  // below 1, so older than any use, in the same order
    const double scale = 1.0 / (1.0 + *std::ranges::max_element(scores_));
    for (double& score : scores_) score *= scale;
  }
  return place_locked(target_locked(), false);
}

std::vector<SlotLoad> ExpertPool::stage(std::span<const std::int32_t> ids) {
  check_experts(ids, config_.num_experts, -1, "ids");
  const std::lock_guard lock(mutex_);
  observe_locked(ids);
  std::vector<SlotLoad> loads;
  if (!config_.admit || config_.ranking == Ranking::Fixed || config_.budget == 0) return loads;
  // Ranking costs memory and a sort, which a forward without misses is spared.
  if (std::ranges::none_of(ids, [&](std::int32_t e) { return e >= 0 && slots_[at(e)] < 0; })) {
    return loads;
  }
  std::vector<std::uint8_t> needed(scores_.size(), 0);
  for (const std::int32_t id : ids) {
    if (id >= 0) needed[at(id)] = 1;
  }
  std::vector<std::int32_t> victims = victims_locked(needed);
  for (const std::int32_t e : ranked_locked()) {
    if (needed[at(e)] == 0 || slots_[at(e)] >= 0) continue;
    // The expert is moved in any case, so keeping it costs nothing: a victim must only rank below
    // it.
    const auto loser = std::ranges::find_if(victims, [&](std::int32_t v) {
      return scores_[at(e)] > scores_[at(v)] && beats_locked(e, v);
    });
    if (loser == victims.end()) continue;
    swap_locked(e, *loser, loads);
    victims.erase(loser);
  }
  return loads;
}

ExpertPool::Pins::Pins(ExpertPool& pool, std::span<const std::int32_t> experts)
    : pool_(pool), experts_(experts) {
  const std::lock_guard lock(pool_.mutex_);
  for (const std::int32_t e : experts_) ++pool_.pins_[at(e)];
}

ExpertPool::Pins::~Pins() {
  const std::lock_guard lock(pool_.mutex_);
  for (const std::int32_t e : experts_) --pool_.pins_[at(e)];
}

void ExpertPool::forget_pins() noexcept { std::ranges::fill(pins_, 0); }

std::vector<std::int32_t> ExpertPool::residents() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::int32_t> list;
  for (std::int32_t e = 0; e < config_.num_experts; ++e) {
    if (slots_[at(e)] >= 0) list.push_back(e);
  }
  return list;
}

std::vector<std::uint8_t> ExpertPool::resident_mask() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::uint8_t> mask(slots_.size());
  std::ranges::transform(slots_, mask.begin(),
                         [](std::int32_t slot) { return std::uint8_t{slot >= 0}; });
  return mask;
}

std::vector<std::int32_t> ExpertPool::slot_map() const {
  const std::lock_guard lock(mutex_);
  return slots_;
}

void ExpertPool::copy_slot_map(std::span<std::int32_t> out) const {
  const std::lock_guard lock(mutex_);
  std::ranges::copy(slots_, out.begin());
}

std::vector<double> ExpertPool::scores() const {
  const std::lock_guard lock(mutex_);
  return scores_;
}

PoolStats ExpertPool::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

void ExpertPool::reset_stats() {
  const std::lock_guard lock(mutex_);
  stats_ = {};
}

ExpertUsage ExpertPool::usage() const {
  const std::lock_guard lock(mutex_);
  return usage_;
}

void ExpertPool::count_forward(std::span<const std::int32_t> ids, std::int32_t top_k,
                               const PoolStats& forward) {
  const std::lock_guard lock(mutex_);
  usage_.add(ids, top_k);
  ++stats_.forwards;
  stats_.hit_experts += forward.hit_experts;
  stats_.miss_experts += forward.miss_experts;
  stats_.hit_pairs += forward.hit_pairs;
  stats_.miss_pairs += forward.miss_pairs;
  stats_.staged += forward.staged;
  stats_.streamed += forward.streamed;
}

void ExpertPool::count_bytes(std::int64_t bytes) {
  const std::lock_guard lock(mutex_);
  stats_.bytes += bytes;
}

}  // namespace moesaic
