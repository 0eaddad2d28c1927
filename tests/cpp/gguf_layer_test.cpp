// Layers from GGUF files written here: every way in which files store experts, against f64.

#include <gtest/gtest.h>

#include <filesystem>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>

#include "gguf_writer.hpp"
#include "layers.hpp"
#include "moesaic/gguf.hpp"
#include "moesaic/thread_pool.hpp"

namespace moesaic::testing {
namespace {

using test::GgufWriter;
using test::TempDir;

constexpr std::int64_t kTokens = 5, kHidden = 256, kWidth = 256, kSharedWidth = 64;
constexpr std::int32_t kExperts = 5, kTopK = 2;
constexpr double kReferenceBound = 1e-5;
constexpr double kExactBound = 2e-3;

enum class Storage : std::uint8_t { Split, Fused, PerExpert };

/// One block of a file.
struct BlockSpec {
  const char* name;
  const char* architecture;
  QuantType gate, up, down;
  Storage storage = Storage::Split;
  bool bias = false, scale = false;
  QuantType router = QuantType::F32;
  bool plain_shared = false;
};

constexpr BlockSpec kBlocks[] = {
    {"qwen3moe", "qwen3moe", QuantType::Q4_K, QuantType::Q4_K, QuantType::Q6_K},
    {"qwen2moe", "qwen2moe", QuantType::Q5_K, QuantType::Q5_K, QuantType::Q8_0},
    {"olmoe", "olmoe", QuantType::Q4_0, QuantType::Q4_0, QuantType::Q5_1},
    {"llama", "llama", QuantType::Q3_K, QuantType::Q3_K, QuantType::Q5_K},
    {"llama_shared", "llama", QuantType::Q4_1, QuantType::Q4_1, QuantType::Q8_0, Storage::Split,
     false, false, QuantType::F32, true},
    {"type_per_role", "qwen3moe", QuantType::IQ4_XS, QuantType::Q8_0, QuantType::BF16,
     Storage::Split, false, false, QuantType::F16},
    {"biases", "qwen3moe", QuantType::MXFP4, QuantType::MXFP4, QuantType::MXFP4, Storage::Split,
     true},
    {"scales", "qwen3moe", QuantType::NVFP4, QuantType::NVFP4, QuantType::NVFP4, Storage::Split,
     false, true},
    {"biases_and_scales", "qwen2moe", QuantType::Q8_0, QuantType::F16, QuantType::Q4_1,
     Storage::Split, true, true},
    {"fused", "qwen3moe", QuantType::Q4_K, QuantType::Q4_K, QuantType::Q6_K, Storage::Fused},
    {"fused_bias", "qwen3moe", QuantType::Q5_0, QuantType::Q5_0, QuantType::Q8_0, Storage::Fused,
     true},
    {"fused_scale", "qwen3moe", QuantType::NVFP4, QuantType::NVFP4, QuantType::NVFP4,
     Storage::Fused, false, true},
    {"fused_bias_and_scale", "qwen3moe", QuantType::F32, QuantType::F32, QuantType::F16,
     Storage::Fused, true, true},
    {"per_expert", "llama", QuantType::Q4_K, QuantType::Q4_K, QuantType::Q6_K, Storage::PerExpert},
    {"per_expert_types", "llama", QuantType::Q2_K, QuantType::F16, QuantType::IQ4_NL,
     Storage::PerExpert, true, true},
};

std::string_view chars(const void* data, std::size_t bytes) {
  return {static_cast<const char*>(data), bytes};
}
std::string_view chars(const Floats& values) {
  return chars(values.data(), values.size() * sizeof(float));
}

/// The weights of one block, from which a file and the expected values are made.
struct Block {
  BlockSpec spec;
  TestLayer experts;
  TestRole router;  ///< one "expert" of [E, H]
  TestLayer shared;
  Floats shared_gate;

  Block(const BlockSpec& s, std::uint32_t seed)
      : spec(s),
        experts(expert_case(s), seed),
        router(make_role(1, kExperts, kHidden, s.router, seed + 3, false)),
        shared(shared_case(), seed + 4),
        shared_gate(random_values(kHidden, seed + 7, 0.1F)) {
    for (TestRole* role : {&experts.gate, &experts.up, &experts.down}) {
      if (!s.bias) role->weights.bias = nullptr;
      if (!s.scale) role->weights.scale = nullptr;
    }
    // Both halves of a fused tensor have one scale.
    if (s.storage == Storage::Fused) experts.gate.weights.scale = experts.up.weights.scale;
  }
  bool gated_shared() const { return std::string(spec.architecture) == "qwen2moe"; }
  bool has_shared() const { return gated_shared() || spec.plain_shared; }
  bool renormalizes() const {
    return std::string(spec.architecture) == "qwen3moe" ||
           std::string(spec.architecture) == "llama";
  }

  static Case expert_case(const BlockSpec& s) {
    return {s.name,
            kTokens,
            kHidden,
            kWidth,
            kExperts,
            kTopK,
            s.gate,
            s.up,
            s.down,
            RoutingShape::Uniform,
            ActivationKind::SwiGlu,
            true};
  }
  static Case shared_case() {
    return {"shared", kTokens,         kHidden,         kSharedWidth,   1,
            1,        QuantType::Q8_0, QuantType::Q8_0, QuantType::Q4_0};
  }
};

/// Keys and tensors of a file; tensors can be left out or given another shape before it is written.
class LayerFile {
 public:
  explicit LayerFile(const std::string& architecture) : architecture_(architecture) {
    writer_.string("general.architecture", architecture);
    for (const auto& [key, value] : {std::pair{"block_count", std::int64_t{2}},
                                     {"embedding_length", kHidden},
                                     {"expert_count", kExperts},
                                     {"expert_used_count", kTopK},
                                     {"expert_feed_forward_length", kWidth}}) {
      writer_.u32(architecture + "." + key, static_cast<std::uint32_t>(value));
    }
  }
  std::string architecture_;
  std::string without;  ///< this tensor is not written
  struct Reshaped {
    std::string name;
    std::vector<std::int64_t> shape;  ///< of as many elements or fewer
    std::optional<QuantType> type;
  };
  std::optional<Reshaped> reshaped;

  LayerFile& tensor(const std::string& name, std::vector<std::int64_t> shape, QuantType type,
                    std::string_view data) {
    if (name == without) return *this;
    if (reshaped && name == reshaped->name) {
      shape = reshaped->shape;
      type = reshaped->type.value_or(type);
      std::int64_t bytes = row_bytes(type, shape.back());
      for (std::size_t i = 0; i + 1 < shape.size(); ++i) bytes *= shape[i];
      data = data.substr(0, static_cast<std::size_t>(bytes));
    }
    writer_.tensor(name, {shape.rbegin(), shape.rend()}, static_cast<std::uint32_t>(type), data);
    return *this;
  }
  LayerFile& block(std::int32_t layer, const Block& block) {
    const std::string prefix = "blk." + std::to_string(layer) + ".ffn_";
    role(prefix + "gate_inp.weight", block.router, {kExperts, kHidden});
    const TestLayer& experts = block.experts;
    switch (block.spec.storage) {
      case Storage::Split:
        stacked(prefix + "gate_exps", experts.gate);
        stacked(prefix + "up_exps", experts.up);
        break;
      case Storage::Fused:
        fused(prefix, experts.gate, experts.up);
        break;
      case Storage::PerExpert:
        per_expert(prefix + "gate", experts.gate);
        per_expert(prefix + "up", experts.up);
        per_expert(prefix + "down", experts.down);
        epilogue(prefix + "gate_exps", experts.gate);
        epilogue(prefix + "up_exps", experts.up);
        epilogue(prefix + "down_exps", experts.down);
        break;
    }
    if (block.spec.storage != Storage::PerExpert) stacked(prefix + "down_exps", experts.down);
    if (block.has_shared()) {
      role(prefix + "gate_shexp.weight", block.shared.gate, {kSharedWidth, kHidden});
      role(prefix + "up_shexp.weight", block.shared.up, {kSharedWidth, kHidden});
      role(prefix + "down_shexp.weight", block.shared.down, {kHidden, kSharedWidth});
      if (block.gated_shared()) {
        tensor(prefix + "gate_inp_shexp.weight", {kHidden}, QuantType::F32,
               chars(block.shared_gate));
      }
    }
    return *this;
  }
  std::string bytes() const { return writer_.bytes(); }

 private:
  LayerFile& role(const std::string& name, const TestRole& role, std::vector<std::int64_t> shape) {
    return tensor(name, std::move(shape), role.weights.ref.type,
                  chars(role.bytes->data(), role.bytes->size()));
  }
  void epilogue(const std::string& name, const TestRole& role) {
    if (role.weights.bias) {
      tensor(name + ".bias", {kExperts, role.weights.ref.rows}, QuantType::F32,
             chars(*role.weights.bias));
    }
    if (role.weights.scale) {
      tensor(name + ".scale", {kExperts}, QuantType::F32, chars(*role.weights.scale));
    }
  }
  void stacked(const std::string& name, const TestRole& weights) {
    role(name + ".weight", weights, {kExperts, weights.weights.ref.rows, weights.weights.ref.cols});
    epilogue(name, weights);
  }
  void per_expert(const std::string& name, const TestRole& role) {
    const WeightRef& ref = role.weights.ref;
    // Real files scatter the experts; here they stand in descending order.
    for (std::int32_t e = kExperts; e-- > 0;) {
      tensor(name + "." + std::to_string(e) + ".weight", {ref.rows, ref.cols}, ref.type,
             chars(ref.expert(e), static_cast<std::size_t>(ref.expert_stride)));
    }
  }
  void fused(const std::string& prefix, const TestRole& gate, const TestRole& up) {
    std::string weights;
    Floats bias;
    for (std::int32_t e = 0; e < kExperts; ++e) {
      for (const TestRole* role : {&gate, &up}) {
        const WeightRef& ref = role->weights.ref;
        weights += chars(ref.expert(e), static_cast<std::size_t>(ref.expert_stride));
        if (!role->weights.bias) continue;
        const auto first = role->weights.bias->begin() + e * ref.rows;
        bias.insert(bias.end(), first, first + ref.rows);
      }
    }
    tensor(prefix + "gate_up_exps.weight", {kExperts, 2 * kWidth, kHidden}, gate.weights.ref.type,
           weights);
    if (!bias.empty()) {
      tensor(prefix + "gate_up_exps.bias", {kExperts, 2 * kWidth}, QuantType::F32, chars(bias));
    }
    if (up.weights.scale) {
      tensor(prefix + "up_exps.scale", {kExperts}, QuantType::F32, chars(*up.weights.scale));
    }
  }

  GgufWriter writer_;
};

/// Softmax over all experts, the best kTopK, renormalised where the architecture does it.
Routing route_f64(const Block& block, const Floats& x) {
  Routing routing(kTokens, kTopK);
  for (std::int64_t t = 0; t < kTokens; ++t) {
    const Doubles row(x.begin() + t * kHidden, x.begin() + (t + 1) * kHidden);
    Doubles p = apply_f64(block.router, 0, row.data());
    double sum = 0.0;
    for (double& v : p) sum += v = std::exp(v);
    for (double& v : p) v /= sum;
    std::vector<std::int32_t> order(kExperts);
    std::iota(order.begin(), order.end(), 0);
    std::ranges::sort(order, [&](std::int32_t a, std::int32_t b) {
      return p[static_cast<std::size_t>(a)] > p[static_cast<std::size_t>(b)];
    });
    double chosen = 0.0;
    for (std::size_t s = 0; s < kTopK; ++s) chosen += p[static_cast<std::size_t>(order[s])];
    for (std::size_t s = 0; s < kTopK; ++s) {
      const std::size_t pair = static_cast<std::size_t>(t) * kTopK + s;
      routing.topk_ids()[pair] = order[s];
      const double weight = p[static_cast<std::size_t>(order[s])];
      routing.topk_weights()[pair] =
          static_cast<float>(block.renormalizes() ? weight / chosen : weight);
    }
  }
  return routing;
}

Doubles layer_f64(const Block& block, const Floats& x) {
  Doubles y = forward_f64(block.experts, x, route_f64(block, x));
  if (!block.has_shared()) return y;
  Routing one(kTokens, 1);
  for (std::int64_t t = 0; t < kTokens; ++t) {
    double logit = 0.0;
    for (std::int64_t h = 0; h < kHidden; ++h) {
      logit += static_cast<double>(block.shared_gate[static_cast<std::size_t>(h)]) *
               static_cast<double>(x[static_cast<std::size_t>(t * kHidden + h)]);
    }
    one.topk_ids()[static_cast<std::size_t>(t)] = 0;
    one.topk_weights()[static_cast<std::size_t>(t)] =
        block.gated_shared() ? static_cast<float>(1.0 / (1.0 + std::exp(-logit))) : 1.0F;
  }
  const Doubles shared = forward_f64(block.shared, x, one);
  for (std::size_t i = 0; i < y.size(); ++i) y[i] += shared[i];
  return y;
}

Doubles run_reference(const LayerRef& layer, const Floats& values) {
  const std::int64_t hidden = layer.stack->shape().hidden_size;
  Tensor x(DType::F32, kTokens, hidden, values), y(DType::F32, kTokens, hidden);
  ForwardIo io;
  io.x = x.view();
  io.out = y.view();
  moe_forward_cpu(layer, io);
  const Floats out = y.values();
  return {out.begin(), out.end()};
}

struct Way {
  GemmMode gemm;
  RowSpaceMode row_space;
};
constexpr Way kWays[] = {{GemmMode::Auto, RowSpaceMode::Auto},
                         {GemmMode::Bucketed, RowSpaceMode::TokenPairs},
                         {GemmMode::Bucketed, RowSpaceMode::PackedRows},
                         {GemmMode::Aligned, RowSpaceMode::TokenPairs},
                         {GemmMode::Aligned, RowSpaceMode::PackedRows}};

Floats run_way(const LayerRef& layer, const Floats& values, const Way& way) {
  Tuning tuning;
  tuning.poison = true;
  tuning.precision = Precision::Exact;
  tuning.gemm = way.gemm;
  tuning.row_space = way.row_space;
  Context context(backend_for(Device{}), tuning, ThreadPool::shared(2));
  const std::int64_t hidden = layer.stack->shape().hidden_size;
  Workspace workspace(workspace_bytes(context, layer, layer.router->top_k, kTokens));
  Tensor x(DType::F32, kTokens, hidden, values), y(DType::F32, kTokens, hidden);
  ForwardIo io;
  io.x = x.view();
  io.out = y.view();
  moe_forward(context, layer, io, workspace);
  return y.values();
}

std::string shown(const ::testing::TestParamInfo<BlockSpec>& info) { return info.param.name; }

class GgufLayer : public ::testing::TestWithParam<BlockSpec> {
 protected:
  TempDir folder;
  Block block{GetParam(), 1};
  Floats x = random_values(kTokens * kHidden, 3);
  std::filesystem::path path =
      folder.write("layer.gguf", LayerFile(block.spec.architecture).block(0, block).bytes());
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
        EXPECT_LE(rel_l2(run_reference(layer, x), expected), kReferenceBound);
        for (const Way& way : kWays) {
          EXPECT_LE(rel_l2(run_way(layer, x, way), expected), kExactBound)
              << static_cast<int>(way.gemm) << " " << static_cast<int>(way.row_space);
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
      EXPECT_LE(rel_l2(run_way(layer, x, kWays[0]), expected), kExactBound);
    }
  }
}

TEST(GgufLayers, EveryLayerHasItsOwnTypes) {
  const TempDir folder;
  const Block first(kBlocks[0], 11), second(kBlocks[5], 12);
  const auto file = GgufFile::open(
      folder.write("layers.gguf", LayerFile("qwen3moe").block(0, first).block(1, second).bytes()));
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
    EXPECT_LE(rel_l2(run_way(layer, x, kWays[0]), layer_f64(*block, x)), kExactBound);
  }
}

TEST(GgufLayers, ConfigOfEachArchitecture) {
  const TempDir folder;
  for (const BlockSpec& spec : {kBlocks[0], kBlocks[1], kBlocks[2], kBlocks[3], kBlocks[4]}) {
    const Block block(spec, 5);
    const auto file = GgufFile::open(
        folder.write("config.gguf", LayerFile(spec.architecture).block(0, block).bytes()));
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
      GgufFile::open(folder.write("progress.gguf", LayerFile("qwen3moe").block(0, block).bytes()));
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

/// The layer as stored through the reference, then as the CPU backend runs it in both layouts.
void expect_every_path(const std::shared_ptr<GgufFile>& file, std::int32_t index) {
  const MoeLayer stored = MoeLayer::from_gguf(file, index);
  const Floats x = random_values(kTokens * stored.config().hidden_size, 3);
  const Doubles expected = run_reference(stored, x);
  for (const StackLayout layout : {StackLayout::Auto, StackLayout::File}) {
    LoadOptions options;
    options.backend = &backend_for(Device{});
    options.layout = layout;
    const MoeLayer layer = MoeLayer::from_gguf(file, index, options);
    for (const Way& way : kWays) {
      EXPECT_LE(rel_l2(run_way(layer, x, way), expected), kExactBound)
          << "layer " << index << " " << static_cast<int>(way.gemm) << " "
          << static_cast<int>(way.row_space);
    }
  }
}

TEST(GgufLayers, EveryTypeOnEveryPath) {
  const TempDir folder;
  for (const QuantTraits& type : quant_table()) {
    if (!backend_for(Device{}).supports({.type = type.type}).ok) continue;
    SCOPED_TRACE(type.name);
    const Block block({"", "qwen3moe", type.type, type.type, type.type}, 1);
    const auto file =
        GgufFile::open(folder.write("type.gguf", LayerFile("qwen3moe").block(0, block).bytes()));
    expect_every_path(file, 0);
  }
}

TEST(ZooFile, EveryLayerOnEveryPath) {
  const auto path = std::filesystem::path(MOESAIC_TEST_DIR) / "../../shared/data/zoo-qwen3moe.gguf";
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "no zoo-qwen3moe.gguf";
  const auto file = GgufFile::open(path);
  for (const std::int32_t index : file->moe_layers()) expect_every_path(file, index);
}

/// Files that must be refused, with an error that says what, expected and got.
class BadFile : public ::testing::Test {
 protected:
  TempDir folder;

  enum class Load : std::uint8_t { Stack, Layer };
  template <class E>
  void expect(const LayerFile& file, Load load, std::initializer_list<const char*> parts) {
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
  static LayerFile without(const char* tensor, const BlockSpec& spec) {
    LayerFile file(spec.architecture);
    file.without = tensor;
    file.block(0, Block(spec, 1));
    return file;
  }
  static LayerFile reshaped(const LayerFile::Reshaped& tensor, const BlockSpec& spec) {
    LayerFile file(spec.architecture);
    file.reshaped = tensor;
    file.block(0, Block(spec, 1));
    return file;
  }
  static const BlockSpec& spec(const std::string& name) {
    for (const BlockSpec& s : kBlocks) {
      if (name == s.name) return s;
    }
    throw std::runtime_error("no block " + name);
  }
};

TEST_F(BadFile, MissingTensors) {
  for (const char* name : {"blk.0.ffn_up_exps.weight", "blk.0.ffn_down_exps.weight"}) {
    expect<FormatError>(without(name, spec("qwen3moe")), Load::Stack,
                        {"layer 0", name, "no such tensor"});
    expect<FormatError>(without(name, spec("qwen3moe")), Load::Layer,
                        {"block 0", "ffn_down_exps.weight"});
  }
  for (const char* name : {"blk.0.ffn_gate_exps.weight", "blk.0.ffn_gate_inp.weight"}) {
    expect<FormatError>(without(name, spec("qwen3moe")), Load::Layer,
                        {"layer 0", name, "no such tensor"});
  }
  for (const char* name : {"blk.0.ffn_up_shexp.weight", "blk.0.ffn_down_shexp.weight",
                           "blk.0.ffn_gate_inp_shexp.weight"}) {
    expect<FormatError>(without(name, spec("qwen2moe")), Load::Layer, {name});
  }
}

TEST_F(BadFile, MissingExpertsOfOneTensorEach) {
  const BlockSpec& legacy = spec("per_expert");
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
  LayerFile dense("qwen3moe");
  const Floats values(kHidden * kWidth);
  dense.tensor("blk.0.ffn_up.weight", {kWidth, kHidden}, QuantType::F32, chars(values));
  dense.tensor("blk.0.ffn_down.weight", {kHidden, kWidth}, QuantType::F32, chars(values));
  expect<FormatError>(dense, Load::Stack, {"layer 0", "blk.0.ffn_*_exps.weight"});
  expect<ShapeError>(dense, Load::Layer, {"block 0", "a file with experts", "without"});
}

TEST_F(BadFile, ShapesThatDisagree) {
  const BlockSpec& split = spec("qwen3moe");
  const std::vector<std::int64_t> fewer{kExperts - 1, kWidth, kHidden};
  expect<FormatError>(reshaped({"blk.0.ffn_gate_exps.weight", fewer, {}}, split), Load::Stack,
                      {"blk.0.ffn_gate_exps.weight", "[5, 256, 256]", "[4, 256, 256]"});
  expect<FormatError>(reshaped({"blk.0.ffn_down_exps.weight", fewer, {}}, split), Load::Stack,
                      {"blk.0.ffn_down_exps.weight", "[5, 256, 256]", "[4, 256, 256]"});
  expect<FormatError>(reshaped({"blk.0.ffn_down_exps.weight", fewer, {}}, split), Load::Layer,
                      {"blk.0.ffn_down_exps.weight", "[5, 256, 256]", "[4, 256, 256]"});
  expect<FormatError>(
      reshaped({"blk.0.ffn_up_exps.weight", {kExperts * kWidth, kHidden}, {}}, split), Load::Stack,
      {"blk.0.ffn_up_exps.weight", "[E, I, H]", "[1280, 256]"});
  expect<FormatError>(
      reshaped({"blk.0.ffn_gate_up_exps.weight", {kExperts, 2 * kWidth - 1, kHidden}, {}},
               spec("fused")),
      Load::Stack, {"blk.0.ffn_gate_up_exps.weight", "[E, 2I, H]", "[5, 511, 256]"});
  expect<FormatError>(reshaped({"blk.0.ffn_gate_inp.weight", {kExperts - 1, kHidden}, {}}, split),
                      Load::Layer, {"blk.0.ffn_gate_inp.weight", "[5, 256]", "[4, 256]"});
  expect<FormatError>(
      reshaped({"blk.0.ffn_up_exps.bias", {kExperts, kWidth - 1}, {}}, spec("biases")), Load::Stack,
      {"blk.0.ffn_up_exps.bias", "[5, 256]", "[5, 255]"});
  expect<FormatError>(
      reshaped({"blk.0.ffn_gate_up_exps.bias", {kExperts, kWidth}, {}}, spec("fused_bias")),
      Load::Stack, {"blk.0.ffn_gate_up_exps.bias", "[5, 512]", "[5, 256]"});
  expect<FormatError>(reshaped({"blk.0.ffn_down_exps.scale", {kExperts - 1}, {}}, spec("scales")),
                      Load::Stack, {"blk.0.ffn_down_exps.scale", "[5]", "[4]"});
  expect<FormatError>(
      reshaped({"blk.0.ffn_up_shexp.weight", {kSharedWidth / 2, kHidden}, {}}, spec("qwen2moe")),
      Load::Layer, {"ffn_", "_shexp.weight", "[32, 256]", "[64, 256]"});
}

TEST_F(BadFile, TypesAndArchitecturesThatAreUnknown) {
  expect<UnsupportedError>(
      reshaped({"blk.0.ffn_down_exps.weight", {kExperts, kHidden, kWidth}, QuantType::I8},
               spec("type_per_role")),
      Load::Stack, {"blk.0.ffn_down_exps.weight", "decoder", "I8"});
  LayerFile file("a_new_moe");
  file.block(0, Block(spec("qwen3moe"), 1));
  expect<UnsupportedError>(file, Load::Layer, {"general.architecture", "qwen3moe", "a_new_moe"});
}

}  // namespace
}  // namespace moesaic::testing
