#pragma once

/// The Metal backend. It only encodes: grids, threads and arguments come from dispatch_shape.hpp.
/// Operations are recorded and run when `submit` or `synchronize` says so; memory is unified, so
/// the host may read it after `synchronize`.

#include <memory>

#include "metal/host/encoding.hpp"
#include "moesaic/backend.hpp"

namespace moesaic::metal {

class MetalBackend final : public Backend {
 public:
  explicit MetalBackend(NS::SharedPtr<MTL::Device> device);
  ~MetalBackend() override;

  BackendInfo info() const override;
  DeviceType device_type() const override { return DeviceType::Metal; }
  std::vector<KernelInfo> kernels() const override;
  std::string kernel_name(const WeightRef& weight, const Tuning& tuning) const override;
  Support supports(const WeightRef& weight) const override;

  void* allocate(std::size_t bytes) const override;
  void deallocate(void* memory, std::size_t bytes) const noexcept override;
  void copy(void* to, const void* from, std::size_t bytes) const override;
  void copy_on_stream(Context& context, void* to, const void* from,
                      std::size_t bytes) const override;
  std::shared_ptr<const void> share(void* memory, std::size_t bytes) const override;
  SharedHandle share_handle(void* handle) const override;
  void fill(Context& context, const op::Fill& call) const override;
  void submit(Context& context) const override;
  void synchronize(Context& context) const override;
  std::shared_ptr<const void> pin(HostValues values) const override;
  void prepare(ExpertStack::Parts& parts, const LoadOptions& options) const override;
  std::size_t scratch_bytes(const ScratchQuery& query) const override;
  void before_launches(Context& context, const RouterConfig* router,
                       std::initializer_list<HostValues> values,
                       std::string_view operation) const override;
  std::int64_t route_scratch(const RouterRules& router, std::int64_t num_tokens,
                             int threads) const override;
  void check_ids(Context& context, const RoutingView& routing, std::int32_t num_experts,
                 std::string_view operation) const override;

  void router_logits(Context& context, const op::RouterLogits& call) const override;
  RouteStats route(Context& context, const op::Route& call) const override;
  void shared_routing(Context& context, const op::SharedRouting& call) const override;
  void bucket_plan(Context& context, const op::BucketPlan& call) const override;
  void align(Context& context, const op::Align& call) const override;
  void gather(Context& context, const op::Gather& call) const override;
  void expert_gemm(Context& context, const op::Gemm& call) const override;
  void activate(Context& context, const op::Activate& call) const override;
  void combine(Context& context, const op::Combine& call) const override;
  void zero_skipped(Context& context, const op::ZeroSkipped& call) const override;
  void gate_up(Context& context, const op::GateUp& call) const override;

 private:
  Encoding encode(Context& context, const char* operation) const {
    return Encoding(*recorder_, context, operation);
  }

  NS::SharedPtr<MTL::Device> device_;
  std::unique_ptr<Recorder> recorder_;
};

}  // namespace moesaic::metal
