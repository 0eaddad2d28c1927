#include "metal/host/metal_backend.hpp"

#include <cstring>
#include <string>

#include "backend/builtin.hpp"
#include "metal/host/prepare.hpp"
#include "moesaic/context.hpp"

namespace moesaic::metal {
namespace {

using namespace metal_args;

constexpr std::string_view kNoKernels =
    "no Metal kernels for this type; load with dequantize = F16, or run it on the CPU";
constexpr std::string_view kPacked = "packed for another backend; load it for this one";
constexpr std::string_view kElsewhere = "not in Metal memory; load it for this backend";

/// Whether 32-bit words describe the range.
bool in_words(const void* memory, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(memory) % 4 == 0 && bytes % 4 == 0;
}

/// Bytes as text, e.g. "21.3 GiB".
std::string gib(std::uint64_t bytes) {
  const std::uint64_t tenths = bytes * 10 >> 30;
  return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10) + " GiB";
}

/// One that the kernels run on, if there is one; else any.
NS::SharedPtr<MTL::Device> first_device() {
  const auto all = NS::TransferPtr(MTL::CopyAllDevices());
  NS::SharedPtr<MTL::Device> first;
  for (NS::UInteger i = 0; all.get() != nullptr && i < all->count(); ++i) {
    auto* const device = all->object<MTL::Device>(i);
    if (device->supportsFamily(MTL::GPUFamilyApple7)) return NS::RetainPtr(device);
    if (!first) first = NS::RetainPtr(device);
  }
  return first;
}

WordsArgs words_args(std::size_t bytes, std::uint32_t value) {
  return {static_cast<std::int64_t>(bytes / 4), value, 0};
}

}  // namespace

MetalBackend::MetalBackend(NS::SharedPtr<MTL::Device> device)
    : device_(std::move(device)), recorder_(std::make_unique<Recorder>(device_.get())) {}

MetalBackend::~MetalBackend() {
  const AutoreleaseScope scope;
  recorder_->memory.deallocate(recorder_->nothing);
  recorder_.reset();
}

BackendInfo MetalBackend::info() const {
  const AutoreleaseScope scope;
  return {.name = "metal",
          .available = true,
          .reason = "",
          .devices = {Device{DeviceType::Metal, 0}},
          .detail = std::string(device_->name()->utf8String()) + ", working set " +
                    gib(device_->recommendedMaxWorkingSetSize()) + ", buffers of up to " +
                    gib(device_->maxBufferLength())};
}

std::vector<KernelInfo> MetalBackend::kernels() const {
  std::vector<KernelInfo> list;
  const auto add = [&](QuantType type) {
    for (const auto& [operation, loop] :
         {std::pair{"expert_gemv", ExpertLoop::Gemv}, std::pair{"gate_up", ExpertLoop::GateUp},
          std::pair{"expert_gemm", ExpertLoop::Gemm},
          std::pair{"expert_gemm", ExpertLoop::GemmHalf}}) {
      list.push_back({operation, type, kernel_layout(type), "metal",
                      std::string(name_of(expert_kernel(type, loop)))});
    }
  };
#define MOESAIC_METAL_FORMAT(type, suffix) add(QuantType::type);
#include "metal/kernels.inc"
  return list;
}

std::string MetalBackend::kernel_name(const WeightRef& weight, const Tuning& tuning) const {
  if (!has_kernels(weight.type)) return {};
  const ExpertLoop gemm = loop_of(Product::GemmIndirect, tuning.precision);
  return std::string(name_of(expert_kernel(weight.type, ExpertLoop::Gemv))) + " or " +
         std::string(name_of(expert_kernel(weight.type, gemm)));
}

Support MetalBackend::supports(const WeightRef& weight) const {
  if (!has_kernels(weight.type)) return {false, kNoKernels};
  if (weight.layout != kernel_layout(weight.type) || weight.base == nullptr) {
    return {false, kPacked};
  }
  if (!recorder_->memory.holds(weight.base)) return {false, kElsewhere};
  return {};
}

void* MetalBackend::allocate(std::size_t bytes) const {
  const AutoreleaseScope scope;
  return recorder_->memory.allocate(bytes);
}

void MetalBackend::deallocate(void* memory, std::size_t) const noexcept {
  const AutoreleaseScope scope;
  recorder_->memory.deallocate(memory);
}

void MetalBackend::copy(void* to, const void* from, std::size_t bytes) const {
  if (bytes == 0) return;
  const AutoreleaseScope scope;
  recorder_->queue.wait_for_all();
  std::memcpy(to, from, bytes);
}

void MetalBackend::copy_on_stream(Context& context, void* to, const void* from,
                                  std::size_t bytes) const {
  if (bytes == 0) return;
  if (!recorder_->memory.holds(to, bytes) || !in_words(to, bytes) || !in_words(from, bytes)) {
    synchronize(context);
    std::memcpy(to, from, bytes);
    return;
  }
  Encoding e = encode(context, "copy");
  e.run(words_shape(Kernel::copy_words, static_cast<std::int64_t>(bytes / 4)), words_args(bytes, 0),
        {e.copied(from, bytes), e.at(to)});
}

std::shared_ptr<const void> MetalBackend::share(void* memory, std::size_t bytes) const {
  const AutoreleaseScope scope;
  return recorder_->memory.share(memory, bytes);
}

SharedHandle MetalBackend::share_handle(void* handle) const {
  const AutoreleaseScope scope;
  return recorder_->memory.share_buffer(static_cast<MTL::Buffer*>(handle));
}

void MetalBackend::fill(Context& context, const op::Fill& call) const {
  const auto bytes = static_cast<std::size_t>(call.bytes);
  if (bytes == 0) return;
  if (!recorder_->memory.holds(call.data, bytes) || !in_words(call.data, bytes)) {
    synchronize(context);
    std::memset(call.data, call.value, bytes);
    return;
  }
  Encoding e = encode(context, "fill");
  e.run(words_shape(Kernel::fill_words, call.bytes / 4),
        words_args(bytes, call.value * 0x01010101U), {e.at(call.data)});
}

void MetalBackend::submit(Context& context) const {
  const AutoreleaseScope scope;
  recorder_->memory.request_residency();
  recorder_->queue.submit(recorder_->queue.work_of(context));
}

void MetalBackend::synchronize(Context& context) const {
  const AutoreleaseScope scope;
  recorder_->queue.wait(recorder_->queue.work_of(context));
  context.throw_kept_error();
}

std::shared_ptr<const void> MetalBackend::pin(HostValues values) const {
  if (values.empty()) return nullptr;
  const AutoreleaseScope scope;
  return recorder_->memory.mirror(values.data(), values.size());
}

void MetalBackend::prepare(ExpertStack::Parts& parts, const LoadOptions& options) const {
  const AutoreleaseScope scope;
  hold_roles(*this, recorder_->memory, parts, options);
}

std::size_t MetalBackend::scratch_bytes(const ScratchQuery& query) const {
  return tile_scratch_bytes(query.num_pairs);
}

void MetalBackend::before_launches(Context&, const RouterConfig* router,
                                   std::initializer_list<HostValues>, std::string_view) const {
  if (router != nullptr) check_route(*router);
}

std::int64_t MetalBackend::route_scratch(const RouterRules&, std::int64_t num_tokens, int) const {
  return num_tokens;  // a flag per row
}

void MetalBackend::router_logits(Context& context, const op::RouterLogits& call) const {
  Encoding e = encode(context, "router_logits");
  const InputRows& x = call.x;
  const auto bytes = static_cast<std::size_t>(call.num_experts * x.cols) * sizeof(float);
  e.run(router_logits_shape(x, call.num_experts),
        RouterLogitsArgs{input_args(x), x.cols, call.num_experts, 0},
        {e.at(x.data), e.copied(call.weight, bytes), e.at(call.logits)});
}

RouteStats MetalBackend::route(Context& context, const op::Route& call) const {
  check_route(call);
  // Reading the flags back means waiting, so only who asks for them pays.
  const bool report = context.tuning().strict || context.profiler() != nullptr;
  const RoutingView& out = call.out;
  {
    Encoding e = encode(context, "route");
    const auto bytes = static_cast<std::size_t>(call.num_experts) * sizeof(float);
    e.run(
        route_shape(out.num_tokens), route_args(call, report),
        {e.at(call.logits), e.copied(call.router_bias, bytes), e.copied(call.selection_bias, bytes),
         e.at(out.topk_ids), e.at(out.topk_weights), e.at(call.scratch)});
  }
  RouteStats stats;
  if (!report || out.num_tokens == 0) return stats;
  synchronize(context);
  for (std::int64_t t = 0; t < out.num_tokens; ++t) {
    std::int32_t flag;
    std::memcpy(&flag, static_cast<const std::byte*>(call.scratch) + t * sizeof flag, sizeof flag);
    stats.nonfinite_rows += flag;
  }
  return stats;
}

void MetalBackend::check_ids(Context& context, const RoutingView& routing, std::int32_t num_experts,
                             std::string_view operation) const {
  if (!context.tuning().strict) return;
  synchronize(context);
  moesaic::check_ids(routing, num_experts, operation);
}

void MetalBackend::shared_routing(Context& context, const op::SharedRouting& call) const {
  Encoding e = encode(context, "shared_routing");
  const RoutingView& out = call.out;
  e.run(
      shared_routing_shape(out.num_tokens),
      SharedRoutingArgs{static_cast<std::int32_t>(out.num_tokens), call.logits != nullptr ? 1 : 0},
      {e.at(call.logits), e.at(out.topk_ids), e.at(out.topk_weights)});
}

void MetalBackend::bucket_plan(Context& context, const op::BucketPlan& call) const {
  Encoding e = encode(context, "bucket_plan");
  const RoutingView& routing = call.routing;
  const BucketPlanView& out = call.out;
  const auto pairs = static_cast<std::int32_t>(routing.num_pairs());
  e.run(bucket_plan_shape(call.num_experts),
        BucketPlanArgs{pairs, routing.top_k, call.num_experts, 0},
        {e.at(routing.topk_ids), e.at(out.expert_offsets), e.at(out.row_token), e.at(out.row_pair),
         e.at(out.pair_row)});
}

void MetalBackend::align(Context& context, const op::Align& call) const {
  Encoding e = encode(context, "align");
  const AlignArgs args{.num_pairs = static_cast<std::int32_t>(call.num_pairs),
                       .num_experts = call.num_experts,
                       .block_size = call.block_size,
                       .packed_rows = call.row_space == RowSpace::PackedRows ? 1 : 0,
                       .capacity = static_cast<std::int32_t>(call.block_capacity * call.block_size),
                       .block_capacity = static_cast<std::int32_t>(call.block_capacity)};
  e.run(align_shape(call.num_experts), args,
        {e.at(call.plan.expert_offsets), e.at(call.plan.row_pair), e.at(call.out.sorted_ids),
         e.at(call.out.block_experts), e.at(call.out.num_post_pad)});
}

void MetalBackend::gather(Context& context, const op::Gather& call) const {
  Encoding e = encode(context, "gather");
  e.run(gather_shape(call.x, call.rows), GatherArgs{input_args(call.x), call.x.cols},
        {e.at(call.x.data), e.at(call.index), e.at(call.out)});
}

void MetalBackend::expert_gemm(Context& context, const op::Gemm& call) const {
  Encoding e = encode(context, "expert_gemm");
  const WeightRef& ref = call.weight.ref;
  const RowMap& map = call.map;
  const Product product = choose_product(map);
  const DispatchShape shape = expert_shape(call, product);
  const BufferSlice bytes = e.at(ref.base);
  // The buffer is bound at its begin; the kernel adds the 64-bit offset.
  const WeightArgs weight = weight_args(call.weight, bytes.offset);
  const RowMapArgs map_args = row_map_args(map);
  const InputArgs in = input_args(call.in);
  const BufferSlice whole{bytes.buffer, 0};
  const BufferSlice slots = e.at(ref.slot_map);
  const BufferSlice scale = e.at(call.weight.scale);
  const BufferSlice bias = e.at(call.weight.bias);
  const BufferSlice expert = e.at(map.expert), offsets = e.at(map.offsets);
  const BufferSlice source = e.at(map.source), destination = e.at(map.destination);
  const BufferSlice x = e.at(call.in.data), out = e.at(call.out), gather = e.at(ref.int4.gather);
  if (product == Product::Gemv) {
    e.run(shape, ExpertGemvArgs{weight, map_args, in},
          {whole, slots, scale, bias, expert, offsets, source, destination, x, out, gather});
    return;
  }
  const bool indirect = product == Product::GemmIndirect;
  const BufferSlice grid = e.at(indirect ? call.scratch : nullptr);
  const BufferSlice tiles = e.at(indirect ? call.scratch + kTileListOffset : nullptr);
  if (indirect) {
    e.run(gemm_tiles_shape(map), GemmTilesArgs{map_args, ref.num_experts, shape.groups[1]},
          {expert, offsets, tiles, grid});
  }
  const std::int32_t per_segment = indirect ? 0 : tiles_per_segment(map);
  e.run(shape, ExpertGemmArgs{weight, map_args, in, per_segment, 0},
        {whole, slots, scale, bias, expert, offsets, source, destination, x, out, gather, tiles},
        indirect ? &grid : nullptr);
}

void MetalBackend::activate(Context& context, const op::Activate& call) const {
  Encoding e = encode(context, "activate");
  e.run(activate_shape(call),
        ActivateArgs{call.row_stride, call.intermediate, activation_args(call.activation)},
        {e.at(call.gate), e.at(call.up), e.at(call.hidden)});
}

void MetalBackend::combine(Context& context, const op::Combine& call) const {
  Encoding e = encode(context, "combine");
  std::uint32_t flags = 0;
  if (call.pair_row != nullptr) flags |= kHasPairRow;
  if (call.accumulate) flags |= kAccumulate;
  if (call.routing.topk_weights != nullptr) flags |= kHasPairWeights;
  e.run(combine_shape(call),
        CombineArgs{call.out.stride, static_cast<std::int32_t>(call.out.cols), call.routing.top_k,
                    call.num_experts, flags},
        {e.at(call.rows), e.at(call.pair_row), e.at(call.routing.topk_ids),
         e.at(call.routing.topk_weights), e.at(call.out.data)});
}

void MetalBackend::zero_skipped(Context& context, const op::ZeroSkipped& call) const {
  Encoding e = encode(context, "zero_skipped");
  e.run(zero_skipped_shape(call.rows), ZeroSkippedArgs{call.cols, call.num_experts, 0},
        {e.at(call.ids), e.at(call.out)});
}

void MetalBackend::gate_up(Context& context, const op::GateUp& call) const {
  if (!fuses_gate_up(call)) {
    Backend::gate_up(context, call);
    return;
  }
  const ScopedZone zone(context, Zone::GateUp);
  Encoding e = encode(context, "gate_up");
  const RoleRef& gate = call.gate;
  const RoleRef& up = call.up;
  const RowMap& map = call.map;
  const BufferSlice gate_bytes = e.at(gate.ref.base), up_bytes = e.at(up.ref.base);
  const ExpertGateUpArgs args{.gate = weight_args(gate, gate_bytes.offset),
                              .up = weight_args(up, up_bytes.offset),
                              .map = row_map_args(map),
                              .in = input_args(call.in),
                              .activation = activation_args(call.activation)};
  e.run(gate_up_shape(call), args,
        {{gate_bytes.buffer, 0},
         e.at(gate.ref.slot_map),
         e.at(gate.scale),
         e.at(gate.bias),
         e.at(map.expert),
         e.at(map.offsets),
         e.at(map.source),
         e.at(map.destination),
         e.at(call.in.data),
         e.at(call.hidden),
         e.at(gate.ref.int4.gather),
         {up_bytes.buffer, 0},
         e.at(up.ref.slot_map),
         e.at(up.scale),
         e.at(up.bias)});
}

std::shared_ptr<const Backend> create_backend() {
  const AutoreleaseScope scope;
  const auto absent = [](std::string reason) {
    return absent_backend(DeviceType::Metal, "metal", std::move(reason));
  };
  auto device = NS::TransferPtr(MTL::CreateSystemDefaultDevice());
  // Without a window server (ssh, launchd, tmux) there may be devices and no default one.
  if (!device) device = first_device();
  if (!device) return absent("this machine has no Metal device");
  // Simdgroup matrices and unified memory.
  if (!device->supportsFamily(MTL::GPUFamilyApple7)) {
    return absent(std::string("needs an Apple GPU of the M1 or later, got ") +
                  device->name()->utf8String());
  }
  return std::make_shared<MetalBackend>(std::move(device));
}

}  // namespace moesaic::metal
