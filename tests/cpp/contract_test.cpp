// What the forward relies on, on every registered backend that is available and on a fake one.

#include <gtest/gtest.h>

#include <string>

#include "fake_backend.hpp"
#include "layers.hpp"

namespace moesaic::testing {
namespace {

constexpr double kExactBound = 2e-3;

class Contract : public ::testing::TestWithParam<Case> {
 protected:
  std::shared_ptr<void> registration = register_backend(std::make_shared<FakeBackend>());

  template <class F>
  void on_every_backend(F&& body) {
    int count = 0;
    for (const auto& backend : backends()) {
      const BackendInfo info = backend->info();
      if (!info.available || backend->device_type() != DeviceType::Cpu) continue;
      SCOPED_TRACE(info.name);
      Context context(*backend, Tuning{}, ThreadPool::shared(2));
      body(*backend, context);
      ++count;
    }
    EXPECT_GE(count, 2);
  }
};
INSTANTIATE_TEST_SUITE_P(Cases, Contract, ::testing::ValuesIn(cases::kCases),
                         [](const auto& info) { return std::string(info.param.name); });

/// Backend scratch of one call.
std::vector<std::byte> scratch_for(const Backend& backend, const Case& c) {
  const std::int64_t pairs = c.tokens * c.top_k;
  return std::vector<std::byte>(
      backend.scratch_bytes({{c.experts, c.hidden, c.intermediate}, c.tokens, c.top_k, pairs}) + 64,
      std::byte{0xFF});
}
std::byte* aligned(std::vector<std::byte>& memory) {
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  return memory.data() + (64 - address % 64) % 64;
}

TEST_P(Contract, MemoryIsAlignedAndCopies) {
  on_every_backend([](const Backend& backend, Context& context) {
    for (const std::size_t bytes : {std::size_t{1}, std::size_t{100}, std::size_t{1} << 20}) {
      void* memory = backend.allocate(bytes);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory) % 64, 0U);
      const std::vector<char> from(bytes, 'x');
      std::vector<char> to(bytes, ' ');
      backend.copy(memory, from.data(), bytes);
      backend.copy(to.data(), memory, bytes);
      backend.synchronize(context);
      EXPECT_EQ(from, to);
      backend.deallocate(memory, bytes);
    }
  });
}

TEST_P(Contract, PreparedWeightsAreSupportedAndNamed) {
  const TestLayer layer(GetParam());
  on_every_backend([&](const Backend& backend, Context& context) {
    const ExpertStack stack = layer.stack(&backend);
    for (const Role role : {Role::Gate, Role::Up, Role::Down}) {
      const WeightRef& ref = stack.role(role).ref;
      if (!ref) continue;
      EXPECT_TRUE(backend.supports(ref).ok) << name_of(role);
      EXPECT_FALSE(backend.kernel_name(ref, context.tuning()).empty()) << name_of(role);
    }
  });
}

TEST_P(Contract, ScratchGrowsWithTokens) {
  const Case& c = GetParam();
  on_every_backend([&](const Backend& backend, Context&) {
    std::size_t last = 0;
    for (std::int64_t tokens = 0; tokens < 70; ++tokens) {
      const std::size_t bytes = backend.scratch_bytes(
          {{c.experts, c.hidden, c.intermediate}, tokens, c.top_k, tokens * c.top_k});
      EXPECT_GE(bytes, last) << tokens;
      last = bytes;
    }
  });
}

TEST_P(Contract, RouterLogits) {
  const Case& c = GetParam();
  const Floats x = random_values(c.tokens * c.hidden, 3);
  const Floats weight = random_values(c.experts * c.hidden, 4);
  Doubles want;
  for (std::int64_t t = 0; t < c.tokens; ++t) {
    for (std::int32_t e = 0; e < c.experts; ++e) {
      double sum = 0.0;
      for (std::int64_t i = 0; i < c.hidden; ++i) {
        sum += static_cast<double>(x[static_cast<std::size_t>(t * c.hidden + i)]) *
               static_cast<double>(weight[static_cast<std::size_t>(e * c.hidden + i)]);
      }
      want.push_back(sum);
    }
  }
  on_every_backend([&](const Backend& backend, Context& context) {
    Floats logits(static_cast<std::size_t>(c.tokens * c.experts), kPoison);
    const ConstTensorView view(x.data(), DType::F32, {c.tokens, c.hidden});
    backend.router_logits(context, input_rows(view, "test", "x"), weight.data(), c.experts,
                          logits.data());
    EXPECT_LE(rel_l2(logits, want), 1e-5);
  });
}

TEST_P(Contract, RouteAndPlansAreThoseOfTheHost) {
  const Case& c = GetParam();
  const std::int64_t pairs = c.tokens * c.top_k;
  const auto p = static_cast<std::size_t>(pairs);
  RouterConfig config;
  config.num_experts = c.experts;
  config.top_k = c.top_k;
  const Floats logits = random_values(c.tokens * c.experts, 4);
  Routing host;
  route(ConstTensorView(logits.data(), DType::F32, {c.tokens, c.experts}), config, host);
  const BucketPlan plan = BucketPlan::build(host, c.experts);
  on_every_backend([&](const Backend& backend, Context& context) {
    Routing routing(c.tokens, c.top_k);
    Floats scratch(
        static_cast<std::size_t>(route_scratch_elems(config) * context.pool().threads()));
    backend.route(context, logits.data(), c.experts, config, routing.view(), scratch.data());
    EXPECT_TRUE(std::ranges::equal(routing.topk_ids(), host.topk_ids()));
    EXPECT_TRUE(std::ranges::equal(routing.topk_weights(), host.topk_weights()));

    std::vector<std::int32_t> offsets(static_cast<std::size_t>(c.experts) + 1, -7);
    std::vector<std::int32_t> token(p, -7), pair(p, -7), row(p, -7);
    const BucketPlanView view{offsets.data(), token.data(), pair.data(), row.data()};
    backend.bucket_plan(context, routing.view(), c.experts, view);
    EXPECT_TRUE(std::ranges::equal(offsets, plan.expert_offsets()));
    EXPECT_TRUE(std::ranges::equal(row, plan.pair_row()));
    for (const RowSpace space : {RowSpace::TokenPairs, RowSpace::PackedRows}) {
      const AlignedRouting want = AlignedRouting::build(host, c.experts, 16, space);
      std::vector<std::int32_t> ids(
          static_cast<std::size_t>(aligned_capacity(pairs, c.experts, 16)), -7);
      std::vector<std::int32_t> blocks(
          static_cast<std::size_t>(aligned_block_capacity(pairs, c.experts, 16)), -7);
      std::int32_t padded = -7;
      backend.align(context, view, pairs, c.experts, 16, space,
                    {ids.data(), blocks.data(), &padded});
      EXPECT_EQ(padded, want.num_post_pad());
      EXPECT_TRUE(std::equal(want.sorted_ids().begin(), want.sorted_ids().end(), ids.begin()));
      EXPECT_TRUE(std::ranges::equal(blocks, want.block_experts()));
    }
  });
}

TEST_P(Contract, PhasesFollowTheRowMap) {
  const Case& c = GetParam();
  const TestLayer layer(c);
  const Routing routing = make_routing(c);
  const std::int64_t pairs = c.tokens * c.top_k;
  const Floats x = random_values(c.tokens * c.hidden, 3);
  const Doubles want = forward_f64(layer, x, routing);
  on_every_backend([&](const Backend& backend, Context& context) {
    const ExpertStack stack = layer.stack(&backend);
    std::vector<std::byte> memory = scratch_for(backend, c);
    Floats gate_up(static_cast<std::size_t>(2 * pairs * c.intermediate), kPoison);
    Floats hidden(static_cast<std::size_t>(pairs * c.intermediate), kPoison);
    Floats rows(static_cast<std::size_t>(pairs * c.hidden), kPoison);
    Tensor y(DType::F32, c.tokens, c.hidden);
    Routing own = routing;
    RowMap map{.num_segments = static_cast<std::int32_t>(pairs),
               .expert = own.topk_ids().data(),
               .source_divisor = c.top_k,
               .limit = static_cast<std::int32_t>(pairs)};
    const ConstTensorView view(x.data(), DType::F32, {c.tokens, c.hidden});
    backend.gate_up(context, {.stack = &stack,
                              .activation = layer.activation,
                              .rows = map,
                              .x = input_rows(view, "test", "x"),
                              .hidden = hidden.data(),
                              .gate_up = backend.fuses_activation() ? nullptr : gate_up.data(),
                              .scratch = aligned(memory)});
    map.source_divisor = 1;
    CombineCall sum;
    sum.rows = rows.data();
    sum.routing = own.view();
    sum.out = y.view();
    backend.down(context, {.stack = &stack,
                           .rows = map,
                           .hidden = hidden.data(),
                           .hidden_rows = pairs,
                           .down_rows = rows.data(),
                           .combine = sum,
                           .scratch = aligned(memory)});
    EXPECT_LE(rel_l2(y.values(), want), kExactBound);
  });
}

TEST_P(Contract, GemmLeavesPaddingAlone) {
  const Case& c = GetParam();
  if (c.tokens == 0) return;
  const TestLayer layer(c);
  const Floats x = random_values(c.tokens * c.hidden, 3);
  on_every_backend([&](const Backend& backend, Context& context) {
    const ExpertStack stack = layer.stack(&backend);
    std::vector<std::byte> memory = scratch_for(backend, c);
    // Three blocks of 4: one row and padding, a skipped block, nothing but padding.
    const auto pairs = static_cast<std::int32_t>(c.tokens * c.top_k);
    std::vector<std::int32_t> ids(12, pairs);
    ids[0] = pairs - 1;
    const std::int32_t experts[] = {c.experts - 1, -1, 0};
    Floats out(static_cast<std::size_t>(pairs * c.intermediate), kPoison);
    const ConstTensorView view(x.data(), DType::F32, {c.tokens, c.hidden});
    backend.expert_gemm(context, {.weights = &stack.up(),
                                  .rows = {.num_segments = 3,
                                           .expert = experts,
                                           .width = 4,
                                           .source = ids.data(),
                                           .destination = ids.data(),
                                           .source_divisor = c.top_k,
                                           .limit = pairs},
                                  .in = input_rows(view, "test", "x"),
                                  .out = out.data(),
                                  .scratch = aligned(memory)});
    const Doubles row(x.end() - c.hidden, x.end());
    const Doubles want = apply_f64(layer.up, c.experts - 1, row.data());
    const Floats got(out.end() - c.intermediate, out.end());
    EXPECT_LE(rel_l2(got, want), kExactBound);
    EXPECT_TRUE(std::all_of(out.begin(), out.end() - c.intermediate,
                            [](float v) { return std::isnan(v); }));
  });
}

}  // namespace
}  // namespace moesaic::testing
