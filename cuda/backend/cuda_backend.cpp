#include "cuda/backend/cuda_backend.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

#include "cuda/backend/arguments.hpp"
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

void require_route_size(const RouterConfig& config) {
  require<UnsupportedError>(config.num_experts <= kMaxExperts && config.top_k <= kMaxTopK, [&] {
    return Problem{
        .operation = "route",
        .what = "experts and top_k",
        .expected = "at most " + std::to_string(kMaxExperts) + " and " + std::to_string(kMaxTopK) +
                    " on a CUDA device",
        .got = std::to_string(config.num_experts) + " and " + std::to_string(config.top_k),
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
    list.push_back({row.operation, static_cast<QuantType>(row.type), WeightLayout::CudaUnits,
                    "sm_" + std::to_string(row.min_arch), row.name});
  }
  return list;
}

std::string CudaBackend::kernel_name(const WeightRef& weight, const Tuning&) const {
  RoleWeights role;
  role.ref = weight;
  const WeightArgs args = weight_args(role);
  const char* const name = table().gemm_name(&args, 1);
  return name != nullptr ? name : "none";
}

std::string CudaBackend::down_name(const WeightRef& weight, const Tuning&, std::int64_t num_pairs,
                                   bool sorted) const {
  RoleWeights role;
  role.ref = weight;
  const WeightArgs args = weight_args(role);
  const char* const name = table().down_name(&args, num_pairs, sorted ? 1 : 0);
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

void CudaBackend::fill(const Context& context, void* memory, std::uint8_t value,
                       std::size_t bytes) const {
  const FillArgs args{memory, static_cast<std::int64_t>(bytes), value};
  gpu_->run("fill", table().fill, args, context.stream());
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
  const GemmScratchArgs args{
      .num_rows = query.num_pairs,
      .num_in = std::max(query.num_tokens, query.num_pairs),
      .cols = widest,
      .out_cols = std::max(query.shape.hidden_size, query.shape.intermediate_size),
      .num_experts = query.shape.num_experts,
      .separate = query.shared_units ? 0 : 1};
  const std::int64_t plan = table().plan_scratch_bytes(query.num_pairs, query.shape.num_experts);
  return static_cast<std::size_t>(std::max(plan, table().gemm_scratch_bytes(&args)));
}

std::int64_t CudaBackend::route_scratch(const RouterConfig&, std::int64_t num_tokens, int) const {
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

void CudaBackend::router_logits(Context& context, const InputRows& x, const float* weight,
                                std::int32_t num_experts, float* logits) const {
  const std::span values(weight, static_cast<std::size_t>(num_experts * x.cols));
  const RouterLogitsArgs args{.x = rows_args(x),
                              .weight = constants_.of(values, "router_logits", context.stream()),
                              .logits = logits,
                              .num_experts = num_experts};
  gpu_->run("router_logits", table().router_logits, args, context.stream());
}

RouteStats CudaBackend::route(Context& context, const float* logits, std::int64_t row_stride,
                              const RouterConfig& config, RoutingView out, float* scratch) const {
  require_route_size(config);
  const Stream stream = context.stream();
  const bool strict = context.tuning().strict;
  RouteArgs args = route_args(config);
  args.logits = logits;
  args.row_stride = row_stride;
  args.num_tokens = out.num_tokens;
  args.router_bias = constants_.of(std::span(config.router_bias), "route", stream);
  args.selection_bias = constants_.of(std::span(config.selection_bias), "route", stream);
  args.topk_ids = out.topk_ids;
  args.topk_weights = out.topk_weights;
  args.nonfinite = strict ? reinterpret_cast<std::int32_t*>(scratch) : nullptr;
  gpu_->run("route", table().route, args, stream);
  if (!strict) return {};

  std::vector<std::int32_t> flags(static_cast<std::size_t>(out.num_tokens));
  gpu_->copy(flags.data(), args.nonfinite, flags.size() * sizeof(std::int32_t), stream);
  gpu_->synchronize(stream);
  return {.nonfinite_rows = std::accumulate(flags.begin(), flags.end(), std::int64_t{0})};
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

void CudaBackend::look_up_experts(Context& context, std::span<const std::int32_t> table,
                                  const std::int32_t* token_ids, RoutingView out) const {
  const Stream stream = context.stream();
  const LookUpArgs args{.table = constants_.of(table, "look_up_experts", stream),
                        .token_ids = token_ids,
                        .topk_ids = out.topk_ids,
                        .num_tokens = out.num_tokens,
                        .num_rows = static_cast<std::int64_t>(table.size()) / out.top_k,
                        .top_k = out.top_k,
                        .reserved = 0};
  gpu_->run("look_up_experts", gpu_->table().look_up_experts, args, stream);
}

void CudaBackend::shared_routing(Context& context, const float* logits, RoutingView out) const {
  const SharedRoutingArgs args{.logits = logits,
                               .topk_ids = out.topk_ids,
                               .topk_weights = out.topk_weights,
                               .num_tokens = out.num_tokens};
  gpu_->run("shared_routing", table().shared_routing, args, context.stream());
}

void CudaBackend::bucket_plan(Context& context, const RoutingView& routing,
                              std::int32_t num_experts, BucketPlanView out) const {
  const BucketPlanArgs args{.topk_ids = routing.topk_ids,
                            .expert_offsets = out.expert_offsets,
                            .row_token = out.row_token,
                            .row_pair = out.row_pair,
                            .pair_row = out.pair_row,
                            .scratch = out.scratch,
                            .num_pairs = routing.num_pairs(),
                            .top_k = routing.top_k,
                            .num_experts = num_experts};
  gpu_->run("bucket_plan", table().bucket_plan, args, context.stream());
}

void CudaBackend::align(Context& context, const BucketPlanView& plan, std::int64_t num_pairs,
                        std::int32_t num_experts, std::int32_t block_size, RowSpace row_space,
                        AlignedRoutingView out) const {
  const AlignArgs args{.expert_offsets = plan.expert_offsets,
                       .row_pair = plan.row_pair,
                       .sorted_ids = out.sorted_ids,
                       .block_experts = out.block_experts,
                       .num_post_pad = out.num_post_pad,
                       .num_pairs = num_pairs,
                       .block_capacity = aligned_block_capacity(num_pairs, num_experts, block_size),
                       .num_experts = num_experts,
                       .block_size = block_size,
                       .row_space = static_cast<std::int32_t>(row_space)};
  gpu_->run("align", table().align, args, context.stream());
}

void CudaBackend::gather(Context& context, const InputRows& x, const std::int32_t* index,
                         std::int64_t rows, float* out) const {
  const GatherArgs args{
      .x = rows_args(x), .index = index, .out = out, .rows = rows, .out_dtype = kF32};
  gpu_->run("gather", table().gather, args, context.stream());
}

void CudaBackend::activate(Context& context, const Activation& activation, const float* gate,
                           const float* up, std::int64_t row_stride, std::int64_t rows,
                           std::int64_t intermediate, float* hidden) const {
  const ActivateArgs args{.activation = activation_args(activation),
                          .gate = gate,
                          .up = up,
                          .hidden = hidden,
                          .row_stride = row_stride,
                          .rows = rows,
                          .intermediate = intermediate};
  gpu_->run("activate", table().activate, args, context.stream());
}

void CudaBackend::combine(Context& context, const CombineCall& call) const {
  CombineArgs args = combine_args(call);
  args.rows = call.rows;
  args.rows_dtype = kF32;
  gpu_->run("combine", table().combine, args, context.stream());
}

void CudaBackend::rms_norm(Context& context, const InputRows& x, const float* weight, float eps,
                           float* out) const {
  const std::span values(weight, static_cast<std::size_t>(x.cols));
  const RmsNormArgs args{.x = rows_args(x),
                         .weight = constants_.of(values, "rms_norm", context.stream()),
                         .out = out,
                         .eps = eps,
                         .reserved = 0};
  gpu_->run("rms_norm", table().rms_norm, args, context.stream());
}

void CudaBackend::add_identity(Context& context, const IdentityCall& call) const {
  const IdentityArgs args{.x = rows_args(call.x),
                          .topk_ids = call.routing.topk_ids,
                          .topk_weights = call.routing.topk_weights,
                          .out = static_cast<float*>(call.out.data),
                          .out_stride = call.out.stride(0),
                          .top_k = call.routing.top_k,
                          .first = call.first,
                          .count = call.count,
                          .reserved = 0};
  gpu_->run("add_identity", table().add_identity, args, context.stream());
}

void CudaBackend::zero_skipped(Context& context, const std::int32_t* ids, std::int32_t num_experts,
                               std::int64_t rows, std::int64_t cols, float* out) const {
  const ZeroSkippedArgs args{
      .ids = ids, .out = out, .rows = rows, .cols = cols, .num_experts = num_experts};
  gpu_->run("zero_skipped", table().zero_skipped, args, context.stream());
}

}  // namespace moesaic::cuda
