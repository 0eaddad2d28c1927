#include <cstring>
#include <limits>

#include "cpu/cpu_backend.hpp"
#include "cpu/epilogue.hpp"
#include "cpu/isa.hpp"
#include "cpu/low_rank.hpp"
#include "cpu/product.hpp"
#include "moesaic/context.hpp"

namespace moesaic::cpu {
namespace {

/// What the passes over gate and up share.
struct GateUpPhase {
  Context& context;
  const op::GateUp& call;
  const IsaKernels& kernels;
  const Buckets& buckets;
  float* hidden;
  std::int64_t intermediate;
  LowRankPair low_rank;  ///< of gate and up

  /// The products of rows [row, row + rows) with the row of x whose hidden row `to` lies in.
  void finish(const Epilogue& epilogue, const LowRankRows& term, std::int32_t expert,
              std::int64_t row, int rows, float* values, const float* to) const {
    if (call.row_weight != nullptr) {
      const float factor = call.row_weight[(to - hidden) / intermediate];
      for (int i = 0; i < rows; ++i) values[i] *= factor;
    }
    epilogue.apply(row, rows, values);
    if (term) term.apply(expert, (to - hidden) / intermediate, row, rows, values);
  }
  float* hidden_row(const Job& job, int t) const {
    const std::int32_t entry = buckets.entries[job.bucket->first + job.first_token + t];
    return hidden + call.map.destination_of(entry) * intermediate;
  }
  void gate(const Activations& activations, const Job& job,
            const std::uint8_t* next_weights) const {
    const Epilogue epilogue(call.gate, job.bucket->expert);
    run_job(
        call.gate.ref, activations, call.map, buckets, job, next_weights,
        [&](int t) { return hidden_row(job, t); },
        [&](std::int64_t row, int rows, float* values, float* to) {
          finish(epilogue, low_rank.first, job.bucket->expert, row, rows, values, to);
          copy_products(to, values, rows);
        });
  }
  void up(const Activations& activations, const Job& job) const {
    const Epilogue epilogue(call.up, job.bucket->expert);
    const ActivateKernel activate = kernels.activate[static_cast<int>(call.activation.kind)];
    run_job(
        call.up.ref, activations, call.map, buckets, job, nullptr,
        [&](int t) { return hidden_row(job, t); },
        [&](std::int64_t row, int rows, float* values, float* to) {
          finish(epilogue, low_rank.second, job.bucket->expert, row, rows, values, to);
          activate(call.activation, to, values, rows);
        });
  }
};

double panel_ops(const WeightRef& weight) {
  return 2.0 * kPanel * static_cast<double>(weight.cols);
}
double panel_weight_bytes(const WeightRef& weight) {
  return static_cast<double>(weight.expert_bytes()) / static_cast<double>(panels_of(weight));
}

}  // namespace

void CpuBackend::gate_up(Context& context, const op::GateUp& call) const {
  const ScopedZone zone(context, Zone::GateUp);
  const WeightRef& gate = call.gate.ref;
  const WeightRef& up = call.up.ref;
  const bool gated = static_cast<bool>(gate);
  const IsaKernels& kernels = kernels_of(active_isa(context.tuning()));
  Carver carver(call.scratch, std::numeric_limits<std::size_t>::max());
  const Buckets buckets = make_buckets(call.map, up, carver);
  if (buckets.num == 0) return;

  const LowRankPair low_rank = low_rank_rows(context, call.gate, call.up, call.in, call.map,
                                             buckets, call.row_weight, carver);
  const GateUpPhase phase{context, call,    kernels, buckets, static_cast<float*>(call.hidden),
                          up.rows, low_rank};
  const PanelCut cut(up);
  const int threads = context.pool().threads();
  const int up_planes = planes_of(up.type, call.precision);
  const int gate_planes = gated ? planes_of(gate.type, call.precision) : up_planes;
  const bool both = gated && gate_planes == up_planes && same_columns(gate, up);
  if (gated && !both) {
    // Integer and f32 formats read different activations: one after the other.
    Carver first = carver;
    const Activations for_gate =
        prepare_activations(context, kernels, call.in, gate, call.map, buckets, gate_planes, first);
    const std::int64_t jobs =
        plan_jobs(buckets, cut, panel_weight_bytes(gate), panel_ops(gate), threads);
    run_jobs(context.pool(), cut, jobs, [&](std::int64_t i, int) {
      phase.gate(for_gate, find_job(buckets, cut, jobs, i), nullptr);
    });
  }
  const Activations activations =
      prepare_activations(context, kernels, call.in, up, call.map, buckets, up_planes, carver);
  const std::int64_t jobs =
      plan_jobs(buckets, cut, panel_weight_bytes(up) + (both ? panel_weight_bytes(gate) : 0.0),
                panel_ops(up) * (both ? 2.0 : 1.0), threads);
  // A job does all its gate panels, then all its up panels: one stream of weights at a time.
  run_jobs(context.pool(), cut, jobs, [&](std::int64_t i, int) {
    const Job job = find_job(buckets, cut, jobs, i);
    if (both) {
      phase.gate(activations, job, panel_bytes(up, job.bucket->expert, job.first_panel));
    }
    phase.up(activations, job);
  });
}

}  // namespace moesaic::cpu
