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
#include "moesaic/types.hpp"
#include "quant/codebooks.hpp"
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
  EXPECT_THROW(quantize_row(QuantType::IQ2_XXS, values.data(), row.data(), 256), UnsupportedError);
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

TEST_P(QuantEncode, ShiftedWeights) {
  const QuantType type = GetParam().type;
  for (const float shift : {-4.0f, 4.0f}) {
    std::vector<float> values = random_values(1024, 6, 0.5f);
    for (float& v : values) v += shift;
    const std::vector<float> got = round_trip(type, values);
    for (std::size_t i = 0; i < values.size(); ++i) ASSERT_NEAR(got[i], values[i], 1.6) << i;
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

TEST_P(QuantEncode, AnyInputGivesAValidBlock) {
  const QuantType type = GetParam().type;
  const auto elems = static_cast<std::size_t>(traits(type).block_elems);
  for (const float bad : {kInf, -kInf, kNaN, 3e38f, -3e38f, 1e-40f, 1e-30f}) {
    std::vector<float> values = random_values(static_cast<std::int64_t>(2 * elems), 8, 1.0f);
    values[0] = bad;
    values[elems / 2] = bad;
    const std::vector<float> got = round_trip(type, values);
    if (elems == 1) continue;
    for (std::size_t i = elems; i < 2 * elems; ++i) {  // the neighbour does not notice
      ASSERT_NEAR(got[i], values[i], 1.0f) << bad;
    }
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

constexpr ErrorBound kBounds[] = {
    {QuantType::F32, 0.0},    {QuantType::F16, 4e-4},    {QuantType::BF16, 3e-3},
    {QuantType::Q8_0, 0.007}, {QuantType::Q4_0, 0.10},   {QuantType::Q4_1, 0.085},
    {QuantType::Q5_0, 0.05},  {QuantType::Q5_1, 0.041},  {QuantType::Q2_K, 0.31},
    {QuantType::Q3_K, 0.155}, {QuantType::Q4_K, 0.08},   {QuantType::Q5_K, 0.04},
    {QuantType::Q6_K, 0.02},  {QuantType::IQ4_NL, 0.09}, {QuantType::IQ4_XS, 0.09},
    {QuantType::MXFP4, 0.14}, {QuantType::NVFP4, 0.11},
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
