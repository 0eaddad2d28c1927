// The rarer parts of a layer, one by one and together: every path against f64 and the reference.

#include "layer_parts.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "count_allocations.hpp"
#include "fake_backend.hpp"
#include "run_case.hpp"

namespace moesaic::testing {
namespace {

using namespace parts;

/// A call whose output the test holds, to see what an error leaves of it.
void run(Context& context, const MoeLayer& layer, const ForwardIo& io, const Way& way = kWays[0]) {
  Workspace workspace(workspace_bytes(context, layer, kTopK, io.x.dim(0)));
  forward(context, layer, io, workspace, way);
}

class Parts : public ::testing::TestWithParam<Spec> {};
INSTANTIATE_TEST_SUITE_P(Specs, Parts, ::testing::ValuesIn(kSpecs),
                         [](const auto& info) { return std::string(info.param.name); });
INSTANTIATE_TEST_SUITE_P(CpuSpecs, Parts, ::testing::ValuesIn(kCpuSpecs),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(Parts, EveryWayAgreesWithF64AndTheReference) {
  const Model m(GetParam());
  const MoeLayer layer = m.layer();
  for (const std::int64_t tokens : {1, 2, 9}) {
    Batch batch(m, tokens);
    std::vector<Chosen> chosen;
    const Doubles want = batch.expected(m, chosen);
    LayerCase c = batch.on(m, layer);
    const Outcome reference = run_reference(c);
    EXPECT_LE(reference.error(want), 1e-5) << tokens;
    const Routing& routed = reference.routing;
    for (std::size_t pair = 0; pair < routed.topk_ids().size(); ++pair) {
      EXPECT_EQ(routed.topk_ids()[pair], chosen[pair / kTopK].ids[pair % kTopK]);
      EXPECT_NEAR(static_cast<double>(routed.topk_weights()[pair]),
                  chosen[pair / kTopK].weights[pair % kTopK], 1e-5);
    }
    for (const Way& way : kWays) {
      SCOPED_TRACE(std::string(way.name) + ", " + std::to_string(tokens) + " tokens");
      Context context = poisoned_context(backend_for(Device{}), Precision::Exact);
      Outcome got = run_case(context, c, way);
      EXPECT_LE(got.error(want), 2e-3);
      EXPECT_TRUE(std::ranges::equal(got.routing.topk_ids(), routed.topk_ids()));

      // That routing from outside gives the same bits.
      LayerCase ready{.layer = layer, .x = c.x, .routing = got.routing.view()};
      EXPECT_EQ(run_case(context, ready, way).values(), got.values());

      // Added to an output of another type, it is rounded once.
      const Floats old = random_values(tokens * kHidden, 33);
      ready.out = DType::F16;
      ready.added_to = &old;
      const Outcome half = run_case(context, ready, way);
      const Floats sums = half.values(), alone = got.values();
      for (std::size_t i = 0; i < sums.size(); ++i) {
        const float sum = half.before[i] + alone[i];
        EXPECT_NEAR(sums[i], sum, 1e-3F * (1.0F + std::fabs(sum)));
      }
    }
  }
}

TEST_P(Parts, WorkspaceIsExactAndCallsDoNotAllocate) {
  const Model m(GetParam());
  const MoeLayer layer = m.layer();
  Batch batch(m, 5);
  Context context = poisoned_context(backend_for(Device{}), Precision::Exact);
  const std::size_t bytes = workspace_bytes(context, layer, kTopK, 5);
  GuardedMemory memory(bytes);
  Workspace enough(memory.data(), bytes), short_of_one(memory.data(), bytes - 1);
  Tensor y(DType::F32, 5, kHidden);
  const ForwardIo io = batch.io(m, y.view());
  EXPECT_THROW(moe_forward(context, layer, io, short_of_one), WorkspaceError);
  EXPECT_TRUE(std::isnan(y.get(0)));
  moe_forward(context, layer, io, enough);
  EXPECT_TRUE(memory.guard_untouched());
  const Floats first = y.values();
  const LayerRef ref(layer);
#if defined(MOESAIC_COUNTS_MALLOC)
  EXPECT_EQ(test::count_allocations([&] { moe_forward(context, ref, io, enough); }), 0);
#endif
  EXPECT_EQ(y.values(), first);
}

TEST_P(Parts, BackendsWithoutThemSayWhich) {
  const Model m(GetParam());
  const FakeBackend fake;
  const MoeLayer layer = m.layer(fake);
  Batch batch(m, 3);
  Tensor y(DType::F32, 3, kHidden);
  Context context = poisoned_context(fake, Precision::Exact, 1);
  const Spec& s = m.spec;
  const bool rare = s.weight_on == WeightOn::Input || s.identity > 0 || s.latent || s.input_norm ||
                    s.router_input == RouterInput::Norm || s.select_on == SelectOn::Given ||
                    s.low_rank;
  if (!rare) {
    EXPECT_NO_THROW(run(context, layer, batch.io(m, y.view())));
    return;
  }
  try {
    run(context, layer, batch.io(m, y.view()));
    ADD_FAILURE() << "ran on a backend that lacks the part";
  } catch (const UnsupportedError& error) {
    EXPECT_NE(std::string(error.what()).find("fake"), std::string::npos) << error.what();
  }
  for (const float v : y.values()) EXPECT_TRUE(std::isnan(v));  // nothing was written
}

template <class E>
std::string error_of(const MoeLayer& layer, const ForwardIo& io) {
  Context context = poisoned_context(backend_for(Device{}), Precision::Exact);
  try {
    run(context, layer, io);
  } catch (const E& error) {
    return error.what();
  }
  return "(no error of this kind)";
}

TEST(PartsErrors, InputsThatDoNotBelong) {
  const Model plain(spec_named("plain")), table(spec_named("table")), given(spec_named("given")),
      separate(spec_named("separate"));
  Batch batch(plain, 2);
  Tensor y(DType::F32, 2, kHidden);
  const auto io = [&](const Model& m) { return batch.io(m, y.view()); };
  const ConstTensorView tokens(batch.token_ids.data(), DType::I32, {2});
  const auto expect = [](const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };

  ForwardIo call = io(plain);
  call.token_ids = tokens;
  expect(error_of<ConfigError>(plain.layer(), call), "this router selects");
  call = io(plain);
  call.routing = {batch.topk_ids.data(), nullptr, 2, kTopK};
  expect(error_of<ConfigError>(plain.layer(), call), "this router selects");

  call = io(table);
  call.token_ids = {};
  expect(error_of<ConfigError>(table.layer(), call), "token_ids or topk_ids");
  batch.token_ids[1] = kVocabulary;
  call = io(table);
  expect(error_of<ShapeError>(table.layer(), call), "token_ids[1]: expected 0 to 10, got 11");
  batch.token_ids[1] = -1;
  expect(error_of<ShapeError>(table.layer(), call), "token_ids[1]");
  call.token_ids = ConstTensorView(batch.token_ids.data(), DType::I32, {1});
  expect(error_of<ShapeError>(table.layer(), call), "token_ids");

  call = io(given);
  call.routing.topk_ids = nullptr;
  expect(error_of<ConfigError>(given.layer(), call), "topk_ids");
  call = io(given);
  call.token_ids = tokens;
  call.routing = {};
  expect(error_of<ConfigError>(given.layer(), call), "token_ids");
  call = io(given);
  call.routing.top_k = kTopK - 1;
  expect(error_of<ShapeError>(given.layer(), call), "topk_ids");
  batch.topk_ids[1] = kExperts;
  expect(error_of<ShapeError>(given.layer(), io(given)), "topk_ids[0, 1]");

  call = io(separate);
  call.router_input = {};
  expect(error_of<ConfigError>(separate.layer(), call), "router_input");
  call.router_input = ConstTensorView(batch.x.data(), DType::F32, {1, kHidden});
  expect(error_of<ShapeError>(separate.layer(), call), "router_input");

  Routing ready(2, kTopK);
  call = io(separate);
  call.routing = ready.view();
  expect(error_of<ConfigError>(separate.layer(), call), "router_input and routing");
  for (const float v : y.values()) EXPECT_TRUE(std::isnan(v));
}

TEST(PartsErrors, LayersWhosePartsDisagree) {
  const auto error = [](const Model& m, auto&& change) {
    MoeConfig config = m.config();
    MoeLayer::Parts parts = m.layer().parts();
    change(config, parts);
    try {
      const MoeLayer layer(config, std::move(parts));
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("(no error)");
  };
  const Model all(spec_named("everything")), table(spec_named("table"));
  const auto expect = [](const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  expect(error(all, [](MoeConfig&, MoeLayer::Parts& p) { p.latent.reset(); }), "latent experts");
  expect(error(all, [](MoeConfig& c, MoeLayer::Parts&) { c.latent_size = 0; }), "hidden_size");
  expect(error(all, [](MoeConfig& c, MoeLayer::Parts&) { c.latent_norm = false; }), "latent norm");
  expect(error(all, [](MoeConfig&, MoeLayer::Parts& p) { p.shared.reset(); }), "shared experts");
  expect(error(all, [](MoeConfig&, MoeLayer::Parts& p) { p.shared->gate.pop_back(); }),
         "shared gate");
  expect(error(all, [](MoeConfig&, MoeLayer::Parts& p) { p.input_norm.weight.clear(); }),
         "input norm");
  expect(error(all, [](MoeConfig&, MoeLayer::Parts& p) { p.router_norm.weight.pop_back(); }),
         "router norm");
  expect(error(all, [](MoeConfig&, MoeLayer::Parts& p) { p.router_weight.pop_back(); }),
         "router_weight");
  expect(error(all, [](MoeConfig& c, MoeLayer::Parts&) { c.router.identity_experts = 1; }),
         "identity");
  expect(error(table, [](MoeConfig&, MoeLayer::Parts& p) { p.token_experts[4] = kExperts; }),
         "token_experts[1, 1]");
  expect(error(table, [](MoeConfig&, MoeLayer::Parts& p) { p.token_experts.pop_back(); }),
         "token_experts");
  expect(
      error(table, [](MoeConfig& c, MoeLayer::Parts&) { c.router.select_on = SelectOn::Scores; }),
      "select_on");
}

TEST(PartsErrors, NoTokensIsLegal) {
  const Model m(spec_named("everything"));
  const MoeLayer layer = m.layer();
  Batch batch(m, 0);
  Tensor y(DType::F32, 0, kHidden);
  for (const Way& way : kWays) {
    Context context = poisoned_context(backend_for(Device{}), Precision::Exact);
    EXPECT_NO_THROW(run(context, layer, batch.io(m, y.view()), way));
  }
}

}  // namespace
}  // namespace moesaic::testing
