#include "cuda/backend/arguments.hpp"

#include <limits>

namespace moesaic::cuda {
namespace {

template <class E>
constexpr bool same(E value, std::int32_t code) {
  return static_cast<std::int32_t>(value) == code;
}
static_assert(same(DType::F32, kF32) && same(DType::F16, kF16) && same(DType::BF16, kBF16));
static_assert(same(ScoreFunction::Softmax, kSoftmax) &&
              same(ScoreFunction::SoftmaxSelected, kSoftmaxSelected) &&
              same(ScoreFunction::Sigmoid, kSigmoid) &&
              same(ScoreFunction::SqrtSoftplus, kSqrtSoftplus));
static_assert(same(SelectOn::Scores, kScores) && same(SelectOn::Logits, kLogits) &&
              same(SelectOn::Given, kGiven));
static_assert(same(GroupReduce::Top2Sum, kTop2Sum) && same(GroupReduce::Max, kMax));
static_assert(same(GroupMask::MinusInfinity, kMinusInfinity) && same(GroupMask::Zero, kZero));
static_assert(same(NormGuard::None, kGuardNone) && same(NormGuard::AddEps, kGuardAddEps) &&
              same(NormGuard::ClampMin, kGuardClampMin));
static_assert(same(RowSpace::TokenPairs, kTokenPairs) && same(RowSpace::PackedRows, kPackedRows));
static_assert(same(UnitHalf::Alone, kAlone) && same(UnitHalf::First, kFirstHalf) &&
              same(UnitHalf::Second, kSecondHalf));

}  // namespace

RowsArgs rows_args(const InputRows& rows) {
  return {.data = rows.data,
          .dtype = static_cast<std::int32_t>(rows.dtype),
          .reserved = 0,
          .num_rows = rows.num_rows,
          .cols = rows.cols,
          .inner_count = rows.inner_count,
          .outer_stride = rows.outer_stride,
          .inner_stride = rows.inner_stride};
}

RowsArgs dense_rows(const void* data, DType dtype, std::int64_t count, std::int64_t cols) {
  return {.data = data,
          .dtype = static_cast<std::int32_t>(dtype),
          .reserved = 0,
          .num_rows = count,
          .cols = cols,
          .inner_count = 1,
          .outer_stride = cols,
          .inner_stride = 0};
}

MapArgs map_args(const RowMap& map) {
  return {.expert = map.expert,
          .offsets = map.offsets,
          .source = map.source,
          .destination = map.destination,
          .num_segments = map.num_segments,
          .width = map.width,
          .source_divisor = map.source_divisor,
          .limit = map.limit};
}

WeightArgs weight_args(const RoleWeights& role) {
  const WeightRef& ref = role.ref;
  return {.base = ref.base,
          .table = reinterpret_cast<const void* const*>(ref.table),
          .slot_map = ref.slot_map,
          .expert_stride = ref.expert_stride,
          .rows = ref.rows,
          .cols = ref.cols,
          .num_experts = ref.num_experts,
          .type = static_cast<std::int32_t>(ref.type),
          .half = static_cast<std::int32_t>(ref.half),
          .zeros = ref.int4.zeros ? 1 : 0,
          .scale_f32 = ref.int4.scale_f32 ? 1 : 0,
          .scale_cols = ref.int4.scale_cols,
          .group_size = ref.int4.group_size,
          .packed_cols = ref.int4.packed_cols,
          .gather = ref.int4.gather,
          .gather_stride = ref.int4.gather_stride,
          .scale = role.device_scale.get(),
          .bias = role.device_bias.get()};
}

ActivationArgs activation_args(const Activation& activation) {
  return {.kind = static_cast<std::int32_t>(activation.kind),
          .limit = activation.limit,
          .alpha = activation.alpha,
          .beta = activation.beta,
          .linear_beta = activation.linear_beta};
}

RouteArgs route_args(const RouterConfig& config) {
  RouteArgs args{};
  args.num_experts = config.num_experts;
  args.top_k = config.top_k;
  args.score = static_cast<std::int32_t>(config.score);
  args.renormalize = config.renormalize ? 1 : 0;
  args.guard = static_cast<std::int32_t>(config.guard);
  args.select_on = static_cast<std::int32_t>(config.select_on);
  args.num_groups = config.num_groups;
  args.groups_used = config.groups_used;
  args.group_reduce = static_cast<std::int32_t>(config.group_reduce);
  args.group_mask = static_cast<std::int32_t>(config.group_mask);
  args.guard_eps = config.guard_eps;
  args.scale = config.scale;
  return args;
}

CombineArgs combine_args(const CombineCall& call) {
  CombineArgs args{};
  args.pair_row = call.pair_row;
  args.topk_ids = call.routing.topk_ids;
  args.topk_weights = call.routing.topk_weights;
  args.out = call.out.data;
  args.out_stride = call.out.stride(0);
  args.num_tokens = call.routing.num_tokens;
  args.hidden_size = call.out.dim(1);
  args.out_dtype = static_cast<std::int32_t>(call.out.dtype);
  args.top_k = call.routing.top_k;
  args.num_experts =
      call.num_experts > 0 ? call.num_experts : std::numeric_limits<std::int32_t>::max();
  args.accumulate = call.accumulate ? 1 : 0;
  return args;
}

}  // namespace moesaic::cuda
