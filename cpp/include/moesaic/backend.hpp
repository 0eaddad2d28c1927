#pragma once

/// What a device must be able to do: memory, and the operations of operations.hpp, which the
/// forward (forward/forward.cpp) calls in order. A backend may fuse neighbouring ones.

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moesaic/backend_facts.hpp"
#include "moesaic/operations.hpp"
#include "moesaic/routing.hpp"

namespace moesaic {

class Context;

class Backend {
 public:
  virtual ~Backend() = default;

  // What it is. -----------------------------------------------------------------------------------

  virtual BackendInfo info() const = 0;
  /// Where the memory it works on lies; the forward compares it with the tensors it is given.
  virtual DeviceType device_type() const { return DeviceType::Cpu; }
  virtual Device device() const { return {device_type(), 0}; }
  virtual std::vector<KernelInfo> kernels() const { return {}; }
  /// The kernel that would run this role, by name; for explain().
  virtual std::string kernel_name(const WeightRef& weight, const Tuning& tuning) const;
  /// The kernel that `down` would run, for pairs that are sorted by expert or each a segment of its
  /// own. The default: kernel_name.
  virtual std::string down_name(const WeightRef& weight, const Tuning& tuning,
                                std::int64_t num_pairs, bool sorted) const;
  /// Whether the weights can run here.
  virtual Support supports(const WeightRef& weight) const = 0;
  /// Whether layers with this part can run here.
  virtual Support supports_part(LayerPart) const {
    return {false, "not available on this backend"};
  }
  /// Activation and gate_up run as one; no [P, 2I] buffer is needed.
  virtual bool fuses_activation() const { return false; }
  /// Element type of the rows between the phases of a forward whose x has this type.
  virtual DType working_dtype(DType) const { return DType::F32; }

  // Memory. ---------------------------------------------------------------------------------------

  /// 64-byte aligned; throws OutOfMemoryError.
  virtual void* allocate(std::size_t bytes) const;
  virtual void deallocate(void* memory, std::size_t bytes) const noexcept;
  /// Between any two of host and device; complete when it returns.
  virtual void copy(void* to, const void* from, std::size_t bytes) const;
  /// A copy in the order of the context's stream. The default: copy.
  virtual void copy_on_stream(Context& context, void* to, const void* from,
                              std::size_t bytes) const;
  /// `bytes` of host memory in memory of this backend, which must outlive the result.
  std::shared_ptr<void> upload(const void* from, std::size_t bytes) const;
  /// Lets launches read and write host memory of the caller in place while the result lives, where
  /// host and device share their memory. Null where that cannot be; then the caller copies.
  virtual std::shared_ptr<const void> share(void*, std::size_t) const { return nullptr; }
  /// Memory that another package hands over by a handle (data of kDLMetal in DLPack, an MTLBuffer).
  /// Throws UnsupportedError on backends whose memory has addresses alone.
  virtual SharedHandle share_handle(void* handle) const;
  virtual void fill(Context& context, const op::Fill& call) const;
  /// The end of every public operation: recorded work goes to the device.
  virtual void submit(Context&) const {}
  virtual void synchronize(Context& context) const;
  /// Whether the context's stream records a graph: nothing may then be allocated or read back.
  virtual bool capturing(const Context&) const { return false; }
  /// Announces host values that calls will bring by this very address (router weights, norms, token
  /// tables), which must stay and not change while the result lives. Null where nothing is gained.
  virtual std::shared_ptr<const void> pin(HostValues) const { return nullptr; }
  /// Before the first launch of a forward: uploads what its launches need of the host's router
  /// (null with a ready routing) and of the host arrays `values`. Errors: CaptureError where that
  /// cannot be had now.
  virtual void before_launches(Context&, const RouterConfig* router,
                               std::initializer_list<HostValues> values,
                               std::string_view operation) const;
  /// Changes roles to the layout this backend runs fastest and records it in parts.report.
  virtual void prepare(ExpertStack::Parts& parts, const LoadOptions& options) const;
  /// Bytes of scratch that the products and the bucket plan of a call of this size need.
  virtual std::size_t scratch_bytes(const ScratchQuery& query) const;
  /// Elements of 4 bytes that op::Route::scratch needs.
  virtual std::int64_t route_scratch(const RouterRules& router, std::int64_t num_tokens,
                                     int threads) const;
  /// Rejects ids < -1 or >= num_experts. A device looks only under `strict`; its operations take
  /// such ids as -1.
  virtual void check_ids(Context& context, const RoutingView& routing, std::int32_t num_experts,
                         std::string_view operation) const;

  // Operations (operations.hpp), in the order of the context's stream. The default of each throws
  // UnsupportedError, but for linear and the two phases, whose defaults compose other operations.

  virtual void router_logits(Context& context, const op::RouterLogits& call) const;
  virtual RouteStats route(Context& context, const op::Route& call) const;
  virtual void look_up_experts(Context& context, const op::LookUpExperts& call) const;
  virtual void shared_routing(Context& context, const op::SharedRouting& call) const;
  virtual void bucket_plan(Context& context, const op::BucketPlan& call) const;
  virtual void align(Context& context, const op::Align& call) const;
  virtual void gather(Context& context, const op::Gather& call) const;
  virtual void expert_gemm(Context& context, const op::Gemm& call) const;
  virtual void activate(Context& context, const op::Activate& call) const;
  virtual void combine(Context& context, const op::Combine& call) const;
  virtual void zero_skipped(Context& context, const op::ZeroSkipped& call) const;
  virtual void rms_norm(Context& context, const op::RmsNorm& call) const;
  virtual void add_identity(Context& context, const op::AddIdentity& call) const;
  virtual void linear(Context& context, const op::Linear& call) const;
  virtual void gate_up(Context& context, const op::GateUp& call) const;
  virtual void down(Context& context, const op::Down& call) const;

 protected:
  /// Throws UnsupportedError naming `operation`; of an absent backend a DeviceError with its reason.
  [[noreturn]] void refuse(const char* operation) const;
};

/// Registered backends, the CPU first; absent ones are listed with their reason. The span stays
/// valid; its end moves with register_backend.
std::span<const std::shared_ptr<const Backend>> backends();
/// The backend of a device; the latest registered one where there are several. Throws DeviceError
/// with the reason when it is absent.
const Backend& backend_for(Device device);
/// Adds a backend for tests; returns a handle that removes it.
std::shared_ptr<void> register_backend(std::shared_ptr<const Backend> backend);

}  // namespace moesaic
