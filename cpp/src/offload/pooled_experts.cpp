#include "offload/pooled_experts.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "moesaic/error.hpp"
#include "offload/forward_state.hpp"

namespace moesaic::offload {

void MissHistory::add(std::span<const std::int32_t> missed, std::span<const SlotLoad> placed) {
  const std::lock_guard lock(mutex_);
  for (float& heat : heat_) heat *= kKeep;
  for (const std::int32_t e : missed) heat_[static_cast<std::size_t>(e)] += 1.0F;
  for (const SlotLoad& load : placed) heat_[static_cast<std::size_t>(load.expert)] = 0.0F;
}

std::vector<std::int32_t> MissHistory::likely(std::int32_t count) const {
  const std::lock_guard lock(mutex_);
  std::vector<std::int32_t> experts;
  for (std::size_t e = 0; e < heat_.size(); ++e) {
    if (heat_[e] > 0.1F) experts.push_back(static_cast<std::int32_t>(e));
  }
  std::ranges::stable_sort(experts, [&](std::int32_t a, std::int32_t b) {
    return heat_[static_cast<std::size_t>(a)] > heat_[static_cast<std::size_t>(b)];
  });
  if (experts.size() > static_cast<std::size_t>(count)) {
    experts.resize(static_cast<std::size_t>(count));
  }
  return experts;
}

PooledExperts::PooledExperts(std::shared_ptr<MoeExpertStore> store, StoreParts& parts,
                             std::shared_ptr<SlotTable> table, OnMiss on_miss)
    : store_(std::move(store)), parts_(parts), table_(std::move(table)), on_miss_(on_miss) {
  give_state(take_state());  // makes one now, so that the first forward need not
}

PooledExperts::~PooledExperts() = default;

std::unique_ptr<ForwardState> PooledExperts::take_state() {
  {
    const std::lock_guard lock(states_mutex_);
    if (states_ != nullptr) {
      std::unique_ptr<ForwardState> state = std::move(states_);
      states_ = std::move(state->next);
      return state;
    }
  }
  const LayerMoeWeights& weights = parts_.layers[static_cast<std::size_t>(table_->layer())];
  return std::make_unique<ForwardState>(*weights.stack, *table_);
}

void PooledExperts::give_state(std::unique_ptr<ForwardState> state) noexcept {
  const std::lock_guard lock(states_mutex_);
  state->next = std::move(states_);
  states_ = std::move(state);
}

/// Asks the source for the experts that the next layer usually misses: it runs after this one.
void PooledExperts::read_ahead() {
  if (parts_.read_ahead == 0) return;
  const std::size_t next = static_cast<std::size_t>(table_->layer() + 1) % parts_.layers.size();
  parts_.source->expect(static_cast<std::int32_t>(next),
                        parts_.misses[next]->likely(parts_.read_ahead), Expect::Guessed);
}

void PooledExperts::run(Context& context, const op::GateUp& gate_up, const op::Down& down) {
  const RoutingView& routing = down.combine.routing;
  const std::span<const std::int32_t> ids(routing.topk_ids,
                                          static_cast<std::size_t>(routing.num_pairs()));
  struct StateGuard {
    PooledExperts& owner;
    std::unique_ptr<ForwardState> state;
    ~StateGuard() { owner.give_state(std::move(state)); }
  } guard{*this, take_state()};
  ForwardState& state = *guard.state;
  state.collect(routing);

  ExpertPool& pool = table_->pool();
  const ExpertPool::Pins pins(pool, state.needed);
  auto held = table_->hold();
  state.count_hits(*table_);
  state.find_cold(*table_);
  require<DeviceError>(state.cold.empty() || on_miss_ != OnMiss::Error, [&] {
    return Problem{.operation = "moe_forward",
                   .what = "expert " + std::to_string(state.cold.front()),
                   .expected = "a resident expert (on_miss=\"error\")",
                   .got = std::to_string(state.cold.size()) + " experts without a slot",
                   .hint = "refresh the pool and apply it, or choose compute or stage"};
  });
  if (on_miss_ == OnMiss::Stage) pool.stage(ids);
  if (!state.cold.empty()) {
    run_mixed(state, std::move(held), context, gate_up, down);
    return;
  }
  pool.count_forward(ids, routing.top_k, state.stats);
  if (parts_.read_ahead > 0) parts_.misses[static_cast<std::size_t>(table_->layer())]->add({}, {});
  read_ahead();
  if (state.needed.empty()) {  // every pair is skipped, so only the sum remains to be written
    context.backend().combine(context, down.combine);
    return;
  }
  const ExpertStack& residents = *table_->residents();
  op::GateUp up_call = gate_up;
  op::Down down_call = down;
  up_call.gate = residents.gate().view();
  up_call.up = residents.up().view();
  down_call.weight = residents.down().view();
  context.backend().gate_up(context, up_call);
  context.backend().down(context, down_call);
}

}  // namespace moesaic::offload
