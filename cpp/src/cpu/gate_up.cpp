#include <cstring>
#include <limits>

#include "cpu/epilogue.hpp"
#include "cpu/experts.hpp"
#include "cpu/isa.hpp"
#include "cpu/product.hpp"

namespace moesaic::cpu {
namespace {

/// What the passes over gate and up share.
struct Phase {
  Context& context;
  const GateUpCall& call;
  const IsaKernels& kernels;
  const Buckets& buckets;
  std::int64_t intermediate;

  /// The products of rows [row, row + rows) with the row of x whose hidden row `to` lies in.
  void finish(const Epilogue& epilogue, std::int64_t row, int rows, float* values,
              const float* to) const {
    if (call.row_weight != nullptr) {
      const float factor = call.row_weight[(to - call.hidden) / intermediate];
      for (int i = 0; i < rows; ++i) values[i] *= factor;
    }
    epilogue.apply(row, rows, values);
  }
  float* hidden_row(const Unit& unit, int t) const {
    const std::int32_t entry = buckets.entries[unit.bucket->first + unit.first_token + t];
    return call.hidden + call.rows.destination_of(entry) * intermediate;
  }
  void gate(const Activations& activations, const Unit& unit, const std::uint8_t* then) const {
    const Epilogue epilogue(call.stack->gate(), unit.bucket->expert);
    run_unit(
        kernels, call.stack->gate().ref, activations, call.rows, buckets, unit, then,
        [&](int t) { return hidden_row(unit, t); },
        [&](std::int64_t row, int rows, float* values, float* to) {
          finish(epilogue, row, rows, values, to);
          copy_products(to, values, rows);
        });
  }
  void up(const Activations& activations, const Unit& unit) const {
    const Epilogue epilogue(call.stack->up(), unit.bucket->expert);
    const ActivateKernel activate = kernels.activate[static_cast<int>(call.activation.kind)];
    run_unit(
        kernels, call.stack->up().ref, activations, call.rows, buckets, unit, nullptr,
        [&](int t) { return hidden_row(unit, t); },
        [&](std::int64_t row, int rows, float* values, float* to) {
          finish(epilogue, row, rows, values, to);
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

void gate_up(Context& context, const GateUpCall& call) {
  const ScopedZone zone(context, Zone::GateUp);
  const ExpertStack& stack = *call.stack;
  const bool gated = stack.gated();
  const WeightRef& gate = stack.gate().ref;
  const WeightRef& up = stack.up().ref;
  const IsaKernels& kernels = kernels_of(active_isa(context.tuning()));
  Carver carver(call.scratch, std::numeric_limits<std::size_t>::max());
  const Buckets buckets = group_by_expert(call.rows, up, carver);
  if (buckets.num == 0) return;

  const Phase phase{context, call, kernels, buckets, up.rows};
  const std::int64_t panels = panels_of(up);
  const int threads = context.pool().threads();
  const int up_planes = planes_of(up.type, call.precision);
  const int gate_planes = gated ? planes_of(gate.type, call.precision) : up_planes;
  const bool both = gated && gate_planes == up_planes && same_columns(gate, up);
  if (gated && !both) {
    // Integer and f32 formats read different activations: one after the other.
    Carver first = carver;
    const Activations for_gate =
        prepare_activations(context, kernels, call.x, gate, call.rows, buckets, gate_planes, first);
    const std::int64_t units =
        plan_units(buckets, panels, panel_weight_bytes(gate), panel_ops(gate), threads);
    context.pool().parallel_for(units, [&](std::int64_t i, int) {
      phase.gate(for_gate, find_unit(buckets, panels, i), nullptr);
    });
  }
  const Activations activations =
      prepare_activations(context, kernels, call.x, up, call.rows, buckets, up_planes, carver);
  const std::int64_t units =
      plan_units(buckets, panels, panel_weight_bytes(up) + (both ? panel_weight_bytes(gate) : 0.0),
                 panel_ops(up) * (both ? 2.0 : 1.0), threads);
  // A unit does all its gate panels, then all its up panels: one stream of weights at a time.
  context.pool().parallel_for(units, [&](std::int64_t i, int) {
    const Unit unit = find_unit(buckets, panels, i);
    if (both) {
      phase.gate(activations, unit, panel_bytes(up, unit.bucket->expert, unit.first_panel));
    }
    phase.up(activations, unit);
  });
}

}  // namespace moesaic::cpu
