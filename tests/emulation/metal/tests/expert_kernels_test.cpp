// The expert kernels of metal/kernels against f64, for every format, loop and shape of row map.
#include <gtest/gtest.h>

#include "expert_case.hpp"
#include "seeds.hpp"

namespace moesaic::metal_test {
namespace {

constexpr double kF32 = 2e-6;                     // of sum |w x|
constexpr double kHalf = 0x1p-10 * 1.001 + kF32;  // as expert_gemm.metal states it

struct Shape {
  int experts, rows, cols;
};

// The first shape alone shows ThreadSanitizer every access.
std::vector<Shape> all_shapes_of(QuantType type) {
  // Every kind of scales, zero points and orders of columns; records of 256 columns, whole and not.
  if (type == QuantType::INT4) return {{3, 67, 568}, {2, 17, 104}, {2, 40, 304}, {1, 5, 32}};
  const int block = traits(type).block_elems;
  if (block == 1) return {{3, 67, 100}, {3, 9, 1}, {1, 130, 33}};
  if (block == 256) return {{3, 67, 512}, {1, 5, 256}};
  if (block == 128) return {{3, 67, 384}, {1, 5, 128}};
  if (block == 64) return {{3, 67, 192}, {1, 5, 64}};
  return {{3, 67, 96}, {1, 5, 32}, {2, 65, 288}};
}

std::vector<Shape> shapes_of(QuantType type) {
  std::vector<Shape> shapes = all_shapes_of(type);
  if (emulation::race_checked()) shapes.resize(1);
  return shapes;
}

enum class Loop { gemv, gemm, gemm_indirect, gemm_half };

class ExpertKernels : public ::testing::TestWithParam<Format> {
 protected:
  void TearDown() override { emulation::options() = {}; }

  testing::Random random_{7};
};
INSTANTIATE_TEST_SUITE_P(Formats, ExpertKernels, ::testing::ValuesIn(kFormats),
                         [](const auto& format) { return std::string(format.param.suffix); });

std::uint32_t tiles(int count, int size) {
  return static_cast<std::uint32_t>((count + size - 1) / size);
}

std::vector<GemmTile> tile_list(const Map& map, const Role& role, int tile) {
  std::vector<GemmTile> list;
  for (int s = 0; s < map.args.num_segments; s++) {
    if (role.skips(map.expert_of(s))) continue;
    for (int first = map.begin(s); first < map.begin(s + 1); first += tile)
      list.push_back({s, first});
  }
  return list;
}

void run_product(Loop loop, const char* suffix, Role& role, Map& map, Input& in, Output& out,
                 int tile = kGemmMaxCols) {
  fake_metal::set_function_constant(kConstantTile, tile);
  fake_metal::set_function_constant(kConstantInput, in.type());
  std::vector<void*> buffers = {role.weights(),    role.slots(),           role.scales(),
                                role.biases(),     map.expert.data(),      map.offsets.data(),
                                map.source.data(), map.destination.data(), in.data(),
                                out.data(),        role.gather()};
  const std::string name = suffix;
  const auto segments = static_cast<std::uint32_t>(map.args.num_segments);
  if (loop == Loop::gemv) {
    const ExpertGemvArgs args{role.args, map.args, in.args};
    dispatch("expert_gemv_" + name, &args, buffers, tiles(role.args.rows, kGemvRows), segments,
             kGemvThreads);
    return;
  }
  const bool indirect = loop == Loop::gemm_indirect;
  std::vector<GemmTile> list = tile_list(map, role, tile);
  const auto per_segment = std::max(1u, tiles(map.max_entries, tile));
  buffers.push_back(list.data());
  const ExpertGemmArgs args{role.args, map.args, in.args,
                            indirect ? 0 : static_cast<i32>(per_segment), 0};
  dispatch((loop == Loop::gemm_half ? "expert_gemm_half_" : "expert_gemm_") + name, &args, buffers,
           indirect ? static_cast<std::uint32_t>(list.size()) : segments * per_segment,
           tiles(role.args.rows, kGemmRows), kGemmThreads);
}

void check_product(Loop loop, const char* suffix, Role& role, Map map, Input& in,
                   int tile = kGemmMaxCols) {
  const int rows = role.args.rows;
  Output out(map.args.limit, rows);
  run_product(loop, suffix, role, map, in, out, tile);
  for (int s = 0; s < map.args.num_segments; s++) {
    const int expert = map.expert_of(s);
    if (role.skips(expert)) continue;
    for (int i = map.begin(s); i < map.begin(s + 1); i++) {
      const int destination = map.destination_of(i);
      if (destination < 0) continue;
      for (int r = 0; r < rows; r++) {
        const auto sum = role.product(expert, r, in.row(map.source_of(i)));
        const double bound = sum.magnitude * (loop == Loop::gemm_half ? kHalf : kF32) + 1e-30;
        ASSERT_EQ(out.compare(destination, r, sum.value, bound), "");
      }
    }
  }
  EXPECT_EQ(out.check_untouched(), "");
}

TEST_P(ExpertKernels, ProductsOfEveryLoopAndMap) {
  constexpr int kTopK = 2;
  int type = 0;
  std::size_t turn = 0;  // each case under one seed, each loop and map under all of them
  const auto seeds = emulation::seeds();
  for (const Shape& shape : shapes_of(GetParam().type)) {
    Role role(GetParam().type, shape.experts, shape.rows, shape.cols, random_);
    Input in(40, shape.cols, type++ % 3, random_);
    for (const auto& ids : nasty_routings(shape.experts, kTopK, random_)) {
      emulation::options().seed = seeds[turn++ % seeds.size()];
      const char* suffix = GetParam().suffix;
      check_product(Loop::gemv, suffix, role, Map::pairs(ids, kTopK), in);
      check_product(Loop::gemv, suffix, role, Map::pairs(ids, 1), in);
      const Map buckets = Map::buckets(ids, kTopK, shape.experts);
      check_product(Loop::gemv, suffix, role, buckets, in);
      const int tile = 8 << turn % 3;
      check_product(Loop::gemm, suffix, role, buckets, in, tile);
      check_product(Loop::gemm_indirect, suffix, role, buckets, in, 32 >> turn % 3);
      check_product(Loop::gemm_half, suffix, role, buckets, in, tile);
      check_product(Loop::gemm, suffix, role, Map::blocks(ids, kTopK, shape.experts, 16), in, 16);
      if (HasFatalFailure() || HasNonfatalFailure()) return;
    }
  }
}

TEST_P(ExpertKernels, EpilogueAndMissingExperts) {
  const Shape shape = shapes_of(GetParam().type)[0];
  Role role(GetParam().type, 4, shape.rows, shape.cols, random_);
  role.add_epilogue();
  role.map_slots({2, -1, 0, 3});
  Input in(40, shape.cols, kTypeF32, random_);
  for (const auto& ids : nasty_routings(4, 2, random_)) {
    check_product(Loop::gemv, GetParam().suffix, role, Map::pairs(ids, 2), in);
    check_product(Loop::gemm, GetParam().suffix, role, Map::buckets(ids, 2, 4), in);
    check_product(Loop::gemm_indirect, GetParam().suffix, role, Map::buckets(ids, 2, 4), in);
  }
}

TEST_P(ExpertKernels, GateUpWithActivation) {
  constexpr int kTopK = 2;
  const Activation activations[] = {{.kind = ActivationKind::SwiGlu},
                                    {.kind = ActivationKind::SwiGluOai, .limit = 2.0f},
                                    {.kind = ActivationKind::GeGluTanh}};
  for (const Shape& shape : shapes_of(GetParam().type)) {
    Role gate(GetParam().type, shape.experts, shape.rows, shape.cols, random_);
    Role up(GetParam().type, shape.experts, shape.rows, shape.cols, random_);
    up.add_epilogue();
    Input in(40, shape.cols, kTypeF16, random_);
    const auto routings = nasty_routings(shape.experts, kTopK, random_);
    for (std::size_t i = 0; i < routings.size(); i++) {
      const Activation& activation = activations[i % 3];
      emulation::options().seed = emulation::race_checked() ? 0 : i;
      Map map =
          i % 2 ? Map::buckets(routings[i], kTopK, shape.experts) : Map::pairs(routings[i], kTopK);
      Output out(map.args.limit, shape.rows);
      const ExpertGateUpArgs args{
          gate.args,
          up.args,
          map.args,
          in.args,
          {activation.limit, activation.alpha, activation.beta, activation.linear_beta}};
      fake_metal::set_function_constant(kConstantInput, in.type());
      fake_metal::set_function_constant(kConstantActivation, static_cast<int>(activation.kind));
      dispatch(std::string("expert_gate_up_") + GetParam().suffix, &args,
               {gate.weights(), gate.slots(), gate.scales(), gate.biases(), map.expert.data(),
                map.offsets.data(), map.source.data(), map.destination.data(), in.data(),
                out.data(), gate.gather(), up.weights(), up.slots(), up.scales(), up.biases()},
               tiles(shape.rows, kGateUpRows), static_cast<std::uint32_t>(map.args.num_segments),
               kGemvThreads);
      for (int s = 0; s < map.args.num_segments; s++) {
        if (gate.skips(map.expert_of(s))) continue;
        for (int e = map.begin(s); e < map.begin(s + 1); e++) {
          for (int r = 0; r < shape.rows; r++) {
            const auto g = gate.product(map.expert_of(s), r, in.row(map.source_of(e)));
            const auto u = up.product(map.expert_of(s), r, in.row(map.source_of(e)));
            const double expected =
                activate(activation, static_cast<float>(g.value), static_cast<float>(u.value));
            // Both factors of the product carry their error.
            const double bound = 1e-5 * (1 + g.magnitude) * (1 + u.magnitude);
            ASSERT_EQ(out.compare(map.destination_of(e), r, expected, bound), "");
          }
        }
      }
      EXPECT_EQ(out.check_untouched(), "");
    }
  }
}

TEST_P(ExpertKernels, AnEntryGivesTheSameBitsAloneAndInABatch) {
  const Shape shape = shapes_of(GetParam().type)[0];
  Role role(GetParam().type, shape.experts, shape.rows, shape.cols, random_);
  Input in(12, shape.cols, kTypeF32, random_);
  const std::vector<std::int32_t> ids(12, 1);
  Map alone = Map::pairs(ids, 1), batch = Map::buckets(ids, 1, shape.experts);
  Output first(12, shape.rows), second(12, shape.rows);
  run_product(Loop::gemv, GetParam().suffix, role, alone, in, first);
  run_product(Loop::gemv, GetParam().suffix, role, batch, in, second);
  EXPECT_EQ(std::memcmp(first.data(), second.data(), first.values().size() * 4), 0);
}

// With subnormal numbers flushed, blocks of the lowest exponents have weights all the same.
TEST(ExpertFormats, Mxfp4KeepsItsExponents) {
  constexpr int kCols = 32;
  for (const int exponent : {0, 1, 2, 13, 127, 240}) {
    std::byte row[17];
    std::fill(row, row + 17, std::byte{0x71});  // 6 and 0.5
    row[0] = static_cast<std::byte>(exponent);
    float weights[kCols], x[kCols];
    dequantize_row(QuantType::MXFP4, row, weights, kCols);
    double want = 0;
    for (int c = 0; c < kCols; c++) {
      x[c] = std::ldexp(1.0f + static_cast<float>(c), exponent < 64 ? 100 : 0);
      want += static_cast<double>(weights[c]) * x[c];
    }
    WeightArgs weight{};
    weight.expert_stride = weight.row_stride = 17;
    weight.num_experts = weight.rows = 1;
    weight.cols = weight.stored_cols = kCols;
    const ExpertGemvArgs args{weight, {1, 1, 1, 1, 0, 0}, {1, kCols, 0}};
    float out = 0;
    fake_metal::set_function_constant(kConstantInput, kTypeF32);
    dispatch("expert_gemv_mxfp4", &args,
             {row, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, x, &out, nullptr},
             1, 1, kGemvThreads);
    EXPECT_NEAR(out / want, 1.0, 1e-6) << exponent;
  }
}

// A stack of more than 4 GiB with rows of x more than 4 Gi elements apart, of which only the pages
// that are read exist.
TEST_P(ExpertKernels, OffsetsHave64Bits) {
  constexpr std::int64_t kStride = std::int64_t{5} << 30;
  const Shape shape = shapes_of(GetParam().type)[0];
  Role role(GetParam().type, 1, shape.rows, shape.cols, random_);
  Input in(1, shape.cols, kTypeF32, random_);
  const std::size_t weight_bytes = static_cast<std::size_t>(kStride + (1 << 20));
  const std::size_t input_bytes = static_cast<std::size_t>(4 * kStride + (1 << 20));
  auto map_pages = [](std::size_t bytes) {
    void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return pages == MAP_FAILED ? nullptr : static_cast<std::byte*>(pages);
  };
  std::byte* weights = map_pages(weight_bytes);
  std::byte* x = map_pages(input_bytes);
  if (!weights || !x) GTEST_SKIP() << "no address space for a large stack";
  std::memcpy(weights + kStride, static_cast<std::byte*>(role.weights()) + role.args.base,
              static_cast<std::size_t>(role.expert_bytes()));
  std::memcpy(x + 4 * kStride, in.row(0), sizeof(float) * shape.cols);
  WeightArgs far = role.args;
  far.base = 0;
  far.expert_stride = kStride;
  far.num_experts = 2;
  far.gather_stride = 0;
  const InputArgs far_rows{1, kStride, 0};
  for (const bool gemm : {false, true}) {
    Map map = Map::pairs({-1, 1}, 1);
    Output out(2, shape.rows);
    fake_metal::set_function_constant(kConstantInput, kTypeF32);
    std::vector<void*> buffers = {weights, nullptr, nullptr, nullptr,    map.expert.data(), nullptr,
                                  nullptr, nullptr, x,       out.data(), role.gather()};
    if (gemm) {
      fake_metal::set_function_constant(kConstantTile, kGemmMaxCols);
      const ExpertGemmArgs args{far, map.args, far_rows, 1, 0};
      buffers.push_back(nullptr);
      dispatch(std::string("expert_gemm_") + GetParam().suffix, &args, buffers, 2,
               tiles(shape.rows, kGemmRows), kGemmThreads);
    } else {
      const ExpertGemvArgs args{far, map.args, far_rows};
      dispatch(std::string("expert_gemv_") + GetParam().suffix, &args, buffers,
               tiles(shape.rows, kGemvRows), 2, kGemvThreads);
    }
    for (int r = 0; r < shape.rows; r++) {
      const auto sum = role.product(0, r, in.row(0));
      ASSERT_EQ(out.compare(1, r, sum.value, sum.magnitude * kF32), "");
    }
    EXPECT_EQ(out.check_untouched(), "");
  }
  munmap(weights, weight_bytes);
  munmap(x, input_bytes);
}

}  // namespace
}  // namespace moesaic::metal_test
