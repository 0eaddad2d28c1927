// Layers of INT4 group weights: every path on every instruction set beside f64, and what such a
// stack knows of its parts.

#include <gtest/gtest.h>

#include <cmath>
#include <memory>

#include "cpu/isa.hpp"
#include "gptq_checkpoint.hpp"
#include "moesaic/marlin_stack.hpp"
#include "run_case.hpp"

namespace moesaic::testing {
namespace {

constexpr double kReferenceBound = 1e-5;
constexpr double kExactBound = 1e-4;
constexpr double kFastBound = 2e-2;

/// Two Marlin stacks as a layer.
struct MarlinLayer {
  Checkpoint gate_up, down;
  std::shared_ptr<const MarlinExpertStack> gate_up_stack, down_stack;

  MarlinLayer(const Recipe& gate_up_recipe, const Recipe& down_recipe)
      : gate_up(make_checkpoint(gate_up_recipe, 3)), down(make_checkpoint(down_recipe, 4)) {
    const auto load = [](const Checkpoint& c) {
      return std::make_shared<const MarlinExpertStack>(MarlinExpertStack::from_gptq(c.tensors()));
    };
    gate_up_stack = load(gate_up);
    down_stack = load(down);
  }
  ExpertStack stack(const LoadOptions& options = {}) const {
    return ExpertStack::from_marlin(gate_up_stack, down_stack, options);
  }
  Doubles forward_f64(const Floats& x, const Routing& routing) const {
    const std::int64_t hidden = gate_up.k, intermediate = down.k;
    Doubles y(x.size());
    for (std::size_t pair = 0; pair < routing.topk_ids().size(); ++pair) {
      const std::int32_t e = routing.topk_ids()[pair];
      if (e < 0) continue;
      const auto t = static_cast<std::int64_t>(pair) / routing.top_k();
      const Doubles row(x.begin() + t * hidden, x.begin() + (t + 1) * hidden);
      const Doubles gu = apply_f64(gate_up.matrices[static_cast<std::size_t>(e)], row.data());
      Doubles h;
      for (std::int64_t i = 0; i < intermediate; ++i) {
        const double gate = gu[static_cast<std::size_t>(i)];
        h.push_back(gate / (1.0 + std::exp(-gate)) *
                    gu[static_cast<std::size_t>(intermediate + i)]);
      }
      const Doubles d = apply_f64(down.matrices[static_cast<std::size_t>(e)], h.data());
      for (std::int64_t i = 0; i < hidden; ++i) {
        y[static_cast<std::size_t>(t * hidden + i)] +=
            static_cast<double>(routing.topk_weights()[pair]) * d[static_cast<std::size_t>(i)];
      }
    }
    return y;
  }
};

void check_layer(const MarlinLayer& marlin, std::int64_t tokens, std::int32_t top_k,
                 RoutingShape routing_shape, bool every_isa = true) {
  const ExpertStack stack = marlin.stack();
  const std::int64_t hidden = marlin.gate_up.k;
  Routing routing = make_routing(
      int4_case(tokens, hidden, marlin.down.k, marlin.down.experts, top_k, routing_shape));
  const Floats x = random_values(tokens * hidden, 12);
  const Doubles want = marlin.forward_f64(x, routing);
  LayerCase c{.x = rows_of(x, hidden), .routing = routing.view()};
  c.layer.stack = &stack;
  EXPECT_LT(run_reference(c).error(want), kReferenceBound);
  for (const CpuIsa isa : cpu::supported_isas()) {
    if (!every_isa && isa != cpu::best_isa()) continue;
    for (const Precision precision : {Precision::Exact, Precision::Fast}) {
      Tuning tuning;
      tuning.cpu_isa = isa;
      tuning.precision = precision;
      tuning.poison = true;
      const auto run = [&](const Way& way) {
        Context context(backend_for(Device{}), tuning, ThreadPool::shared(2));
        return run_case(context, c, way);
      };
      const Outcome first = run(kWays[0]);
      EXPECT_LT(first.error(want), precision == Precision::Exact ? kExactBound : kFastBound)
          << name_of(isa);
      for (const Way& way : kWays) {
        EXPECT_EQ(run(way).values(), first.values()) << way.name;
        if (way.gemm != GemmMode::Aligned) continue;
        for (const std::int32_t block : kBlockSizes) {
          tuning.block_size = block;
          EXPECT_EQ(run(way).values(), first.values()) << way.name << " " << block;
        }
        tuning.block_size = Tuning{}.block_size;
      }
    }
  }
}

TEST(MarlinLayers, AgreeOnEveryPath) {
  check_layer({{.experts = 5, .k = 128, .n = 128, .group_size = 32},
               {.experts = 5, .k = 64, .n = 128, .group_size = 32}},
              9, 3, RoutingShape::Skipped);
  // Act-order: shared above, one per expert below, groups of any size.
  check_layer({{.experts = 4, .k = 256, .n = 192, .group_size = 64, .order = Order::Permuted},
               {.experts = 4,
                .k = 96,
                .n = 256,
                .group_size = 32,
                .order = Order::Random,
                .shared_order = false}},
              17, 2, RoutingShape::Zipf);
  // Columns that fill no panel, rows that fill no step.
  check_layer({{.experts = 3,
                .k = 72,
                .n = 48,
                .group_size = 32,
                .order = Order::Random,
                .f32_scales = true},
               {.experts = 3, .k = 24, .n = 72, .group_size = -1, .zeros = false}},
              7, 2, RoutingShape::AllToOne);
  check_layer(
      {{.experts = 1, .k = 64, .n = 64, .group_size = 128, .format = CheckpointFormat::Awq},
       {.experts = 1, .k = 32, .n = 64, .group_size = 32, .format = CheckpointFormat::GptqV2}},
      1, 1, RoutingShape::Uniform);
}

TEST(MarlinLayers, AModelsShapeAgreesOnEveryPath) {
  check_layer({{.experts = 8, .k = 2048, .n = 1536, .group_size = 128, .order = Order::Permuted},
               {.experts = 8, .k = 768, .n = 2048, .group_size = 128}},
              6, 2, RoutingShape::Uniform, false);
}

TEST(MarlinLayers, ScratchHoldsPaddedGroups) {
  // 32 groups of 8 columns take 32 steps: four times as many columns in memory.
  const Checkpoint c = make_checkpoint({.experts = 2, .k = 256, .n = 40, .group_size = 8});
  const MarlinExpertStack stack = MarlinExpertStack::from_gptq(c.tensors());
  EXPECT_EQ(stack.weights().ref.int4.packed_cols, 1024);
  Context context = cpu_context();
  const Floats x = random_values(6 * 256, 5);
  const std::vector<std::int32_t> ids = {0, 1, 1, 0, 1, 1};
  const Floats out =
      run_case(context, {.weights = &stack.weights(), .x = dense_rows(x, 256), .experts = ids});
  Doubles want;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const Doubles row(x.begin() + static_cast<std::int64_t>(i) * 256,
                      x.begin() + static_cast<std::int64_t>(i + 1) * 256);
    const Doubles y = apply_f64(c.matrices[static_cast<std::size_t>(ids[i])], row.data());
    want.insert(want.end(), y.begin(), y.end());
  }
  EXPECT_LT(rel_l2(out, want), kExactBound);
  // The forward asks for as much.
  const Backend& backend = context.backend();
  EXPECT_GT(backend.scratch_bytes({{2, 256, 40}, 6, 1, 6, 1024}),
            backend.scratch_bytes({{2, 256, 40}, 6, 1, 6}));
  const MarlinLayer layer({.experts = 2, .k = 256, .n = 64, .group_size = 8},
                          {.experts = 2, .k = 32, .n = 256, .group_size = 8});
  const MarlinLayer even({.experts = 2, .k = 256, .n = 64, .group_size = 32},
                         {.experts = 2, .k = 32, .n = 256, .group_size = 32});
  const ExpertStack padded = layer.stack(), packed = even.stack();
  LayerRef a, b;
  a.stack = &padded;
  b.stack = &packed;
  EXPECT_GT(workspace_bytes(context, a, 2, 8), workspace_bytes(context, b, 2, 8));
  check_layer(layer, 8, 2, RoutingShape::Uniform);
}

TEST(MarlinLayers, StackKnowsItsMarlinStacks) {
  const MarlinLayer layer({.experts = 2, .k = 64, .n = 64}, {.experts = 2, .k = 32, .n = 64});
  LoadOptions options;
  options.backend = &backend_for(Device{});
  const ExpertStack stack = layer.stack(options);
  EXPECT_STREQ(stack.kind(), "marlin");
  EXPECT_EQ(stack.marlin(Role::Gate), layer.gate_up_stack);
  EXPECT_EQ(stack.marlin(Role::Up), layer.gate_up_stack);
  EXPECT_EQ(stack.marlin(Role::Down), layer.down_stack);
  EXPECT_EQ(stack.gate().ref.base, layer.gate_up_stack->weights().ref.base);  // no copy
  // Codes, f16 scales and zero points of [64 x 64] and [32 x 64].
  EXPECT_EQ(stack.bytes_per_expert(), 64 * 64 / 2 + 2 * 64 * 3 + 32 * 64 / 2 + 1 * 64 * 3);
  options.dequantize = QuantType::F32;
  const ExpertStack dense = layer.stack(options);
  EXPECT_STREQ(dense.kind(), "stacked");
  EXPECT_EQ(dense.marlin(Role::Down), nullptr);
  Floats a(64), b(64);
  for (const Role role : {Role::Gate, Role::Up}) {
    for (std::int64_t row = 0; row < 32; ++row) {
      dequantize_expert_row(stack.role(role).ref, 1, row, a.data());
      dequantize_expert_row(dense.role(role).ref, 1, row, b.data());
      EXPECT_EQ(a, b);
    }
  }
  EXPECT_THROW(ExpertStack::from_marlin(layer.down_stack, layer.gate_up_stack), ShapeError);
  // INT4 bytes have no form of their own.
  const std::vector<std::byte> bytes(2 * 32 * 64 / 2);
  const ExpertStack::EncodedRole up{QuantType::INT4, 2,      32, 64, bytes.data(),
                                    bytes.size(),    nullptr};
  const ExpertStack::EncodedRole down{QuantType::INT4, 2,      64, 32, bytes.data(),
                                      bytes.size(),    nullptr};
  EXPECT_THROW(ExpertStack::from_encoded(up, up, down), UnsupportedError);
  EXPECT_THROW(ExpertStack::from_marlin(layer.gate_up_stack, nullptr), ShapeError);
  const MarlinLayer more({.experts = 3, .k = 64, .n = 64}, {.experts = 3, .k = 32, .n = 64});
  EXPECT_THROW(ExpertStack::from_marlin(layer.gate_up_stack, more.down_stack), ShapeError);
}

}  // namespace
}  // namespace moesaic::testing
