#pragma once

/// The CPU backend. Each operation is defined in a file of its name: the products in cpu/, the
/// small steps around them in cpu/ops/.

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
  void fill(Context& context, const op::Fill& call) const override;
  void synchronize(Context&) const override {}  // operations are complete when they return
  /// Repacks each role into panels in huge pages (StackLayout::Auto), or leaves it as stored
  /// (File). Parallel over options.pool, reports progress.
  void prepare(ExpertStack::Parts& parts, const LoadOptions& options) const override;
  std::size_t scratch_bytes(const ScratchQuery& query) const override;

  /// Each product is summed in 8 lanes (column modulo 8), which are then added in a fixed tree.
  void router_logits(Context& context, const op::RouterLogits& call) const override;
  RouteStats route(Context& context, const op::Route& call) const override;
  void look_up_experts(Context& context, const op::LookUpExperts& call) const override;
  void shared_routing(Context& context, const op::SharedRouting& call) const override;
  void bucket_plan(Context& context, const op::BucketPlan& call) const override;
  void align(Context& context, const op::Align& call) const override;
  void gather(Context& context, const op::Gather& call) const override;
  void expert_gemm(Context& context, const op::Gemm& call) const override;
  /// Within a few ulp of moesaic::activate, and of its f64 value.
  void activate(Context& context, const op::Activate& call) const override;
  void combine(Context& context, const op::Combine& call) const override;
  void zero_skipped(Context& context, const op::ZeroSkipped& call) const override;
  void rms_norm(Context& context, const op::RmsNorm& call) const override;
  void add_identity(Context& context, const op::AddIdentity& call) const override;
  void linear(Context& context, const op::Linear& call) const override;
  void gate_up(Context& context, const op::GateUp& call) const override;
  void down(Context& context, const op::Down& call) const override;
};

}  // namespace moesaic::cpu
