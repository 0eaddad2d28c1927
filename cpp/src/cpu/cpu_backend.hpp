#pragma once

/// The CPU backend: experts.hpp for the products, ops/ for the small steps around them.

#include "moesaic/backend.hpp"

namespace moesaic::cpu {

class CpuBackend final : public Backend {
 public:
  BackendInfo info() const override;
  std::vector<KernelInfo> kernels() const override;
  std::string kernel_name(const WeightRef& weight, const Tuning& tuning) const override;
  Support supports(const WeightRef& weight) const override;
  Support supports_part(LayerPart) const override { return {}; }
  bool fuses_activation() const override { return true; }

  void* allocate(std::size_t bytes) const override;
  void deallocate(void* memory, std::size_t bytes) const noexcept override;
  void copy(void* to, const void* from, std::size_t bytes) const override;
  void synchronize(Context& context) const override;
  void prepare(ExpertStack::Parts& parts, const LoadOptions& options) const override;
  std::size_t scratch_bytes(const ScratchQuery& query) const override;

  void router_logits(Context& context, const InputRows& x, const float* weight,
                     std::int32_t num_experts, float* logits) const override;
  RouteStats route(Context& context, const float* logits, std::int64_t row_stride,
                   const RouterConfig& config, RoutingView out, float* scratch) const override;
  void bucket_plan(Context& context, const RoutingView& routing, std::int32_t num_experts,
                   BucketPlanView out) const override;
  void align(Context& context, const BucketPlanView& plan, std::int64_t num_pairs,
             std::int32_t num_experts, std::int32_t block_size, RowSpace row_space,
             AlignedRoutingView out) const override;
  void gather(Context& context, const InputRows& x, const std::int32_t* index, std::int64_t rows,
              float* out) const override;
  void expert_gemm(Context& context, const GemmCall& call) const override;
  void activate(Context& context, const Activation& activation, const float* gate, const float* up,
                std::int64_t row_stride, std::int64_t rows, std::int64_t intermediate,
                float* hidden) const override;
  void combine(Context& context, const CombineCall& call) const override;
  void rms_norm(Context& context, const InputRows& x, const float* weight, float eps,
                float* out) const override;
  void add_identity(Context& context, const IdentityCall& call) const override;
  void gate_up(Context& context, const GateUpCall& call) const override;
  void down(Context& context, const DownCall& call) const override;
};

}  // namespace moesaic::cpu
