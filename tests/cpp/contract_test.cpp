// What the forward relies on, on every registered backend that is available and on a fake one. The
// emulated build runs the same file with a CUDA backend beside them (tests/emulation).

#include <gtest/gtest.h>

#include <cstdlib>
#include <optional>
#include <string>

#include "device_array.hpp"
#include "fake_backend.hpp"
#include "layers.hpp"
#include "moesaic/error.hpp"

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
      if (!info.available) continue;
      SCOPED_TRACE(info.name);
      Context context(*backend, Tuning{}, ThreadPool::shared(2));
      body(*backend, context);
      ++count;
    }
    EXPECT_GE(count, 2);
  }
};
/// On a machine that is there for a device, a run that skips it is no pass: MOESAIC_REQUIRE_BACKEND
/// names what must be there, e.g. "metal".
TEST(RequiredBackend, IsAvailable) {
  const char* const name = std::getenv("MOESAIC_REQUIRE_BACKEND");
  if (name == nullptr) return;
  std::string reason = "no such backend";
  for (const auto& backend : backends()) {
    const BackendInfo info = backend->info();
    if (info.name != name) continue;
    if (info.available) return;
    reason = info.reason;
  }
  FAIL() << name << ": " << reason;
}

INSTANTIATE_TEST_SUITE_P(Cases, Contract, ::testing::ValuesIn(cases::kCases),
                         [](const auto& info) { return std::string(info.param.name); });

/// The stack in the backend's memory; nothing where a device says that a type has no kernel.
std::optional<ExpertStack> stack_on(const Backend& backend, const TestLayer& layer) {
  try {
    return layer.stack(&backend);
  } catch (const UnsupportedError& error) {
    EXPECT_NE(backend.device_type(), DeviceType::Cpu) << error.what();
    EXPECT_NE(std::string(error.what()).find("dequantize"), std::string::npos) << error.what();
    return std::nullopt;
  }
}

/// Backend scratch of one call.
DeviceArray<std::byte> scratch_for(const Backend& backend, const Case& c) {
  const std::int64_t pairs = c.tokens * c.top_k;
  return {backend, static_cast<std::int64_t>(backend.scratch_bytes(
                       {{c.experts, c.hidden, c.intermediate}, c.tokens, c.top_k, pairs}))};
}

InputRows rows_of(const DeviceArray<float>& x, std::int64_t rows, std::int64_t cols) {
  return dense_rows(x.data(), DType::F32, rows, cols);
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
      backend.fill(context,
                   {.data = memory, .bytes = static_cast<std::int64_t>(bytes), .value = 0x41});
      backend.copy_on_stream(context, to.data(), memory, bytes);
      backend.synchronize(context);
      EXPECT_EQ(to, std::vector<char>(bytes, 'A'));
      backend.deallocate(memory, bytes);
    }
  });
}

TEST_P(Contract, PreparedWeightsAreSupportedAndNamed) {
  const TestLayer layer(GetParam());
  on_every_backend([&](const Backend& backend, Context& context) {
    const auto stack = stack_on(backend, layer);
    if (!stack) return;
    EXPECT_EQ(stack->device(), backend.device());
    for (const Role role : {Role::Gate, Role::Up, Role::Down}) {
      const WeightRef& ref = stack->role(role).ref;
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
    const DeviceArray<float> in(backend, x);
    const DeviceArray<float> logits(backend, c.tokens * c.experts);
    backend.router_logits(context, {.x = rows_of(in, c.tokens, c.hidden),
                                    .weight = weight.data(),
                                    .num_experts = c.experts,
                                    .logits = logits.data()});
    EXPECT_LE(rel_l2(logits.host(), want), 1e-5);
  });
}

TEST_P(Contract, RouteAndPlansAreThoseOfTheHost) {
  const Case& c = GetParam();
  const std::int64_t pairs = c.tokens * c.top_k;
  RouterConfig config;
  config.num_experts = c.experts;
  config.top_k = c.top_k;
  const Floats logits = random_values(c.tokens * c.experts, 4);
  Routing host;
  route(ConstTensorView(logits.data(), DType::F32, {c.tokens, c.experts}), config, host);
  const BucketPlan plan = BucketPlan::build(host, c.experts);
  on_every_backend([&](const Backend& backend, Context& context) {
    const DeviceArray<float> in(backend, logits);
    const DeviceArray<std::int32_t> ids(backend, pairs);
    const DeviceArray<float> weights(backend, pairs);
    const RoutingView routing{ids.data(), weights.data(), c.tokens, c.top_k};
    const DeviceArray<float> route_scratch(
        backend, backend.route_scratch(config, c.tokens, context.pool().threads()));
    op::Route call = route_by(config);
    call.logits = in.data();
    call.row_stride = c.experts;
    call.out = routing;
    call.scratch = route_scratch.data();
    backend.route(context, call);
    EXPECT_TRUE(std::ranges::equal(ids.host(), host.topk_ids()));
    if (backend.device_type() == DeviceType::Cpu) {
      EXPECT_TRUE(std::ranges::equal(weights.host(), host.topk_weights()));
    } else {
      const Floats want(host.topk_weights().begin(), host.topk_weights().end());
      EXPECT_LE(rel_l2(weights.host(), want), 1e-6);
    }

    const DeviceArray<std::int32_t> offsets(backend, c.experts + 1);
    const DeviceArray<std::int32_t> token(backend, pairs), pair(backend, pairs),
        row(backend, pairs);
    const auto scratch = scratch_for(backend, c);
    const BucketPlanView view{offsets.data(), token.data(), pair.data(), row.data(),
                              scratch.data()};
    backend.bucket_plan(context, {.routing = routing, .num_experts = c.experts, .out = view});
    EXPECT_TRUE(std::ranges::equal(offsets.host(), plan.expert_offsets()));
    EXPECT_TRUE(std::ranges::equal(row.host(), plan.pair_row()));
    const auto same_up_to_last = [&](const std::vector<std::int32_t>& got, auto want) {
      const std::int64_t rows = plan.num_rows();
      return std::equal(got.begin(), got.begin() + rows, want.begin());
    };
    EXPECT_TRUE(same_up_to_last(token.host(), plan.row_token()));
    EXPECT_TRUE(same_up_to_last(pair.host(), plan.row_pair()));
    for (const RowSpace space : {RowSpace::TokenPairs, RowSpace::PackedRows}) {
      const AlignedRouting want = AlignedRouting::build(host, c.experts, 16, space);
      const DeviceArray<std::int32_t> sorted(backend, aligned_capacity(pairs, c.experts, 16));
      const DeviceArray<std::int32_t> blocks(backend, aligned_block_capacity(pairs, c.experts, 16));
      const DeviceArray<std::int32_t> padded(backend, 1);
      backend.align(context, {.plan = view,
                              .num_pairs = pairs,
                              .num_experts = c.experts,
                              .block_size = 16,
                              .block_capacity = aligned_block_capacity(pairs, c.experts, 16),
                              .row_space = space,
                              .out = {sorted.data(), blocks.data(), padded.data()}});
      EXPECT_EQ(padded.host()[0], want.num_post_pad());
      const std::vector<std::int32_t> got = sorted.host();
      EXPECT_TRUE(std::equal(want.sorted_ids().begin(), want.sorted_ids().end(), got.begin()));
      EXPECT_TRUE(std::ranges::equal(blocks.host(), want.block_experts()));
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
    const auto stack = stack_on(backend, layer);
    if (!stack) return;
    const auto scratch = scratch_for(backend, c);
    const DeviceArray<float> in(backend, x);
    const DeviceArray<std::int32_t> ids(
        backend, std::vector<std::int32_t>(routing.topk_ids().begin(), routing.topk_ids().end()));
    const DeviceArray<float> weights(
        backend, Floats(routing.topk_weights().begin(), routing.topk_weights().end()));
    const DeviceArray<float> gate_up(backend, 2 * pairs * c.intermediate);
    const DeviceArray<float> hidden(backend, pairs * c.intermediate);
    const DeviceArray<float> rows(backend, pairs * c.hidden);
    const DeviceArray<float> y(backend, c.tokens * c.hidden);
    RowMap map{.num_segments = static_cast<std::int32_t>(pairs),
               .expert = ids.data(),
               .source_divisor = c.top_k,
               .limit = static_cast<std::int32_t>(pairs)};
    backend.gate_up(context, {.gate = stack->gate().view(),
                              .up = stack->up().view(),
                              .activation = layer.activation,
                              .map = map,
                              .in = rows_of(in, c.tokens, c.hidden),
                              .hidden = hidden.data(),
                              .gate_up = backend.fuses_activation() ? nullptr : gate_up.data(),
                              .scratch = scratch.data()});
    map.source_divisor = 1;
    op::Combine sum;
    sum.rows = rows.data();
    sum.routing = {ids.data(), weights.data(), c.tokens, c.top_k};
    sum.out = {.data = y.data(), .dtype = DType::F32, .cols = c.hidden, .stride = c.hidden};
    backend.down(context, {.weight = stack->down().view(),
                           .map = map,
                           .in = rows_of(hidden, pairs, c.intermediate),
                           .rows = rows.data(),
                           .combine = sum,
                           .scratch = scratch.data()});
    EXPECT_LE(rel_l2(y.host(), want), kExactBound);
  });
}

TEST_P(Contract, GemmLeavesPaddingAlone) {
  const Case& c = GetParam();
  if (c.tokens == 0) return;
  const TestLayer layer(c);
  const Floats x = random_values(c.tokens * c.hidden, 3);
  on_every_backend([&](const Backend& backend, Context& context) {
    const auto stack = stack_on(backend, layer);
    if (!stack) return;
    const auto scratch = scratch_for(backend, c);
    const DeviceArray<float> in(backend, x);
    // Three blocks of 4: one row and padding, a skipped block, nothing but padding.
    const auto pairs = static_cast<std::int32_t>(c.tokens * c.top_k);
    std::vector<std::int32_t> order(12, pairs);
    order[0] = pairs - 1;
    const DeviceArray<std::int32_t> ids(backend, order);
    const DeviceArray<std::int32_t> experts(backend, {c.experts - 1, -1, 0});
    const DeviceArray<float> y(backend, pairs * c.intermediate);
    backend.expert_gemm(context, {.weight = stack->up().view(),
                                  .map = {.num_segments = 3,
                                          .expert = experts.data(),
                                          .width = 4,
                                          .source = ids.data(),
                                          .destination = ids.data(),
                                          .source_divisor = c.top_k,
                                          .limit = pairs},
                                  .in = rows_of(in, c.tokens, c.hidden),
                                  .out = y.data(),
                                  .scratch = scratch.data()});
    const Doubles row(x.end() - c.hidden, x.end());
    const Doubles want = apply_f64(layer.up, c.experts - 1, row.data());
    const Floats out = y.host();
    const Floats got(out.end() - c.intermediate, out.end());
    EXPECT_LE(rel_l2(got, want), kExactBound);
    EXPECT_TRUE(std::all_of(out.begin(), out.end() - c.intermediate,
                            [](float v) { return std::isnan(v); }));
  });
}

TEST_P(Contract, LinearAssignsAndAdds) {
  Case c = GetParam();
  c.experts = 1;
  const TestLayer layer(c);
  const Floats x = random_values(c.tokens * c.hidden, 3);
  const Floats before = random_values(c.tokens * c.intermediate, 4);
  Doubles want, sum(before.begin(), before.end());
  for (std::int64_t t = 0; t < c.tokens; ++t) {
    const Doubles row(x.begin() + t * c.hidden, x.begin() + (t + 1) * c.hidden);
    const Doubles y = apply_f64(layer.up, 0, row.data());
    want.insert(want.end(), y.begin(), y.end());
  }
  for (std::size_t i = 0; i < want.size(); ++i) sum[i] += want[i];
  on_every_backend([&](const Backend& backend, Context& context) {
    const auto stack = stack_on(backend, layer);
    if (!stack) return;
    const auto scratch = scratch_for(backend, c);
    const DeviceArray<float> in(backend, x), rows(backend, c.tokens * c.intermediate);
    const DeviceArray<std::int32_t> ids(backend, c.tokens);
    const DeviceArray<float> weights(backend, c.tokens);
    const auto run = [&](const DeviceArray<float>& out, bool accumulate) {
      backend.linear(context, {.weight = stack->up().view(),
                               .in = rows_of(in, c.tokens, c.hidden),
                               .out = {out.data(), DType::F32, c.intermediate, c.intermediate},
                               .accumulate = accumulate,
                               .rows = rows.data(),
                               .once = {ids.data(), weights.data(), c.tokens, 1},
                               .scratch = scratch.data()});
    };
    const DeviceArray<float> assigned(backend, c.tokens * c.intermediate), added(backend, before);
    run(assigned, false);
    EXPECT_LE(rel_l2(assigned.host(), want), kExactBound);
    const Floats untouched = rows.host();
    EXPECT_TRUE(std::ranges::all_of(untouched, [](float v) { return std::isnan(v); }));
    run(added, true);
    EXPECT_LE(rel_l2(added.host(), sum), kExactBound);
  });
}

TEST_P(Contract, NormsIdentityExpertsAndTables) {
  const Case& c = GetParam();
  const auto cols = static_cast<std::size_t>(c.hidden);
  const Floats x = random_values(c.tokens * c.hidden, 3), weight = random_values(c.hidden, 4);
  const Floats before = random_values(c.tokens * c.hidden, 5);
  const Routing routing = make_routing(c);
  const auto pairs = routing.topk_ids().size(), top_k = static_cast<std::size_t>(c.top_k);
  // The last half of the experts let x through.
  const std::int32_t first = c.experts / 2;
  Doubles norms(x.size()), sums(before.begin(), before.end());
  for (std::size_t t = 0; t < static_cast<std::size_t>(c.tokens); ++t) {
    double square = 0.0, share = 0.0;
    for (std::size_t i = t * cols; i < (t + 1) * cols; ++i) {
      square += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    }
    for (std::size_t pair = t * top_k; pair < (t + 1) * top_k; ++pair) {
      if (routing.topk_ids()[pair] >= first) {
        share += static_cast<double>(routing.topk_weights()[pair]);
      }
    }
    for (std::size_t i = t * cols; i < (t + 1) * cols; ++i) {
      const auto v = static_cast<double>(x[i]);
      norms[i] = v / std::sqrt(square / static_cast<double>(cols) + 0.5) *
                 static_cast<double>(weight[i % cols]);
      sums[i] += share * v;
    }
  }
  std::vector<std::int32_t> table(3 * top_k), tokens(static_cast<std::size_t>(c.tokens));
  for (std::size_t i = 0; i < table.size(); ++i) table[i] = static_cast<std::int32_t>(7 * i);
  for (std::size_t t = 0; t < tokens.size(); ++t) tokens[t] = static_cast<std::int32_t>(t % 3);

  on_every_backend([&](const Backend& backend, Context& context) {
    const DeviceArray<float> in(backend, x), out(backend, before);
    const DeviceArray<std::int32_t> ids(
        backend, std::vector<std::int32_t>(routing.topk_ids().begin(), routing.topk_ids().end()));
    const DeviceArray<float> weights(
        backend, Floats(routing.topk_weights().begin(), routing.topk_weights().end()));
    if (backend.supports_part(LayerPart::Norms).ok) {
      const DeviceArray<float> normed(backend, c.tokens * c.hidden);
      backend.rms_norm(context, {.x = rows_of(in, c.tokens, c.hidden),
                                 .weight = weight.data(),
                                 .eps = 0.5F,
                                 .out = normed.data()});
      EXPECT_LE(rel_l2(normed.host(), norms), 1e-6);
    }
    if (backend.supports_part(LayerPart::IdentityExperts).ok) {
      backend.add_identity(
          context,
          {.x = rows_of(in, c.tokens, c.hidden),
           .routing = {ids.data(), weights.data(), c.tokens, c.top_k},
           .first = first,
           .count = c.experts - first,
           .out = {.data = out.data(), .dtype = DType::F32, .cols = c.hidden, .stride = c.hidden}});
      EXPECT_LE(rel_l2(out.host(), sums), 1e-6);
    }
    if (backend.supports_part(LayerPart::GivenIds).ok) {
      const DeviceArray<std::int32_t> token_ids(backend, tokens);
      const DeviceArray<std::int32_t> found(backend, static_cast<std::int64_t>(pairs));
      backend.look_up_experts(context, {.table = table.data(),
                                        .num_rows = 3,
                                        .token_ids = token_ids.data(),
                                        .out = {found.data(), nullptr, c.tokens, c.top_k}});
      const std::vector<std::int32_t> got = found.host();
      for (std::size_t p = 0; p < pairs; ++p) {
        EXPECT_EQ(got[p], table[p / top_k % 3 * top_k + p % top_k]) << p;
      }
    }
  });
}

TEST_P(Contract, ProductsOverAHostPlan) {
  const Case& c = GetParam();
  const TestLayer layer(c);
  const Routing routing = make_routing(c);
  const BucketPlan plan = BucketPlan::build(routing, c.experts);
  const std::int64_t pairs = plan.num_pairs();
  const Floats x = random_values(c.tokens * c.hidden, 3);
  const Floats h = random_values(pairs * c.intermediate, 5);
  // In pair order, zeros where nothing is routed.
  const auto expected = [&](const TestRole& role, const Floats& in, std::int32_t pairs_per_row) {
    const WeightRef& ref = role.weights.ref;
    Doubles all;
    for (std::int64_t pair = 0; pair < pairs; ++pair) {
      const std::int32_t expert = routing.topk_ids()[static_cast<std::size_t>(pair)];
      const auto row = in.begin() + pair / pairs_per_row * ref.cols;
      const Doubles y = expert < 0 ? Doubles(static_cast<std::size_t>(ref.rows))
                                   : apply_f64(role, expert, Doubles(row, row + ref.cols).data());
      all.insert(all.end(), y.begin(), y.end());
    }
    return all;
  };
  on_every_backend([&](const Backend& backend, Context& context) {
    const auto stack = stack_on(backend, layer);
    if (!stack) return;
    const Device device = backend.device();
    const DeviceArray<float> in(backend, x), hidden(backend, h);
    const ConstTensorView tokens(in.data(), DType::F32, {c.tokens, c.hidden}, device);
    const auto check = [&](Role role, const ConstTensorView& from, const Doubles& want) {
      const std::int64_t rows = stack->role(role).ref.rows;
      const DeviceArray<float> out(backend, pairs * rows);
      expert_gemm(context, *stack, role, from, plan,
                  {out.data(), DType::F32, {pairs, rows}, device}, Precision::Exact);
      EXPECT_LE(rel_l2(out.host(), want), kExactBound) << name_of(role);
    };
    if (stack->gated()) check(Role::Gate, tokens, expected(layer.gate, x, c.top_k));
    check(Role::Up, tokens, expected(layer.up, x, c.top_k));
    check(Role::Down, {hidden.data(), DType::F32, {pairs, c.intermediate}, device},
          expected(layer.down, h, 1));
  });
}

TEST_P(Contract, RowsThereAndBackOverAHostPlan) {
  const Case& c = GetParam();
  const Routing routing = make_routing(c);
  const BucketPlan plan = BucketPlan::build(routing, c.experts);
  const std::int64_t pairs = plan.num_pairs();
  const Floats x = random_values(c.tokens * c.hidden, 3);
  Floats packed(static_cast<std::size_t>(pairs * c.hidden)), by_pair = packed;
  Doubles sums(x.size());
  for (std::int64_t r = 0; r < plan.num_rows(); ++r) {
    const std::int64_t pair = plan.row_pair()[static_cast<std::size_t>(r)];
    for (std::int64_t i = 0; i < c.hidden; ++i) {
      const float value = x[static_cast<std::size_t>(pair / c.top_k * c.hidden + i)];
      packed[static_cast<std::size_t>(r * c.hidden + i)] = value;
      by_pair[static_cast<std::size_t>(pair * c.hidden + i)] = value;
      sums[static_cast<std::size_t>(pair / c.top_k * c.hidden + i)] +=
          static_cast<double>(routing.topk_weights()[static_cast<std::size_t>(pair)]) *
          static_cast<double>(value);
    }
  }
  Doubles twice = sums;
  for (double& v : twice) v *= 2.0;
  on_every_backend([&](const Backend& backend, Context& context) {
    const Device device = backend.device();
    const DeviceArray<float> in(backend, x), rows(backend, pairs * c.hidden);
    const TensorView packed_rows(rows.data(), DType::F32, {pairs, c.hidden}, device);
    gather_rows(context, {in.data(), DType::F32, {c.tokens, c.hidden}, device}, plan, packed_rows);
    EXPECT_EQ(rows.host(), packed);

    const DeviceArray<float> slots(backend, by_pair), a(backend, c.tokens * c.hidden),
        b(backend, c.tokens * c.hidden);
    const TensorView out_a(a.data(), DType::F32, {c.tokens, c.hidden}, device);
    const TensorView out_b(b.data(), DType::F32, {c.tokens, c.hidden}, device);
    const ConstTensorView in_slots(slots.data(), DType::F32, {c.tokens, c.top_k, c.hidden}, device);
    combine(context, packed_rows, plan, routing, out_a);
    weighted_sum(context, in_slots, routing, out_b);
    EXPECT_LE(rel_l2(a.host(), sums), 1e-6);
    EXPECT_EQ(a.host(), b.host());

    // Pairs that the plan skips add nothing, whatever another routing says of them.
    Routing names_all = routing;
    for (std::int32_t& id : names_all.topk_ids()) id = std::max(id, 0);
    combine(context, packed_rows, plan, names_all, out_a);
    EXPECT_LE(rel_l2(a.host(), sums), 1e-6);

    // The routing in the backend's own memory.
    const DeviceArray<std::int32_t> ids(
        backend, std::vector<std::int32_t>(routing.topk_ids().begin(), routing.topk_ids().end()));
    const DeviceArray<float> weights(
        backend, Floats(routing.topk_weights().begin(), routing.topk_weights().end()));
    const RoutingView there{ids.data(), weights.data(), c.tokens, c.top_k};
    combine(context, packed_rows, plan, there, out_a, true);
    weighted_sum(context, in_slots, there, out_b, true);
    EXPECT_LE(rel_l2(a.host(), twice), 1e-6);
    EXPECT_EQ(a.host(), b.host());
  });
}

TEST_P(Contract, SharedRoutingAndSkippedRows) {
  on_every_backend([](const Backend& backend, Context& context) {
    const DeviceArray<float> logits(backend, {0.0F, 2.0F, -30.0F});
    const DeviceArray<std::int32_t> ids(backend, 3);
    const DeviceArray<float> weights(backend, 3);
    const RoutingView routing{ids.data(), weights.data(), 3, 1};
    backend.shared_routing(context, {.out = routing});
    EXPECT_EQ(weights.host(), Floats(3, 1.0F));
    backend.shared_routing(context, {.logits = logits.data(), .out = routing});
    EXPECT_EQ(ids.host(), std::vector<std::int32_t>(3, 0));
    const Doubles want{0.5, 1.0 / (1.0 + std::exp(-2.0)), 1.0 / (1.0 + std::exp(30.0))};
    EXPECT_LE(rel_l2(weights.host(), want), 1e-6);

    const DeviceArray<std::int32_t> chosen(backend, {-1, 2, -1});
    const DeviceArray<float> rows(backend, Floats(15, 7.0F));
    backend.zero_skipped(
        context,
        {.ids = chosen.data(), .num_experts = 3, .out = rows.data(), .rows = 3, .cols = 5});
    const Floats got = rows.host();
    for (std::size_t i = 0; i < got.size(); ++i) {
      EXPECT_EQ(got[i], i / 5 == 1 ? 7.0F : 0.0F) << i;
    }
  });
}

}  // namespace
}  // namespace moesaic::testing
