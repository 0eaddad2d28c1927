// Layers from GGUF files, in every way in which files store experts: what they compute beside f64,
// what the loader reports, how long they hold their file.

#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "gguf_block.hpp"
#include "moesaic/gguf.hpp"
#include "run_case.hpp"

namespace moesaic::testing {
namespace {

constexpr double kReferenceBound = 1e-5;
constexpr double kExactBound = 2e-3;

LayerCase case_of(const LayerRef& layer, const Floats& x) {
  return {.layer = layer, .x = rows_of(x, layer.hidden_size())};
}

Outcome run(const LayerRef& layer, const Floats& x, const Way& way = kWays[0]) {
  Context context = poisoned_context(backend_for(Device{}), Precision::Exact);
  return run_case(context, case_of(layer, x), way);
}

std::string shown(const ::testing::TestParamInfo<BlockSpec>& info) { return info.param.name; }

class GgufLayer : public ::testing::TestWithParam<BlockSpec> {
 protected:
  TempDir folder;
  Block block{GetParam(), 1};
  Floats x = random_values(kTokens * kHidden, 3);
  std::filesystem::path path =
      folder.write("layer.gguf", BlockFile(block.spec.architecture).block(0, block).bytes());
};
INSTANTIATE_TEST_SUITE_P(Blocks, GgufLayer, ::testing::ValuesIn(kBlocks), shown);

TEST_P(GgufLayer, RunsAsDefinedHoweverItIsOpened) {
  const Doubles expected = layer_f64(block, x);
  for (const bool mmap : {true, false}) {
    const auto file = GgufFile::open(path, {.mmap = mmap});
    EXPECT_EQ(file->mapped(), mmap);
    for (const StackLayout layout : {StackLayout::Auto, StackLayout::File}) {
      for (const bool dense : {false, true}) {
        SCOPED_TRACE((mmap ? "mmap" : "read") + std::string(dense ? " dequantized " : " ") +
                     (layout == StackLayout::Auto ? "auto" : "file"));
        LoadOptions options;
        options.backend = &backend_for(Device{});
        options.layout = layout;
        if (dense) options.dequantize = QuantType::F32;
        const MoeLayer layer = MoeLayer::from_gguf(file, 0, options);
        EXPECT_EQ(layer.shared() != nullptr, block.has_shared());
        EXPECT_EQ(decode_role(layer.stack().gate()), block.experts.gate.decoded);
        EXPECT_EQ(decode_role(layer.stack().up()), block.experts.up.decoded);
        EXPECT_EQ(decode_role(layer.stack().down()), block.experts.down.decoded);
        EXPECT_LE(run_reference(case_of(layer, x)).error(expected), kReferenceBound);
        for (const Way& way : kWays) {
          EXPECT_LE(run(layer, x, way).error(expected), kExactBound) << way.name;
        }
      }
    }
  }
}

TEST_P(GgufLayer, StackIsTheLayersAndReportsWhatWasDone) {
  const Storage storage = block.spec.storage;
  for (const bool mmap : {true, false}) {
    const ExpertStack stack = ExpertStack::load_from_gguf(GgufFile::open(path, {.mmap = mmap}), 0);
    EXPECT_EQ(stack.shape(), (StackShape{kExperts, kHidden, kWidth}));
    EXPECT_STREQ(stack.kind(), storage == Storage::PerExpert ? "per_expert" : "stacked");
    ASSERT_EQ(stack.report().roles.size(), 3U);
    for (const RoleReport& role : stack.report().roles) {
      const TestRole& made = role.role == Role::Gate ? block.experts.gate
                             : role.role == Role::Up ? block.experts.up
                                                     : block.experts.down;
      EXPECT_EQ(role.stored, made.weights.ref.type);
      EXPECT_EQ(role.kept, made.weights.ref.type);
      EXPECT_EQ(role.decision, mmap ? "mapped" : "read");
      EXPECT_EQ(role.bytes, static_cast<std::int64_t>(made.bytes->size()));
      const std::string name = storage == Storage::Fused && role.role != Role::Down
                                   ? std::string("gate_up")
                                   : name_of(role.role);
      EXPECT_EQ(role.source, "blk.0.ffn_" + name +
                                 (storage == Storage::PerExpert ? ".*.weight" : "_exps.weight"));
    }
  }
  LoadOptions options;
  options.backend = &backend_for(Device{});
  const ExpertStack repacked = ExpertStack::open_and_load(path, 0, options);
  for (const RoleReport& role : repacked.report().roles) {
    EXPECT_EQ(role.decision, "repacked");
    EXPECT_EQ(role.kept, role.stored);
  }
  options.dequantize = QuantType::F16;
  options.layout = StackLayout::File;
  const ExpertStack dense = ExpertStack::open_and_load(path, 0, options);
  for (const RoleReport& role : dense.report().roles) {
    EXPECT_EQ(role.decision, role.stored == QuantType::F16 ? "mapped" : "dequantized");
    EXPECT_EQ(role.kept, QuantType::F16);
  }
}

TEST_P(GgufLayer, HoldsTheFileWhileItNeedsIt) {
  const Doubles expected = layer_f64(block, x);
  const Backend& backend = backend_for(Device{});
  for (const bool mmap : {true, false}) {
    for (const StackLayout layout : {StackLayout::Auto, StackLayout::File}) {
      auto file = GgufFile::open(path, {.mmap = mmap});
      const MoeLayer layer = MoeLayer::from_gguf(
          file, 0,
          {.layout = layout, .dequantize = {}, .backend = &backend, .pool = {}, .progress = {}});
      if (mmap && layout == StackLayout::File) {
        EXPECT_THROW(file->close(), DeviceError);
      } else {
        file->close();
      }
      file.reset();
      EXPECT_LE(run(layer, x).error(expected), kExactBound);
    }
  }
}

TEST(GgufLayers, EveryLayerHasItsOwnTypes) {
  const TempDir folder;
  const Block first(kBlocks[0], 11), second(kBlocks[5], 12);
  const auto file = GgufFile::open(
      folder.write("layers.gguf", BlockFile("qwen3moe").block(0, first).block(1, second).bytes()));
  const Floats x = random_values(kTokens * kHidden, 3);
  LoadOptions options;
  options.backend = &backend_for(Device{});
  std::int32_t index = 0;
  for (const Block* block : {&first, &second}) {
    const MoeLayer layer = MoeLayer::from_gguf(file, index, options);
    EXPECT_EQ(layer.config().layer, index++);
    EXPECT_EQ(layer.stack().gate().ref.type, block->spec.gate);
    EXPECT_EQ(layer.stack().up().ref.type, block->spec.up);
    EXPECT_EQ(layer.stack().down().ref.type, block->spec.down);
    EXPECT_LE(run(layer, x).error(layer_f64(*block, x)), kExactBound);
  }
}

TEST(GgufLayers, ConfigOfEachArchitecture) {
  const TempDir folder;
  for (const BlockSpec& spec : {kBlocks[0], kBlocks[1], kBlocks[2], kBlocks[3], kBlocks[4]}) {
    const Block block(spec, 5);
    const auto file = GgufFile::open(
        folder.write("config.gguf", BlockFile(spec.architecture).block(0, block).bytes()));
    const MoeConfig config = MoeLayer::from_gguf(file, 0).config();
    EXPECT_EQ(config.architecture, spec.architecture);
    EXPECT_EQ(config.router.renormalize, block.renormalizes()) << spec.name;
    EXPECT_EQ(config.shared, block.gated_shared() ? SharedKind::SigmoidGated
                             : block.has_shared() ? SharedKind::Plain
                                                  : SharedKind::None);
    EXPECT_EQ(config.shared_intermediate_size, block.has_shared() ? kSharedWidth : 0);
  }
}

TEST(GgufLayers, ProgressReportsAllBytesAndCancels) {
  const TempDir folder;
  const Block block(kBlocks[0], 1);
  const auto file =
      GgufFile::open(folder.write("progress.gguf", BlockFile("qwen3moe").block(0, block).bytes()));
  LoadOptions options;
  Progress last{};
  options.progress = [&](const Progress& p) {
    EXPECT_GT(p.done_bytes, last.done_bytes);
    last = p;
    return true;
  };
  const ExpertStack stack = ExpertStack::load_from_gguf(file, 0, options);
  EXPECT_EQ(last.done_bytes, stack.nbytes());
  EXPECT_EQ(last.total_bytes, stack.nbytes());
  options.progress = [](const Progress&) { return false; };
  EXPECT_THROW(ExpertStack::load_from_gguf(file, 0, options), OperationCancelled);
}

/// Beside the reference on the layer as stored: the CPU backend in both layouts, on every way.
void expect_every_path(const std::shared_ptr<GgufFile>& file, std::int32_t index) {
  const MoeLayer stored = MoeLayer::from_gguf(file, index);
  const Floats x = random_values(kTokens * stored.config().hidden_size, 3);
  const Floats reference = run_reference(case_of(stored, x)).values();
  const Doubles expected(reference.begin(), reference.end());
  for (const StackLayout layout : {StackLayout::Auto, StackLayout::File}) {
    LoadOptions options;
    options.backend = &backend_for(Device{});
    options.layout = layout;
    const MoeLayer layer = MoeLayer::from_gguf(file, index, options);
    for (const Way& way : kWays) {
      EXPECT_LE(run(layer, x, way).error(expected), kExactBound)
          << "layer " << index << " " << way.name;
    }
  }
}

TEST(GgufLayers, EveryTypeOnEveryPath) {
  const TempDir folder;
  for (const QuantTraits& type : quant_table()) {
    if (!backend_for(Device{}).supports({.type = type.type}).ok) continue;
    if (!is_ggml_type(type.type)) continue;
    SCOPED_TRACE(type.name);
    const Block block({"", "qwen3moe", type.type, type.type, type.type}, 1);
    const auto file =
        GgufFile::open(folder.write("type.gguf", BlockFile("qwen3moe").block(0, block).bytes()));
    expect_every_path(file, 0);
  }
}

TEST(ZooFile, EveryLayerOnEveryPath) {
  const auto path = std::filesystem::path(MOESAIC_TEST_DIR) / "../../shared/data/zoo-qwen3moe.gguf";
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "no zoo-qwen3moe.gguf";
  const auto file = GgufFile::open(path);
  for (const std::int32_t index : file->moe_layers()) expect_every_path(file, index);
}

}  // namespace
}  // namespace moesaic::testing
