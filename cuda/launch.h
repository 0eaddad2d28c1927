#pragma once

/// The launchers behind Table's operations; each is defined beside its kernels (route/, plan/,
/// ops/, gemm/), compiled by nvcc for the plug-in and as C++ for the emulator.

#include "plugin.h"

namespace moesaic::cuda {

int32_t launch_router_logits(const op::RouterLogits& args, Stream stream);
int32_t launch_route(const op::Route& args, Stream stream);
int32_t launch_look_up_experts(const op::LookUpExperts& args, Stream stream);
int32_t launch_shared_routing(const op::SharedRouting& args, Stream stream);
int32_t launch_bucket_plan(const op::BucketPlan& args, Stream stream);
int32_t launch_align(const op::Align& args, Stream stream);
int32_t launch_gather(const op::Gather& args, Stream stream);
int32_t launch_activate(const op::Activate& args, Stream stream);
int32_t launch_combine(const op::Combine& args, Stream stream);
int32_t launch_rms_norm(const op::RmsNorm& args, Stream stream);
int32_t launch_add_identity(const op::AddIdentity& args, Stream stream);
int32_t launch_zero_skipped(const op::ZeroSkipped& args, Stream stream);
int32_t launch_fill(const op::Fill& args, Stream stream);
int32_t launch_gemm(const op::Gemm& args, Stream stream);
int32_t launch_gate_up(const op::GateUp& args, Stream stream);
int32_t launch_down(const op::Down& args, Stream stream);

// Each loads the kernels of its folder before their first launch; the last those of products.
int32_t load_route_kernels();
int32_t load_plan_kernels();
int32_t load_row_kernels();
int32_t load_stage_kernels();
int32_t load_product_kernels(const WeightRef& weight);

int64_t plan_scratch_bytes(int64_t num_pairs, int32_t num_experts);
int64_t gemm_scratch_bytes(const GemmSizes& args);

const char* gemm_name(const WeightRef& weight);
const char* down_name(const WeightRef& weight, int64_t num_pairs, bool sorted);
/// All kernels of gemm/, for Table::kernels.
const KernelRow* gemm_kernels(int32_t* count);

/// Version, sizes, operations and kernels (table.cu); the rest is the plug-in's or the emulator's.
void fill_operations(Table& table);

}  // namespace moesaic::cuda
