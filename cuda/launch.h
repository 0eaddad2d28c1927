#pragma once

/// The launchers behind Table's operations; each is defined beside its kernels (route/, plan/,
/// ops/, gemm/), compiled by nvcc for the plug-in and as C++ for the emulator.

#include "plugin.h"

namespace moesaic::cuda {

int32_t launch_router_logits(const RouterLogitsArgs& args, Stream stream);
int32_t launch_route(const RouteArgs& args, Stream stream);
int32_t launch_look_up_experts(const LookUpArgs& args, Stream stream);
int32_t launch_shared_routing(const SharedRoutingArgs& args, Stream stream);
int32_t launch_bucket_plan(const BucketPlanArgs& args, Stream stream);
int32_t launch_align(const AlignArgs& args, Stream stream);
int32_t launch_gather(const GatherArgs& args, Stream stream);
int32_t launch_activate(const ActivateArgs& args, Stream stream);
int32_t launch_combine(const CombineArgs& args, Stream stream);
int32_t launch_rms_norm(const RmsNormArgs& args, Stream stream);
int32_t launch_add_identity(const IdentityArgs& args, Stream stream);
int32_t launch_zero_skipped(const ZeroSkippedArgs& args, Stream stream);
int32_t launch_fill(const FillArgs& args, Stream stream);
int32_t launch_gemm(const GemmArgs& args, Stream stream);
int32_t launch_gate_up(const GateUpArgs& args, Stream stream);
int32_t launch_down(const DownArgs& args, Stream stream);

/// Not in the table: a step of the products.
int32_t launch_tiles(const TilesArgs& args, Stream stream);

int64_t plan_scratch_bytes(int64_t num_pairs, int32_t num_experts);
int64_t gemm_scratch_bytes(const GemmScratchArgs& args);

const char* gemm_name(const WeightArgs& weight, int64_t rows);
const char* down_name(const WeightArgs& weight, int64_t num_pairs, bool sorted);
/// All kernels of gemm/, for Table::kernels.
const KernelRow* gemm_kernels(int32_t* count);

/// Version, sizes, operations and kernels (table.cu); the rest is the plug-in's or the emulator's.
void fill_operations(Table& table);

}  // namespace moesaic::cuda
