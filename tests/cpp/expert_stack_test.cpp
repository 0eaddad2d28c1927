// Stacks from arrays and from GGUF files: shapes, decisions, errors, decoded rows.

#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "layers.hpp"
#include "moesaic/gguf.hpp"
#include "moesaic/thread_pool.hpp"

namespace moesaic::testing {
namespace {

template <class E, class F>
void expect_error(F&& f, const std::string& part) {
  try {
    f();
    ADD_FAILURE() << "no error: " << part;
  } catch (const E& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

TEST(DenseStacks, KeepValuesAndTypes) {
  const Floats gate = random_values(3 * 5 * 8, 1), up = random_values(3 * 5 * 8, 2);
  Tensor down(DType::BF16, 3 * 8, 5, random_values(3 * 8 * 5, 3));
  const ExpertStack stack =
      ExpertStack::from_dense_stacks(ConstTensorView(gate.data(), DType::F32, {3, 5, 8}),
                                     ConstTensorView(up.data(), DType::F32, {3, 5, 8}),
                                     ConstTensorView(down.bytes.data(), DType::BF16, {3, 8, 5}));
  EXPECT_EQ(stack.shape(), (StackShape{3, 8, 5}));
  EXPECT_EQ(stack.num_experts(), 3);
  EXPECT_TRUE(stack.gated());
  EXPECT_STREQ(stack.kind(), "stacked");
  EXPECT_EQ(decode_role(stack.gate()), gate);
  EXPECT_EQ(decode_role(stack.up()), up);
  EXPECT_EQ(decode_role(stack.down()), down.values());
  EXPECT_EQ(stack.down().ref.type, QuantType::BF16);
  EXPECT_EQ(stack.nbytes(), 3 * 5 * 8 * (4 + 4 + 2));
  ASSERT_EQ(stack.report().roles.size(), 3U);
  EXPECT_EQ(stack.report().roles[0].decision, "copied");
}

TEST(DenseStacks, StridedAndUngated) {
  const Floats up = random_values(2 * 8 * 6, 2), down = random_values(2 * 8 * 6, 3);
  ConstTensorView transposed(up.data(), DType::F32, {2, 8, 6});  // stored [E, H, I]
  std::swap(transposed.shape[1], transposed.shape[2]);
  std::swap(transposed.strides[1], transposed.strides[2]);
  const ExpertStack stack = ExpertStack::from_dense_stacks(
      {}, transposed, ConstTensorView(down.data(), DType::F32, {2, 8, 6}));
  EXPECT_FALSE(stack.gated());
  EXPECT_EQ(stack.shape(), (StackShape{2, 8, 6}));
  const Floats decoded = decode_role(stack.up());
  for (std::size_t e = 0; e < 2; ++e) {
    for (std::size_t i = 0; i < 6; ++i) {
      for (std::size_t h = 0; h < 8; ++h) {
        EXPECT_EQ(decoded[(e * 6 + i) * 8 + h], up[(e * 8 + h) * 6 + i]);
      }
    }
  }
}

TEST(DenseStacks, Errors) {
  const Floats values = random_values(3 * 5 * 8, 1);
  const ConstTensorView good(values.data(), DType::F32, {3, 5, 8});
  const ConstTensorView down(values.data(), DType::F32, {3, 8, 5});
  expect_error<ShapeError>(
      [&] {
        ExpertStack::from_dense_stacks(ConstTensorView(values.data(), DType::F32, {3, 8, 5}), good,
                                       down);
      },
      "gate");
  expect_error<ShapeError>([&] { ExpertStack::from_dense_stacks(good, good, good); }, "down");
  expect_error<ShapeError>([&] { ExpertStack::from_dense_stacks({}, {}, down); }, "up");
  expect_error<DTypeError>(
      [&] {
        ExpertStack::from_dense_stacks(good, ConstTensorView(values.data(), DType::I32, {3, 5, 8}),
                                       down);
      },
      "up");
  ConstTensorView elsewhere = down;
  elsewhere.device = {DeviceType::Cuda, 0};
  expect_error<DeviceError>([&] { ExpertStack::from_dense_stacks(good, good, elsewhere); }, "down");
}

TEST(DenseStacks, ProgressCancels) {
  const Floats values = random_values(3 * 5 * 8, 1);
  const ConstTensorView up(values.data(), DType::F32, {3, 5, 8});
  const ConstTensorView down(values.data(), DType::F32, {3, 8, 5});
  LoadOptions options;
  std::int64_t last = 0, total = 0;
  options.progress = [&](const Progress& p) {
    EXPECT_GT(p.done_bytes, last);
    last = p.done_bytes;
    total = p.total_bytes;
    return true;
  };
  ExpertStack::from_dense_stacks(up, up, down, options);
  EXPECT_EQ(last, total);
  EXPECT_EQ(total, 3 * 3 * 5 * 8 * 4);
  options.progress = [](const Progress&) { return false; };
  EXPECT_THROW(ExpertStack::from_dense_stacks(up, up, down, options), OperationCancelled);
}

class StackParts : public ::testing::Test {
 protected:
  TestLayer layer{Case{"", 1, 64, 32, 3, 1, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q4_0,
                       RoutingShape::Uniform, ActivationKind::SwiGlu, true}};
  ExpertStack::Parts parts = layer.parts();
};

TEST_F(StackParts, ChecksEveryRole) {
  EXPECT_NO_THROW(ExpertStack{parts});
  auto bad = parts;
  bad.up.ref.rows -= 1;
  expect_error<ShapeError>([&] { ExpertStack{bad}; }, "up");
  bad = parts;
  bad.gate.ref.num_experts = 4;
  expect_error<ShapeError>([&] { ExpertStack{bad}; }, "gate");
  bad = parts;
  bad.down.ref = {};
  expect_error<ShapeError>([&] { ExpertStack{bad}; }, "down");
  bad = parts;
  bad.down.ref.row_stride -= 1;
  expect_error<ShapeError>([&] { ExpertStack{bad}; }, "down row stride");
  bad = parts;
  bad.down.ref.expert_stride -= 1;
  expect_error<ShapeError>([&] { ExpertStack{bad}; }, "down expert stride");
  bad = parts;
  bad.up.bias = std::make_shared<const Floats>(5);
  expect_error<ShapeError>([&] { ExpertStack{bad}; }, "up.bias");
  bad = parts;
  bad.up.scale = std::make_shared<const Floats>(2);
  expect_error<ShapeError>([&] { ExpertStack{bad}; }, "up.scale");
  bad = parts;
  bad.down.ref.type = QuantType::I32;
  expect_error<UnsupportedError>([&] { ExpertStack{bad}; }, "down");
  bad = parts;
  bad.gate.ref.type = QuantType::Q4_K;
  expect_error<ShapeError>([&] { ExpertStack{bad}; }, "gate columns");
  bad = parts;
  bad.shape.num_experts = 0;
  expect_error<ShapeError>([&] { ExpertStack{bad}; }, "shape");
}

TEST_F(StackParts, DecodesRowsOfTablesAndSlots) {
  EXPECT_EQ(decode_role(parts.down), layer.down.decoded);
  WeightRef table = parts.down.ref;
  const std::byte* pointers[3];
  for (std::int32_t e = 0; e < 3; ++e) pointers[e] = parts.down.ref.expert(e);
  table.base = nullptr;
  table.table = pointers;
  parts.down.ref = table;
  EXPECT_EQ(decode_role(parts.down), layer.down.decoded);
  EXPECT_STREQ(ExpertStack(parts).kind(), "per_expert");
  const std::int32_t slots[3] = {2, -1, 0};
  table.slot_map = slots;
  Floats row(static_cast<std::size_t>(table.cols));
  dequantize_expert_row(table, 0, 1, row.data());
  EXPECT_TRUE(std::equal(row.begin(), row.end(),
                         layer.down.decoded.begin() + (2 * table.rows + 1) * table.cols));
  EXPECT_THROW(dequantize_expert_row(table, 1, 0, row.data()), UnsupportedError);
  EXPECT_THROW(dequantize_expert_row(table, 3, 0, row.data()), ShapeError);
  EXPECT_THROW(dequantize_expert_row(table, 0, table.rows, row.data()), ShapeError);
}

TEST(PreparedStacks, DecodeToTheSameBits) {
  const Backend& backend = backend_for(Device{});
  for (const Case& c : cases::kCases) {
    const TestLayer layer(c);
    const ExpertStack stack = layer.stack(&backend);
    if (stack.gated()) {
      EXPECT_EQ(decode_role(stack.gate()), layer.gate.decoded) << c.name;
    }
    EXPECT_EQ(decode_role(stack.up()), layer.up.decoded) << c.name;
    EXPECT_EQ(decode_role(stack.down()), layer.down.decoded) << c.name;
  }
}

std::shared_ptr<GgufFile> zoo() {
  const auto path = std::filesystem::path(MOESAIC_TEST_DIR) / "../../shared/data/zoo-qwen3moe.gguf";
  return std::filesystem::exists(path) ? GgufFile::open(path) : nullptr;
}

TEST(ZooFile, LoadsEveryLayerOnRequestDequantized) {
  const auto file = zoo();
  if (!file) GTEST_SKIP() << "no zoo-qwen3moe.gguf";
  ThreadPool pool(2);
  for (const std::int32_t layer : file->moe_layers()) {
    const ExpertStack stack = ExpertStack::load_from_gguf(file, layer);
    for (const RoleReport& role : stack.report().roles) {
      EXPECT_EQ(role.stored, role.kept);
      EXPECT_NE(role.source.find("_exps.weight"), std::string::npos);
    }
    LoadOptions options;
    options.dequantize = QuantType::F32;
    options.pool = &pool;
    const ExpertStack dense = ExpertStack::load_from_gguf(file, layer, options);
    EXPECT_EQ(dense.shape(), stack.shape());
    EXPECT_EQ(dense.up().ref.type, QuantType::F32);
    const RoleReport& up = dense.report().roles[1];
    EXPECT_EQ(up.kept, QuantType::F32);
    EXPECT_EQ(up.decision, up.stored == QuantType::F32 ? "mapped" : "dequantized");
    EXPECT_EQ(decode_role(dense.gate()), decode_role(stack.gate()));
    EXPECT_EQ(decode_role(dense.down()), decode_role(stack.down()));
  }
}

TEST(ZooFile, LayerWithoutExperts) {
  const auto file = zoo();
  if (!file) GTEST_SKIP() << "no zoo-qwen3moe.gguf";
  expect_error<FormatError>([&] { ExpertStack::load_from_gguf(file, 999); }, "999");
}

}  // namespace
}  // namespace moesaic::testing
