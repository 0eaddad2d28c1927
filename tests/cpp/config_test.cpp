// What the metadata and tensors of a file say about a layer.

#include "moesaic/config.hpp"

#include <filesystem>
#include <string>
#include <vector>

#include "layer_file.hpp"

namespace moesaic::test {
namespace {

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
  EXPECT_EQ(c.router.guard, NormGuard::None);
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
  expect_contains(text, "'gpt-j'");
  // All of them would be some 700 characters.
  expect_contains(text, "known_architectures()");
  EXPECT_LE(text.size(), 200U) << text;
  FileBuilder nameless;
  nameless.writer = {};
  expect_contains(error_of<FormatError>(nameless.stacks()), "general.architecture");
}

TEST(LayerKinds, ByTheTensors) {
  FileBuilder b("ernie4_5-moe");
  b.u32("block_count", 6).stacks();  // block 1
  b.writer.filled("blk.0.ffn_up.weight", QuantType::F32, {8, 8});
  b.writer.filled("blk.2.attn_q.weight", QuantType::F32, {8, 8});
  b.writer.filled("blk.3.ffn_gate_up_exps.weight", QuantType::F32, {2, 8, 8});
  b.writer.filled("blk.4.ffn_up.0.weight", QuantType::F32, {8, 8});
  const OpenFile open(b);
  using enum LayerKind;
  EXPECT_EQ(layer_kinds(*open.file), (std::vector<LayerKind>{Dense, Moe, None, Moe, Moe, None}));

  FileBuilder far("llama");
  far.writer.filled("blk.2000000000.ffn_up.weight", QuantType::F32, {8, 8});
  EXPECT_THROW(layer_kinds(*OpenFile(far).file), FormatError);
  EXPECT_EQ(layer_kinds(*OpenFile(FileBuilder("llama").u32("block_count", 4000000000)).file).size(),
            1024U);
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

}  // namespace
}  // namespace moesaic::test
