#include "moesaic/quant.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "compare.hpp"
#include "moesaic/error.hpp"
#include "moesaic/quantize.hpp"
#include "moesaic/thread_pool.hpp"
#include "moesaic/types.hpp"
#include "quant/codebooks.hpp"
#include "quant/encode.hpp"
#include "quant/grid_search.hpp"
#include "quant/iq_grids.hpp"
#include "quant/k_scales.hpp"
#include "random.hpp"

namespace moesaic {
namespace {

using testing::Random;
using testing::random_values;
using testing::rel_l2;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kPoison = 12345.678f;

std::uint32_t bits_of(float value) { return std::bit_cast<std::uint32_t>(value); }

/// Equal bits, or both NaN.
bool same(float a, float b) { return bits_of(a) == bits_of(b) || (std::isnan(a) && std::isnan(b)); }

std::string name_of(QuantType type) { return std::string(traits(type).name); }

std::vector<std::byte> encoded(QuantType type, const std::vector<float>& values) {
  const auto cols = static_cast<std::int64_t>(values.size());
  std::vector<std::byte> row(static_cast<std::size_t>(row_bytes(type, cols)), std::byte{0xa5});
  quantize_row(type, values.data(), row.data(), cols);
  return row;
}

std::vector<float> decoded(QuantType type, const std::vector<std::byte>& row, std::int64_t cols) {
  std::vector<float> out(static_cast<std::size_t>(cols) + 1, kPoison);
  dequantize_row(type, row.data(), out.data(), cols);
  EXPECT_EQ(out.back(), kPoison) << "wrote past the row";
  out.pop_back();
  return out;
}

std::vector<float> round_trip(QuantType type, const std::vector<float>& values) {
  return decoded(type, encoded(type, values), static_cast<std::int64_t>(values.size()));
}

std::vector<QuantType> types_with_encoder() {
  std::vector<QuantType> types;
  for (const QuantTraits& t : quant_table()) {
    if (has_encoder(t.type)) types.push_back(t.type);
  }
  return types;
}

// ---- the table

TEST(QuantTable, IsSortedAndUnique) {
  std::set<std::string_view> names;
  int last = -1;
  for (const QuantTraits& t : quant_table()) {
    EXPECT_GT(static_cast<int>(t.type), last) << t.name;
    last = static_cast<int>(t.type);
    EXPECT_TRUE(names.insert(t.name).second) << t.name;
    EXPECT_GT(t.block_elems, 0);
    EXPECT_GT(t.block_bytes, 0);
    EXPECT_LE(t.bits_per_weight(), 64.0);
    EXPECT_EQ(&traits(t.type), &t);
    EXPECT_EQ(quant_type_from_id(static_cast<std::uint32_t>(t.type)), t.type);
    EXPECT_EQ(quant_type_from_name(t.name), t.type);
    EXPECT_EQ(quant_id_remark(static_cast<std::uint32_t>(t.type)), "");
    EXPECT_TRUE(t.dequantize != nullptr || !has_encoder(t.type)) << t.name;
  }
  EXPECT_EQ(quant_table().size(), 35u);
}

TEST(QuantTable, KnowsTheSizes) {
  EXPECT_EQ(traits(QuantType::Q4_K).block_bytes, 144);
  EXPECT_EQ(traits(QuantType::Q4_K).block_elems, 256);
  EXPECT_DOUBLE_EQ(traits(QuantType::Q4_K).bits_per_weight(), 4.5);
  EXPECT_DOUBLE_EQ(traits(QuantType::IQ1_S).bits_per_weight(), 1.5625);
  EXPECT_DOUBLE_EQ(traits(QuantType::MXFP4).bits_per_weight(), 4.25);
}

TEST(QuantTable, RefusesOtherIdsWithARemark) {
  for (const std::uint32_t id : {4u, 5u, 31u, 32u, 33u, 36u, 37u, 38u}) {
    EXPECT_FALSE(quant_type_from_id(id)) << id;
    EXPECT_TRUE(quant_id_remark(id).starts_with("removed from ggml")) << id;
  }
  EXPECT_EQ(quant_id_remark(144), "ik_llama.cpp private type IQ4_KS");
  EXPECT_EQ(quant_id_remark(97), "ik_llama.cpp private type Q8_0_X4");
  EXPECT_EQ(quant_id_remark(158), "ik_llama.cpp private type IQ1_KT");
  EXPECT_TRUE(quant_id_remark(212).starts_with("ik_llama.cpp private type"));
  for (const std::uint32_t id : {43u, 96u, 159u, 201u, 400u, 514u, 0xffffffffu}) {
    EXPECT_FALSE(quant_type_from_id(id)) << id;
    EXPECT_EQ(quant_id_remark(id), "unknown") << id;
  }
  EXPECT_FALSE(quant_type_from_id(258));  // 2 in the low byte
  EXPECT_FALSE(quant_type_from_name("q4_k"));
  EXPECT_FALSE(quant_type_from_name(""));
}

TEST(QuantTable, RowBytesChecksTheBlock) {
  EXPECT_EQ(row_bytes(QuantType::Q4_K, 512), 288);
  EXPECT_EQ(row_bytes(QuantType::Q4_K, 0), 0);
  EXPECT_EQ(row_bytes(QuantType::F16, 3), 6);
  EXPECT_THROW(row_bytes(QuantType::Q4_K, 255), ShapeError);
  EXPECT_THROW(row_bytes(QuantType::Q4_0, 16), ShapeError);
  EXPECT_THROW(row_bytes(QuantType::F32, -1), ShapeError);
  EXPECT_THROW(row_bytes(QuantType::Q4_0, -32), ShapeError);
  EXPECT_THROW(row_bytes(QuantType::F64, std::numeric_limits<std::int64_t>::max()), ShapeError);
  try {
    row_bytes(QuantType::Q4_K, 100);
    FAIL();
  } catch (const ShapeError& error) {
    EXPECT_STREQ(error.what(), "row_bytes: cols of Q4_K: expected a multiple of 256, got 100");
  }
}

TEST(QuantTable, RowCallsRefuse) {
  std::vector<std::byte> row(512);
  std::vector<float> values(512);
  EXPECT_THROW(dequantize_row(QuantType::Q4_K, row.data(), values.data(), 100), ShapeError);
  EXPECT_THROW(quantize_row(QuantType::Q4_K, values.data(), row.data(), 100), ShapeError);
  for (const QuantType type : {QuantType::Q8_1, QuantType::Q8_K, QuantType::I8, QuantType::I32}) {
    EXPECT_THROW(dequantize_row(type, row.data(), values.data(), 0), UnsupportedError);
    EXPECT_THROW(quantize_row(type, values.data(), row.data(), 0), UnsupportedError);
  }
  const std::vector<float> importance(512, 1.0f);
  EXPECT_THROW(quantize_row(QuantType::Q8_0, values.data(), row.data(), 256, importance.data()),
               UnsupportedError);
}

TEST(QuantTable, BadValuesAreRefusedByPosition) {
  std::vector<std::byte> row(512);
  for (const QuantType type : types_with_encoder()) {
    if (traits(type).block_elems == 1) continue;  // F32, F16 and BF16 hold them
    for (const float bad : {kInf, -kInf, kNaN}) {
      std::vector<float> values(256, 1.0f);
      values[77] = bad;
      try {
        quantize_row(type, values.data(), row.data(), 256);
        FAIL() << name_of(type) << " took " << bad;
      } catch (const ConfigError& error) {
        EXPECT_NE(std::string(error.what()).find("values[77]"), std::string::npos) << error.what();
      }
    }
    const std::vector<float> huge(256, 3e38f);
    EXPECT_THROW(quantize_row(type, huge.data(), row.data(), 256), ConfigError);
  }
}

// ---- decoders

struct GoldenRecord {
  QuantType type;
  std::int32_t blocks, block_bytes, block_elems;
  std::vector<std::byte> bytes;
  std::vector<float> values;
};

std::vector<GoldenRecord> read_golden() {
  std::ifstream file(MOESAIC_TEST_DIR "/golden/quant_golden.bin", std::ios::binary);
  std::vector<GoldenRecord> records;
  std::uint32_t head[4];
  while (file.read(reinterpret_cast<char*>(head), sizeof head)) {
    GoldenRecord r{static_cast<QuantType>(head[0]),
                   static_cast<std::int32_t>(head[1]),
                   static_cast<std::int32_t>(head[2]),
                   static_cast<std::int32_t>(head[3]),
                   {},
                   {}};
    r.bytes.resize(static_cast<std::size_t>(r.blocks * r.block_bytes));
    r.values.resize(static_cast<std::size_t>(r.blocks * r.block_elems));
    file.read(reinterpret_cast<char*>(r.bytes.data()),
              static_cast<std::streamsize>(r.bytes.size()));
    file.read(reinterpret_cast<char*>(r.values.data()),
              static_cast<std::streamsize>(r.values.size() * sizeof(float)));
    EXPECT_TRUE(file.good());
    records.push_back(std::move(r));
  }
  return records;
}

TEST(QuantDecode, MatchesGolden) {
  std::set<QuantType> seen;
  for (const GoldenRecord& r : read_golden()) {
    const QuantTraits& t = traits(r.type);
    SCOPED_TRACE(t.name);
    seen.insert(r.type);
    ASSERT_EQ(t.block_bytes, r.block_bytes);
    ASSERT_EQ(t.block_elems, r.block_elems);
    const std::vector<float> got =
        decoded(r.type, r.bytes, static_cast<std::int64_t>(r.values.size()));
    for (std::size_t i = 0; i < got.size(); ++i) {
      ASSERT_TRUE(same(got[i], r.values[i]))
          << "block " << i / t.block_elems << " weight " << i % t.block_elems << ": got " << got[i]
          << ", want " << r.values[i];
    }
  }
  for (const QuantTraits& t : quant_table()) {
    if (t.dequantize == nullptr || t.type == QuantType::F64) continue;
    EXPECT_TRUE(seen.contains(t.type)) << "no golden data for " << t.name;
  }
}

TEST(QuantDecode, F64) {
  const double values[] = {1.0, -0.1, 1e300, 1e-300, 0.0};
  std::vector<std::byte> row(sizeof values);
  std::memcpy(row.data(), values, sizeof values);
  const std::vector<float> got = decoded(QuantType::F64, row, 5);
  EXPECT_EQ(got, (std::vector<float>{1.0f, -0.1f, kInf, 0.0f, 0.0f}));
}

TEST(QuantDecode, BlocksNeedNoAlignment) {
  for (const GoldenRecord& r : read_golden()) {
    std::vector<std::byte> shifted(r.bytes.size() + 1);
    std::memcpy(shifted.data() + 1, r.bytes.data(), r.bytes.size());
    std::vector<float> out(r.values.size(), kPoison);
    dequantize_row(r.type, shifted.data() + 1, out.data(), static_cast<std::int64_t>(out.size()));
    for (std::size_t i = 0; i < out.size(); ++i) {
      ASSERT_TRUE(same(out[i], r.values[i])) << name_of(r.type);
    }
  }
}

// Any bytes decode: no code may index outside a table, whatever the scale.
TEST(QuantDecode, AcceptsAnyBytes) {
  Random random(1);
  for (const QuantTraits& t : quant_table()) {
    if (t.dequantize == nullptr) continue;
    constexpr int kBlocks = 8;
    std::vector<std::byte> row(static_cast<std::size_t>(kBlocks * t.block_bytes));
    for (int fill = 0; fill < 12; ++fill) {
      for (std::byte& b : row) {
        b = fill == 0 ? std::byte{0} : fill == 1 ? std::byte{0xff} : random.byte();
      }
      decoded(t.type, row, kBlocks * t.block_elems);
    }
  }
}

TEST(QuantDecode, EmptyRow) {
  for (const QuantTraits& t : quant_table()) {
    if (t.dequantize != nullptr) dequantize_row(t.type, nullptr, nullptr, 0);
    if (has_encoder(t.type)) quantize_row(t.type, nullptr, nullptr, 0);
  }
}

TEST(QuantScales, Fp4ScaleFormats) {
  for (int e = 0; e < 256; ++e) {
    EXPECT_EQ(quant::half_e8m0(static_cast<std::uint8_t>(e)), std::ldexp(1.0, e - 128)) << e;
  }
  for (int code = 0; code < 256; ++code) {
    const int exponent = code >> 3 & 15;
    const double mantissa = (code & 7) / 8.0;
    double want = exponent == 0 ? std::ldexp(mantissa, -6) : std::ldexp(1 + mantissa, exponent - 7);
    if (code == 0x7f) want = 0.0;
    EXPECT_EQ(quant::half_ue4m3(static_cast<std::uint8_t>(code)), 0.5 * want) << code;
  }
}

TEST(QuantScales, KScalesPackAndUnpack) {
  Random random(2);
  for (int trial = 0; trial < 100; ++trial) {
    quant::ScaleMin6 s;
    for (int j = 0; j < 8; ++j) {
      s.scale[j] = random.bits() & 63u;
      s.min[j] = random.bits() & 63u;
    }
    std::uint8_t packed[12];
    quant::pack_scale_min6(s.scale, s.min, packed);
    const quant::ScaleMin6 back = quant::unpack_scale_min6(packed);
    EXPECT_EQ(std::memcmp(&s, &back, sizeof s), 0);

    std::int8_t scales[16];
    std::int8_t scales_back[16];
    for (std::int8_t& scale : scales) scale = static_cast<std::int8_t>(random.below(64) - 32);
    quant::pack_scale6(scales, packed);
    quant::unpack_scale6(packed, scales_back);
    EXPECT_EQ(std::memcmp(scales, scales_back, sizeof scales), 0);
  }
}

TEST(QuantScales, EighthSignMakesParityEven) {
  for (std::uint32_t signs = 0; signs < 128; ++signs) {
    const std::uint8_t full = quant::full_signs(signs);
    EXPECT_EQ(full & 127u, signs);
    EXPECT_EQ(std::popcount(full) % 2, 0);
  }
}

// ---- encoders

struct ErrorBound {
  QuantType type;
  double relative_rms;
};

class QuantEncode : public ::testing::TestWithParam<ErrorBound> {};

TEST_P(QuantEncode, RoundTripStaysWithinTheBound) {
  const auto [type, bound] = GetParam();
  // NVFP4 has no scale of the whole: its range starts higher.
  for (const float sigma :
       type == QuantType::NVFP4 ? std::vector{1.0f, 30.0f} : std::vector{0.02f, 1.0f, 300.0f}) {
    const std::vector<float> values = random_values(256 * 64, 5, sigma);
    const std::vector<float> got = round_trip(type, values);
    EXPECT_LE(rel_l2(got, values), bound) << "sigma " << sigma;
  }
}

/// One scale without a minimum, or signs alone, still find the level that all values are near.
TEST_P(QuantEncode, ShiftedWeights) {
  const auto [type, bound] = GetParam();
  for (const float shift : {-4.0f, 4.0f}) {
    std::vector<float> values = random_values(1024, 6, 0.5f);
    for (float& v : values) v += shift;
    EXPECT_LE(rel_l2(round_trip(type, values), values), std::max(bound, 0.16)) << shift;
  }
}

TEST_P(QuantEncode, ConstantsAndZeros) {
  const QuantType type = GetParam().type;
  const auto elems = static_cast<std::size_t>(traits(type).block_elems);
  for (const float value : {0.0f, 1.0f, -1.0f, 0.375f}) {
    for (const float v : round_trip(type, std::vector<float>(2 * elems, value))) {
      ASSERT_NEAR(v, value, std::fabs(value) * 0.04f) << value;
    }
  }
}

TEST_P(QuantEncode, TinyAndLargestValuesGiveValidBlocks) {
  const QuantType type = GetParam().type;
  const auto elems = static_cast<std::size_t>(traits(type).block_elems);
  if (elems == 1) return;
  const float largest = quant::encoder_of(type).largest;
  for (const float odd : {largest, -largest, 1e-40f, -1e-30f, 1e-7f}) {
    std::vector<float> values = random_values(static_cast<std::int64_t>(2 * elems), 8, 1.0f);
    values[0] = odd;
    values[elems / 2] = odd;
    const std::vector<float> got = round_trip(type, values);
    for (std::size_t i = 0; i < 2 * elems; ++i) ASSERT_TRUE(std::isfinite(got[i])) << odd;
    if (std::fabs(odd) > 1.0f) {
      ASSERT_NEAR(got[0] / odd, 1.0f, type == QuantType::Q1_0 ? 1.0f : 0.6f) << odd;
    }
    for (std::size_t i = elems; i < 2 * elems; ++i) {  // the neighbour does not notice
      ASSERT_NEAR(got[i], values[i], 4.0f) << odd;
    }
  }
}

/// What counts more comes out better.
TEST_P(QuantEncode, ImportanceLowersTheWeightedError) {
  const QuantType type = GetParam().type;
  if (!takes_importance(type)) return;
  const std::vector<float> values = random_values(256 * 16, 15, 0.02f);
  std::vector<float> importance = random_values(256 * 16, 16, 1.0f);
  for (float& w : importance) w = std::exp(2.0f * w);
  const auto cols = static_cast<std::int64_t>(values.size());
  std::vector<std::byte> row(static_cast<std::size_t>(row_bytes(type, cols)));
  const auto error = [&](const float* weights) {
    quantize_row(type, values.data(), row.data(), cols, weights);
    const std::vector<float> got = decoded(type, row, cols);
    double sum = 0.0;
    for (std::size_t i = 0; i < got.size(); ++i) {
      sum += importance[i] * std::pow(static_cast<double>(got[i]) - values[i], 2.0);
    }
    return sum;
  };
  const double without = error(nullptr);
  EXPECT_LT(error(importance.data()), 0.9 * without);

  // Zeros alone say nothing, nor does a common factor.
  const std::vector<std::byte> plain = encoded(type, values);
  for (const float same : {0.0f, 1.0f}) {
    const std::vector<float> alike(values.size(), same);
    quantize_row(type, values.data(), row.data(), cols, alike.data());
    const double want = rel_l2(decoded(type, plain, cols), values);
    EXPECT_NEAR(rel_l2(decoded(type, row, cols), values), want, 0.01 * want) << same;
  }
}

TEST_P(QuantEncode, IsDeterministicAndLocal) {
  const QuantType type = GetParam().type;
  const auto elems = static_cast<std::size_t>(traits(type).block_elems);
  const std::vector<float> values = random_values(static_cast<std::int64_t>(3 * elems), 9, 1.0f);
  const std::vector<std::byte> whole = encoded(type, values);
  EXPECT_EQ(whole, encoded(type, values));
  const std::vector<std::byte> last = encoded(
      type,
      std::vector<float>(values.begin() + static_cast<std::ptrdiff_t>(2 * elems), values.end()));
  EXPECT_EQ(std::memcmp(whole.data() + 2 * last.size(), last.data(), last.size()), 0);
}

// Four per cent above what the encoders reach.
constexpr ErrorBound kBounds[] = {
    {QuantType::F32, 0},         {QuantType::F16, 0.0004},   {QuantType::BF16, 0.003},
    {QuantType::Q4_0, 0.0842},   {QuantType::Q4_1, 0.0718},  {QuantType::Q5_0, 0.0417},
    {QuantType::Q5_1, 0.0357},   {QuantType::Q8_0, 0.00556}, {QuantType::Q2_K, 0.269},
    {QuantType::Q3_K, 0.148},    {QuantType::Q4_K, 0.0724},  {QuantType::Q5_K, 0.0364},
    {QuantType::Q6_K, 0.0173},   {QuantType::IQ2_XXS, 0.34}, {QuantType::IQ2_XS, 0.296},
    {QuantType::IQ3_XXS, 0.184}, {QuantType::IQ1_S, 0.46},   {QuantType::IQ4_NL, 0.0762},
    {QuantType::IQ3_S, 0.134},   {QuantType::IQ2_S, 0.248},  {QuantType::IQ4_XS, 0.0766},
    {QuantType::IQ1_M, 0.427},   {QuantType::TQ1_0, 0.451},  {QuantType::TQ2_0, 0.451},
    {QuantType::MXFP4, 0.116},   {QuantType::NVFP4, 0.0848}, {QuantType::Q1_0, 0.625},
    {QuantType::Q2_0, 0.364},
};

INSTANTIATE_TEST_SUITE_P(Types, QuantEncode, ::testing::ValuesIn(kBounds),
                         [](const auto& info) { return name_of(info.param.type); });

TEST(QuantEncode, EveryEncoderHasABound) {
  EXPECT_EQ(types_with_encoder().size(), std::size(kBounds));
}

// Weights that a code can hold exactly come back exactly.
TEST(QuantEncode, ExactValuesSurvive) {
  const std::pair<QuantType, int> levels_of[] = {
      {QuantType::Q4_0, 16}, {QuantType::Q4_1, 16}, {QuantType::Q4_K, 16},
      {QuantType::Q5_0, 32}, {QuantType::Q5_1, 32}, {QuantType::Q5_K, 32},
  };
  for (const auto& [type, levels] : levels_of) {
    std::vector<float> values(256);
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = 0.25f * static_cast<float>(static_cast<int>(i) * 7 % levels - levels / 2);
    }
    const std::vector<float> got = round_trip(type, values);
    for (std::size_t i = 0; i < values.size(); ++i) {
      ASSERT_NEAR(got[i], values[i], 2e-3f) << name_of(type) << " " << i;
    }
  }
  for (const QuantType type : {QuantType::MXFP4, QuantType::NVFP4}) {
    std::vector<float> values(64);
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = 0.5f * quant::kE2m1Doubled[i * 7 % 16];
    }
    EXPECT_EQ(round_trip(type, values), values) << name_of(type);
  }
}

/// Signs, ternary digits and powers of two survive every number of rounds.
TEST(QuantEncode, DecodedWeightsAreEncodedToThemselves) {
  for (const QuantType type :
       {QuantType::TQ1_0, QuantType::TQ2_0, QuantType::Q1_0, QuantType::Q2_0, QuantType::MXFP4}) {
    const std::vector<float> once = round_trip(type, random_values(1024, 21, 1.0f));
    EXPECT_EQ(round_trip(type, once), once) << name_of(type);
  }
}

/// The search that leaves groups of points out finds what trying all of them finds.
TEST(QuantEncode, TheNearestPointOfAGridIsTheNearest) {
  const quant::GridSearch<2048, 8, 3> search(quant::kGridIq1, {-1, 0, 1});
  for (std::uint32_t seed = 0; seed < 200; ++seed) {
    const std::vector<float> x = random_values(8, seed, 1.0f);
    std::vector<float> w = random_values(8, seed + 1000, 1.0f);
    for (float& v : w) v = std::exp(v);
    const float scale = 0.3f + 0.01f * static_cast<float>(seed);
    const auto found = search.find(x.data(), w.data(), scale, 0.125f);
    double least = std::numeric_limits<double>::infinity();
    for (const auto& point : quant::kGridIq1) {
      double cost = 0.0;
      for (std::size_t k = 0; k < 8; ++k) {
        const double v = scale * (point[k] + 0.125);
        cost += w[k] * v * (v - 2.0 * x[k]);
      }
      least = std::min(least, cost);
    }
    ASSERT_NEAR(found.cost, least, 1e-4 * std::fabs(least)) << seed;
  }
}

/// The same bytes on every machine, with every compiler. They change with the search alone.
TEST(QuantEncode, BytesArePinned) {
  const std::pair<QuantType, std::uint32_t> pinned[] = {
      {QuantType::F32, 0x30dcce0eu},    {QuantType::F16, 0x42721861u},
      {QuantType::BF16, 0xe20f9229u},   {QuantType::Q4_0, 0xf776b8d6u},
      {QuantType::Q4_1, 0xbceb9936u},   {QuantType::Q5_0, 0x728b552eu},
      {QuantType::Q5_1, 0x0a90e3d5u},   {QuantType::Q8_0, 0x9c4117d5u},
      {QuantType::Q2_K, 0x8dc580adu},   {QuantType::Q3_K, 0x77923c2eu},
      {QuantType::Q4_K, 0x20aa06c8u},   {QuantType::Q5_K, 0xb7fc99b6u},
      {QuantType::Q6_K, 0xd018ca72u},   {QuantType::IQ2_XXS, 0x39528570u},
      {QuantType::IQ2_XS, 0x22c5923cu}, {QuantType::IQ3_XXS, 0x627bebafu},
      {QuantType::IQ1_S, 0xafe27f81u},  {QuantType::IQ4_NL, 0x565ec0ddu},
      {QuantType::IQ3_S, 0xfcf2fbe9u},  {QuantType::IQ2_S, 0x182f3485u},
      {QuantType::IQ4_XS, 0xcd2319d1u}, {QuantType::IQ1_M, 0xf5f1bb9bu},
      {QuantType::TQ1_0, 0xb0df27d1u},  {QuantType::TQ2_0, 0x496ab6beu},
      {QuantType::MXFP4, 0x61cabc9au},  {QuantType::NVFP4, 0xcc431aaeu},
      {QuantType::Q1_0, 0x6a78e247u},   {QuantType::Q2_0, 0xca2c953au},
  };
  EXPECT_EQ(std::size(pinned), types_with_encoder().size());
  // Sums of four uniform values: near normal, and without a logarithm of some library.
  Random random(31);
  std::vector<float> values(1024);
  for (float& v : values) {
    v = random.uniform();
    for (int i = 0; i < 3; ++i) v += random.uniform();
    v -= 2.0f;
  }
  for (const auto& [type, want] : pinned) {
    std::uint32_t hash = 2166136261u;  // FNV-1a
    for (const std::byte b : encoded(type, values)) {
      hash = (hash ^ static_cast<std::uint32_t>(b)) * 16777619u;
    }
    EXPECT_EQ(hash, want) << name_of(type);
  }
}

// ---- rows over threads

TEST(QuantRows, ThreadsAndPiecesGiveTheBytesOfOneRow) {
  constexpr std::int64_t kRows = 3, kCols = 4096 + 512;
  const std::vector<float> values = random_values(kRows * kCols, 41, 0.1f);
  const std::vector<float> importance(random_values(kCols, 42, 1.0f));
  std::vector<float> weights(importance);
  for (float& w : weights) w = w * w;
  for (const QuantType type : {QuantType::Q4_K, QuantType::IQ3_XXS, QuantType::Q8_0}) {
    const float* const w = takes_importance(type) ? weights.data() : nullptr;
    const std::int64_t bytes = row_bytes(type, kCols);
    std::vector<std::byte> want(static_cast<std::size_t>(kRows * bytes));
    for (std::int64_t row = 0; row < kRows; ++row) {
      quantize_row(type, values.data() + row * kCols, want.data() + row * bytes, kCols, w);
    }
    for (const int threads : {1, 3}) {
      ThreadPool pool(threads);
      std::vector<std::byte> got(want.size(), std::byte{0xa5});
      quantize_rows(type, {values.data(), DType::F32, {kRows, kCols}}, {w, DType::F32, {kCols}},
                    got.data(), pool);
      EXPECT_EQ(got, want) << name_of(type) << " " << threads;
      std::vector<float> out(values.size(), kNaN);
      dequantize_rows(type, want.data(), kRows, kCols, out.data(), pool);
      std::vector<float> out_want(values.size());
      for (std::int64_t row = 0; row < kRows; ++row) {
        dequantize_row(type, want.data() + row * bytes, out_want.data() + row * kCols, kCols);
      }
      EXPECT_EQ(out, out_want) << name_of(type) << " " << threads;
    }
  }
}

TEST(QuantRows, TheFirstBadValueIsNamed) {
  std::vector<float> values(2 * 3 * 256, 1.0f);
  values[256 * 4 + 17] = kNaN;
  values[256 * 5 + 3] = kInf;
  std::vector<std::byte> out(6 * 144);
  ThreadPool pool(2);
  try {
    quantize_rows(QuantType::Q4_K, {values.data(), DType::F32, {2, 3, 256}}, {}, out.data(), pool);
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_STREQ(error.what(),
                 "quantize: values[1, 1, 17]: expected a finite number of magnitude at most 65504 "
                 "for Q4_K, got nan");
  }
}

// ---- f16 and bf16

/// An f16 by its definition, in double.
double f16_value(std::uint32_t bits) {
  const std::uint32_t exponent = bits >> 10 & 31u;
  const double mantissa = (bits & 1023u) / 1024.0;
  const double magnitude = exponent == 0
                               ? std::ldexp(mantissa, -14)
                               : std::ldexp(1 + mantissa, static_cast<int>(exponent) - 15);
  return (bits & 0x8000u) != 0 ? -magnitude : magnitude;
}

TEST(Half, EveryF16ToF32AndBack) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float value = f16_to_f32(half);
    if ((bits & 0x7fffu) > 0x7c00u) {
      ASSERT_TRUE(std::isnan(value)) << bits;
      const std::uint16_t back = f32_to_f16(value);
      ASSERT_GT(back & 0x7fffu, 0x7c00u) << bits;
      ASSERT_EQ(back & 0x8000u, bits & 0x8000u) << bits;
      continue;
    }
    if ((bits & 0x7fffu) == 0x7c00u) {
      ASSERT_EQ(value, bits == 0x7c00u ? kInf : -kInf);
    } else {
      ASSERT_EQ(value, f16_value(bits)) << bits;
      ASSERT_EQ(std::signbit(value), (bits & 0x8000u) != 0) << bits;
    }
    ASSERT_EQ(f32_to_f16(value), half);
  }
}

/// Between each two neighbours: the middle goes to the even one, anything else to the nearer one.
TEST(Half, EveryTieAndItsNeighboursRoundToNearestEven) {
  for (std::uint32_t low = 0; low < 0x7c00u; ++low) {
    const std::uint32_t high = low + 1;  // 0x7c00, infinity, stands for 2^16 here
    const double middle = 0.5 * (f16_value(low) + f16_value(high));
    const auto tie = static_cast<float>(middle);
    ASSERT_EQ(tie, middle) << "f32 holds every middle";
    const std::uint32_t even = (low & 1u) == 0 ? low : high;
    for (const std::uint32_t sign : {0u, 0x8000u}) {
      const float s = sign != 0 ? -1.0f : 1.0f;
      ASSERT_EQ(f32_to_f16(s * tie), sign | even) << low;
      ASSERT_EQ(f32_to_f16(s * std::nextafter(tie, 0.0f)), sign | low) << low;
      ASSERT_EQ(f32_to_f16(s * std::nextafter(tie, kInf)), sign | high) << low;
    }
  }
}

TEST(Half, F32ToF16Extremes) {
  EXPECT_EQ(f32_to_f16(kInf), 0x7c00u);
  EXPECT_EQ(f32_to_f16(-kInf), 0xfc00u);
  EXPECT_EQ(f32_to_f16(3e38f), 0x7c00u);
  EXPECT_EQ(f32_to_f16(-0.0f), 0x8000u);
  EXPECT_EQ(f32_to_f16(1e-45f), 0u);
  EXPECT_EQ(f32_to_f16(-1e-45f), 0x8000u);
  // A NaN whose payload lies below the bits of f16.
  EXPECT_GT(f32_to_f16(std::bit_cast<float>(0x7f800001u)) & 0x7fffu, 0x7c00u);
  EXPECT_GT(f32_to_f16(std::bit_cast<float>(0xffffffffu)) & 0x7fffu, 0x7c00u);
}

TEST(Half, Bf16) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float value = bf16_to_f32(half);
    ASSERT_EQ(bits_of(value), bits << 16);
    const std::uint16_t back = f32_to_bf16(value);
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(bf16_to_f32(back))) << bits;
      continue;
    }
    ASSERT_EQ(back, half);
    if (std::isinf(value)) continue;
    const std::uint32_t even = bits + (bits & 1u);
    ASSERT_EQ(f32_to_bf16(std::bit_cast<float>(bits << 16 | 0x7fffu)), bits);
    ASSERT_EQ(f32_to_bf16(std::bit_cast<float>(bits << 16 | 0x8000u)), even);
    ASSERT_EQ(f32_to_bf16(std::bit_cast<float>(bits << 16 | 0x8001u)), bits + 1);
  }
  EXPECT_TRUE(std::isnan(bf16_to_f32(f32_to_bf16(std::bit_cast<float>(0x7f800001u)))));
}

// ---- names

TEST(Types, SizesAndNames) {
  const std::pair<DType, std::pair<const char*, std::size_t>> want[] = {
      {DType::F32, {"f32", 4}}, {DType::F16, {"f16", 2}}, {DType::BF16, {"bf16", 2}},
      {DType::F64, {"f64", 8}}, {DType::I32, {"i32", 4}}, {DType::I64, {"i64", 8}},
      {DType::U8, {"u8", 1}},   {DType::U16, {"u16", 2}}, {DType::Bool, {"bool", 1}},
  };
  for (const auto& [dtype, facts] : want) {
    EXPECT_STREQ(moesaic::name_of(dtype), facts.first);
    EXPECT_EQ(size_of(dtype), facts.second) << facts.first;
  }
}

TEST(Types, Describe) {
  EXPECT_EQ(describe(ConstTensorView(nullptr, DType::F32, {4, 2048})), "f32[4, 2048]");
  EXPECT_EQ(describe(ConstTensorView(nullptr, DType::I32, {7})), "i32[7]");
  EXPECT_EQ(describe(ConstTensorView{}), "f32[]");
}

TEST(Types, Devices) {
  for (const Device device : {Device{DeviceType::Cpu, 0}, Device{DeviceType::Cuda, 0},
                              Device{DeviceType::Cuda, 12}, Device{DeviceType::Metal, 0}}) {
    EXPECT_EQ(parse_device(to_string(device)), device);
  }
  EXPECT_EQ(to_string({DeviceType::Cuda, 1}), "cuda:1");
  EXPECT_EQ(parse_device("cuda"), (Device{DeviceType::Cuda, 0}));
  for (const char* text : {"", "gpu", "CPU", "cuda:", "cuda:x", "cuda:1x", "cuda:-1", "cuda: 1",
                           "cuda:99999999999", "cpu:0"}) {
    EXPECT_THROW(parse_device(text), ConfigError) << text;
  }
}

}  // namespace
}  // namespace moesaic
