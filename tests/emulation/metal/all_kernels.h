// The kernel files in the order in which metal/embed.cmake pastes them.

#include "metal/kernels/expert_gate_up.metal"
#include "metal/kernels/expert_gemm.metal"
#include "metal/kernels/expert_gemv.metal"
#include "metal/kernels/plan.metal"
#include "metal/kernels/route.metal"
#include "metal/kernels/router_logits.metal"
#include "metal/kernels/rows.metal"
