#include "forward/steps.hpp"

namespace moesaic {
namespace forward {
namespace {

/// Pads the buckets to blocks.
PhaseMaps align_blocks(const Call& call, const RoutingView& routing, RowSpace row_space) {
  const ScopedZone zone(call.context, Zone::Align);
  const Scratch& s = call.scratch;
  const std::int64_t pairs = call.sizes.num_pairs;
  const std::int32_t experts = call.stack().num_experts();
  const bool on_host = call.backend().device_type() == DeviceType::Cpu;
  const std::span<const std::int32_t> offsets(s.plan.expert_offsets,
                                              on_host ? static_cast<std::size_t>(experts) + 1 : 0);
  const std::int32_t block = pick_block_size(offsets, !on_host, pairs, call.context.tuning());
  // On a device only the capacity is known here; blocks behind the last one have expert -1.
  std::int64_t blocks = aligned_block_capacity(pairs, experts, block);
  call.backend().align(call.context, {.plan = s.plan,
                                      .num_pairs = pairs,
                                      .num_experts = experts,
                                      .block_size = block,
                                      .block_capacity = blocks,
                                      .row_space = row_space,
                                      .out = s.aligned});
  if (on_host) {
    blocks = *s.aligned.num_post_pad / block;
    if (Profiler* profiler = call.context.profiler(); profiler != nullptr) {
      profiler->add(Counter::PaddedRows, *s.aligned.num_post_pad - offsets.back());
    }
  }
  return aligned_maps(s.aligned, s.plan, routing, blocks, block, row_space);
}

/// `x` in packed order, dense.
InputRows gather_packed(const Call& call, const InputRows& x) {
  const ScopedZone zone(call.context, Zone::Gather);
  const Scratch& s = call.scratch;
  const bool on_host = call.backend().device_type() == DeviceType::Cpu;
  const std::int64_t rows =
      on_host ? s.plan.expert_offsets[call.stack().num_experts()] : call.sizes.num_pairs;
  call.backend().gather(call.context,
                        {.x = x, .index = s.plan.row_token, .rows = rows, .out = s.rows});
  return dense_rows(s.rows, DType::F32, rows, x.cols);
}

}  // namespace

PhaseMaps plan_buckets(const Call& call, const RoutingView& routing, const PathChoice& choice,
                       InputRows& in) {
  const Scratch& s = call.scratch;
  {
    const ScopedZone zone(call.context, Zone::Plan);
    call.backend().bucket_plan(
        call.context,
        {.routing = routing, .num_experts = call.stack().num_experts(), .out = s.plan});
  }
  const PhaseMaps maps =
      choice.path == Path::Aligned
          ? align_blocks(call, routing, choice.row_space)
          : bucket_maps(s.plan, call.sizes.num_pairs, call.stack().num_experts(), choice.row_space);
  if (choice.row_space == RowSpace::PackedRows) in = gather_packed(call, in);
  return maps;
}

}  // namespace forward

void moe_forward_bucketed(Context& context, const LayerRef& layer, const ForwardIo& io,
                          Workspace& workspace, GemmMode gemm, RowSpaceMode row_space) {
  Tuning tuning = context.tuning();
  tuning.gemm = gemm == GemmMode::Auto ? GemmMode::Bucketed : gemm;
  if (row_space != RowSpaceMode::Auto) tuning.row_space = row_space;
  forward::run("moe_forward_bucketed", context, layer, io, workspace, tuning);
}

}  // namespace moesaic
