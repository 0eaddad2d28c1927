#include "cpu/cpu_backend.hpp"

#include <cstring>
#include <new>

#include "cpu/experts.hpp"
#include "cpu/isa.hpp"
#include "cpu/ops/activate.hpp"
#include "cpu/ops/add_identity.hpp"
#include "cpu/ops/combine.hpp"
#include "cpu/ops/gather.hpp"
#include "cpu/ops/rms_norm.hpp"
#include "cpu/ops/route.hpp"
#include "cpu/ops/router_logits.hpp"
#include "moesaic/context.hpp"
#include "moesaic/error.hpp"

namespace moesaic::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};

/// "avx512vnni", or what MOESAIC_CPU_ISA asks for.
std::string isa_detail() {
  const CpuIsa forced = Tuning::process().cpu_isa;
  if (forced == CpuIsa::Auto) return name_of(best_isa());
  return std::string(name_of(forced)) + (supported(forced) ? " (forced by MOESAIC_CPU_ISA)"
                                                           : " (MOESAIC_CPU_ISA, cannot run here)");
}

}  // namespace

BackendInfo CpuBackend::info() const {
  return {.name = "cpu",
          .available = true,
          .reason = "",
          .devices = {Device{DeviceType::Cpu, 0}},
          .detail = isa_detail()};
}

std::vector<KernelInfo> CpuBackend::kernels() const { return cpu::kernels(); }

std::string CpuBackend::kernel_name(const WeightRef& weight, const Tuning& tuning) const {
  return cpu::kernel_name(weight, tuning);
}

Support CpuBackend::supports(const WeightRef& weight) const { return cpu::supports(weight); }

void* CpuBackend::allocate(std::size_t bytes) const {
  void* const memory = ::operator new(bytes, kAlignment, std::nothrow);
  require<OutOfMemoryError>(memory != nullptr, [&] {
    return Problem{"cpu backend", "allocate", std::to_string(bytes) + " bytes", "no memory", ""};
  });
  return memory;
}

void CpuBackend::deallocate(void* memory, std::size_t) const noexcept {
  ::operator delete(memory, kAlignment);
}

void CpuBackend::copy(void* to, const void* from, std::size_t bytes) const {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

void CpuBackend::synchronize(Context&) const {}  // every operation is complete when it returns

void CpuBackend::prepare(ExpertStack::Parts& parts, const LoadOptions& options) const {
  cpu::prepare(parts, options);
}

std::size_t CpuBackend::scratch_bytes(const ScratchQuery& query) const {
  return cpu::scratch_bytes(query);
}

void CpuBackend::router_logits(Context& context, const InputRows& x, const float* weight,
                               std::int32_t num_experts, float* logits) const {
  cpu::router_logits(context.pool(), x, weight, num_experts, logits);
}

RouteStats CpuBackend::route(Context& context, const float* logits, std::int64_t row_stride,
                             const RouterConfig& config, RoutingView out, float* scratch) const {
  return cpu::route(context.pool(), logits, row_stride, config, out, scratch);
}

void CpuBackend::bucket_plan(Context&, const RoutingView& routing, std::int32_t num_experts,
                             BucketPlanView out) const {
  build_bucket_plan(routing.topk_ids, routing.num_pairs(), routing.top_k, num_experts, out);
}

void CpuBackend::align(Context&, const BucketPlanView& plan, std::int64_t num_pairs,
                       std::int32_t num_experts, std::int32_t block_size, RowSpace row_space,
                       AlignedRoutingView out) const {
  align_block_size(plan, num_pairs, num_experts, block_size, row_space, out);
}

void CpuBackend::gather(Context& context, const InputRows& x, const std::int32_t* index,
                        std::int64_t rows, float* out) const {
  cpu::gather(context.pool(), x, index, rows, out);
}

void CpuBackend::expert_gemm(Context& context, const GemmCall& call) const {
  cpu::expert_gemm(context, call);
}

void CpuBackend::activate(Context& context, const Activation& activation, const float* gate,
                          const float* up, std::int64_t row_stride, std::int64_t rows,
                          std::int64_t intermediate, float* hidden) const {
  cpu::activate(context.pool(), activation, gate, up, row_stride, rows, intermediate, hidden);
}

void CpuBackend::combine(Context& context, const CombineCall& call) const {
  cpu::combine(context.pool(), call);
}

void CpuBackend::rms_norm(Context& context, const InputRows& x, const float* weight, float eps,
                          float* out) const {
  cpu::rms_norm(context.pool(), x, weight, eps, out);
}

void CpuBackend::add_identity(Context& context, const IdentityCall& call) const {
  cpu::add_identity(context.pool(), call);
}

void CpuBackend::gate_up(Context& context, const GateUpCall& call) const {
  cpu::gate_up(context, call);
}

void CpuBackend::down(Context& context, const DownCall& call) const { cpu::down(context, call); }

}  // namespace moesaic::cpu
