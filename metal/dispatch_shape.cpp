#include "metal/dispatch_shape.hpp"

#include <algorithm>
#include <limits>
#include <string>

#include "moesaic/error.hpp"

namespace moesaic::metal {
namespace {

using namespace metal_args;

/// A dimension of a grid; positions in it are 32-bit in the kernels.
std::uint32_t extent(std::int64_t groups, const char* what) {
  require<ShapeError>(groups >= 0 && groups <= std::numeric_limits<std::int32_t>::max(), [&] {
    return Problem{"metal", what, "fewer than 2^31 threadgroups", std::to_string(groups),
                   "split the batch"};
  });
  return static_cast<std::uint32_t>(groups);
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int32_t narrow(std::int64_t value, const char* what) {
  return static_cast<std::int32_t>(extent(value, what));
}

}  // namespace

std::string_view name_of(Kernel kernel) noexcept {
  switch (kernel) {
#define MOESAIC_METAL_KERNEL(name) \
  case Kernel::name:               \
    return #name;
#include "metal/kernels.inc"
  }
  return "unknown";
}

namespace {

/// Rows per segment, on average.
std::int64_t mean_rows(const RowMap& map) {
  if (map.offsets == nullptr) return map.width;
  return map.num_segments > 0 ? map.limit / map.num_segments : 0;
}

bool same_columns(const Int4Format& a, const Int4Format& b) {
  return a.packed_cols == b.packed_cols && a.scale_cols == b.scale_cols &&
         a.scale_f32 == b.scale_f32 && a.zeros == b.zeros && a.gather == b.gather &&
         a.gather_stride == b.gather_stride;
}

}  // namespace

Product choose_product(const RowMap& map) {
  if (mean_rows(map) < kGemmMinRows) return Product::Gemv;
  return map.offsets == nullptr ? Product::GemmDirect : Product::GemmIndirect;
}

std::int32_t tile_cols(const RowMap& map) {
  std::int32_t cols = 8;
  while (cols < kGemmMaxCols && cols < mean_rows(map)) cols *= 2;
  return cols;
}

std::int32_t tiles_per_segment(const RowMap& map) {
  return static_cast<std::int32_t>(ceil_div(map.width, tile_cols(map)));
}

bool fuses_gate_up(const op::GateUp& call) {
  const WeightRef &gate = call.gate.ref, &up = call.up.ref;
  return gate && choose_product(call.map) == Product::Gemv && gate.type == up.type &&
         same_columns(gate.int4, up.int4);
}

bool has_kernels(QuantType type) {
  switch (type) {
#define MOESAIC_METAL_FORMAT(type, suffix) case QuantType::type:
#include "metal/kernels.inc"
    return true;
    default:
      return false;
  }
}

WeightLayout kernel_layout(QuantType type) {
  return type == QuantType::INT4 ? WeightLayout::Panels : WeightLayout::Rows;
}

Kernel expert_kernel(QuantType type, ExpertLoop loop) {
  Kernel first{};
  switch (type) {
#define MOESAIC_METAL_FORMAT(type, suffix) \
  case QuantType::type:                    \
    first = Kernel::expert_gemv_##suffix;  \
    break;
#include "metal/kernels.inc"
    default:
      break;
  }
  // kernels.inc lists the loops of a format in the order of ExpertLoop.
  return static_cast<Kernel>(static_cast<int>(first) + static_cast<int>(loop));
}

ExpertLoop loop_of(Product product, Precision precision) {
  if (product == Product::Gemv) return ExpertLoop::Gemv;
  return precision == Precision::Fast ? ExpertLoop::GemmHalf : ExpertLoop::Gemm;
}

std::size_t tile_scratch_bytes(std::int64_t limit) {
  return kTileListOffset +
         static_cast<std::size_t>(std::max<std::int64_t>(limit, 1)) * sizeof(GemmTile);
}

std::int32_t input_constant(DType dtype) {
  switch (dtype) {
    case DType::F16:
      return kTypeF16;
    case DType::BF16:
      return kTypeBF16;
    default:
      return kTypeF32;
  }
}

RowMapArgs row_map_args(const RowMap& map) {
  std::uint32_t flags = 0;
  if (map.expert != nullptr) flags |= kHasExpert;
  if (map.offsets != nullptr) flags |= kHasOffsets;
  if (map.source != nullptr) flags |= kHasSource;
  if (map.destination != nullptr) flags |= kHasDestination;
  return {map.num_segments, map.width, map.source_divisor, map.limit, flags, 0};
}

InputArgs input_args(const InputRows& rows) {
  return {rows.inner_count, rows.outer_stride, rows.inner_stride};
}

ActivationArgs activation_args(const Activation& a) {
  return {a.limit, a.alpha, a.beta, a.linear_beta};
}

WeightArgs weight_args(const RoleRef& weight, std::uint64_t base) {
  const WeightRef& ref = weight.ref;
  const Int4Format& int4 = ref.int4;
  const bool panels = ref.type == QuantType::INT4;
  // Within a row kernels count bytes in 32 bits.
  require<UnsupportedError>(ref.row_stride <= std::numeric_limits<std::uint32_t>::max(), [&] {
    return Problem{"metal", "weights", "rows below 4 GiB",
                   std::to_string(ref.row_stride) + " bytes", "run the layer on the CPU"};
  });
  std::uint32_t flags = 0;
  if (ref.slot_map != nullptr) flags |= kHasSlotMap;
  if (weight.scale != nullptr) flags |= kHasScale;
  if (weight.bias != nullptr) flags |= kHasBias;
  if (int4.gather != nullptr) flags |= kHasGather;
  if (int4.scale_f32) flags |= kInt4ScaleF32;
  if (int4.zeros) flags |= kInt4HasZeros;
  return {.base = base,
          .expert_stride = ref.expert_stride,
          .row_stride = ref.row_stride,
          .num_experts = ref.num_experts,
          .rows = narrow(ref.rows, "rows"),
          .cols = narrow(ref.cols, "cols"),
          .flags = flags,
          .stored_cols = narrow(panels ? int4.packed_cols : ref.cols, "cols"),
          .scale_cols = int4.scale_cols,
          .gather_stride = narrow(int4.gather_stride, "cols"),
          .unused = 0};
}

RouteArgs route_args(const op::Route& call, bool report_nonfinite) {
  std::uint32_t flags = 0;
  if (call.router_bias != nullptr) flags |= kHasRouterBias;
  if (call.selection_bias != nullptr) flags |= kHasSelectionBias;
  if (report_nonfinite) flags |= kReportNonfinite;
  if (call.renormalize) flags |= kRenormalize;
  return {.row_stride = call.row_stride,
          .num_experts = call.num_experts,
          .top_k = call.top_k,
          .score = static_cast<std::int32_t>(call.score),
          .guard = static_cast<std::int32_t>(call.guard),
          .select_on = static_cast<std::int32_t>(call.select_on),
          .num_groups = call.num_groups,
          .groups_used = call.groups_used,
          .group_reduce = static_cast<std::int32_t>(call.group_reduce),
          .group_mask = static_cast<std::int32_t>(call.group_mask),
          .flags = flags,
          .guard_eps = call.guard_eps,
          .scale = call.scale == 0.0F ? 1.0F : call.scale};
}

void check_route(const RouterRules& router) {
  require<UnsupportedError>(router.top_k <= kRouteMaxTopK, [&] {
    return Problem{"metal", "top_k", "at most " + std::to_string(kRouteMaxTopK),
                   std::to_string(router.top_k), "route on the CPU and give the routing"};
  });
  require<UnsupportedError>(router.num_groups <= kRouteMaxGroups, [&] {
    return Problem{"metal", "num_groups", "at most " + std::to_string(kRouteMaxGroups),
                   std::to_string(router.num_groups), "route on the CPU and give the routing"};
  });
}

DispatchShape router_logits_shape(const InputRows& x, std::int32_t num_experts) {
  const std::int64_t tiles = ceil_div(num_experts, kLogitsThreads / kSimdWidth);
  return {.kernel = Kernel::router_logits,
          .constants = {.input = input_constant(x.dtype)},
          .groups = {extent(tiles, "experts"), extent(x.num_rows, "tokens"), 1},
          .threads = kLogitsThreads};
}

DispatchShape route_shape(std::int64_t num_tokens) {
  return {.kernel = Kernel::route,
          .groups = {extent(num_tokens, "tokens"), 1, 1},
          .threads = kRouteThreads};
}

DispatchShape bucket_plan_shape(std::int32_t num_experts) {
  return {.kernel = Kernel::bucket_plan,
          .groups = {extent(num_experts + std::int64_t{1}, "experts"), 1, 1},
          .threads = kPlanThreads};
}

DispatchShape align_shape(std::int32_t num_experts) {
  return {.kernel = Kernel::align_blocks,
          .groups = {extent(num_experts + std::int64_t{1}, "experts"), 1, 1},
          .threads = kPlanThreads};
}

DispatchShape gather_shape(const InputRows& x, std::int64_t rows) {
  return {.kernel = Kernel::gather_rows,
          .constants = {.input = input_constant(x.dtype)},
          .groups = {extent(x.cols > 0 ? rows : 0, "rows"), 1, 1},
          .threads = kRowThreads};
}

DispatchShape activate_shape(const op::Activate& call) {
  return {.kernel = Kernel::activate_rows,
          .constants = {.activation = static_cast<std::int32_t>(call.activation.kind)},
          .groups = {extent(call.rows, "rows"), 1, 1},
          .threads = kRowThreads};
}

DispatchShape combine_shape(const op::Combine& call) {
  return {.kernel = Kernel::combine_rows,
          .constants = {.output = input_constant(call.out.dtype)},
          .groups = {extent(ceil_div(call.out.cols, kRowThreads), "columns"),
                     extent(call.routing.num_tokens, "tokens"), 1},
          .threads = kRowThreads};
}

DispatchShape shared_routing_shape(std::int64_t num_tokens) {
  return {.kernel = Kernel::shared_routing,
          .groups = {extent(ceil_div(num_tokens, kRowThreads), "tokens"), 1, 1},
          .threads = kRowThreads};
}

DispatchShape zero_skipped_shape(std::int64_t rows) {
  return {.kernel = Kernel::zero_skipped,
          .groups = {extent(rows, "rows"), 1, 1},
          .threads = kRowThreads};
}

DispatchShape words_shape(Kernel kernel, std::int64_t words) {
  return {.kernel = kernel,
          .groups = {extent(ceil_div(words, kRowThreads), "words"), 1, 1},
          .threads = kRowThreads};
}

DispatchShape gemm_tiles_shape(const RowMap& map) {
  return {.kernel = Kernel::gemm_tiles,
          .constants = {.tile = tile_cols(map)},
          .groups = {extent(map.num_segments + std::int64_t{1}, "segments"), 1, 1},
          .threads = kSimdWidth};
}

DispatchShape expert_shape(const op::Gemm& call, Product product) {
  const WeightRef& weight = call.weight.ref;
  const RowMap& map = call.map;
  DispatchShape shape{.kernel = expert_kernel(weight.type, loop_of(product, call.precision)),
                      .constants = {.input = input_constant(call.in.dtype)}};
  if (product == Product::Gemv) {
    shape.groups = {extent(ceil_div(weight.rows, kGemvRows), "rows"),
                    extent(map.num_segments, "segments"), 1};
    shape.threads = kGemvThreads;
    return shape;
  }
  shape.constants.tile = tile_cols(map);
  // For an indirect grid this is the most: the device writes the number of tiles there are.
  const std::int64_t tiles = product == Product::GemmDirect
                                 ? std::int64_t{map.num_segments} * tiles_per_segment(map)
                                 : map.limit;
  shape.groups = {extent(tiles, "tiles"), extent(ceil_div(weight.rows, kGemmRows), "rows"), 1};
  shape.threads = kGemmThreads;
  return shape;
}

DispatchShape gate_up_shape(const op::GateUp& call) {
  return {.kernel = expert_kernel(call.gate.ref.type, ExpertLoop::GateUp),
          .constants = {.input = input_constant(call.in.dtype),
                        .activation = static_cast<std::int32_t>(call.activation.kind)},
          .groups = {extent(ceil_div(call.gate.ref.rows, kGateUpRows), "rows"),
                     extent(call.map.num_segments, "segments"), 1},
          .threads = kGemvThreads};
}

}  // namespace moesaic::metal
