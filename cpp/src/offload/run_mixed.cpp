// A forward some of whose experts are cold. Residents and cold experts run one after the other,
// each pass writing the rows of its own experts; the weighted sum over all rows comes last, in the
// order that it always has, so that the result does not depend on who was resident.
//
// Cold experts are computed where they lie, in the mapped file or in the buffers into which they were
// read, or in their slots where the pool gave them some; each while later ones still arrive:
//
//   disk   | read a | read b | read c |
//   CPU    | residents | a: rows | b: slot, rows | c: rows | sum

#include <algorithm>
#include <optional>
#include <utility>

#include "offload/forward_state.hpp"
#include "offload/pooled_experts.hpp"

namespace moesaic::offload {
namespace {

enum Phase : unsigned { kGateUp = 1, kDown = 2, kBoth = kGateUp | kDown };

/// Runs one pass over the experts that `stack` maps to memory; the others are skipped.
void run_pass(Context& context, const ExpertStack& stack, unsigned phases,
              const op::GateUp& gate_up, const op::Down& down) {
  const Backend& backend = context.backend();
  if ((phases & kGateUp) != 0) {
    op::GateUp call = gate_up;
    call.gate = stack.gate().view();
    call.up = stack.up().view();
    backend.gate_up(context, call);
  }
  if ((phases & kDown) != 0) {
    const ScopedZone zone(context, Zone::Down);
    backend.expert_gemm(context, {.weight = stack.down().view(),
                                  .map = down.map,
                                  .in = down.in,
                                  .out = down.rows,
                                  .precision = down.precision,
                                  .scratch = down.scratch});
  }
}

}  // namespace

struct PooledExperts::Mixed {
  ForwardState& state;
  Context& context;
  const op::GateUp& gate_up;
  const op::Down& down;
  std::optional<SlotTable::Loading>& loading;

  void run_pass(const ExpertStack& stack, unsigned phases) const {
    offload::run_pass(context, stack, phases, gate_up, down);
  }
  /// Runs those experts of a batch that are there, from `first` on and at least that one; returns the
  /// next one.
  std::size_t run_ready(std::span<const std::int32_t> wave, ExpertBatch& batch, std::size_t first,
                        unsigned phases) const {
    std::size_t end = first;
    std::size_t in_slots = 0;
    {
      const ScopedZone zone(context, Zone::Upload);
      do {
        const ExpertBytes bytes = batch.wait(end);
        const std::int32_t slot = loading ? loading->load(context, wave[end], bytes) : -1;
        if (slot < 0) {
          state.show(wave[end], bytes);
        } else {
          state.show(wave[end], slot);
          ++in_slots;
        }
        ++end;
      } while (end < wave.size() && batch.ready(end));
    }
    if (in_slots < end - first) run_pass(state.slow, phases);
    if (in_slots > 0) run_pass(*state.fresh, phases);
    for (std::size_t i = first; i < end; ++i) state.hide(wave[i]);
    return end;
  }
};

/// All cold experts, in waves of as many as half of the buffers hold.
void PooledExperts::run_cold(Mixed& call, unsigned phases) {
  ExpertSource& source = *parts_.source;
  const auto most = static_cast<std::size_t>(std::max(1, source.batch_limit() / 2));
  std::span<const std::int32_t> left(call.state.cold);
  while (!left.empty()) {
    const std::span<const std::int32_t> wave = left.first(std::min(most, left.size()));
    left = left.subspan(wave.size());
    const std::unique_ptr<ExpertBatch> batch = source.open(table_->layer(), wave);
    if (left.empty()) {
      read_ahead();
    } else {
      source.expect(table_->layer(), left.first(std::min(most, left.size())), Expect::Needed);
    }
    for (std::size_t next = 0; next < wave.size();) {
      next = call.run_ready(wave, *batch, next, phases);
    }
  }
}

void PooledExperts::run_mixed(ForwardState& state, std::shared_lock<std::shared_mutex> held,
                              Context& context, const op::GateUp& gate_up, const op::Down& down) {
  const RoutingView& routing = down.combine.routing;
  // The disk works while residents are computed.
  parts_.source->expect(table_->layer(), state.cold, Expect::Needed);
  std::optional<SlotTable::Loading> loading;
  std::span<const SlotLoad> placed;
  if (on_miss_ == OnMiss::Stage) {
    held.unlock();
    loading.emplace(*table_, state.cold);
    held = table_->hold();
    state.find_cold(*table_);  // another forward may have brought some meanwhile
    placed = loading->loads();
    state.stats.staged = static_cast<std::int64_t>(placed.size());
    state.stats.streamed = static_cast<std::int64_t>(state.cold.size() - placed.size());
  }
  table_->pool().count_forward({routing.topk_ids, static_cast<std::size_t>(routing.num_pairs())},
                               routing.top_k, state.stats);
  if (parts_.read_ahead > 0) {
    parts_.misses[static_cast<std::size_t>(table_->layer())]->add(state.cold, placed);
  }

  Mixed call{state, context, gate_up, down, loading};
  // When the rows of x were gathered into the memory that down will write, no pass may run down
  // before every pass has run gate and up.
  const bool shared_rows = gate_up.in.data == down.rows;
  for (const unsigned phases : {shared_rows ? kGateUp : kBoth, kDown}) {
    if (table_->residents() != nullptr && state.cold.size() < state.needed.size()) {
      call.run_pass(*table_->residents(), phases);
    }
    run_cold(call, phases);
    if (!shared_rows) break;
  }
  held.unlock();
  if (loading) {
    loading->publish();
    table_->pool().count_bytes(static_cast<std::int64_t>(state.cold.size()) *
                               table_->expert_bytes());
  }
  const ScopedZone zone(context, Zone::Combine);
  context.backend().combine(context, down.combine);
}

}  // namespace moesaic::offload
