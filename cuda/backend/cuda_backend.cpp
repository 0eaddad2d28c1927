#include "cuda/backend/cuda_backend.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

#include "cuda/backend/prepare.hpp"
#include "moesaic/context.hpp"
#include "moesaic/error.hpp"

namespace moesaic::cuda {
namespace {

constexpr std::string_view kElsewhere = "the weights are not in the CUDA layout";

std::string version_text(std::int32_t version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

/// Reading back needs a stream that may be waited for.
void require_no_capture(const Gpu& gpu, Stream stream, std::string_view operation,
                        const char* what) {
  require<CaptureError>(!gpu.capturing(stream), [&] {
    return Problem{.operation = std::string(operation),
                   .what = what,
                   .expected = "a stream that records no graph",
                   .got = "a capture",
                   .hint = "strict mode reads results back; turn it off for captures"};
  });
}

void require_route_size(const RouterRules& router) {
  require<UnsupportedError>(router.num_experts <= kMaxExperts && router.top_k <= kMaxTopK, [&] {
    return Problem{
        .operation = "route",
        .what = "experts and top_k",
        .expected = "at most " + std::to_string(kMaxExperts) + " and " + std::to_string(kMaxTopK) +
                    " on a CUDA device",
        .got = std::to_string(router.num_experts) + " and " + std::to_string(router.top_k),
        .hint = {}};
  });
}

}  // namespace

CudaBackend::CudaBackend(const Table& table, int index)
    : gpu_(std::make_shared<const Gpu>(table, index)),
      properties_(gpu_->properties()),
      constants_(gpu_) {}

BackendInfo CudaBackend::info() const {
  const std::string arch = std::to_string(properties_.arch);
  return {.name = "cuda",
          .available = true,
          .reason = "",
          .devices = {device()},
          .detail = std::string(properties_.name) + ", sm_" + arch + ", " +
                    std::to_string(properties_.num_sms) + " SMs, " +
                    std::to_string(properties_.memory_bytes >> 20) + " MiB; driver CUDA " +
                    version_text(properties_.driver_version) + ", plug-in " + table().build};
}

std::vector<KernelInfo> CudaBackend::kernels() const {
  std::vector<KernelInfo> list;
  for (std::int32_t i = 0; i < table().num_kernels; ++i) {
    const KernelRow& row = table().kernels[i];
    list.push_back({row.operation, row.type, WeightLayout::CudaUnits,
                    "sm_" + std::to_string(row.min_arch), row.name});
  }
  return list;
}

std::string CudaBackend::kernel_name(const WeightRef& weight, const Tuning&) const {
  const char* const name = table().gemm_name(&weight);
  return name != nullptr ? name : "none";
}

std::string CudaBackend::down_name(const WeightRef& weight, const Tuning&, std::int64_t num_pairs,
                                   bool sorted) const {
  const char* const name = table().down_name(&weight, num_pairs, sorted);
  return name != nullptr ? name : "none";
}

Support CudaBackend::supports(const WeightRef& weight) const {
  if (weight.layout != WeightLayout::CudaUnits) return {false, kElsewhere};
  return {};
}

void* CudaBackend::allocate(std::size_t bytes) const { return gpu_->allocate(bytes); }

void CudaBackend::deallocate(void* memory, std::size_t) const noexcept { gpu_->deallocate(memory); }

void CudaBackend::copy(void* to, const void* from, std::size_t bytes) const {
  gpu_->copy(to, from, bytes);
}

void CudaBackend::copy_on_stream(Context& context, void* to, const void* from,
                                 std::size_t bytes) const {
  gpu_->copy(to, from, bytes, context.stream());
}

void CudaBackend::fill(Context& context, const op::Fill& call) const {
  gpu_->run("fill", table().fill, call, context.stream());
}

void CudaBackend::synchronize(Context& context) const { gpu_->synchronize(context.stream()); }

bool CudaBackend::capturing(const Context& context) const {
  return gpu_->capturing(context.stream());
}

std::shared_ptr<const void> CudaBackend::pin(HostValues values) const {
  return constants_.pin(values);
}

void CudaBackend::prepare(ExpertStack::Parts& parts, const LoadOptions& options) const {
  cuda::prepare(gpu_, parts, options);
}

std::size_t CudaBackend::scratch_bytes(const ScratchQuery& query) const {
  const std::int64_t widest =
      std::max({query.shape.hidden_size, query.shape.intermediate_size, query.packed_cols});
  const GemmSizes sizes{
      .num_rows = query.num_pairs,
      .num_in = std::max(query.num_tokens, query.num_pairs),
      .cols = widest,
      .out_cols = std::max(query.shape.hidden_size, query.shape.intermediate_size),
      .num_experts = query.shape.num_experts,
      .separate = !query.shared_units};
  const std::int64_t plan = table().plan_scratch_bytes(query.num_pairs, query.shape.num_experts);
  return static_cast<std::size_t>(std::max(plan, table().gemm_scratch_bytes(&sizes)));
}

std::int64_t CudaBackend::route_scratch(const RouterRules&, std::int64_t num_tokens, int) const {
  return num_tokens;  // flags of non-finite rows
}

void CudaBackend::before_launches(Context& context, const RouterConfig* router,
                                  std::initializer_list<HostValues> values,
                                  std::string_view operation) const {
  const Stream stream = context.stream();
  if (router != nullptr) {
    require_route_size(*router);
    if (context.tuning().strict) require_no_capture(*gpu_, stream, operation, "non-finite rows");
    constants_.find(host_values(router->router_bias), operation, stream);
    constants_.find(host_values(router->selection_bias), operation, stream);
  }
  for (const HostValues array : values) constants_.find(array, operation, stream);
}

void CudaBackend::check_ids(Context& context, const RoutingView& routing, std::int32_t num_experts,
                            std::string_view operation) const {
  if (!context.tuning().strict) return;
  require_no_capture(*gpu_, context.stream(), operation, "ids");
  std::vector<std::int32_t> ids(static_cast<std::size_t>(routing.num_pairs()));
  gpu_->copy(ids.data(), routing.topk_ids, ids.size() * sizeof(std::int32_t), context.stream());
  gpu_->synchronize(context.stream());
  moesaic::check_ids({ids.data(), nullptr, routing.num_tokens, routing.top_k}, num_experts,
                     operation);
}

// Each operation passes its struct on, with host arrays replaced by their copies on the device.

void CudaBackend::router_logits(Context& context, const op::RouterLogits& call) const {
  op::RouterLogits args = call;
  args.weight =
      on_device(call.weight, call.num_experts * call.x.cols, "router_logits", context.stream());
  gpu_->run("router_logits", table().router_logits, args, context.stream());
}

RouteStats CudaBackend::route(Context& context, const op::Route& call) const {
  require_route_size(call);
  const Stream stream = context.stream();
  const bool strict = context.tuning().strict;
  op::Route args = call;
  args.router_bias = on_device(call.router_bias, call.num_experts, "route", stream);
  args.selection_bias = on_device(call.selection_bias, call.num_experts, "route", stream);
  if (!strict) args.scratch = nullptr;
  gpu_->run("route", table().route, args, stream);
  if (!strict) return {};

  std::vector<std::int32_t> flags(static_cast<std::size_t>(call.out.num_tokens));
  gpu_->copy(flags.data(), args.scratch, flags.size() * sizeof(std::int32_t), stream);
  gpu_->synchronize(stream);
  return {.nonfinite_rows = std::accumulate(flags.begin(), flags.end(), std::int64_t{0})};
}

void CudaBackend::look_up_experts(Context& context, const op::LookUpExperts& call) const {
  op::LookUpExperts args = call;
  args.table =
      on_device(call.table, call.num_rows * call.out.top_k, "look_up_experts", context.stream());
  gpu_->run("look_up_experts", table().look_up_experts, args, context.stream());
}

void CudaBackend::shared_routing(Context& context, const op::SharedRouting& call) const {
  gpu_->run("shared_routing", table().shared_routing, call, context.stream());
}

void CudaBackend::bucket_plan(Context& context, const op::BucketPlan& call) const {
  gpu_->run("bucket_plan", table().bucket_plan, call, context.stream());
}

void CudaBackend::align(Context& context, const op::Align& call) const {
  gpu_->run("align", table().align, call, context.stream());
}

void CudaBackend::gather(Context& context, const op::Gather& call) const {
  gpu_->run("gather", table().gather, call, context.stream());
}

void CudaBackend::activate(Context& context, const op::Activate& call) const {
  gpu_->run("activate", table().activate, call, context.stream());
}

void CudaBackend::combine(Context& context, const op::Combine& call) const {
  gpu_->run("combine", table().combine, call, context.stream());
}

void CudaBackend::zero_skipped(Context& context, const op::ZeroSkipped& call) const {
  gpu_->run("zero_skipped", table().zero_skipped, call, context.stream());
}

void CudaBackend::rms_norm(Context& context, const op::RmsNorm& call) const {
  op::RmsNorm args = call;
  args.weight = on_device(call.weight, call.x.cols, "rms_norm", context.stream());
  gpu_->run("rms_norm", table().rms_norm, args, context.stream());
}

void CudaBackend::add_identity(Context& context, const op::AddIdentity& call) const {
  gpu_->run("add_identity", table().add_identity, call, context.stream());
}

void CudaBackend::expert_gemm(Context& context, const op::Gemm& call) const {
  op::Gemm args = call;
  args.batch_invariant = context.tuning().batch_invariant;
  gpu_->run("expert_gemm", table().gemm, args, context.stream());
}

void CudaBackend::gate_up(Context& context, const op::GateUp& call) const {
  const ScopedZone zone(context, Zone::GateUp);
  op::GateUp args = call;
  args.batch_invariant = context.tuning().batch_invariant;
  gpu_->run("gate_up", table().gate_up, args, context.stream());
}

void CudaBackend::down(Context& context, const op::Down& call) const {
  const ScopedZone zone(context, Zone::Down);
  op::Down args = call;
  args.batch_invariant = context.tuning().batch_invariant;
  gpu_->run("down", table().down, args, context.stream());
}

}  // namespace moesaic::cuda
