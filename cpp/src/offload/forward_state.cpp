#include "offload/forward_state.hpp"

#include <algorithm>

namespace moesaic::offload {

ForwardState::ForwardState(const ExpertStack& source, const SlotTable& table)
    : pairs(static_cast<std::size_t>(source.num_experts()), 0),
      shown(pairs.size(), -1),
      pointers{std::vector<const std::byte*>(pairs.size()),
               std::vector<const std::byte*>(pairs.size()),
               std::vector<const std::byte*>(pairs.size())},
      slow(over_pointers(source)),
      placed(pairs.size(), -1) {
  needed.reserve(pairs.size());
  cold.reserve(pairs.size());
  const ExpertSlots* const slots = table.slots();
  if (slots == nullptr) return;
  const std::array refs{slots->ref(Role::Gate), slots->ref(Role::Up), slots->ref(Role::Down)};
  fresh = std::make_unique<ExpertStack>(stack_over(source, refs, placed.data(), slots->owner()));
}

ExpertStack ForwardState::over_pointers(const ExpertStack& source) const {
  std::array<WeightRef, 3> refs;
  for (const Role role : kRoles) {
    WeightRef& ref = refs[static_cast<std::size_t>(role)];
    ref = source.role(role).ref;
    ref.base = nullptr;
    ref.table = pointers[static_cast<std::size_t>(role)].data();
  }
  return stack_over(source, refs, shown.data(), nullptr);
}

void ForwardState::collect(const RoutingView& routing) {
  stats = {};
  std::ranges::fill(pairs, 0);
  std::ranges::fill(placed, -1);
  std::ranges::fill(shown, -1);  // a forward that failed may have left entries
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
  cold.clear();
  for (const std::int32_t e : needed) {
    if (table.slot_of(e) < 0) cold.push_back(e);
  }
}

void ForwardState::show(std::int32_t expert, const ExpertBytes& bytes) {
  const auto e = static_cast<std::size_t>(expert);
  for (std::size_t role = 0; role < bytes.size(); ++role) pointers[role][e] = bytes[role];
  shown[e] = expert;
}

}  // namespace moesaic::offload
