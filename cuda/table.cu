/// The launchers behind the table's functions; the same for the plug-in and the emulator.

#include "launch.h"

namespace moesaic::cuda {
namespace {

template <auto Launch, class Args>
int32_t call(const Args* args, Stream stream) {
  return Launch(*args, stream);
}

}  // namespace

void fill_operations(Table& table) {
  table.version = kPluginVersion;
  table.table_bytes = sizeof(Table);
  table.plan_scratch_bytes = plan_scratch_bytes;
  table.gemm_scratch_bytes = [](const GemmScratchArgs* args) { return gemm_scratch_bytes(*args); };
  table.router_logits = call<launch_router_logits, RouterLogitsArgs>;
  table.route = call<launch_route, RouteArgs>;
  table.look_up_experts = call<launch_look_up_experts, LookUpArgs>;
  table.shared_routing = call<launch_shared_routing, SharedRoutingArgs>;
  table.bucket_plan = call<launch_bucket_plan, BucketPlanArgs>;
  table.align = call<launch_align, AlignArgs>;
  table.gather = call<launch_gather, GatherArgs>;
  table.activate = call<launch_activate, ActivateArgs>;
  table.combine = call<launch_combine, CombineArgs>;
  table.rms_norm = call<launch_rms_norm, RmsNormArgs>;
  table.add_identity = call<launch_add_identity, IdentityArgs>;
  table.zero_skipped = call<launch_zero_skipped, ZeroSkippedArgs>;
  table.fill = call<launch_fill, FillArgs>;
  table.gemm = call<launch_gemm, GemmArgs>;
  table.gate_up = call<launch_gate_up, GateUpArgs>;
  table.down = call<launch_down, DownArgs>;
  table.kernels = gemm_kernels(&table.num_kernels);
  table.gemm_name = [](const WeightArgs* weight, int64_t rows) { return gemm_name(*weight, rows); };
  table.down_name = [](const WeightArgs* weight, int64_t num_pairs, int32_t sorted) {
    return down_name(*weight, num_pairs, sorted != 0);
  };
}

}  // namespace moesaic::cuda
