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
  void fill(const Context& context, void* memory, std::uint8_t value,
            std::size_t bytes) const override;
  void submit(Context& context) const override;
  void synchronize(Context& context) const override;
  std::shared_ptr<const void> pin(HostValues values) const override;
  void prepare(ExpertStack::Parts& parts, const LoadOptions& options) const override;
  std::size_t scratch_bytes(const ScratchQuery& query) const override;
  std::int64_t route_scratch(const RouterConfig& config, std::int64_t num_tokens,
                             int threads) const override;

  void router_logits(Context& context, const InputRows& x, const float* weight,
                     std::int32_t num_experts, float* logits) const override;
  RouteStats route(Context& context, const float* logits, std::int64_t row_stride,
                   const RouterConfig& config, RoutingView out, float* scratch) const override;
  void check_ids(Context& context, const RoutingView& routing, std::int32_t num_experts,
                 std::string_view operation) const override;
  void shared_routing(Context& context, const float* logits, RoutingView out) const override;
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
  void zero_skipped(Context& context, const std::int32_t* ids, std::int32_t num_experts,
                    std::int64_t rows, std::int64_t cols, float* out) const override;
  void gate_up(Context& context, const GateUpCall& call) const override;

 private:
  Encoding encode(const char* operation) const { return Encoding(*recorder_, operation); }

  NS::SharedPtr<MTL::Device> device_;
  std::unique_ptr<Recorder> recorder_;
};

}  // namespace moesaic::metal
