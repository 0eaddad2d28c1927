#include "offload/slot_table.hpp"

#include <algorithm>
#include <utility>

#include "moesaic/interrupt.hpp"

namespace moesaic::offload {
namespace {

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
  pool_->forget_pins();
}

std::int64_t SlotTable::nbytes() const { return slots_ != nullptr ? slots_->nbytes() : 0; }

std::vector<std::int32_t> SlotTable::slot_map() {
  const auto held = hold();
  return map_;
}

/// The experts that the pool wants in a slot where they are not; `evicted` is who lies there now.
/// The caller holds load_mutex_, without which map_ does not change.
std::vector<SlotLoad> SlotTable::missing_loads(std::optional<std::span<const std::int32_t>> only) {
  std::vector<SlotLoad> loads;
  if (slots_ == nullptr) return loads;
  pool_->copy_slot_map(wanted_);
  const auto add = [&](std::int32_t expert) {
    const auto e = static_cast<std::size_t>(expert);
    if (wanted_[e] >= 0 && map_[e] != wanted_[e]) loads.push_back({expert, wanted_[e], -1});
  };
  if (only) {
    std::ranges::for_each(*only, add);
  } else {
    for (std::int32_t e = 0; e < static_cast<std::int32_t>(map_.size()); ++e) add(e);
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

SlotTable::Loading::Loading(SlotTable& table, std::optional<std::span<const std::int32_t>> only)
    : table_(table), one_(table.load_mutex_), loads_(table.missing_loads(only)) {
  if (loads_.empty()) return;
  copied_.reserve(loads_.size());
  table_.set_slots(loads_, false);  // from here on no forward reads these slots
}

std::int32_t SlotTable::Loading::load(Context& context, std::int32_t expert,
                                      const ExpertBytes& from) {
  const auto load = std::ranges::find(loads_, expert, &SlotLoad::expert);
  if (load == loads_.end()) return -1;
  // A forward in two phases comes by twice.
  if (std::ranges::find(copied_, *load) != copied_.end()) return load->slot;
  table_.slots_->load(context, load->slot, from);
  table_.slots_->wait(context);  // the caller may give `from` back
  copied_.push_back(*load);
  return load->slot;
}

void SlotTable::Loading::publish() {
  if (copied_.empty()) return;
  table_.set_slots(copied_, true);
  copied_.clear();
}

std::int64_t SlotTable::reconcile(Context& context, ExpertSource& source) {
  Loading loading(*this, std::nullopt);
  if (loading.loads().empty()) return 0;
  const ScopedZone zone(context, Zone::Upload);
  const std::vector<std::int32_t> experts = experts_of(loading.loads());
  // A batch takes half of the buffers: while it is copied, the next one fills the other half.
  const auto most = static_cast<std::size_t>(std::max(1, source.batch_limit() / 2));
  std::span<const std::int32_t> left(experts);
  while (!left.empty()) {
    const std::span<const std::int32_t> now = left.first(std::min(most, left.size()));
    left = left.subspan(now.size());
    {
      const std::unique_ptr<ExpertBatch> batch = source.open(layer_, now);
      source.expect(layer_, left.first(std::min(most, left.size())), Expect::Needed);
      for (std::size_t i = 0; i < now.size(); ++i) {
        Interrupt::check();
        loading.load(context, now[i], batch->wait(i));
      }
    }
    loading.publish();
  }
  const std::int64_t moved = static_cast<std::int64_t>(experts.size()) * weights_.expert_bytes;
  pool_->count_bytes(moved);
  return moved;
}

}  // namespace moesaic::offload
