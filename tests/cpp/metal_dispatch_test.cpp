// What the Metal backend decides in plain C++: grids, function constants, argument packing, which
// buffer an address belongs to.

#include <gtest/gtest.h>

#include <cstddef>
#include <set>
#include <string>

#include "metal/dispatch_shape.hpp"
#include "metal/host/address_map.hpp"
#include "moesaic/error.hpp"

namespace moesaic::metal {
namespace {

using namespace metal_args;

RowMap pair_map(std::int32_t pairs) {
  static const std::int32_t ids[1] = {};
  return {.num_segments = pairs, .expert = ids, .source_divisor = 2, .limit = pairs};
}
RowMap bucket_map(std::int32_t experts, std::int32_t pairs) {
  static const std::int32_t offsets[1] = {};
  return {.num_segments = experts, .offsets = offsets, .limit = pairs};
}
RowMap block_map(std::int32_t blocks, std::int32_t width, std::int32_t pairs) {
  static const std::int32_t ids[1] = {};
  return {.num_segments = blocks,
          .expert = ids,
          .width = width,
          .source = ids,
          .destination = ids,
          .limit = pairs};
}
InputRows input(DType dtype) {
  return {.data = nullptr, .dtype = dtype, .num_rows = 5, .cols = 256, .outer_stride = 300};
}

TEST(MetalDispatch, KernelNamesAreDistinctAndMechanical) {
  std::set<std::string_view> names;
#define MOESAIC_METAL_KERNEL(name)         \
  EXPECT_EQ(name_of(Kernel::name), #name); \
  names.insert(name_of(Kernel::name));
#include "metal/kernels.inc"
  EXPECT_EQ(names.size(), 12U + 4U * 29U);
}

TEST(MetalDispatch, EveryFormatHasItsFourLoops) {
  int formats = 0;
  for (const QuantTraits& t : quant_table()) {
    if (!has_kernels(t.type)) continue;
    ++formats;
    std::string suffix(t.name);
    for (char& c : suffix) c = static_cast<char>(std::tolower(c));
    EXPECT_EQ(name_of(expert_kernel(t.type, ExpertLoop::Gemv)), "expert_gemv_" + suffix);
    EXPECT_EQ(name_of(expert_kernel(t.type, ExpertLoop::GateUp)), "expert_gate_up_" + suffix);
    EXPECT_EQ(name_of(expert_kernel(t.type, ExpertLoop::Gemm)), "expert_gemm_" + suffix);
    EXPECT_EQ(name_of(expert_kernel(t.type, ExpertLoop::GemmHalf)), "expert_gemm_half_" + suffix);
  }
  EXPECT_EQ(formats, 28);
  EXPECT_EQ(name_of(expert_kernel(QuantType::INT4, ExpertLoop::Gemv)), "expert_gemv_int4");
  EXPECT_EQ(kernel_layout(QuantType::INT4), WeightLayout::Panels);
  EXPECT_EQ(kernel_layout(QuantType::IQ3_S), WeightLayout::Rows);
  for (const QuantType none : {QuantType::F64, QuantType::Q8_1, QuantType::I8}) {
    EXPECT_FALSE(has_kernels(none));
  }
}

TEST(MetalDispatch, ProductFollowsTheRowsPerSegment) {
  EXPECT_EQ(choose_product(pair_map(8)), Product::Gemv);
  EXPECT_EQ(choose_product(bucket_map(128, 256)), Product::Gemv);
  EXPECT_EQ(choose_product(bucket_map(128, 128 * kGemmMinRows - 1)), Product::Gemv);
  EXPECT_EQ(choose_product(bucket_map(128, 128 * kGemmMinRows)), Product::GemmIndirect);
  EXPECT_EQ(choose_product(block_map(4, 16, 40)), Product::GemmDirect);
  EXPECT_EQ(choose_product(block_map(4, 2, 8)), Product::Gemv);
  EXPECT_EQ(choose_product({.num_segments = 1, .width = 100, .limit = 100}), Product::GemmDirect);
  EXPECT_EQ(choose_product({}), Product::Gemv);
  EXPECT_EQ(loop_of(Product::Gemv, Precision::Fast), ExpertLoop::Gemv);
  EXPECT_EQ(loop_of(Product::GemmDirect, Precision::Fast), ExpertLoop::GemmHalf);
  EXPECT_EQ(loop_of(Product::GemmIndirect, Precision::Exact), ExpertLoop::Gemm);
}

TEST(MetalDispatch, TilesAreAsWideAsSegments) {
  EXPECT_EQ(tile_cols(bucket_map(128, 128 * kGemmMinRows)), 8);
  EXPECT_EQ(tile_cols(bucket_map(128, 128 * 8)), 8);
  EXPECT_EQ(tile_cols(bucket_map(128, 128 * 9)), 16);
  EXPECT_EQ(tile_cols(bucket_map(128, 128 * 17)), 32);
  EXPECT_EQ(tile_cols(bucket_map(4, 1 << 20)), 32);
  EXPECT_EQ(tile_cols(block_map(5, 16, 60)), 16);
  EXPECT_EQ(tiles_per_segment(block_map(5, 16, 60)), 1);
  EXPECT_EQ(gemm_tiles_shape(bucket_map(3, 60)).constants.tile, 32);
}

TEST(MetalDispatch, GateAndUpGoTogetherWhereTheyAreAlike) {
  const std::byte bytes[1] = {};
  const std::int32_t order[1] = {};
  op::GateUp call;
  call.map = pair_map(6);
  call.gate.ref.base = call.up.ref.base = bytes;
  call.gate.ref.type = call.up.ref.type = QuantType::INT4;
  EXPECT_TRUE(fuses_gate_up(call));
  call.up.ref.int4.gather = order;
  EXPECT_FALSE(fuses_gate_up(call)) << "x is staged once, in one order";
  call.gate.ref.int4.gather = order;
  EXPECT_TRUE(fuses_gate_up(call));
  call.up.ref.type = QuantType::Q4_K;
  EXPECT_FALSE(fuses_gate_up(call));
  call.up.ref.type = QuantType::INT4;
  call.map = bucket_map(4, 400);
  EXPECT_FALSE(fuses_gate_up(call));
}

TEST(MetalDispatch, GridsCoverEveryRow) {
  const InputRows x = input(DType::BF16);
  op::Gemm call;
  call.map = pair_map(6);
  call.in = x;
  call.weight.ref.type = QuantType::Q4_K;
  call.weight.ref.rows = 3 * kGemmRows + 1;
  const DispatchShape gemv = expert_shape(call, Product::Gemv);
  EXPECT_EQ(gemv.groups, (std::array<std::uint32_t, 3>{(3 * kGemmRows) / kGemvRows + 1, 6, 1}));
  EXPECT_EQ(gemv.threads, kGemvThreads);
  EXPECT_EQ(gemv.constants.input, kTypeBF16);
  call.map = block_map(5, kGemmMaxCols + 1, 60);
  call.precision = Precision::Fast;
  const DispatchShape direct = expert_shape(call, Product::GemmDirect);
  EXPECT_EQ(direct.groups, (std::array<std::uint32_t, 3>{10, 4, 1}));
  EXPECT_EQ(direct.kernel, Kernel::expert_gemm_half_q4_k);
  EXPECT_EQ(direct.constants.tile, 32);
  EXPECT_EQ(tiles_per_segment(block_map(5, kGemmMaxCols + 1, 60)), 2);
  op::GateUp both;
  both.map = pair_map(6);
  both.gate.ref.rows = 2 * kGateUpRows + 1;
  EXPECT_EQ(gate_up_shape(both).groups, (std::array<std::uint32_t, 3>{3, 6, 1}));

  EXPECT_EQ(bucket_plan_shape(128).groups[0], 129U);
  EXPECT_EQ(align_shape(128).groups[0], 129U);
  EXPECT_EQ(gemm_tiles_shape(bucket_map(7, 9)).groups[0], 8U);
  EXPECT_EQ(router_logits_shape(x, 9).groups, (std::array<std::uint32_t, 3>{3, 5, 1}));
  EXPECT_TRUE(gather_shape(x, 0).empty());
  EXPECT_TRUE(route_shape(0).empty());
  EXPECT_FALSE(bucket_plan_shape(1).empty());
}

TEST(MetalDispatch, TileListHoldsTheWorstCase) {
  // A tile for each entry, whatever the segments are; and one without entries where there is none.
  EXPECT_EQ(tile_scratch_bytes(64), kTileListOffset + 64 * sizeof(GemmTile));
  EXPECT_EQ(tile_scratch_bytes(0), kTileListOffset + sizeof(GemmTile));
  EXPECT_GE(kTileListOffset, sizeof(IndirectGrid));
}

TEST(MetalDispatch, TooLargeGridsAndRoutersAreRefused) {
  EXPECT_THROW(route_shape(std::int64_t{1} << 31), ShapeError);
  RouterConfig config;
  config.num_experts = 512;
  config.top_k = kRouteMaxTopK;
  EXPECT_NO_THROW(check_route(config));
  config.top_k = kRouteMaxTopK + 1;
  EXPECT_THROW(check_route(config), UnsupportedError);
  config.top_k = 1;
  config.num_groups = kRouteMaxGroups + 1;
  EXPECT_THROW(check_route(config), UnsupportedError);
}

TEST(MetalArguments, MapsSayWhichArraysTheyHave) {
  const RowMapArgs pairs = row_map_args(pair_map(6));
  EXPECT_EQ(pairs.flags, static_cast<std::uint32_t>(kHasExpert));
  EXPECT_EQ(pairs.source_divisor, 2);
  EXPECT_EQ(pairs.num_segments, 6);
  EXPECT_EQ(row_map_args(bucket_map(3, 6)).flags, static_cast<std::uint32_t>(kHasOffsets));
  const RowMapArgs blocks = row_map_args(block_map(3, 16, 40));
  EXPECT_EQ(blocks.flags, static_cast<std::uint32_t>(kHasExpert + kHasSource + kHasDestination));
  EXPECT_EQ(blocks.width, 16);
  EXPECT_EQ(blocks.limit, 40);
}

TEST(MetalArguments, WeightsKeep64BitOffsets) {
  RoleRef weights;
  weights.ref.expert_stride = std::int64_t{5} << 32;
  weights.ref.row_stride = 144;
  weights.ref.num_experts = 3;
  weights.ref.rows = 7;
  weights.ref.cols = 256;
  const std::uint64_t base = std::uint64_t{9} << 33;
  WeightArgs args = weight_args(weights, base);
  EXPECT_EQ(args.base, base);
  EXPECT_EQ(args.expert_stride, std::int64_t{5} << 32);
  EXPECT_EQ(args.flags, 0U);
  const float value = 0.0F;
  const std::int32_t slots[3] = {};
  weights.bias = weights.scale = &value;
  weights.ref.slot_map = slots;
  args = weight_args(weights, base);
  EXPECT_EQ(args.flags, static_cast<std::uint32_t>(kHasSlotMap + kHasScale + kHasBias));
  EXPECT_EQ(args.stored_cols, 256);
  weights.ref.row_stride = std::int64_t{1} << 32;
  EXPECT_THROW(weight_args(weights, base), UnsupportedError);
}

TEST(MetalArguments, Int4PanelsAreDescribed) {
  RoleRef weights;
  weights.ref.type = QuantType::INT4;
  weights.ref.cols = 104;
  const std::int32_t order[1] = {};
  weights.ref.int4 = {.packed_cols = 160,
                      .scale_cols = 64,
                      .scale_f32 = true,
                      .zeros = true,
                      .gather = order,
                      .gather_stride = 160};
  const WeightArgs args = weight_args(weights, 0);
  EXPECT_EQ(args.cols, 104);
  EXPECT_EQ(args.stored_cols, 160);
  EXPECT_EQ(args.scale_cols, 64);
  EXPECT_EQ(args.gather_stride, 160);
  EXPECT_EQ(args.flags, static_cast<std::uint32_t>(kHasGather + kInt4ScaleF32 + kInt4HasZeros));
}

TEST(MetalArguments, RoutersAreWrittenDown) {
  RouterConfig config;
  config.num_experts = 8;
  config.top_k = 2;
  config.score = ScoreFunction::Sigmoid;
  config.select_on = SelectOn::Logits;
  config.guard = NormGuard::ClampMin;
  config.guard_eps = 0.5F;
  config.scale = 0.0F;
  config.selection_bias.assign(8, 1.0F);
  op::Route call = route_by(config);
  call.row_stride = 12;
  const RouteArgs args = route_args(call, true);
  EXPECT_EQ(args.row_stride, 12);
  EXPECT_EQ(args.score, 2);
  EXPECT_EQ(args.select_on, 1);
  EXPECT_EQ(args.guard, 2);
  EXPECT_EQ(args.guard_eps, 0.5F);
  EXPECT_EQ(args.scale, 1.0F);
  EXPECT_EQ(args.flags,
            static_cast<std::uint32_t>(kHasSelectionBias + kReportNonfinite + kRenormalize));
}

TEST(MetalArguments, EnumeratorsAreThoseOfTheLibrary) {
  EXPECT_EQ(kSwiGlu, static_cast<int>(ActivationKind::SwiGlu));
  EXPECT_EQ(kSwiGluClampInput, static_cast<int>(ActivationKind::SwiGluClampInput));
  EXPECT_EQ(kSwiGluClampOutput, static_cast<int>(ActivationKind::SwiGluClampOutput));
  EXPECT_EQ(kSwiGluOai, static_cast<int>(ActivationKind::SwiGluOai));
  EXPECT_EQ(kGeGluTanh, static_cast<int>(ActivationKind::GeGluTanh));
  EXPECT_EQ(kReGlu, static_cast<int>(ActivationKind::ReGlu));
  EXPECT_EQ(kGeluTanh, static_cast<int>(ActivationKind::GeluTanh));
  EXPECT_EQ(kReluSquared, static_cast<int>(ActivationKind::ReluSquared));
  EXPECT_EQ(kSiTu, static_cast<int>(ActivationKind::SiTu));
  // As written in kernels/route.metal.
  EXPECT_EQ(static_cast<int>(ScoreFunction::Softmax), 0);
  EXPECT_EQ(static_cast<int>(ScoreFunction::SoftmaxSelected), 1);
  EXPECT_EQ(static_cast<int>(ScoreFunction::Sigmoid), 2);
  EXPECT_EQ(static_cast<int>(SelectOn::Given), 2);
  EXPECT_EQ(static_cast<int>(GroupReduce::Max), 1);
  EXPECT_EQ(static_cast<int>(GroupMask::MinusInfinity), 0);
  EXPECT_EQ(static_cast<int>(NormGuard::AddEps), 1);
  EXPECT_EQ(static_cast<int>(NormGuard::ClampMin), 2);
}

// Both compilers lay a struct out by the natural alignment of its members; these offsets are what
// the Metal compiler computes too.
TEST(MetalArguments, OffsetsAreNatural) {
  EXPECT_EQ(offsetof(WeightArgs, num_experts), 24U);
  EXPECT_EQ(offsetof(WeightArgs, flags), 36U);
  EXPECT_EQ(offsetof(WeightArgs, gather_stride), 48U);
  EXPECT_EQ(offsetof(ExpertGemvArgs, map), 56U);
  EXPECT_EQ(offsetof(ExpertGemvArgs, in), 80U);
  EXPECT_EQ(offsetof(ExpertGateUpArgs, up), 56U);
  EXPECT_EQ(offsetof(ExpertGateUpArgs, activation), 160U);
  EXPECT_EQ(offsetof(ExpertGemmArgs, tiles_per_segment), 104U);
  EXPECT_EQ(offsetof(GemmTilesArgs, num_experts), 24U);
  EXPECT_EQ(offsetof(RouteArgs, flags), 44U);
  EXPECT_EQ(offsetof(ActivateArgs, activation), 16U);
  EXPECT_EQ(offsetof(CombineArgs, flags), 20U);
}

TEST(MetalAddressMap, FindsTheBufferOfAnAddress) {
  AddressMap map;
  std::byte memory[100] = {};
  int one = 0, two = 0;
  EXPECT_FALSE(map.find(memory));
  map.insert(memory, 50, &one, 7);
  map.insert(memory + 50, 50, &two);
  EXPECT_EQ(map.find(memory)->buffer, &one);
  EXPECT_EQ(map.find(memory)->offset, 7U);
  EXPECT_EQ(map.find(memory + 49)->offset, 56U);
  EXPECT_EQ(map.find(memory + 50)->buffer, &two);
  EXPECT_FALSE(map.find(memory + 100));
  EXPECT_FALSE(map.find(memory + 40, 20)) << "no buffer holds all of it";
  map.erase(memory + 50, &two);
  EXPECT_FALSE(map.find(memory + 50));
  EXPECT_TRUE(map.find(memory + 49));
}

TEST(MetalAddressMap, OverlappingRangesKeepTheirBuffers) {
  AddressMap map;
  std::byte memory[100] = {};
  int whole = 0, part = 0;
  map.insert(memory, 100, &whole);
  map.insert(memory + 20, 10, &part);
  map.insert(memory, 100, &part);
  EXPECT_EQ(map.find(memory + 25)->buffer, &part);
  EXPECT_EQ(map.find(memory + 25, 20)->offset, 25U);
  map.erase(memory, &part);
  EXPECT_EQ(map.find(memory + 40)->buffer, &whole);
}

}  // namespace
}  // namespace moesaic::metal
