#include "offload/forward_state.hpp"

#include <algorithm>

namespace moesaic::offload {

ForwardState::ForwardState(const ExpertStack& source, SlotTable& table, bool stage)
    : pairs(static_cast<std::size_t>(source.num_experts()), 0),
      wave_map(pairs.size(), -1),
      pointers{std::vector<const std::byte*>(pairs.size()),
               std::vector<const std::byte*>(pairs.size()),
               std::vector<const std::byte*>(pairs.size())},
      slow(over_pointers(source)) {
  needed.reserve(pairs.size());
  cold.reserve(pairs.size());
  if (!stage) return;
  const ExpertSlots& slots = table.passage();
  passage = std::make_unique<ExpertStack>(
      stack_over(source, {slots.ref(Role::Gate), slots.ref(Role::Up), slots.ref(Role::Down)},
                 wave_map.data(), slots.owner()));
}

ExpertStack ForwardState::over_pointers(const ExpertStack& source) const {
  std::array<WeightRef, 3> refs;
  for (const Role role : kRoles) {
    WeightRef& ref = refs[static_cast<std::size_t>(role)];
    ref = source.role(role).ref;
    ref.base = nullptr;
    ref.table = pointers[static_cast<std::size_t>(role)].data();
  }
  return stack_over(source, refs, wave_map.data(), nullptr);
}

void ForwardState::collect(const RoutingView& routing) {
  stats = {};
  std::ranges::fill(pairs, 0);
  std::ranges::fill(wave_map, -1);  // a forward that failed may have left entries
  needed.clear();
  cold.clear();
  for (std::int64_t p = 0; p < routing.num_pairs(); ++p) {
    const std::int32_t e = routing.topk_ids[p];
    // Ids behind the stack's experts are those of identity experts, which need no weights.
    if (e < 0 || e >= static_cast<std::int32_t>(pairs.size())) continue;
    if (pairs[static_cast<std::size_t>(e)]++ == 0) needed.push_back(e);
  }
}

void ForwardState::count_hits(const SlotTable& table) {
  for (const std::int32_t e : needed) {
    const bool resident = table.slot_of(e) >= 0;
    (resident ? stats.hit_experts : stats.miss_experts) += 1;
    (resident ? stats.hit_pairs : stats.miss_pairs) += pairs[static_cast<std::size_t>(e)];
  }
}

void ForwardState::find_cold(const SlotTable& table) {
  for (const std::int32_t e : needed) {
    if (table.slot_of(e) < 0) cold.push_back(e);
  }
}

void ForwardState::bring(std::span<const std::int32_t> wave, ExpertBatch& batch, ExpertSlots* slots,
                         Context& context) {
  const ScopedZone zone(context, Zone::Upload);
  for (std::size_t i = 0; i < wave.size(); ++i) {
    const auto e = static_cast<std::size_t>(wave[i]);
    const ExpertBytes bytes = batch.wait(i);
    if (slots != nullptr) {
      slots->load(context, static_cast<std::int32_t>(i), bytes);
      wave_map[e] = static_cast<std::int32_t>(i);
    } else {
      for (std::size_t role = 0; role < bytes.size(); ++role) pointers[role][e] = bytes[role];
      wave_map[e] = wave[i];
    }
  }
  if (slots != nullptr) slots->wait(context);
}

void ForwardState::clear(std::span<const std::int32_t> wave) {
  for (const std::int32_t e : wave) wave_map[static_cast<std::size_t>(e)] = -1;
}

}  // namespace moesaic::offload
