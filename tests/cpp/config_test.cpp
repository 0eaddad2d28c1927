#include "moesaic/config.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "gguf_writer.hpp"
#include "gtest/gtest.h"
#include "moesaic/error.hpp"
#include "moesaic/gguf.hpp"
#include "route/presets.hpp"

namespace moesaic {
namespace {

constexpr std::uint32_t kHidden = 64, kExperts = 4, kWidth = 32;

/// Writes a file of one MoE block (block 1; block 0 is dense), whose parts a test may change.
struct FileBuilder {
  std::string architecture = "qwen3moe";

  test::GgufWriter writer;

  explicit FileBuilder(std::string arch = "qwen3moe") : architecture(std::move(arch)) {
    writer.string("general.architecture", architecture);
  }
  std::string key(const std::string& name) const { return architecture + "." + name; }
  FileBuilder& u32(const std::string& name, std::uint32_t value) {
    writer.u32(key(name), value);
    return *this;
  }
  FileBuilder& f32(const std::string& name, float value) {
    writer.scalar(key(name), GgufType::F32, value);
    return *this;
  }
  FileBuilder& boolean(const std::string& name, bool value) {
    writer.scalar(key(name), GgufType::Bool, static_cast<std::uint8_t>(value));
    return *this;
  }
  FileBuilder& per_layer(const std::string& name, const std::vector<std::uint32_t>& values) {
    writer.array(key(name), GgufType::U32, values);
    return *this;
  }
  /// Keys that every file has.
  FileBuilder& sizes() {
    return u32("block_count", 2)
        .u32("embedding_length", kHidden)
        .u32("expert_count", kExperts)
        .u32("expert_used_count", 2);
  }
  FileBuilder& tensor(const std::string& name, const std::vector<std::int64_t>& shape,
                      QuantType type = QuantType::F32) {
    writer.filled("blk.1." + name, type, shape);
    return *this;
  }
  FileBuilder& values(const std::string& name, const std::vector<float>& data) {
    writer.tensor("blk.1." + name, {static_cast<std::int64_t>(data.size())}, 0,
                  {reinterpret_cast<const char*>(data.data()), data.size() * sizeof(float)});
    return *this;
  }
  FileBuilder& stacks(std::int64_t width = kWidth, std::int64_t count = kExperts) {
    return tensor("ffn_gate_inp.weight", {count, kHidden})
        .tensor("ffn_gate_exps.weight", {count, width, kHidden}, QuantType::Q4_0)
        .tensor("ffn_up_exps.weight", {count, width, kHidden}, QuantType::Q4_0)
        .tensor("ffn_down_exps.weight", {count, kHidden, width}, QuantType::Q8_0);
  }
  FileBuilder& shared(std::int64_t width) {
    return tensor("ffn_gate_shexp.weight", {width, kHidden})
        .tensor("ffn_up_shexp.weight", {width, kHidden})
        .tensor("ffn_down_shexp.weight", {kHidden, width});
  }
};

/// The file stays open for as long as the test's object lives.
struct OpenFile {
  test::TempDir dir;
  std::shared_ptr<GgufFile> file;
  explicit OpenFile(const FileBuilder& builder)
      : file(GgufFile::open(dir.write("model.gguf", builder.writer.bytes()))) {}
};

MoeConfig read(const FileBuilder& builder) {
  return MoeConfig::from_gguf(*OpenFile(builder).file, 1);
}
MoeConfig read(const FileBuilder& builder, const Preset& preset) {
  return config_from_preset(*OpenFile(builder).file, 1, preset);
}

template <class E>
std::string error_of(const FileBuilder& builder, const Preset* preset = nullptr) {
  try {
    preset != nullptr ? read(builder, *preset) : read(builder);
  } catch (const E& error) {
    return error.what();
  }
  return "(no error of this kind)";
}

void expect_contains(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << "\"" << part << "\" is not in: " << text;
}

TEST(FromGguf, Qwen3Moe) {
  const MoeConfig c = read(FileBuilder()
                               .sizes()
                               .u32("feed_forward_length", 999)
                               .u32("expert_feed_forward_length", kWidth)
                               .stacks());
  EXPECT_EQ(c.architecture, "qwen3moe");
  EXPECT_EQ(c.layer, 1);
  EXPECT_EQ(c.hidden_size, kHidden);
  EXPECT_EQ(c.intermediate_size, kWidth);
  EXPECT_EQ(c.num_experts, 4);
  EXPECT_EQ(c.top_k, 2);
  EXPECT_EQ(c.activation.kind, ActivationKind::SwiGlu);
  EXPECT_EQ(c.router.num_experts, 4);
  EXPECT_EQ(c.router.top_k, 2);
  EXPECT_EQ(c.router.score, ScoreFunction::Softmax);
  EXPECT_TRUE(c.router.renormalize);
  EXPECT_EQ(c.router.guard, NormGuard::ClampMin);
  EXPECT_EQ(c.router.guard_eps, std::ldexp(1.0F, -14));
  EXPECT_EQ(c.router.scale, 1.0F);
  EXPECT_EQ(c.router.num_groups, 1);
  EXPECT_TRUE(c.router.router_bias.empty());
  EXPECT_TRUE(c.router.selection_bias.empty());
  EXPECT_EQ(c.shared, SharedKind::None);
  EXPECT_EQ(c.shared_intermediate_size, 0);
}

TEST(FromGguf, Qwen2Moe) {
  const auto file = [] { return FileBuilder("qwen2moe").sizes().u32("feed_forward_length", 64); };
  const auto shared = [](FileBuilder builder) {
    return builder.stacks().shared(96).tensor("ffn_gate_inp_shexp.weight", {kHidden});
  };
  const MoeConfig c = read(shared(file().u32("expert_shared_feed_forward_length", 96)));
  EXPECT_FALSE(c.router.renormalize);
  EXPECT_EQ(c.intermediate_size, 32);  // 64 / 2 used experts
  EXPECT_EQ(c.shared, SharedKind::SigmoidGated);
  EXPECT_EQ(c.shared_intermediate_size, 96);
  EXPECT_EQ(read(shared(file())).shared_intermediate_size, 96);

  expect_contains(error_of<FormatError>(file().stacks()), "blk.1.ffn_up_shexp.weight");
  expect_contains(error_of<FormatError>(file().stacks().shared(96)),
                  "blk.1.ffn_gate_inp_shexp.weight");
  expect_contains(
      error_of<FormatError>(shared(file().u32("expert_shared_feed_forward_length", 128))),
      "ffn_gate_shexp.weight: expected [128, 64], got [96, 64]");
}

TEST(FromGguf, Olmoe) {
  const MoeConfig c =
      read(FileBuilder("olmoe").sizes().u32("feed_forward_length", kWidth).stacks());
  EXPECT_FALSE(c.router.renormalize);
  EXPECT_EQ(c.intermediate_size, kWidth);
  EXPECT_EQ(c.shared, SharedKind::None);
}

TEST(FromGguf, Mixtral) {
  const auto file = [] { return FileBuilder("llama").sizes().u32("feed_forward_length", kWidth); };
  const MoeConfig plain = read(file().stacks());
  EXPECT_TRUE(plain.router.renormalize);
  EXPECT_EQ(plain.intermediate_size, kWidth);
  EXPECT_EQ(plain.shared, SharedKind::None);
  const MoeConfig shared = read(file().stacks().shared(48));
  EXPECT_EQ(shared.shared, SharedKind::Plain);
  EXPECT_EQ(shared.shared_intermediate_size, 48);
  expect_contains(error_of<FormatError>(
                      file().stacks().shared(48).tensor("ffn_gate_inp_shexp.weight", {kHidden})),
                  "ffn_gate_inp_shexp.weight: expected no such tensor");
}

TEST(FromGguf, OldMixtralTensors) {
  const auto file = [](std::uint32_t count) {
    FileBuilder b("llama");
    b.sizes().u32("feed_forward_length", kWidth).tensor("ffn_gate_inp.weight", {4, kHidden});
    for (std::uint32_t e = 0; e < count; ++e) {
      const std::string tail = "." + std::to_string(e) + ".weight";
      b.tensor("ffn_gate" + tail, {kWidth, kHidden}).tensor("ffn_up" + tail, {kWidth, kHidden});
      b.tensor("ffn_down" + tail, {kHidden, kWidth});
    }
    return b;
  };
  EXPECT_EQ(read(file(4)).num_experts, 4);
  EXPECT_THROW(read(file(3)), FormatError);
}

TEST(FromGguf, FusedGateUp) {
  const auto file = [](std::int64_t rows) {
    return FileBuilder()
        .sizes()
        .u32("expert_feed_forward_length", kWidth)
        .tensor("ffn_gate_inp.weight", {kExperts, kHidden})
        .tensor("ffn_gate_up_exps.weight", {kExperts, rows, kHidden}, QuantType::Q4_0)
        .tensor("ffn_down_exps.weight", {kExperts, kHidden, kWidth}, QuantType::Q4_0);
  };
  EXPECT_EQ(read(file(2 * kWidth)).intermediate_size, kWidth);
  expect_contains(error_of<FormatError>(file(kWidth)), "expected [4, 64, 64], got [4, 32, 64]");
}

TEST(FromGguf, ArraysPerLayer) {
  const MoeConfig c = read(FileBuilder()
                               .u32("embedding_length", kHidden)
                               .u32("expert_count", kExperts)
                               .per_layer("expert_used_count", {0, 3})
                               .per_layer("expert_feed_forward_length", {0, kWidth})
                               .stacks());
  EXPECT_EQ(c.top_k, 3);
  EXPECT_EQ(c.intermediate_size, kWidth);
}

TEST(FromGguf, ContradictionsAreFormatErrors) {
  const auto file = [] { return FileBuilder().sizes().u32("expert_feed_forward_length", kWidth); };
  expect_contains(error_of<FormatError>(file().stacks(kWidth, 8)),
                  "blk.1.ffn_gate_inp.weight: expected [4, 64], got [8, 64]");
  expect_contains(error_of<FormatError>(file().stacks(64)),
                  "blk.1.ffn_gate_exps.weight: expected [4, 32, 64], got [4, 64, 64]");
  expect_contains(error_of<FormatError>(file().stacks().values("exp_probs_b.bias", {1, 2, 3, 4})),
                  "blk.1.exp_probs_b.bias: expected no such tensor");

  const auto with = [](std::uint32_t experts, std::uint32_t used) {
    return FileBuilder()
        .u32("embedding_length", kHidden)
        .u32("expert_count", experts)
        .u32("expert_used_count", used)
        .u32("expert_feed_forward_length", kWidth)
        .stacks();
  };
  expect_contains(error_of<FormatError>(with(kExperts, 5)), "top_k: expected 1 to 4, got 5");
  expect_contains(error_of<FormatError>(with(kExperts, 0)), "qwen3moe.expert_used_count");
  expect_contains(error_of<FormatError>(with(8, 2)), "blk.1.ffn_gate_inp.weight");
}

TEST(FromGguf, MissingKeysAreNamed) {
  expect_contains(error_of<FormatError>(FileBuilder().sizes().stacks()),
                  "qwen3moe.feed_forward_length");
  expect_contains(error_of<FormatError>(FileBuilder().u32("embedding_length", 64).stacks()),
                  "qwen3moe.expert_count");
  expect_contains(error_of<FormatError>(FileBuilder().u32("expert_count", 4).stacks()),
                  "qwen3moe.embedding_length");
}

TEST(FromGguf, LayerWithoutExperts) {
  const OpenFile open(FileBuilder().sizes().u32("expert_feed_forward_length", kWidth).stacks());
  EXPECT_NO_THROW(MoeConfig::from_gguf(*open.file, 1));
  for (const std::int32_t layer : {0, 2, -1}) {
    EXPECT_THROW(MoeConfig::from_gguf(*open.file, layer), ShapeError);
  }
}

TEST(FromGguf, UnknownArchitectures) {
  const std::string text = error_of<UnsupportedError>(FileBuilder("gpt-j").sizes().stacks());
  expect_contains(text, "\"gpt-j\"");
  for (const std::string& name : known_architectures()) expect_contains(text, name);
  FileBuilder nameless;
  nameless.writer = {};
  expect_contains(error_of<FormatError>(nameless.stacks()), "general.architecture");
}

TEST(Presets, AreSortedAndSourced) {
  const auto names = known_architectures();
  EXPECT_EQ(names, (std::vector<std::string>{"llama", "olmoe", "qwen2moe", "qwen3moe"}));
  EXPECT_TRUE(std::ranges::is_sorted(names));
  for (const Preset& preset : presets()) EXPECT_FALSE(preset.source.empty());
}

/// A row that uses every key, as families beyond the first ones do.
constexpr Preset kEveryKey{.architecture = "every",
                           .source = "this test",
                           .score = ScoreFunction::Softmax,
                           .score_key = Use::Optional,
                           .renormalize = false,
                           .renormalize_key = Use::Optional,
                           .scale_key = Use::Optional,
                           .group_keys = Use::Optional,
                           .router_bias = Use::Optional,
                           .selection_bias = Use::Optional,
                           .activation = ActivationKind::SwiGluClampInput,
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
                  "every.expert_gating_func: expected 1 to 4, got 5");
  expect_contains(error_of<FormatError>(file().u32("expert_group_count", 2), preset),
                  "every.expert_group_used_count");
  expect_contains(
      error_of<FormatError>(file().u32("expert_group_count", 3).u32("expert_group_used_count", 1),
                            preset),
      "every.expert_group_count");
  expect_contains(error_of<FormatError>(file().values("exp_probs_b.bias", {1, 2, 3}), preset),
                  "exp_probs_b.bias: expected [4], got [3]");
  const float nan = std::numeric_limits<float>::quiet_NaN();
  expect_contains(error_of<FormatError>(file().values("exp_probs_b.bias", {1, nan, 3, 4}), preset),
                  "selection_bias[1]");
}

TEST(FromGguf, RealFile) {
  const auto path = std::filesystem::path(MOESAIC_TEST_DIR) / "../../shared/data/zoo-qwen3moe.gguf";
  if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is not there";
  const auto file = GgufFile::open(path);
  const auto layers = file->moe_layers();
  ASSERT_FALSE(layers.empty());
  for (const std::int32_t layer : layers) {
    const MoeConfig c = MoeConfig::from_gguf(*file, layer);
    EXPECT_EQ(c.architecture, "qwen3moe");
    EXPECT_EQ(c.num_experts, file->integer("qwen3moe.expert_count"));
    EXPECT_EQ(c.intermediate_size, find_moe_tensors(*file, layer).down->shape[2]);
    EXPECT_TRUE(c.router.renormalize);
  }
}

// Activations against their formulas in double.
double in_double(const Activation& a, double g, double u) {
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  const auto gelu = [](double x) {
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  };
  const double limit = static_cast<double>(a.limit);
  const double clamped = std::clamp(u, -limit, limit);
  const double capped = std::min(g, limit);
  const double beta = static_cast<double>(a.beta), linear = static_cast<double>(a.linear_beta);
  switch (a.kind) {
    case ActivationKind::SwiGlu:
      return g * sigmoid(g) * u;
    case ActivationKind::SwiGluClampInput:
      return capped * sigmoid(capped) * clamped;
    case ActivationKind::SwiGluClampOutput:
      return std::min(g * sigmoid(g), limit) * clamped;
    case ActivationKind::SwiGluOai:
      return capped * sigmoid(static_cast<double>(a.alpha) * capped) * (clamped + 1);
    case ActivationKind::GeGluTanh:
      return gelu(g) * u;
    case ActivationKind::ReGlu:
      return std::max(g, 0.0) * u;
    case ActivationKind::GeluTanh:
      return gelu(u);
    case ActivationKind::ReluSquared:
      return std::max(u, 0.0) * std::max(u, 0.0);
    case ActivationKind::SiTu:
      return beta * std::tanh(g / beta) * sigmoid(g) *
             (linear == 0 ? u : linear * std::tanh(u / linear));
  }
  return 0;
}

TEST(Activate, MatchesFormulas) {
  for (int kind = 0; kind <= static_cast<int>(ActivationKind::SiTu); ++kind) {
    Activation a;
    a.kind = static_cast<ActivationKind>(kind);
    for (const float linear_beta : {0.0F, 25.0F}) {
      a.beta = 4.0F;
      a.linear_beta = linear_beta;
      a.limit = 2.0F;
      for (const float g : {-100.0F, -8.0F, -1.5F, -0.1F, 0.0F, 0.3F, 1.9F, 2.1F, 30.0F, 200.0F}) {
        for (const float u : {-50.0F, -2.5F, -1.0F, 0.0F, 0.7F, 1.9F, 3.0F, 90.0F}) {
          const double want = in_double(a, static_cast<double>(g), static_cast<double>(u));
          EXPECT_NEAR(static_cast<double>(activate(a, g, u)), want, 3e-6 * (1 + std::abs(want)))
              << name_of(a.kind) << " g=" << g << " u=" << u;
        }
      }
    }
  }
}

TEST(Activate, StaysFiniteAndKeepsNaN) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (int kind = 0; kind <= static_cast<int>(ActivationKind::SiTu); ++kind) {
    Activation a;
    a.kind = static_cast<ActivationKind>(kind);
    EXPECT_TRUE(std::isfinite(activate(a, -1e30F, 1.0F))) << name_of(a.kind);
    EXPECT_TRUE(std::isfinite(activate(a, 1e15F, 1e15F))) << name_of(a.kind);
    EXPECT_TRUE(std::isnan(activate(a, 1.0F, nan))) << name_of(a.kind);
    EXPECT_EQ(std::isnan(activate(a, nan, 1.0F)), a.gated()) << name_of(a.kind);
  }
}

TEST(Activate, Names) {
  Activation a;
  EXPECT_STREQ(name_of(a.kind), "swiglu");
  EXPECT_TRUE(a.gated());
  a.kind = ActivationKind::ReluSquared;
  EXPECT_STREQ(name_of(a.kind), "relu_squared");
  EXPECT_FALSE(a.gated());
}

}  // namespace
}  // namespace moesaic
