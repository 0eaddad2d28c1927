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

#include "moesaic/error.hpp"
#include "moesaic/quantize.hpp"
#include "quant/codebooks.hpp"
#include "quant/iq_grids.hpp"
#include "quant/k_scales.hpp"
#include "quant_rows.hpp"
#include "random.hpp"

namespace moesaic {
namespace {

using testing::decoded;
using testing::Random;
using testing::type_name;
using testing::types_with_encoder;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kPoison = testing::kBehindRow;

std::uint32_t bits_of(float value) { return std::bit_cast<std::uint32_t>(value); }

/// Equal bits, or both NaN.
bool same(float a, float b) { return bits_of(a) == bits_of(b) || (std::isnan(a) && std::isnan(b)); }

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
    const auto id = static_cast<std::uint32_t>(t.type);
    EXPECT_EQ(quant_type_from_name(t.name), t.type);
    // A file that says 241 means something else by it.
    EXPECT_EQ(is_ggml_type(t.type), t.type != QuantType::E4M3);
    EXPECT_EQ(quant_type_from_id(id), is_ggml_type(t.type) ? std::optional(t.type) : std::nullopt);
    EXPECT_EQ(quant_id_remark(id).empty(), is_ggml_type(t.type));
    EXPECT_TRUE(t.dequantize != nullptr || !has_encoder(t.type)) << t.name;
  }
  EXPECT_EQ(quant_table().size(), 36u);
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
        FAIL() << type_name(type) << " took " << bad;
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
    if (t.dequantize == nullptr || t.type == QuantType::F64 || !is_ggml_type(t.type)) continue;
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

/// One rounding, that of the product; beside the definition of the format in f64.
TEST(QuantDecode, E4m3) {
  constexpr int kBytes = 132;
  for (const float scale : {1.0f, 0.1f, -3.0f, 0x1p-130f, 1e30f}) {
    std::vector<std::byte> row(2 * kBytes);
    for (int code = 0; code < 256; ++code) {
      row[static_cast<std::size_t>(code / 128 * kBytes + 4 + code % 128)] =
          static_cast<std::byte>(code);
    }
    for (std::size_t block : {0, 1}) std::memcpy(row.data() + block * kBytes, &scale, 4);
    const std::vector<float> got = decoded(QuantType::E4M3, row, 256);
    for (int code = 0; code < 256; ++code) {
      const int exponent = code >> 3 & 15, mantissa = code & 7;
      double want =
          exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
      if (code % 128 == 127) want = kNaN;
      if (code >= 128) want = -want;
      EXPECT_TRUE(same(got[static_cast<std::size_t>(code)],
                       static_cast<float>(want * static_cast<double>(scale))))
          << code << " * " << scale;
    }
  }
}

TEST(QuantDecode, BlocksNeedNoAlignment) {
  for (const GoldenRecord& r : read_golden()) {
    std::vector<std::byte> shifted(r.bytes.size() + 1);
    std::memcpy(shifted.data() + 1, r.bytes.data(), r.bytes.size());
    std::vector<float> out(r.values.size(), kPoison);
    dequantize_row(r.type, shifted.data() + 1, out.data(), static_cast<std::int64_t>(out.size()));
    for (std::size_t i = 0; i < out.size(); ++i) {
      ASSERT_TRUE(same(out[i], r.values[i])) << type_name(r.type);
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

}  // namespace
}  // namespace moesaic
