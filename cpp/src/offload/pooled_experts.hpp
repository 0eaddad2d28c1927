#pragma once

/// Runs the experts of one layer in a forward: residents from their slots, the others as OnMiss
/// says.

#include <memory>
#include <shared_mutex>
#include <span>
#include <vector>

#include "moesaic/leaf_mutex.hpp"
#include "moesaic/offload.hpp"
#include "offload/slot_table.hpp"

namespace moesaic::offload {

/// Guesses which cold experts a layer will ask for next: those it missed lately.
class MissHistory {
 public:
  explicit MissHistory(std::int32_t num_experts)
      : heat_(static_cast<std::size_t>(num_experts), 0.0F) {}
  /// Experts that one forward missed, and those of them that have a slot since.
  void add(std::span<const std::int32_t> missed, std::span<const SlotLoad> placed);
  /// The hottest, at most `count`.
  std::vector<std::int32_t> likely(std::int32_t count) const;

 private:
  static constexpr float kKeep = 0.8F;  ///< share of its heat that an expert keeps per forward
  mutable LeafMutex mutex_;
  std::vector<float> heat_;
};

struct ForwardState;

/// What the layers of a store share.
struct StoreParts {
  std::vector<LayerMoeWeights> layers;
  std::unique_ptr<ExpertSource> source;
  std::vector<std::unique_ptr<MissHistory>> misses;  ///< one per layer
  std::int32_t read_ahead = 0;
};

class PooledExperts final : public ExpertResidency {
 public:
  /// `parts` belong to `store`, which is kept alive.
  PooledExperts(std::shared_ptr<MoeExpertStore> store, StoreParts& parts,
                std::shared_ptr<SlotTable> table, OnMiss on_miss);
  ~PooledExperts() override;
  void run(Context& context, const op::GateUp& gate_up, const op::Down& down) override;
  ExpertUsage usage() const override { return table_->pool().usage(); }

 private:
  std::unique_ptr<ForwardState> take_state();
  void give_state(std::unique_ptr<ForwardState> state) noexcept;
  /// A forward some of whose experts are cold; `held` holds the map.
  void run_mixed(ForwardState& state, std::shared_lock<std::shared_mutex> held, Context& context,
                 const op::GateUp& gate_up, const op::Down& down);
  /// One call of run_mixed, for what it does several times.
  struct Mixed;
  void run_cold(Mixed& call, unsigned phases);
  void read_ahead();

  const std::shared_ptr<MoeExpertStore> store_;
  StoreParts& parts_;
  const std::shared_ptr<SlotTable> table_;
  const OnMiss on_miss_;
  LeafMutex states_mutex_;
  /// The first of those not in use now; together as many as forwards ever ran at once.
  std::unique_ptr<ForwardState> states_;
};

}  // namespace moesaic::offload
