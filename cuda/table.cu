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
  table.load_operations = [] {
    int32_t error = load_route_kernels();
    if (error == kOk) error = load_plan_kernels();
    if (error == kOk) error = load_row_kernels();
    return error == kOk ? load_stage_kernels() : error;
  };
  table.load_products = [](const WeightRef* weight) { return load_product_kernels(*weight); };
  table.plan_scratch_bytes = plan_scratch_bytes;
  table.gemm_scratch_bytes = [](const GemmSizes* args) { return gemm_scratch_bytes(*args); };
  table.router_logits = call<launch_router_logits, op::RouterLogits>;
  table.route = call<launch_route, op::Route>;
  table.look_up_experts = call<launch_look_up_experts, op::LookUpExperts>;
  table.shared_routing = call<launch_shared_routing, op::SharedRouting>;
  table.bucket_plan = call<launch_bucket_plan, op::BucketPlan>;
  table.align = call<launch_align, op::Align>;
  table.gather = call<launch_gather, op::Gather>;
  table.activate = call<launch_activate, op::Activate>;
  table.combine = call<launch_combine, op::Combine>;
  table.rms_norm = call<launch_rms_norm, op::RmsNorm>;
  table.add_identity = call<launch_add_identity, op::AddIdentity>;
  table.zero_skipped = call<launch_zero_skipped, op::ZeroSkipped>;
  table.fill = call<launch_fill, op::Fill>;
  table.gemm = call<launch_gemm, op::Gemm>;
  table.gate_up = call<launch_gate_up, op::GateUp>;
  table.down = call<launch_down, op::Down>;
  table.kernels = gemm_kernels(&table.num_kernels);
  table.gemm_name = [](const WeightRef* weight) { return gemm_name(*weight); };
  table.down_name = [](const WeightRef* weight, int64_t num_pairs, bool sorted) {
    return down_name(*weight, num_pairs, sorted);
  };
}

}  // namespace moesaic::cuda
