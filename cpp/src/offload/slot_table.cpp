#include "offload/slot_table.hpp"

#include <algorithm>
#include <utility>

#include "moesaic/interrupt.hpp"

namespace moesaic::offload {
namespace {

constexpr std::int32_t kMostPassageSlots = 8;

std::vector<std::int32_t> experts_of(std::span<const SlotLoad> loads) {
  std::vector<std::int32_t> experts;
  for (const SlotLoad& load : loads) experts.push_back(load.expert);
  return experts;
}

}  // namespace

ExpertStack stack_over(const ExpertStack& source, const std::array<WeightRef, 3>& refs,
                       const std::int32_t* slot_map, std::shared_ptr<const void> owner) {
  ExpertStack::Parts parts;
  parts.shape = source.shape();
  parts.device = source.device();
  const std::pair<Role, RoleWeights*> roles[] = {
      {Role::Gate, &parts.gate}, {Role::Up, &parts.up}, {Role::Down, &parts.down}};
  for (const auto& [role, weights] : roles) {
    *weights = source.role(role);  // with its bias and scale, which go by expert and not by slot
    if (!weights->ref) continue;
    weights->ref = refs[static_cast<std::size_t>(role)];
    weights->ref.slot_map = slot_map;
    weights->owner = owner;
  }
  return ExpertStack(std::move(parts));
}

SlotTable::SlotTable(const LayerMoeWeights& weights, std::int32_t layer,
                     std::shared_ptr<ExpertPool> pool, const Backend& backend)
    : weights_(weights),
      layer_(layer),
      pool_(std::move(pool)),
      map_(static_cast<std::size_t>(weights.stack->num_experts()), -1),
      wanted_(map_.size(), -1) {
  if (pool_->budget() > 0) {
    slots_ = make_slots(backend, *weights.stack, pool_->budget());
    const std::array refs{slots_->ref(Role::Gate), slots_->ref(Role::Up), slots_->ref(Role::Down)};
    residents_ = std::make_unique<ExpertStack>(
        stack_over(*weights.stack, refs, map_.data(), slots_->owner()));
  }
  watch();
}

/// Forwards and loads of other threads, which hold these for long, are not there.
void SlotTable::forked() noexcept {
  renew(map_mutex_);
  renew(turnstile_);
  renew(load_mutex_);
  renew(passage_mutex_);
  pool_->forget_pins();
}

std::int64_t SlotTable::nbytes() const {
  return (slots_ != nullptr ? slots_->nbytes() : 0) +
         (passage_ != nullptr ? passage_->nbytes() : 0);
}

std::vector<std::int32_t> SlotTable::slot_map() {
  const auto held = hold();
  return map_;
}

/// The experts that the pool wants in a slot where they are not; `evicted` is who lies there now.
/// The caller holds load_mutex_, without which map_ does not change.
std::vector<SlotLoad> SlotTable::missing_loads() {
  std::vector<SlotLoad> loads;
  if (slots_ == nullptr) return loads;
  pool_->copy_slot_map(wanted_);
  for (std::size_t e = 0; e < wanted_.size(); ++e) {
    if (wanted_[e] < 0 || map_[e] == wanted_[e]) continue;
    loads.push_back({static_cast<std::int32_t>(e), wanted_[e], -1});
  }
  for (std::size_t e = 0; !loads.empty() && e < map_.size(); ++e) {
    const auto taken =
        std::ranges::find_if(loads, [&](const SlotLoad& load) { return load.slot == map_[e]; });
    if (taken != loads.end()) taken->evicted = static_cast<std::int32_t>(e);
  }
  return loads;
}

void SlotTable::set_slots(std::span<const SlotLoad> loads, bool resident) {
  const std::lock_guard turnstile(turnstile_);
  const std::unique_lock lock(map_mutex_);
  const std::lock_guard no_fork(change_mutex_);
  for (const SlotLoad& load : loads) {
    if (resident) {
      map_[static_cast<std::size_t>(load.expert)] = load.slot;
    } else {
      map_[static_cast<std::size_t>(load.expert)] = -1;  // until now it may lie in another slot
      if (load.evicted >= 0) map_[static_cast<std::size_t>(load.evicted)] = -1;
    }
  }
}

void SlotTable::load_batch(Context& context, ExpertSource& source, std::span<const SlotLoad> loads,
                           std::span<const SlotLoad> next) {
  const std::unique_ptr<ExpertBatch> batch = source.open(layer_, experts_of(loads));
  source.expect(layer_, experts_of(next));
  for (std::size_t i = 0; i < loads.size(); ++i) {
    Interrupt::check();
    slots_->load(context, loads[i].slot, batch->wait(i));
  }
  slots_->wait(context);
}

std::int64_t SlotTable::reconcile(Context& context, ExpertSource& source) {
  const std::lock_guard one(load_mutex_);
  const std::vector<SlotLoad> loads = missing_loads();
  if (loads.empty()) return 0;
  const ScopedZone zone(context, Zone::Upload);
  set_slots(loads, false);  // from here on no forward reads these slots
  std::int64_t moved = 0;
  // A batch takes half of the buffers: while it is copied, the next one fills the other half.
  const auto most = static_cast<std::size_t>(std::max(1, source.batch_limit() / 2));
  std::span<const SlotLoad> left(loads);
  while (!left.empty()) {
    const std::span<const SlotLoad> now = left.first(std::min(most, left.size()));
    left = left.subspan(now.size());
    load_batch(context, source, now, left.first(std::min(most, left.size())));
    set_slots(now, true);
    moved += static_cast<std::int64_t>(now.size()) * weights_.expert_bytes;
  }
  pool_->count_bytes(moved);
  return moved;
}

std::int32_t SlotTable::passage_slots() const {
  // One is needed even when the budget holds all experts: one that could not be loaded must pass.
  return std::clamp(pool_->num_experts() - pool_->budget(), 1, kMostPassageSlots);
}

void SlotTable::make_passage(const Backend& backend) {
  if (passage_ != nullptr) return;
  std::unique_ptr<ExpertSlots> made = make_slots(backend, *weights_.stack, passage_slots());
  const std::lock_guard no_fork(change_mutex_);
  passage_ = std::move(made);
}

}  // namespace moesaic::offload
