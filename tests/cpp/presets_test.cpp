// Every row of the presets, from files made of it.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "layer_file.hpp"
#include "moesaic/forward.hpp"

namespace moesaic::test {
namespace {

TEST(Models, AreSortedAndSourced) {
  EXPECT_TRUE(std::ranges::is_sorted(models(), {}, &Model::name));
  for (const Model& model : models()) {
    EXPECT_TRUE(model.source.starts_with("transformers ") || model.source.starts_with("llama.cpp "))
        << model.name;
    EXPECT_EQ(&find_model(model.name), &model);
  }
  EXPECT_THROW(find_model("no such model"), ConfigError);
}

TEST(Presets, AreSortedAndSourced) {
  const auto names = known_architectures();
  EXPECT_GE(names.size(), 60U);
  EXPECT_TRUE(std::ranges::is_sorted(names));
  for (const Preset& preset : presets()) EXPECT_FALSE(preset.source.empty());
}

/// A row that uses every key, as families beyond the first ones do.
constexpr Model kEveryModel{.name = "every",
                            .source = "this test",
                            .router_bias = Use::Optional,
                            .selection_bias = Use::Optional,
                            .activation = ActivationKind::SwiGluClampInput};
constexpr Preset kEveryKey{.architecture = "every",
                           .source = "this test",
                           .model = &kEveryModel,
                           .score_key = Use::Optional,
                           .renormalize_key = Use::Optional,
                           .scale_key = Use::Optional,
                           .limit_key = Use::Required};

FileBuilder every_file() {
  return FileBuilder("every").sizes().u32("expert_feed_forward_length", kWidth).stacks();
}

TEST(Presets, KeysOverride) {
  const MoeConfig c = read(every_file()
                               .u32("expert_gating_func", 2)
                               .boolean("expert_weights_norm", true)
                               .f32("expert_weights_scale", 2.5F)
                               .u32("expert_group_count", 2)
                               .u32("expert_group_used_count", 1)
                               .f32("swiglu_clamp_exp", 10.0F)
                               .values("ffn_gate_inp.bias", {4, 3, 2, 1})
                               .values("exp_probs_b.bias", {1, 2, 3, 4}),
                           kEveryKey);
  EXPECT_EQ(c.router.score, ScoreFunction::Sigmoid);
  EXPECT_TRUE(c.router.renormalize);
  EXPECT_EQ(c.router.scale, 2.5F);
  EXPECT_EQ(c.router.num_groups, 2);
  EXPECT_EQ(c.router.groups_used, 1);
  EXPECT_EQ(c.router.router_bias, (std::vector<float>{4, 3, 2, 1}));
  EXPECT_EQ(c.router.selection_bias, (std::vector<float>{1, 2, 3, 4}));
  EXPECT_EQ(c.activation.kind, ActivationKind::SwiGluClampInput);
  EXPECT_EQ(c.activation.limit, 10.0F);
}

TEST(Presets, DefaultsWithoutKeys) {
  const MoeConfig c = read(every_file().f32("swiglu_clamp_exp", 0.0F), kEveryKey);
  EXPECT_EQ(c.router.score, ScoreFunction::Softmax);
  EXPECT_FALSE(c.router.renormalize);
  EXPECT_EQ(c.router.scale, 1.0F);
  EXPECT_EQ(c.router.num_groups, 1);
  EXPECT_EQ(c.activation.kind, ActivationKind::SwiGlu);  // a limit of 0 is off
}

TEST(Presets, BadKeys) {
  const Preset* preset = &kEveryKey;
  const auto file = [] { return every_file().f32("swiglu_clamp_exp", 1.0F); };
  expect_contains(error_of<FormatError>(every_file(), preset), "every.swiglu_clamp_exp");
  expect_contains(error_of<FormatError>(file().u32("expert_gating_func", 5), preset),
                  "every.expert_gating_func: expected 0 to 4, got 5");
  expect_contains(error_of<FormatError>(file().u32("expert_group_count", 2), preset),
                  "every.expert_group_used_count");
  expect_contains(
      error_of<FormatError>(file().u32("expert_group_count", 3).u32("expert_group_used_count", 1),
                            preset),
      "every.expert_group_count");
  expect_contains(error_of<FormatError>(file().values("exp_probs_b.bias", {1, 2, 3}), preset),
                  "exp_probs_b.bias: expected [4], got [3]");
  const float nan = std::numeric_limits<float>::quiet_NaN();
  expect_contains(error_of<FormatError>(every_file().f32("swiglu_clamp_exp", nan), preset),
                  "every.swiglu_clamp_exp: expected a finite number");
  expect_contains(error_of<FormatError>(file().f32("expert_weights_scale", -1.0F), preset),
                  "scale");
  expect_contains(error_of<FormatError>(file().values("exp_probs_b.bias", {1, nan, 3, 4}), preset),
                  "selection_bias[1]");
}

TEST(Presets, EveryRowOpensALayer) {
  for (const Preset& p : presets()) {
    SCOPED_TRACE(p.architecture);
    const OpenFile open(file_of(p));
    if (!p.missing.empty()) {
      try {
        MoeConfig::from_gguf(*open.file, 1);
        ADD_FAILURE() << "opened";
      } catch (const UnsupportedError& error) {
        expect_contains(error.what(), std::string(p.missing));
      }
      continue;
    }
    const MoeConfig c = MoeLayer::from_gguf(open.file, 1).config();
    const Model& m = *p.model;
    EXPECT_EQ(c.architecture, p.architecture);
    EXPECT_EQ(c.router.score, p.score_key == Use::Required ? ScoreFunction::Sigmoid : m.score);
    EXPECT_EQ(c.router.select_on, m.select_on);
    EXPECT_EQ(c.router.renormalize,
              p.renormalize_key == Use::Required ||
                  (p.renormalize_key == Use::Ignored ? m.renormalize : p.absent_renormalize));
    EXPECT_EQ(c.router.guard, m.guard);
    EXPECT_EQ(c.router.guard_eps, m.guard_eps);
    EXPECT_EQ(c.router.group_reduce, m.group_reduce);
    EXPECT_EQ(c.router.group_mask, m.group_mask);
    const float half = m.averaged ? 0.5F : 1.0F;
    EXPECT_EQ(c.router.scale, half * (p.scale_key == Use::Required ? 1.5F : 1.0F));
    EXPECT_EQ(c.shared_scale, half);
    EXPECT_EQ(c.router.weight_on, m.weight_on);
    EXPECT_EQ(c.router.selection_bias.empty(), p.bias_use(m) != Use::Required);
    EXPECT_EQ(c.router.router_bias.empty(), m.router_bias != Use::Required);
    const bool clamp_off = p.limit_key == Use::Optional && p.absent_limit == 0.0;
    EXPECT_EQ(c.activation.kind, clamp_off ? ActivationKind::SwiGlu : m.activation);
    const float absent = p.absent_limit > 0.0 ? static_cast<float>(p.absent_limit) : 7.0F;
    EXPECT_EQ(c.activation.limit, p.limit_key == Use::Required ? 5.0F : absent);
    const bool shared = p.shared_tensors != Use::Ignored;
    EXPECT_EQ(c.shared, shared ? m.shared : SharedKind::None);
    EXPECT_EQ(c.shared_intermediate_size, shared ? 2 * kWidth : 0);
    EXPECT_EQ(c.latent_size, p.latent_key.empty() ? 0 : 32);
    EXPECT_EQ(c.input_norm, m.input_norm);
    EXPECT_EQ(c.router_input, m.router_input);
  }
}

/// Whatever a row requires is missed by name.
TEST(Presets, EveryRowMissesWhatItRequires) {
  for (Preset p : presets()) {
    if (!p.missing.empty()) continue;
    SCOPED_TRACE(p.architecture);
    const auto without = [&](Use Preset::* use, const char* name) {
      if (p.*use != Use::Required) return;
      Preset less = p;
      less.*use = Use::Optional;
      expect_contains(error_of<FormatError>(file_of(less)), name);
    };
    without(&Preset::score_key, "expert_gating_func");
    without(&Preset::renormalize_key, "expert_weights_norm");
    without(&Preset::scale_key, "expert_weights_scale");
    without(&Preset::limit_key, "swiglu_clamp_exp");
    Model asked_less = *p.model;
    asked_less.router_bias = Use::Optional;
    Preset less = p;
    less.model = &asked_less;
    if (p.model->router_bias == Use::Required) {
      expect_contains(error_of<FormatError>(file_of(less)), "ffn_gate_inp.bias");
    }
    less = p;
    less.selection_bias = Use::Optional;
    if (p.bias_use(*p.model) == Use::Required) {
      expect_contains(error_of<FormatError>(file_of(less)), "exp_probs_b.bias");
    }
  }
}

TEST(Presets, ClampsOfRoutedAndSharedExperts) {
  const auto find = [](std::string_view name) {
    return *std::ranges::find(presets(), name, &Preset::architecture);
  };
  const auto kinds = [&](const char* name, float routed, std::optional<float> shared) {
    FileBuilder file = file_of(find(name));
    file.f32("swiglu_clamp_exp", routed);
    if (shared) file.f32("swiglu_clamp_shexp", *shared);
    const MoeConfig c = read(file);
    return std::pair{c.activation, c.shared_activation};
  };
  constexpr auto kPlain = ActivationKind::SwiGlu;
  constexpr auto kInput = ActivationKind::SwiGluClampInput;
  constexpr auto kOutput = ActivationKind::SwiGluClampOutput;
  auto [routed, shared] = kinds("deepseek4", 10.0F, std::nullopt);
  EXPECT_EQ(routed.kind, kInput);
  EXPECT_EQ(shared.kind, kInput);
  EXPECT_EQ(shared.limit, 10.0F);
  std::tie(routed, shared) = kinds("deepseek4", 10.0F, 3.0F);
  EXPECT_EQ(shared.limit, 3.0F);
  std::tie(routed, shared) = kinds("hy_v4", 10.0F, 3.0F);
  EXPECT_EQ(routed.kind, kInput);
  EXPECT_EQ(shared.kind, kPlain);
  std::tie(routed, shared) = kinds("step35", 0.0F, 4.0F);
  EXPECT_EQ(routed.kind, kPlain);
  EXPECT_EQ(shared.kind, kOutput);
  EXPECT_EQ(shared.limit, 4.0F);
}

TEST(Presets, HashLayers) {
  const Preset& p = *std::ranges::find(presets(), "deepseek4", &Preset::architecture);
  Preset unbiased = p;
  unbiased.selection_bias = Use::Optional;
  const auto table = [](FileBuilder b, std::int32_t last) {
    std::vector<std::int32_t> ids{0, 1, 2, 3, 1, last};
    b.writer.tensor("blk.1.ffn_gate_tid2eid.weight", {2, 3},
                    static_cast<std::uint32_t>(QuantType::I32),
                    {reinterpret_cast<const char*>(ids.data()), ids.size() * 4});
    return b;
  };
  const OpenFile hashed(table(file_of(unbiased).u32("hash_layer_count", 2), 0));
  const MoeLayer layer = MoeLayer::from_gguf(hashed.file, 1);
  EXPECT_EQ(layer.config().router.select_on, SelectOn::Given);
  EXPECT_EQ(layer.config().vocab_size, 3);
  EXPECT_EQ(layer.parts().token_experts, (std::vector<std::int32_t>{0, 1, 2, 3, 1, 0}));
  const OpenFile bad(table(file_of(unbiased).u32("hash_layer_count", 2), 4));
  EXPECT_THROW(MoeLayer::from_gguf(bad.file, 1), ShapeError);
  expect_contains(error_of<FormatError>(file_of(unbiased).u32("hash_layer_count", 2)),
                  "ffn_gate_tid2eid.weight");
  // Behind the hash layers the router selects, and needs its bias.
  EXPECT_EQ(read(file_of(p).u32("hash_layer_count", 1)).router.select_on, SelectOn::Scores);
  expect_contains(error_of<FormatError>(file_of(unbiased).u32("hash_layer_count", 1)),
                  "exp_probs_b.bias");
}

/// One architecture, two models: DeepSeek-V2 scores by softmax, its successors by the sigmoid.
TEST(Presets, DeepSeekV2IsNotItsSuccessor) {
  const auto groups = [](FileBuilder file) {
    return read(file.u32("expert_group_count", 2).u32("expert_group_used_count", 1)).router;
  };
  const Preset& p = *std::ranges::find(presets(), "deepseek2", &Preset::architecture);
  for (const RouterConfig& v2 :
       {groups(file_of(p)), groups(file_of(p).u32("expert_gating_func", 1))}) {
    EXPECT_EQ(v2.score, ScoreFunction::Softmax);
    EXPECT_EQ(v2.group_reduce, GroupReduce::Max);
    EXPECT_EQ(v2.group_mask, GroupMask::Zero);
  }
  const std::vector<float> bias{1, 2, 3, 4};
  for (const RouterConfig& v3 :
       {groups(file_of(p).u32("expert_gating_func", 2)),
        groups(file_of(p).u32("expert_gating_func", 2).values("exp_probs_b.bias", bias)),
        groups(file_of(p).u32("expert_gating_func", 1).values("exp_probs_b.bias", bias))}) {
    EXPECT_EQ(v3.group_reduce, GroupReduce::Top2Sum);
    EXPECT_EQ(v3.group_mask, GroupMask::MinusInfinity);
    EXPECT_EQ(v3.guard, NormGuard::AddEps);
  }
}

TEST(Presets, GlmFlashIsKnownByItsSizes) {
  const Preset& p = *std::ranges::find(presets(), "deepseek2", &Preset::architecture);
  FileBuilder flash("deepseek2");
  flash.u32("block_count", 47)
      .u32("embedding_length", kHidden)
      .u32("expert_count", kExperts)
      .u32("expert_used_count", 2)
      .u32("expert_feed_forward_length", kWidth)
      .stacks();
  EXPECT_EQ(read(flash).router.score, ScoreFunction::Softmax);
  flash.writer.filled("token_embd.weight", QuantType::Q4_0, {154880, 32});
  EXPECT_EQ(read(flash).router.score, ScoreFunction::Sigmoid);
  EXPECT_EQ(read(flash.u32("expert_gating_func", 1)).router.score, ScoreFunction::Softmax);
  EXPECT_EQ(read(file_of(p)).router.score, ScoreFunction::Softmax);
}

TEST(Presets, SharedGateAndUpInOneTensor) {
  const auto file = [](std::int64_t rows) {
    return FileBuilder("granite_swa")
        .sizes()
        .u32("expert_feed_forward_length", kWidth)
        .u32("expert_shared_feed_forward_length", 96)
        .stacks()
        .tensor("ffn_up_shexp.weight", {rows, kHidden})
        .tensor("ffn_down_shexp.weight", {kHidden, 96});
  };
  const OpenFile open(file(192));
  const MoeLayer layer = MoeLayer::from_gguf(open.file, 1);
  EXPECT_EQ(layer.config().shared_intermediate_size, 96);
  const ExpertStack& shared = layer.shared()->stack;
  ASSERT_TRUE(shared.gated());
  std::vector<float> first(kHidden), gate(kHidden);
  dequantize_expert_row(shared.up().ref, 0, 0, first.data());
  const GgufBytes bytes = open.file->bytes(*open.file->tensor("blk.1.ffn_up_shexp.weight"));
  const auto* stored = reinterpret_cast<const float*>(bytes.bytes.data());
  EXPECT_EQ(std::memcmp(first.data(), stored + 96 * kHidden, kHidden * sizeof(float)), 0);
  dequantize_expert_row(shared.gate().ref, 0, 0, gate.data());
  EXPECT_EQ(std::memcmp(gate.data(), stored, kHidden * sizeof(float)), 0);
  expect_contains(error_of<FormatError>(file(96)), "ffn_gate_shexp.weight");
}

/// Gate and up in one tensor compute what they compute apart, clamp included.
TEST(Presets, FusedGateUpIsClampedToo) {
  constexpr std::int64_t kTokens = 3;
  std::vector<float> gate(kExperts * kWidth * kHidden), up(gate.size()), fused;
  for (std::size_t i = 0; i < gate.size(); ++i) {
    gate[i] = std::sin(static_cast<float>(i));
    up[i] = std::cos(static_cast<float>(3 * i));
  }
  const std::size_t expert = kWidth * kHidden;
  for (std::size_t e = 0; e < kExperts; ++e) {
    for (const auto* half : {&gate, &up}) {
      fused.insert(fused.end(), half->begin() + e * expert, half->begin() + (e + 1) * expert);
    }
  }
  const auto run = [&](bool one_tensor, float limit) {
    FileBuilder b("maple");
    b.sizes().u32("expert_feed_forward_length", kWidth).f32("swiglu_clamp_exp", limit);
    b.tensor("ffn_gate_inp.weight", {kExperts, kHidden});
    const auto add = [&](const char* name, std::int64_t rows, std::int64_t cols,
                         const std::vector<float>& data) {
      b.writer.tensor(std::string("blk.1.") + name, {cols, rows, kExperts}, 0,
                      {reinterpret_cast<const char*>(data.data()), data.size() * sizeof(float)});
    };
    if (one_tensor) {
      add("ffn_gate_up_exps.weight", 2 * kWidth, kHidden, fused);
    } else {
      add("ffn_gate_exps.weight", kWidth, kHidden, gate);
      add("ffn_up_exps.weight", kWidth, kHidden, up);
    }
    add("ffn_down_exps.weight", kHidden, kWidth, up);
    const OpenFile open(b);
    const MoeLayer layer = MoeLayer::from_gguf(open.file, 1);
    std::vector<float> x(kTokens * kHidden), y(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::cos(static_cast<float>(i));
    Routing routing(kTokens, 2);
    for (std::size_t i = 0; i < 6; ++i) {
      routing.topk_ids()[i] = static_cast<std::int32_t>(i % kExperts);
      routing.topk_weights()[i] = 0.5F;
    }
    Context context;
    Workspace workspace(workspace_bytes(context, layer, 2, kTokens));
    ForwardIo io;
    io.x = ConstTensorView(x.data(), DType::F32, {kTokens, kHidden});
    io.out = TensorView(y.data(), DType::F32, {kTokens, kHidden});
    io.routing = routing.view();
    moe_forward(context, layer, io, workspace);
    return y;
  };
  const std::vector<float> clamped = run(false, 0.5F);
  EXPECT_EQ(run(true, 0.5F), clamped);
  EXPECT_NE(run(true, 100.0F), clamped);
}

TEST(Presets, SharedWidthsThatDisagree) {
  const auto file = [](std::uint32_t count, std::int64_t width) {
    return FileBuilder("dots1")
        .sizes()
        .u32("expert_gating_func", 2)
        .u32("expert_feed_forward_length", kWidth)
        .u32("expert_shared_count", count)
        .stacks()
        .shared(width);
  };
  EXPECT_EQ(read(file(3, 3 * kWidth)).shared_intermediate_size, 3 * kWidth);
  expect_contains(error_of<FormatError>(file(2, 3 * kWidth)), "ffn_gate_shexp.weight");
  expect_contains(error_of<FormatError>(file(0xffffffff, kWidth)), "dots1.expert_shared_count");
  expect_contains(error_of<FormatError>(file(0x7fffffff, kWidth)), "dots1.expert_shared_count");
}

TEST(Presets, InWords) {
  const auto rows = architecture_table();
  ASSERT_EQ(rows.size(), presets().size());
  for (const ArchitectureFacts& facts : rows) {
    EXPECT_TRUE(facts.source.starts_with("llama.cpp src/models/")) << facts.architecture;
    EXPECT_FALSE(facts.score.empty());
    EXPECT_FALSE(facts.activation.empty());
  }
  const auto qwen2 = std::ranges::find(rows, "qwen2moe", &ArchitectureFacts::architecture);
  EXPECT_EQ(qwen2->score, "softmax");
  EXPECT_EQ(qwen2->renormalize, "no");
  EXPECT_EQ(qwen2->shared, "sigmoid_gated");
  const auto v4 = std::ranges::find(rows, "deepseek4", &ArchitectureFacts::architecture);
  EXPECT_EQ(v4->score, "key");
  EXPECT_NE(v4->selection.find("by token id"), std::string::npos);
}

}  // namespace
}  // namespace moesaic::test
