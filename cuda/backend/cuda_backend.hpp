#pragma once

/// Backend over a table of launchers: the plug-in's, or the emulator's.

#include <memory>
#include <string>
#include <vector>

#include "cuda/backend/constants.hpp"
#include "cuda/backend/device.hpp"
#include "moesaic/backend.hpp"

namespace moesaic::cuda {

class CudaBackend final : public Backend {
 public:
  /// `table` must outlive it. Errors: DeviceError.
  CudaBackend(const Table& table, int index);

  BackendInfo info() const override;
  DeviceType device_type() const override { return DeviceType::Cuda; }
  Device device() const override { return gpu_->device(); }
  std::vector<KernelInfo> kernels() const override;
  std::string kernel_name(const WeightRef& weight, const Tuning& tuning) const override;
  std::string down_name(const WeightRef& weight, const Tuning& tuning, std::int64_t num_pairs,
                        bool sorted) const override;
  Support supports(const WeightRef& weight) const override;
  Support supports_part(LayerPart) const override { return {}; }
  bool fuses_activation() const override { return true; }
  DType working_dtype(DType x) const override { return x; }

  void* allocate(std::size_t bytes) const override;
  void deallocate(void* memory, std::size_t bytes) const noexcept override;
  void copy(void* to, const void* from, std::size_t bytes) const override;
  void copy_on_stream(Context& context, void* to, const void* from,
                      std::size_t bytes) const override;
  void fill(const Context& context, void* memory, std::uint8_t value,
            std::size_t bytes) const override;
  void synchronize(Context& context) const override;
  bool capturing(const Context& context) const override;
  std::shared_ptr<const void> pin(HostValues values) const override;
  void prepare(ExpertStack::Parts& parts, const LoadOptions& options) const override;
  std::size_t scratch_bytes(const ScratchQuery& query) const override;
  std::int64_t route_scratch(const RouterConfig& config, std::int64_t num_tokens,
                             int threads) const override;

  void before_launches(Context& context, const RouterConfig* router,
                       std::initializer_list<HostValues> values,
                       std::string_view operation) const override;
  void router_logits(Context& context, const InputRows& x, const float* weight,
                     std::int32_t num_experts, float* logits) const override;
  RouteStats route(Context& context, const float* logits, std::int64_t row_stride,
                   const RouterConfig& config, RoutingView out, float* scratch) const override;
  void check_ids(Context& context, const RoutingView& routing, std::int32_t num_experts,
                 std::string_view operation) const override;
  void look_up_experts(Context& context, std::span<const std::int32_t> table,
                       const std::int32_t* token_ids, RoutingView out) const override;
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
  void rms_norm(Context& context, const InputRows& x, const float* weight, float eps,
                float* out) const override;
  void add_identity(Context& context, const IdentityCall& call) const override;
  void gate_up(Context& context, const GateUpCall& call) const override;
  void down(Context& context, const DownCall& call) const override;

 private:
  const Table& table() const { return gpu_->table(); }
  std::shared_ptr<const Gpu> gpu_;
  DeviceProperties properties_;
  Constants constants_;
};

/// One for each device of the table that the kernels run on, or one absent backend with the reason.
std::vector<std::shared_ptr<const Backend>> backends_of(const Table& table);

}  // namespace moesaic::cuda
