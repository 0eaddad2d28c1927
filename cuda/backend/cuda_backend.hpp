#pragma once

/// Backend over a table of launchers: the plug-in's, or the emulator's.

#include <memory>
#include <span>
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
  Support supports_part(LayerPart part) const override {
    return part == LayerPart::LowRankDeltas ? Support{false, "only the CPU runs them"} : Support{};
  }
  bool fuses_activation() const override { return true; }
  DType working_dtype(DType x) const override { return x; }

  void* allocate(std::size_t bytes) const override;
  void deallocate(void* memory, std::size_t bytes) const noexcept override;
  void copy(void* to, const void* from, std::size_t bytes) const override;
  void copy_on_stream(Context& context, void* to, const void* from,
                      std::size_t bytes) const override;
  void fill(Context& context, const op::Fill& call) const override;
  void synchronize(Context& context) const override;
  bool capturing(const Context& context) const override;
  std::shared_ptr<const void> pin(HostValues values) const override;
  void prepare(ExpertStack::Parts& parts, const LoadOptions& options) const override;
  std::size_t scratch_bytes(const ScratchQuery& query) const override;
  std::int64_t route_scratch(const RouterRules& router, std::int64_t num_tokens,
                             int threads) const override;
  void before_launches(Context& context, const RouterConfig* router,
                       std::initializer_list<HostValues> values,
                       std::string_view operation) const override;
  void check_ids(Context& context, const RoutingView& routing, std::int32_t num_experts,
                 std::string_view operation) const override;

  void router_logits(Context& context, const op::RouterLogits& call) const override;
  RouteStats route(Context& context, const op::Route& call) const override;
  void look_up_experts(Context& context, const op::LookUpExperts& call) const override;
  void shared_routing(Context& context, const op::SharedRouting& call) const override;
  void bucket_plan(Context& context, const op::BucketPlan& call) const override;
  void align(Context& context, const op::Align& call) const override;
  void gather(Context& context, const op::Gather& call) const override;
  void expert_gemm(Context& context, const op::Gemm& call) const override;
  void activate(Context& context, const op::Activate& call) const override;
  void combine(Context& context, const op::Combine& call) const override;
  void zero_skipped(Context& context, const op::ZeroSkipped& call) const override;
  void rms_norm(Context& context, const op::RmsNorm& call) const override;
  void add_identity(Context& context, const op::AddIdentity& call) const override;
  void gate_up(Context& context, const op::GateUp& call) const override;
  void down(Context& context, const op::Down& call) const override;

 private:
  const Table& table() const { return gpu_->table(); }
  /// The device's copy of `count` host values; null for none.
  template <class T>
  const T* on_device(const T* values, std::int64_t count, const char* operation,
                     Stream stream) const {
    const std::span<const T> array(values, values != nullptr ? static_cast<std::size_t>(count) : 0);
    return static_cast<const T*>(constants_.find(std::as_bytes(array), operation, stream));
  }

  std::shared_ptr<const Gpu> gpu_;
  DeviceProperties properties_;
  Constants constants_;
};

/// One for each device of the table that the kernels run on, or one absent backend with the reason.
std::vector<std::shared_ptr<const Backend>> backends_of(const Table& table);

}  // namespace moesaic::cuda
