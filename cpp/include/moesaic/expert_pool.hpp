#pragma once

/// Which experts of one layer are kept in fast memory. This is bookkeeping only: a pool decides
/// which expert has which slot (it places experts), and offload.hpp moves the weights. The rules
/// with `Ranking::Hits` and decay 0 are those of the TIDE expert pool (RLX).

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "moesaic/leaf_mutex.hpp"

namespace moesaic {

/// When a pool asks to be refreshed. `step` of should_refresh counts what the policy names: decode
/// steps, or steps of any kind.
struct RefreshPolicy {
  enum class Every : std::uint8_t { Forward, DecodeSteps, Steps, Manual };
  Every every = Every::Steps;
  std::int64_t steps = 1;  ///< every how many steps, at least 1

  static RefreshPolicy every_forward() { return {Every::Forward, 1}; }
  static RefreshPolicy every_decode_steps(std::int64_t n) { return {Every::DecodeSteps, n}; }
  static RefreshPolicy every_steps(std::int64_t n) { return {Every::Steps, n}; }
  /// Only at a prefill block or when forced.
  static RefreshPolicy manual() { return {Every::Manual, 1}; }
  bool operator==(const RefreshPolicy&) const = default;
};

enum class ExecMode : std::uint8_t {
  Reuse,    ///< the policy decides
  Refresh,  ///< forced
};

/// What makes an expert worth its slot.
enum class Ranking : std::uint8_t {
  Hits,     ///< score = decay * score + hits, once per observed forward
  Recency,  ///< the last forward that used it
  Fixed,    ///< the residents stay for ever
};

struct ExpertPoolConfig {
  std::int32_t num_experts = 0;
  std::int32_t budget = 0;  ///< experts in fast memory; more than num_experts means all
  RefreshPolicy refresh{};
  Ranking ranking = Ranking::Hits;
  double decay = 0.0;          ///< for Ranking::Hits: 0 (only the last forward counts) to 1
  double margin = 0.0;         ///< a challenger's score must exceed the incumbent's * (1 + margin)
  std::int64_t min_dwell = 0;  ///< observed forwards that an expert stays at least
  bool admit = true;           ///< whether stage() gives slots, or only refreshes do
};

/// A move that a new placement asks for: `expert` into `slot`.
struct SlotLoad {
  std::int32_t expert;
  std::int32_t slot;
  std::int32_t evicted;  ///< the expert that had the slot, -1 if none
  bool operator==(const SlotLoad&) const = default;
};

struct RefreshResult {
  bool refreshed = false;            ///< whether the pool was due
  std::vector<std::int32_t> target;  ///< wanted experts, best first; may be shorter than the budget
  std::vector<SlotLoad> promotions;  ///< in target order, each paired with its victim
  std::vector<std::int32_t> demotions;
  std::int64_t bytes = 0;  ///< what the promotions will move; 0 where the expert size is unknown
};

/// What a pool did since its start or reset_stats(). A forward of a layer counts once, not once per
/// role.
struct PoolStats {
  std::int64_t forwards = 0;
  std::int64_t refreshes = 0, promotions = 0, demotions = 0;
  std::int64_t hit_experts = 0, miss_experts = 0;  ///< distinct experts of each forward
  std::int64_t hit_pairs = 0, miss_pairs = 0;      ///< token-expert pairs
  std::int64_t staged = 0;                         ///< missing experts that were given a slot
  std::int64_t streamed = 0;                       ///< missing experts that only passed through
  std::int64_t bytes = 0;                          ///< moved into fast memory
  double hit_rate() const {
    const std::int64_t all = hit_pairs + miss_pairs;
    return all == 0 ? 1.0 : static_cast<double>(hit_pairs) / static_cast<double>(all);
  }
};

/// How often each expert was used, over all forwards and over time, and with whom.
class ExpertUsage {
 public:
  ExpertUsage(std::int32_t num_experts, bool coactivation);
  /// What the accessors of these names give.
  struct Counted {
    std::int64_t forwards, tokens, interval;
    std::vector<std::int64_t> counts, history, coactivation;
  };
  /// A usage that was written down. Throws ShapeError where the arrays do not fit together.
  explicit ExpertUsage(Counted counted);
  /// ids [T, top_k]; negative ones are skipped.
  void add(std::span<const std::int32_t> ids, std::int32_t top_k);

  std::int32_t num_experts() const { return num_experts_; }
  std::int64_t forwards() const { return forwards_; }
  std::int64_t tokens() const { return tokens_; }
  std::span<const std::int64_t> counts() const { return counts_; }  ///< [E]
  /// Forwards per row of history(); doubles whenever there are more than kMaxRows rows.
  std::int64_t interval() const { return interval_; }
  std::span<const std::int64_t> history() const { return history_; }  ///< [rows, E]
  /// [E, E] tokens that used both; the diagonal is counts(). Empty unless asked for.
  std::span<const std::int64_t> coactivation() const { return coactivation_; }

  static constexpr std::int64_t kMaxRows = 512;

 private:
  std::int32_t num_experts_;
  std::int64_t forwards_ = 0, tokens_ = 0, interval_ = 1;
  std::vector<std::int64_t> counts_, history_, coactivation_;
};

/// Counts the experts of calls (LayerRef::usage), as an ExpertPool does of its own. Thread safe.
class UsageCounter {
 public:
  explicit UsageCounter(std::int32_t num_experts, bool coactivation = false)
      : usage_(num_experts, coactivation) {}
  /// ids [T, top_k] of one call; those outside the experts are skipped.
  void add(std::span<const std::int32_t> ids, std::int32_t top_k);
  ExpertUsage usage() const;

 private:
  mutable LeafMutex mutex_;
  ExpertUsage usage_;
};

/// Thread safe. Invariants: the number of residents is the budget at all times; an expert keeps its
/// slot while it stays; equal inputs give equal placements.
class ExpertPool {
 public:
  /// Experts 0..budget-1 start resident, expert e in slot e. Errors: ConfigError.
  explicit ExpertPool(const ExpertPoolConfig& config, bool coactivation = false);
  static ExpertPoolConfig all_resident(std::int32_t num_experts) {
    return {.num_experts = num_experts, .budget = num_experts};
  }

  const ExpertPoolConfig& config() const { return config_; }
  std::int32_t num_experts() const { return config_.num_experts; }
  std::int32_t budget() const { return config_.budget; }
  bool offload_enabled() const { return config_.budget < config_.num_experts; }

  /// False without offload; true when forced or at a prefill block; else by the policy: every
  /// forward, or step % steps == 0.
  bool should_refresh(std::int64_t step, bool is_prefill_block, ExecMode mode) const;

  /// Counts one forward's ids into the scores. Errors: ShapeError on an id >= num_experts.
  void observe(std::span<const std::int32_t> ids);
  /// Places the best experts: target() against the residents, each promotion paired with the
  /// coldest victim. Pinned experts stay.
  RefreshResult refresh();
  /// observe, then refresh.
  RefreshResult refresh_from_indices(std::span<const std::int32_t> ids);
  /// A refresh whose target comes from outside. Errors: ShapeError on an id out of range or twice,
  /// or on more than budget ids.
  RefreshResult apply_target(std::span<const std::int32_t> target);
  /// Takes scores from a profile and places the experts that they favour. For Ranking::Recency they
  /// are older than any use. Errors: ShapeError unless there are E scores, none below 0.
  RefreshResult warm(std::span<const double> scores);

  /// Observes a forward and gives its missing experts slots, best first, at the cost of colder ones
  /// that it does not need. Those that do not fit, or rank below every victim, are not placed.
  std::vector<SlotLoad> stage(std::span<const std::int32_t> ids);

  /// Keeps experts from being evicted while it lives.
  class Pins {
   public:
    Pins(ExpertPool& pool, std::span<const std::int32_t> experts);
    ~Pins();
    Pins(const Pins&) = delete;
    Pins& operator=(const Pins&) = delete;

   private:
    ExpertPool& pool_;
    std::span<const std::int32_t> experts_;
  };
  /// For a forked child: nobody who pinned experts is there.
  void forget_pins() noexcept;

  std::vector<std::int32_t> residents() const;  ///< ascending
  std::vector<std::uint8_t> resident_mask() const;
  std::vector<std::int32_t> slot_map() const;  ///< [E], -1 = not resident
  void copy_slot_map(std::span<std::int32_t> out) const;
  std::vector<double> scores() const;  ///< [E]
  /// The best experts by score, zero scores dropped, at most budget.
  std::vector<std::int32_t> target() const;

  PoolStats stats() const;
  void reset_stats();
  ExpertUsage usage() const;
  /// What one forward did, as the layer that ran it tells.
  void count_forward(std::span<const std::int32_t> ids, std::int32_t top_k,
                     const PoolStats& forward);
  void count_bytes(std::int64_t bytes);

 private:
  void observe_locked(std::span<const std::int32_t> ids);
  std::vector<std::int32_t> ranked_locked() const;
  std::vector<std::int32_t> target_locked() const;
  RefreshResult refresh_locked();
  RefreshResult place_locked(std::vector<std::int32_t> target, bool guarded);
  void swap_locked(std::int32_t promoted, std::int32_t victim, std::vector<SlotLoad>& loads);
  bool beats_locked(std::int32_t challenger, std::int32_t incumbent) const;
  std::vector<std::int32_t> victims_locked(std::span<const std::uint8_t> kept) const;

  ExpertPoolConfig config_;
  mutable LeafMutex mutex_;
  std::vector<double> scores_;
  std::vector<std::int32_t> slots_;      ///< [E]
  std::vector<std::int32_t> pins_;       ///< [E]
  std::vector<std::int64_t> placed_at_;  ///< [E], clock_ at its promotion
  std::int64_t clock_ = 0;               ///< number of observed forwards
  PoolStats stats_;
  ExpertUsage usage_;
};

/// How often each expert occurs in `ids`; ids outside [0, num_experts) are left out.
std::vector<std::int64_t> count_hits(std::span<const std::int32_t> ids, std::int32_t num_experts);

/// The experts with the most hits, at most `budget` of them, in descending order, ties to the lower
/// id; experts without hits are left out.
std::vector<std::int32_t> target_from_counts(std::span<const std::int64_t> counts,
                                             std::int32_t budget);

/// [E], 1 for an expert that any of the pools holds. Errors: ShapeError on pools of different
/// sizes.
std::vector<std::uint8_t> merged_resident_mask(std::span<const ExpertPool* const> pools);

}  // namespace moesaic
