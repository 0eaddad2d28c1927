// INT4 groups of GPTQ and AWQ on Metal, where kernels read the host's panels: whole layers, and the
// products over Marlin stacks, against f64. On a Mac the same tests run on the real device.

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>

#include "gptq_checkpoint.hpp"
#include "int4_role.hpp"
#include "metal_forward.hpp"

namespace moesaic::testing {
namespace {

class MetalInt4 : public MetalForward {
 protected:
  LoadOptions here() const {
    LoadOptions options;
    options.backend = &backend();
    return options;
  }
  ConstTensorView rows(const DeviceArray<float>& array, std::int64_t cols) const {
    const auto size = static_cast<std::int64_t>(array.size());
    return {array.data(), DType::F32, {size / cols, cols}, device()};
  }
  TensorView out_rows(const DeviceArray<float>& array, std::int64_t cols) const {
    const auto size = static_cast<std::int64_t>(array.size());
    return {array.data(), DType::F32, {size / cols, cols}, device()};
  }
};

Doubles product_f64(const Checkpoint& c, std::int32_t expert, const Floats& x, std::int64_t row) {
  const Doubles in(x.begin() + row * c.k, x.begin() + (row + 1) * c.k);
  return apply_f64(c.matrices[static_cast<std::size_t>(expert)], in.data());
}
Floats row_of(const Floats& values, std::int64_t row, std::int64_t cols) {
  return {values.begin() + row * cols, values.begin() + (row + 1) * cols};
}

TEST_F(MetalInt4, LayersOfEveryKindOfGroups) {
  const Int4Recipe recipes[] = {
      {.group_size = 128},
      {.group_size = 32, .zeros = true, .scale_f32 = true},
      {.group_size = 64, .zeros = true, .order = Int4Recipe::Shared},
      {.group_size = 32, .order = Int4Recipe::PerExpert},
      {.group_size = -1, .scale_f32 = true},
  };
  for (const Int4Recipe& recipe : recipes) {
    Case c{"int4", 1, 256, 384, 4, 2, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q8_0};
    TestLayer layer(c);
    layer.gate = make_int4_role(c.experts, c.intermediate, c.hidden, recipe, 1, false);
    layer.up = make_int4_role(c.experts, c.intermediate, c.hidden, recipe, 2, true);
    layer.down = make_int4_role(c.experts, c.hidden, c.intermediate, recipe, 3, false);
    const ExpertStack stack = layer.stack(&backend());
    EXPECT_EQ(stack.up().ref.layout, WeightLayout::Panels);
    EXPECT_EQ(stack.up().ref.base, layer.up.weights.ref.base) << "read where they lie";
    for (const std::int64_t tokens : {1, 5, 17}) {
      SCOPED_TRACE(std::to_string(recipe.group_size) + ", " + std::to_string(tokens) + " tokens");
      Case sized = c;
      sized.tokens = tokens;
      const Floats x = random_values(tokens * c.hidden, 3);
      const Floats logits = random_values(tokens * c.experts, 4);
      Tuning tuning;
      tuning.precision = Precision::Exact;
      const Result got = forward(layer, stack, router_of(sized), x, logits, tuning);
      EXPECT_LE(rel_l2(got.y, forward_f64(layer, x, route_on_host(sized, logits))), kF32Bound);
    }
    EXPECT_EQ(decode_role(stack.up()), layer.up.decoded) << "the host reads them too";
  }
}

// Gate and up of one Marlin stack share memory and the order of columns, and go through one kernel.
TEST_F(MetalInt4, LayersOfMarlinStacks) {
  for (const Order order : {Order::Plain, Order::Random}) {
    const std::int64_t hidden = 128, intermediate = 40;  // up begins inside a panel
    const auto make = [&](std::int64_t k, std::int64_t n, std::uint32_t seed) {
      return make_checkpoint({.experts = 3, .k = k, .n = n, .group_size = 32, .order = order},
                             seed);
    };
    const Checkpoint gate_up = make(hidden, 2 * intermediate, 1),
                     down = make(intermediate, hidden, 2);
    const auto stack_of = [](const Checkpoint& c) {
      return std::make_shared<const MarlinExpertStack>(MarlinExpertStack::from_gptq(c.tensors()));
    };
    const auto pair = std::pair(stack_of(gate_up), stack_of(down));
    auto gone =
        std::make_unique<ExpertStack>(ExpertStack::from_marlin(pair.first, pair.second, here()));
    const ExpertStack there = ExpertStack::from_marlin(pair.first, pair.second, here());
    gone.reset();
    const ExpertStack host = ExpertStack::from_marlin(pair.first, pair.second);
    TestLayer layer(
        {"marlin", 3, hidden, intermediate, 3, 2, QuantType::F32, QuantType::F32, QuantType::F32});
    layer.gate.decoded = decode_role(host.gate());
    layer.up.decoded = decode_role(host.up());
    layer.down.decoded = decode_role(host.down());
    const Floats x = random_values(3 * hidden, 3), logits = random_values(3 * 3, 4);
    Tuning tuning;
    tuning.precision = Precision::Exact;
    const Result got = forward(layer, there, router_of(layer.shape), x, logits, tuning);
    EXPECT_LE(rel_l2(got.y, forward_f64(layer, x, route_on_host(layer.shape, logits))), kF32Bound);
    EXPECT_EQ(there.report().roles.front().decision, "referenced");
  }
}

TEST_F(MetalInt4, ProductsOfDispatches) {
  const Checkpoint c = make_checkpoint(
      {.experts = 2, .k = 160, .n = 80, .group_size = 32, .order = Order::Permuted});
  const MarlinExpertStack stack = MarlinExpertStack::from_gptq(c.tensors()).to(here());
  EXPECT_EQ(stack.device(), device());
  // Few rows each; then more segments than experts, each worth a tile of its own.
  std::vector<MarlinDispatch> few{{1, 4, 0, 1}, {0, 0, 2, 2}}, many;
  for (std::int64_t i = 0; i < 7; ++i) many.push_back({1, 6 * i, 6 * (6 - i), 6});
  const Floats x = random_values(42 * c.k, 5);
  const auto in = array(x);
  Context context = this->context();
  for (const auto& dispatches : {few, many}) {
    const auto out = poisoned<float>(42 * c.n);
    stack.gemm_phase_batched(context, rows(in, c.k), dispatches, out_rows(out, c.n),
                             Precision::Exact);
    backend().synchronize(context);
    const Floats all = out.host();
    for (const MarlinDispatch& d : dispatches) {
      for (std::int64_t i = 0; i < d.rows; ++i) {
        EXPECT_LE(
            rel_l2(row_of(all, d.out_row + i, c.n), product_f64(c, d.expert, x, d.in_row + i)),
            kF32Bound);
      }
    }
  }
}

TEST_F(MetalInt4, ProductsOfAlignedBlocks) {
  const Checkpoint c = make_checkpoint({.experts = 3, .k = 64, .n = 48, .group_size = 32});
  const MarlinExpertStack stack = MarlinExpertStack::from_gptq(c.tensors()).to(here());
  Routing routing(6, 2);
  const std::int32_t ids[] = {0, 2, 2, 1, -1, 2, 2, 0, 1, 2, 2, -1};
  std::ranges::copy(ids, routing.topk_ids().begin());
  const Floats x = random_values(6 * c.k, 5);
  const auto in = array(x);
  const auto out = poisoned<float>(12 * c.n);
  Context context = this->context();
  stack.gemm_phase_vllm(context, rows(in, c.k),
                        AlignedRouting::build(routing, c.experts, 16, RowSpace::TokenPairs), 2,
                        out_rows(out, c.n), Precision::Exact);
  backend().synchronize(context);
  const Floats all = out.host();
  for (std::int64_t pair = 0; pair < 12; ++pair) {
    const Floats got = row_of(all, pair, c.n);
    if (ids[pair] < 0) {
      EXPECT_EQ(got, Floats(static_cast<std::size_t>(c.n), 0.0F)) << pair;
    } else {
      EXPECT_LE(rel_l2(got, product_f64(c, ids[pair], x, pair / 2)), kF32Bound) << pair;
    }
  }
}

TEST_F(MetalInt4, OneExpertAsALinearLayer) {
  const Checkpoint c = make_checkpoint({.experts = 2, .k = 64, .n = 128, .order = Order::Random});
  const MarlinExpertStack stack = MarlinExpertStack::from_gptq(c.tensors()).to(here());
  const MarlinLinear linear = stack.make_expert_linear(1, 64, 64, Floats(64, 0.5F));
  const Floats x = random_values(2 * c.k, 5);
  const auto in = array(x);
  const auto out = poisoned<float>(2 * 64);
  Context context = this->context();
  linear.forward(context, rows(in, c.k), out_rows(out, 64), Precision::Exact);
  backend().synchronize(context);
  const Floats all = out.host();
  for (std::int64_t row = 0; row < 2; ++row) {
    Doubles want = product_f64(c, 1, x, row);
    want.erase(want.begin(), want.begin() + 64);
    for (double& v : want) v += 0.5;
    EXPECT_LE(rel_l2(row_of(all, row, 64), want), kF32Bound);
  }
}

}  // namespace
}  // namespace moesaic::testing
