// A forward some of whose experts are cold. Residents and cold experts run one after the other,
// each pass writing the rows of its own experts; the weighted sum over all rows comes last, in the
// order that it always has, so that the result does not depend on who was resident.

#include <algorithm>

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

void PooledExperts::run_mixed(ForwardState& state, Context& context, const op::GateUp& gate_up,
                              const op::Down& down) {
  const bool stage = on_miss_ == OnMiss::Stage;
  ExpertSource& source = *parts_.source;
  std::unique_lock<std::mutex> passage_lock(table_->passage_mutex(), std::defer_lock);
  if (stage) passage_lock.lock();
  const auto most = static_cast<std::size_t>(
      std::max(1, stage ? std::min(table_->passage_slots(), source.batch_limit())
                        : source.batch_limit() / 2));

  const auto run_wave = [&](std::span<const std::int32_t> wave, std::span<const std::int32_t> next,
                            unsigned phases) {
    const std::unique_ptr<ExpertBatch> batch = source.open(table_->layer(), wave);
    if (next.empty()) {
      read_ahead();
    } else {
      source.expect(table_->layer(), next);
    }
    state.bring(wave, *batch, stage ? &table_->passage() : nullptr, context);
    run_pass(context, stage ? *state.passage : state.slow, phases, gate_up, down);
    state.clear(wave);
  };

  // When the rows of x were gathered into the memory that down will write, no pass may run down
  // before every pass has run gate and up.
  const bool shared_rows = gate_up.in.data == down.rows;
  for (const unsigned phases : {shared_rows ? kGateUp : kBoth, kDown}) {
    if (table_->residents() != nullptr && state.cold.size() < state.needed.size()) {
      run_pass(context, *table_->residents(), phases, gate_up, down);
    }
    std::span<const std::int32_t> left(state.cold);
    while (!left.empty()) {
      const std::span<const std::int32_t> wave = left.first(std::min(most, left.size()));
      left = left.subspan(wave.size());
      run_wave(wave, left.first(std::min(most, left.size())), phases);
      if (stage && (phases & kDown) != 0) {
        table_->pool().count_bytes(static_cast<std::int64_t>(wave.size()) * table_->expert_bytes());
      }
    }
    if (!shared_rows) break;
  }
  const ScopedZone zone(context, Zone::Combine);
  context.backend().combine(context, down.combine);
}

}  // namespace moesaic::offload
