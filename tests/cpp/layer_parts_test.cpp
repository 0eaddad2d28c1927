// The rarer parts of a layer, one by one and together: every path against f64 and the reference.

#include <gtest/gtest.h>

#include <cmath>
#include <optional>
#include <string>

#include "count_allocations.hpp"
#include "fake_backend.hpp"
#include "layers.hpp"

namespace moesaic::testing {
namespace {

constexpr std::int64_t kHidden = 96, kWidth = 64, kSharedWidth = 32, kLatent = 32, kVocabulary = 11;
constexpr std::int32_t kExperts = 6, kTopK = 3;
constexpr float kEps = 1e-3F;

/// What a layer under test has.
struct Spec {
  const char* name;
  ActivationKind activation = ActivationKind::SwiGlu;
  bool epilogue = false;
  SharedKind shared = SharedKind::None;
  bool shared_clamped = false;
  WeightOn weight_on = WeightOn::Output;
  std::int32_t identity = 0;
  bool latent = false, latent_norm = false, input_norm = false;
  RouterInput router_input = RouterInput::Experts;
  SelectOn select_on = SelectOn::Scores;
  bool table = false;
};

void PrintTo(const Spec& spec, std::ostream* out) { *out << spec.name; }

constexpr Spec kSpecs[] = {
    {.name = "plain"},
    {.name = "shared", .shared = SharedKind::Plain},
    {.name = "shared_gated_clamped", .shared = SharedKind::SigmoidGated, .shared_clamped = true},
    {.name = "input_weights", .weight_on = WeightOn::Input},
    {.name = "input_weights_epilogue",
     .epilogue = true,
     .shared = SharedKind::Plain,
     .weight_on = WeightOn::Input},
    {.name = "input_weights_ungated",
     .activation = ActivationKind::ReluSquared,
     .epilogue = true,
     .weight_on = WeightOn::Input},
    {.name = "identity", .identity = 3},
    {.name = "identity_shared_input",
     .shared = SharedKind::Plain,
     .weight_on = WeightOn::Input,
     .identity = 5},
    {.name = "latent",
     .activation = ActivationKind::ReluSquared,
     .shared = SharedKind::Plain,
     .latent = true},
    {.name = "latent_norm",
     .activation = ActivationKind::SiTu,
     .latent = true,
     .latent_norm = true},
    {.name = "input_norm", .input_norm = true},
    {.name = "two_norms",
     .activation = ActivationKind::GeGluTanh,
     .epilogue = true,
     .input_norm = true,
     .router_input = RouterInput::Norm},
    {.name = "separate",
     .activation = ActivationKind::ReGlu,
     .router_input = RouterInput::Separate},
    {.name = "given", .select_on = SelectOn::Given},
    {.name = "table",
     .activation = ActivationKind::SwiGluClampInput,
     .shared = SharedKind::Plain,
     .select_on = SelectOn::Given,
     .table = true},
    {.name = "swiglu_oai", .activation = ActivationKind::SwiGluOai, .epilogue = true},
    {.name = "clamp_output", .activation = ActivationKind::SwiGluClampOutput, .epilogue = true},
    {.name = "gelu", .activation = ActivationKind::GeluTanh, .epilogue = true},
    {.name = "everything",
     .epilogue = true,
     .shared = SharedKind::SigmoidGated,
     .weight_on = WeightOn::Input,
     .identity = 2,
     .latent = true,
     .latent_norm = true,
     .input_norm = true,
     .router_input = RouterInput::Norm},
};

Floats positive_values(std::int64_t count, std::uint32_t seed) {
  Floats values = random_values(count, seed, 0.2F);
  for (float& v : values) v += 1.0F;
  return values;
}

/// A layer with its parts decoded, and inputs for it.
struct Model {
  Spec spec;
  std::int64_t narrow;  ///< hidden size of the experts
  Activation activation, shared_activation;
  TestRole gate, up, down, shared_gate, shared_up, shared_down, latent_down, latent_up;
  Floats router_weight, shared_router, input_norm, router_norm, latent_norm;
  std::vector<std::int32_t> table;

  explicit Model(const Spec& s)
      : spec(s),
        narrow(s.latent ? kLatent : kHidden),
        router_weight(random_values((kExperts + s.identity) * kHidden, 4, 0.3F)) {
    activation.kind = s.activation;
    activation.limit = 1.5F;
    activation.beta = 2.0F;
    activation.linear_beta = 3.0F;
    shared_activation = activation;
    if (s.shared_clamped) shared_activation.kind = ActivationKind::SwiGluClampOutput;
    shared_activation.limit = 0.5F;
    if (activation.gated()) gate = role(kExperts, kWidth, narrow, QuantType::Q8_0, 11);
    up = role(kExperts, kWidth, narrow, QuantType::Q8_0, 12);
    down = role(kExperts, narrow, kWidth, QuantType::F16, 13);
    if (s.shared != SharedKind::None) {
      if (shared_activation.gated()) {
        shared_gate = role(1, kSharedWidth, kHidden, QuantType::F32, 14);
      }
      shared_up = role(1, kSharedWidth, kHidden, QuantType::F32, 15);
      shared_down = role(1, kHidden, kSharedWidth, QuantType::Q8_0, 16);
    }
    if (s.shared == SharedKind::SigmoidGated) shared_router = random_values(kHidden, 17, 0.3F);
    if (s.latent) {
      latent_down = make_role(1, kLatent, kHidden, QuantType::Q8_0, 18, false);
      latent_up = make_role(1, kHidden, kLatent, QuantType::F16, 19, false);
    }
    if (s.latent_norm) latent_norm = positive_values(kLatent, 20);
    if (s.input_norm) input_norm = positive_values(kHidden, 21);
    if (s.router_input == RouterInput::Norm) router_norm = positive_values(kHidden, 22);
    for (std::int64_t i = 0; s.table && i < kVocabulary * kTopK; ++i) {
      table.push_back(static_cast<std::int32_t>((i * 5 + i / kTopK) % kExperts));
    }
  }

  TestRole role(std::int32_t experts, std::int64_t rows, std::int64_t cols, QuantType type,
                std::uint32_t seed) const {
    return make_role(experts, rows, cols, type, seed, spec.epilogue && experts > 1);
  }

  MoeConfig config() const {
    MoeConfig c;
    c.hidden_size = kHidden;
    c.intermediate_size = kWidth;
    c.num_experts = kExperts;
    c.top_k = kTopK;
    c.activation = activation;
    c.shared_activation = shared_activation;
    c.router.num_experts = kExperts + spec.identity;
    c.router.top_k = kTopK;
    c.router.identity_experts = spec.identity;
    c.router.weight_on = spec.weight_on;
    c.router.select_on = spec.select_on;
    c.shared = spec.shared;
    c.shared_intermediate_size = spec.shared == SharedKind::None ? 0 : kSharedWidth;
    c.latent_size = spec.latent ? kLatent : 0;
    c.latent_norm = spec.latent_norm;
    c.input_norm = spec.input_norm;
    c.router_input = spec.router_input;
    c.norm_eps = kEps;
    c.vocab_size = spec.table ? kVocabulary : 0;
    return c;
  }

  static ExpertStack stack(const StackShape& shape, const TestRole& gate, const TestRole& up,
                           const TestRole& down, const Backend& backend) {
    ExpertStack::Parts parts;
    parts.shape = shape;
    parts.gate = gate.weights;
    parts.up = up.weights;
    parts.down = down.weights;
    LoadOptions options;
    options.backend = &backend;
    backend.prepare(parts, options);
    return ExpertStack(std::move(parts));
  }

  MoeLayer layer(const Backend& backend = backend_for(Device{})) const {
    MoeLayer::Parts parts;
    parts.stack = std::make_shared<const ExpertStack>(
        stack({kExperts, narrow, kWidth}, gate, up, down, backend));
    parts.router_weight = router_weight;
    if (spec.shared != SharedKind::None) {
      parts.shared.emplace(SharedExperts{
          stack({1, kHidden, kSharedWidth}, shared_gate, shared_up, shared_down, backend),
          shared_router});
    }
    if (spec.latent) {
      parts.latent.emplace(LatentExperts{
          stack({1, kHidden, kLatent}, {}, latent_down, latent_up, backend), {latent_norm, kEps}});
    }
    parts.input_norm = {input_norm, kEps};
    parts.router_norm = {router_norm, kEps};
    parts.token_experts = table;
    return {config(), std::move(parts)};
  }
};

Doubles normed(const Doubles& x, const Floats& weight) {
  if (weight.empty()) return x;
  double square = 0;
  for (const double v : x) square += v * v;
  const double root = std::sqrt(square / static_cast<double>(x.size()) + static_cast<double>(kEps));
  Doubles y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) y[i] = x[i] / root * static_cast<double>(weight[i]);
  return y;
}

Doubles ffn(const Activation& a, const TestRole& gate, const TestRole& up, const TestRole& down,
            std::int32_t expert, Doubles x, double factor) {
  for (double& v : x) v *= factor;
  Doubles u = apply_f64(up, expert, x.data());
  const Doubles g = a.gated() ? apply_f64(gate, expert, x.data()) : Doubles(u.size());
  for (std::size_t i = 0; i < u.size(); ++i) {
    u[i] = static_cast<double>(activate(a, static_cast<float>(g[i]), static_cast<float>(u[i])));
  }
  return apply_f64(down, expert, u.data());
}

struct Chosen {
  std::vector<std::int32_t> ids;
  Doubles weights;
};

/// Softmax over all, the largest (or the given ones), renormalised.
Chosen choose(const Model& m, const Doubles& input, const std::int32_t* given) {
  const std::int32_t experts = kExperts + m.spec.identity;
  Doubles scores;
  double total = 0;
  for (std::int32_t e = 0; e < experts; ++e) {
    scores.push_back(
        std::exp(dot_f64(m.router_weight.data() + e * kHidden, input.data(), kHidden)));
    total += scores.back();
  }
  Chosen chosen;
  Doubles left = scores;
  double sum = 0;
  for (std::int32_t slot = 0; slot < kTopK; ++slot) {
    const auto best = std::max_element(left.begin(), left.end()) - left.begin();
    const auto id = given != nullptr ? given[slot] : static_cast<std::int32_t>(best);
    if (given == nullptr) left[static_cast<std::size_t>(best)] = -1;
    chosen.ids.push_back(id);
    chosen.weights.push_back(scores[static_cast<std::size_t>(id)] / total);
    sum += chosen.weights.back();
  }
  for (double& w : chosen.weights) w /= sum;
  return chosen;
}

/// One token in f64, apart from every other implementation.
Doubles token_f64(const Model& m, const Doubles& x, const Doubles& separate,
                  const std::int32_t* given, Chosen& chosen) {
  const bool on_input = m.spec.weight_on == WeightOn::Input;
  const Doubles input = normed(x, m.input_norm);
  const Doubles& raw = m.spec.router_input == RouterInput::Separate ? separate
                       : m.spec.router_input == RouterInput::Norm   ? x
                                                                    : input;
  chosen = choose(m, normed(raw, m.router_norm), given);

  const Doubles narrow = m.spec.latent ? apply_f64(m.latent_down, 0, input.data()) : input;
  Doubles routed(narrow.size());
  Doubles y(kHidden);
  for (std::size_t slot = 0; slot < chosen.ids.size(); ++slot) {
    const double w = chosen.weights[slot];
    if (chosen.ids[slot] >= kExperts) {
      for (std::size_t i = 0; i < y.size(); ++i) y[i] += w * input[i];
      continue;
    }
    const Doubles d =
        ffn(m.activation, m.gate, m.up, m.down, chosen.ids[slot], narrow, on_input ? w : 1.0);
    for (std::size_t i = 0; i < d.size(); ++i) routed[i] += (on_input ? 1.0 : w) * d[i];
  }
  if (m.spec.latent) {
    const Doubles sum = normed(routed, m.latent_norm);
    routed = apply_f64(m.latent_up, 0, sum.data());
  }
  for (std::size_t i = 0; i < y.size(); ++i) y[i] += routed[i];
  if (m.spec.shared == SharedKind::None) return y;
  const Doubles shared =
      ffn(m.shared_activation, m.shared_gate, m.shared_up, m.shared_down, 0, input, 1.0);
  double w = 1.0;
  if (!m.shared_router.empty()) {
    w = 1.0 / (1.0 + std::exp(-dot_f64(m.shared_router.data(), input.data(), kHidden)));
  }
  for (std::size_t i = 0; i < y.size(); ++i) y[i] += w * shared[i];
  return y;
}

/// A call on `tokens` tokens with what the layer asks for.
struct Batch {
  std::int64_t tokens;
  Floats x, separate;
  std::vector<std::int32_t> token_ids, topk_ids;

  Batch(const Model& m, std::int64_t count)
      : tokens(count),
        x(random_values(count * kHidden, 31)),
        separate(random_values(count * kHidden, 32)) {
    for (std::int64_t t = 0; t < count; ++t) {
      token_ids.push_back(static_cast<std::int32_t>((3 * t + 1) % kVocabulary));
      for (std::int32_t slot = 0; slot < kTopK; ++slot) {
        topk_ids.push_back(static_cast<std::int32_t>((2 * t + slot) % kExperts));
      }
    }
    if (m.spec.table) {
      for (std::size_t pair = 0; pair < topk_ids.size(); ++pair) {
        const std::size_t token = pair / kTopK;
        topk_ids[pair] = m.table[static_cast<std::size_t>(token_ids[token]) * kTopK + pair % kTopK];
      }
    }
  }

  ForwardIo io(const Model& m, const TensorView& out) {
    ForwardIo io;
    io.x = ConstTensorView(x.data(), DType::F32, {tokens, kHidden});
    io.out = out;
    if (m.spec.router_input == RouterInput::Separate) {
      io.router_input = ConstTensorView(separate.data(), DType::F32, {tokens, kHidden});
    }
    if (m.spec.table) {
      io.token_ids = ConstTensorView(token_ids.data(), DType::I32, {tokens});
    } else if (m.spec.select_on == SelectOn::Given) {
      io.routing = {topk_ids.data(), nullptr, tokens, kTopK};
    }
    return io;
  }

  Doubles expected(const Model& m, std::vector<Chosen>& chosen) const {
    Doubles all;
    for (std::int64_t t = 0; t < tokens; ++t) {
      const auto row = [&](const Floats& v) {
        return Doubles(v.begin() + t * kHidden, v.begin() + (t + 1) * kHidden);
      };
      chosen.emplace_back();
      const bool given = m.spec.select_on == SelectOn::Given;
      const Doubles y = token_f64(m, row(x), row(separate),
                                  given ? topk_ids.data() + t * kTopK : nullptr, chosen.back());
      all.insert(all.end(), y.begin(), y.end());
    }
    return all;
  }
};

struct Way {
  const char* name;
  std::optional<GemmMode> gemm;  ///< empty: moe_forward chooses
  RowSpaceMode rows;
};
constexpr Way kWays[] = {
    {"auto", {}, RowSpaceMode::Auto},
    {"bucketed_pairs", GemmMode::Bucketed, RowSpaceMode::TokenPairs},
    {"bucketed_packed", GemmMode::Bucketed, RowSpaceMode::PackedRows},
    {"aligned_pairs", GemmMode::Aligned, RowSpaceMode::TokenPairs},
    {"aligned_packed", GemmMode::Aligned, RowSpaceMode::PackedRows},
};

void run(Context& context, const MoeLayer& layer, const ForwardIo& io, const Way& way) {
  Workspace workspace(workspace_bytes(context, layer, kTopK, io.x.dim(0)));
  if (way.gemm) {
    moe_forward_bucketed(context, layer, io, workspace, *way.gemm, way.rows);
  } else {
    moe_forward(context, layer, io, workspace);
  }
}

Tuning exact_poisoned() {
  Tuning tuning;
  tuning.precision = Precision::Exact;
  tuning.poison = true;
  return tuning;
}

class Parts : public ::testing::TestWithParam<Spec> {};
INSTANTIATE_TEST_SUITE_P(Specs, Parts, ::testing::ValuesIn(kSpecs),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(Parts, EveryWayAgreesWithF64AndTheReference) {
  const Model m(GetParam());
  const MoeLayer layer = m.layer();
  for (const std::int64_t tokens : {1, 2, 9}) {
    Batch batch(m, tokens);
    std::vector<Chosen> chosen;
    const Doubles want = batch.expected(m, chosen);

    Tensor reference(DType::F32, tokens, kHidden);
    Routing routed(tokens, kTopK);
    ForwardIo io = batch.io(m, reference.view());
    io.routing_out = routed.view();
    moe_forward_cpu(layer, io);
    EXPECT_LE(rel_l2(reference.values(), want), 1e-5) << tokens;
    for (std::size_t pair = 0; pair < routed.topk_ids().size(); ++pair) {
      EXPECT_EQ(routed.topk_ids()[pair], chosen[pair / kTopK].ids[pair % kTopK]);
      EXPECT_NEAR(static_cast<double>(routed.topk_weights()[pair]),
                  chosen[pair / kTopK].weights[pair % kTopK], 1e-5);
    }
    for (const Way& way : kWays) {
      SCOPED_TRACE(std::string(way.name) + ", " + std::to_string(tokens) + " tokens");
      Context context(Device{}, exact_poisoned());
      Tensor y(DType::F32, tokens, kHidden);
      Routing got(tokens, kTopK);
      io = batch.io(m, y.view());
      io.routing_out = got.view();
      run(context, layer, io, way);
      EXPECT_LE(rel_l2(y.values(), want), 2e-3);
      EXPECT_EQ(std::vector(got.topk_ids().begin(), got.topk_ids().end()),
                std::vector(routed.topk_ids().begin(), routed.topk_ids().end()));

      // The same routing from outside gives the same bits.
      Tensor again(DType::F32, tokens, kHidden);
      ForwardIo ready;
      ready.x = io.x;
      ready.out = again.view();
      ready.routing = got.view();
      run(context, layer, ready, way);
      EXPECT_EQ(again.values(), y.values());

      // Added to an output of another type: rounded once.
      Floats before = random_values(tokens * kHidden, 33);
      Tensor half(DType::F16, tokens, kHidden, before);
      before = half.values();
      ready.out = half.view();
      ready.accumulate = true;
      run(context, layer, ready, way);
      for (std::size_t i = 0; i < before.size(); ++i) {
        const float sum = before[i] + y.values()[i];
        EXPECT_NEAR(half.get(i), sum, 1e-3F * (1.0F + std::fabs(sum)));
      }
    }
  }
}

TEST_P(Parts, WorkspaceIsExactAndCallsDoNotAllocate) {
  const Model m(GetParam());
  const MoeLayer layer = m.layer();
  Batch batch(m, 5);
  Context context(Device{}, exact_poisoned());
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
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
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
  Context context(fake, exact_poisoned(), ThreadPool::shared(1));
  const Spec& s = m.spec;
  const bool rare = s.weight_on == WeightOn::Input || s.identity > 0 || s.latent || s.input_norm ||
                    s.router_input == RouterInput::Norm || s.select_on == SelectOn::Given;
  if (!rare) {
    EXPECT_NO_THROW(run(context, layer, batch.io(m, y.view()), kWays[0]));
    return;
  }
  try {
    run(context, layer, batch.io(m, y.view()), kWays[0]);
    ADD_FAILURE() << "ran on a backend that lacks the part";
  } catch (const UnsupportedError& error) {
    EXPECT_NE(std::string(error.what()).find("fake"), std::string::npos) << error.what();
  }
  for (const float v : y.values()) EXPECT_TRUE(std::isnan(v));  // nothing was written
}

template <class E>
std::string error_of(const MoeLayer& layer, const ForwardIo& io) {
  Context context(Device{}, exact_poisoned());
  try {
    run(context, layer, io, kWays[0]);
  } catch (const E& error) {
    return error.what();
  }
  return "(no error of this kind)";
}

Spec spec_named(const std::string& name) {
  for (const Spec& s : kSpecs) {
    if (name == s.name) return s;
  }
  throw std::runtime_error("no spec " + name);
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
         "shared.gate");
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
    Context context(Device{}, exact_poisoned());
    EXPECT_NO_THROW(run(context, layer, batch.io(m, y.view()), way));
  }
}

}  // namespace
}  // namespace moesaic::testing
