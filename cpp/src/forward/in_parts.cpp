/// A forward in three calls, made of the steps of the whole one.

#include <string>

#include "forward/parts.hpp"
#include "forward/steps.hpp"
#include "ops/check_tensor.hpp"

namespace moesaic {
namespace forward {
namespace {

/// A call that has its routing, in memory that the host reads: rows of pairs are counted and gathered by
/// ids.
void check_rows_call(const char* operation, const Context& context, const CallSizes& sizes) {
  require<ConfigError>(sizes.ready_routing || sizes.num_tokens == 0, [&] {
    return Problem{.operation = operation,
                   .what = "routing",
                   .expected = "a ready one",
                   .got = "none, or ids without weights",
                   .hint = "route() makes it"};
  });
  const Backend& backend = context.backend();
  const DeviceType type = backend.device_type();
  require<UnsupportedError>(type == DeviceType::Cpu || type == DeviceType::Metal, [&] {
    return Problem{.operation = operation,
                   .what = "rows of pairs",
                   .expected = "a layer on cpu or metal, whose memory the host reads",
                   .got = "one on " + to_string(backend.device()),
                   .hint = {}};
  });
}

/// Before the host reads what the device wrote of this call, or writes what calls before it may still
/// read there.
void wait_for_device(Context& context) {
  if (context.backend().device_type() != DeviceType::Cpu) context.backend().synchronize(context);
}

bool has_row(const ExpertStack& stack, std::int32_t id) {
  return id >= 0 && id < stack.num_experts();
}

void check_rows(const char* operation, const Context& context, const LayerRef& layer,
                const ForwardIo& io, const ConstTensorView& rows) {
  ops::check_dense(operation, "rows", context.backend().device(), rows, DType::F32,
                   {count_expert_rows(layer, io.routing), layer.stack->shape().hidden_size});
}

/// Makes every computed pair a token of its own with weight 1: their sum in `rows` is then the row
/// of each pair, in order, wherever the product wrote it.
op::Combine rows_alone(const Call& call, const RoutingView& pairs, const ExpertPhases& phases,
                       const TensorView& rows) {
  const Scratch& s = call.scratch;
  RoutingView each{s.routing.topk_ids, nullptr, 0, 1};
  for (std::int64_t pair = 0; pair < pairs.num_pairs(); ++pair) {
    if (!has_row(call.stack(), pairs.topk_ids[pair])) continue;
    each.topk_ids[each.num_tokens] = pairs.topk_ids[pair];
    s.row_pairs[each.num_tokens] =
        phases.pair_row != nullptr ? phases.pair_row[pair] : static_cast<std::int32_t>(pair);
    ++each.num_tokens;
  }
  return {.rows = s.rows,
          .rows_dtype = phases.gate_up.hidden_dtype,
          .pair_row = s.row_pairs,
          .routing = each,
          .out = output_rows(rows)};
}

}  // namespace
}  // namespace forward

void moe_route(Context& context, const LayerRef& layer, const ForwardIo& io, Workspace& workspace) {
  using namespace forward;
  constexpr const char* kName = "moe_route";
  const CallSizes sizes = check_inputs(kName, context.backend().device(), layer, io);
  const bool to_fill = sizes.num_tokens == 0 || io.routing_out.topk_ids != nullptr;
  require<ConfigError>(!sizes.ready_routing && to_fill, [&] {
    return Problem{.operation = kName,
                   .what = "routing",
                   .expected = "one to fill",
                   .got = sizes.ready_routing ? "a ready one" : "none",
                   .hint = {}};
  });
  make_ready(kName, context, layer, io, sizes);
  if (sizes.num_tokens == 0) return;
  const Workspace::Use use(workspace);
  const Scratch s =
      carve_workspace(kName, context, layer, sizes.top_k, sizes.num_tokens, workspace);
  const Call call{kName, context, layer, io, sizes, expert_input(context, layer, io, s), s};
  route_tokens(call);
  context.backend().submit(context);
  context.throw_kept_error();
}

std::int64_t count_expert_rows(const LayerRef& layer, const RoutingView& routing) {
  std::int64_t rows = 0;
  for (std::int64_t pair = 0; pair < routing.num_pairs(); ++pair) {
    if (forward::has_row(*layer.stack, routing.topk_ids[pair])) ++rows;
  }
  return rows;
}

void moe_expert_rows(Context& context, const LayerRef& layer, const ForwardIo& io, TensorView rows,
                     Workspace& workspace) {
  using namespace forward;
  constexpr const char* kName = "moe_expert_rows";
  const CallSizes sizes = check_inputs(kName, context.backend().device(), layer, io);
  check_rows_call(kName, context, sizes);
  check_rows(kName, context, layer, io, rows);
  ops::check_apart(kName, "x", io.x, rows);
  make_ready(kName, context, layer, io, sizes);
  if (rows.empty()) return;
  const Workspace::Use use(workspace);
  const Scratch s =
      carve_workspace(kName, context, layer, sizes.top_k, sizes.num_tokens, workspace);
  const Call call{kName, context, layer, io, sizes, expert_input(context, layer, io, s), s};
  const RoutingView pairs = expert_pairs(call, io.routing);
  check_kept(kName, layer, pairs);
  count_call(call, pairs);
  ExpertPhases phases =
      expert_phases(call, io.routing, pairs, choose(call, pairs, context.tuning()));
  wait_for_device(context);
  phases.down.combine = rows_alone(call, pairs, phases, rows);
  run_experts(call, phases);
  context.backend().submit(context);
  context.throw_kept_error();
}

void moe_finish(Context& context, const LayerRef& layer, const ForwardIo& io,
                const ConstTensorView& rows, Workspace& workspace) {
  using namespace forward;
  constexpr const char* kName = "moe_finish";
  const CallSizes sizes = check_forward(kName, context.backend().device(), layer, io);
  check_rows_call(kName, context, sizes);
  check_rows(kName, context, layer, io, rows);
  ops::check_apart(kName, "rows", rows, io.out);
  make_ready(kName, context, layer, io, sizes);
  if (sizes.num_tokens == 0) return;
  const Workspace::Use use(workspace);
  const Scratch s =
      carve_workspace(kName, context, layer, sizes.top_k, sizes.num_tokens, workspace);
  const Call call{kName, context, layer, io, sizes, expert_input(context, layer, io, s), s};
  const RoutingView pairs = expert_pairs(call, io.routing);
  wait_for_device(context);
  std::int32_t next = 0;
  for (std::int64_t pair = 0; pair < pairs.num_pairs(); ++pair) {
    s.row_pairs[pair] = has_row(call.stack(), pairs.topk_ids[pair]) ? next++ : -1;
  }
  const Sums sums = sums_of(call);
  {
    const ScopedZone zone(context, Zone::Combine);
    context.backend().combine(context,
                              sum_of_rows(call, pairs, sums, rows.data, DType::F32, s.row_pairs));
  }
  add_rest(call, io.routing, sums, context.tuning());
}

}  // namespace moesaic
