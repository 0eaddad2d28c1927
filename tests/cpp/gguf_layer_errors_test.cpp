// GGUF files whose layers must be refused, with an error that names the tensor, what was expected
// and what it got.

#include <gtest/gtest.h>

#include <initializer_list>
#include <string>

#include "gguf_block.hpp"
#include "moesaic/forward.hpp"
#include "moesaic/gguf.hpp"

namespace moesaic::testing {
namespace {

class BadFile : public ::testing::Test {
 protected:
  TempDir folder;

  enum class Load : std::uint8_t { Stack, Layer };
  template <class E>
  void expect(const BlockFile& file, Load load, std::initializer_list<const char*> parts) {
    const auto opened = GgufFile::open(folder.write("bad.gguf", file.bytes()));
    try {
      if (load == Load::Stack) {
        ExpertStack::load_from_gguf(opened, 0);
      } else {
        MoeLayer::from_gguf(opened, 0);
      }
      ADD_FAILURE() << "no error: " << *parts.begin();
    } catch (const E& error) {
      const std::string text = error.what();
      const char* operation = load == Load::Stack ? "load_from_gguf" : "from_gguf";
      EXPECT_NE(text.find(operation), std::string::npos) << text;
      EXPECT_NE(text.find("expected"), std::string::npos) << text;
      EXPECT_NE(text.find("got"), std::string::npos) << text;
      for (const char* part : parts) EXPECT_NE(text.find(part), std::string::npos) << text;
    }
  }
  static BlockFile without(const char* tensor, const BlockSpec& spec) {
    BlockFile file(spec.architecture);
    file.without = tensor;
    file.block(0, Block(spec, 1));
    return file;
  }
  static BlockFile reshaped(const BlockFile::Reshaped& tensor, const BlockSpec& spec) {
    BlockFile file(spec.architecture);
    file.reshaped = tensor;
    file.block(0, Block(spec, 1));
    return file;
  }
};

TEST_F(BadFile, MissingTensors) {
  for (const char* name : {"blk.0.ffn_up_exps.weight", "blk.0.ffn_down_exps.weight"}) {
    expect<FormatError>(without(name, block_named("qwen3moe")), Load::Stack,
                        {"layer 0", name, "no such tensor"});
    expect<FormatError>(without(name, block_named("qwen3moe")), Load::Layer,
                        {"block 0", "ffn_down_exps.weight"});
  }
  for (const char* name : {"blk.0.ffn_gate_exps.weight", "blk.0.ffn_gate_inp.weight"}) {
    expect<FormatError>(without(name, block_named("qwen3moe")), Load::Layer,
                        {"layer 0", name, "no such tensor"});
  }
  for (const char* name : {"blk.0.ffn_up_shexp.weight", "blk.0.ffn_down_shexp.weight",
                           "blk.0.ffn_gate_inp_shexp.weight"}) {
    expect<FormatError>(without(name, block_named("qwen2moe")), Load::Layer, {name});
  }
}

TEST_F(BadFile, MissingExpertsOfOneTensorEach) {
  const BlockSpec& legacy = block_named("per_expert");
  expect<FormatError>(without("blk.0.ffn_up.4.weight", legacy), Load::Stack,
                      {"blk.0.ffn_up.4.weight", "no such tensor"});
  expect<FormatError>(without("blk.0.ffn_down.4.weight", legacy), Load::Stack,
                      {"blk.0.ffn_up.*.weight", "4 experts", "got 5"});
  const auto gap =
      GgufFile::open(folder.write("gap.gguf", without("blk.0.ffn_gate.2.weight", legacy).bytes()));
  try {
    ExpertStack::load_from_gguf(gap, 0);
    ADD_FAILURE();
  } catch (const FormatError& error) {
    EXPECT_NE(std::string(error.what()).find("blk.0.ffn_gate.2.weight"), std::string::npos);
  }
  expect<FormatError>(
      reshaped({"blk.0.ffn_up.3.weight", {kWidth, kHidden}, QuantType::Q2_K}, legacy), Load::Stack,
      {"blk.0.ffn_up.3.weight", "type of expert 0", "Q4_K", "Q2_K"});
  expect<FormatError>(reshaped({"blk.0.ffn_down.3.weight", {kHidden / 2, kWidth}, {}}, legacy),
                      Load::Stack, {"blk.0.ffn_down.3.weight", "[256, 256]", "[128, 256]"});
}

TEST_F(BadFile, WithoutExperts) {
  BlockFile dense("qwen3moe");
  const Floats values(kHidden * kWidth);
  dense.tensor("blk.0.ffn_up.weight", {kWidth, kHidden}, QuantType::F32, chars(values));
  dense.tensor("blk.0.ffn_down.weight", {kHidden, kWidth}, QuantType::F32, chars(values));
  expect<FormatError>(dense, Load::Stack, {"layer 0", "blk.0.ffn_*_exps.weight"});
  expect<ShapeError>(dense, Load::Layer, {"block 0", "a file with experts", "without"});
}

TEST_F(BadFile, ShapesThatDisagree) {
  const BlockSpec& split = block_named("qwen3moe");
  const std::vector<std::int64_t> fewer{kExperts - 1, kWidth, kHidden};
  expect<FormatError>(reshaped({"blk.0.ffn_gate_exps.weight", fewer, {}}, split), Load::Stack,
                      {"blk.0.ffn_gate_exps.weight", "[5, 256, 256]", "[4, 256, 256]"});
  expect<FormatError>(reshaped({"blk.0.ffn_down_exps.weight", fewer, {}}, split), Load::Stack,
                      {"blk.0.ffn_down_exps.weight", "[5, 256, 256]", "[4, 256, 256]"});
  expect<FormatError>(reshaped({"blk.0.ffn_down_exps.weight", fewer, {}}, split), Load::Layer,
                      {"blk.0.ffn_down_exps.weight", "[5, 256, 256]", "[4, 256, 256]"});
  // Without an outermost dimension it is one expert, with which the others disagree.
  expect<FormatError>(
      reshaped({"blk.0.ffn_up_exps.weight", {kExperts * kWidth, kHidden}, {}}, split), Load::Stack,
      {"blk.0.ffn_down_exps.weight", "[1, 256, 1280]", "[5, 256, 256]"});
  expect<FormatError>(
      reshaped({"blk.0.ffn_gate_up_exps.weight", {kExperts, 2 * kWidth - 1, kHidden}, {}},
               block_named("fused")),
      Load::Stack, {"blk.0.ffn_gate_up_exps.weight", "[E, 2I, H]", "[5, 511, 256]"});
  expect<FormatError>(reshaped({"blk.0.ffn_gate_inp.weight", {kExperts - 1, kHidden}, {}}, split),
                      Load::Layer, {"blk.0.ffn_gate_inp.weight", "[5, 256]", "[4, 256]"});
  expect<FormatError>(
      reshaped({"blk.0.ffn_up_exps.bias", {kExperts, kWidth - 1}, {}}, block_named("biases")),
      Load::Stack, {"blk.0.ffn_up_exps.bias", "[5, 256]", "[5, 255]"});
  expect<FormatError>(
      reshaped({"blk.0.ffn_gate_up_exps.bias", {kExperts, kWidth}, {}}, block_named("fused_bias")),
      Load::Stack, {"blk.0.ffn_gate_up_exps.bias", "[5, 512]", "[5, 256]"});
  expect<FormatError>(
      reshaped({"blk.0.ffn_down_exps.scale", {kExperts - 1}, {}}, block_named("scales")),
      Load::Stack, {"blk.0.ffn_down_exps.scale", "[5]", "[4]"});
  expect<FormatError>(reshaped({"blk.0.ffn_up_shexp.weight", {kSharedWidth / 2, kHidden}, {}},
                               block_named("qwen2moe")),
                      Load::Layer, {"ffn_", "_shexp.weight", "[32, 256]", "[64, 256]"});
}

TEST_F(BadFile, TypesAndArchitecturesThatAreUnknown) {
  expect<UnsupportedError>(
      reshaped({"blk.0.ffn_down_exps.weight", {kExperts, kHidden, kWidth}, QuantType::I8},
               block_named("type_per_role")),
      Load::Stack, {"blk.0.ffn_down_exps.weight", "decoder", "I8"});
  BlockFile file("a_new_moe");
  file.block(0, Block(block_named("qwen3moe"), 1));
  expect<UnsupportedError>(file, Load::Layer,
                           {"general.architecture", "known_architectures", "a_new_moe"});
}

}  // namespace
}  // namespace moesaic::testing
