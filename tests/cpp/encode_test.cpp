#include "quant/encode.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "compare.hpp"
#include "moesaic/error.hpp"
#include "moesaic/quantize.hpp"
#include "moesaic/thread_pool.hpp"
#include "quant/codebooks.hpp"
#include "quant/grid_search.hpp"
#include "quant/iq_grids.hpp"
#include "quant_rows.hpp"
#include "random.hpp"

namespace moesaic {
namespace {

using testing::decoded;
using testing::encoded;
using testing::Random;
using testing::random_values;
using testing::rel_l2;
using testing::round_trip;
using testing::type_name;
using testing::types_with_encoder;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// ---- each encoder

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
    {QuantType::Q2_0, 0.364},    {QuantType::E4M3, 0.0267},
};

INSTANTIATE_TEST_SUITE_P(Types, QuantEncode, ::testing::ValuesIn(kBounds),
                         [](const auto& info) { return type_name(info.param.type); });

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
      ASSERT_NEAR(got[i], values[i], 2e-3f) << type_name(type) << " " << i;
    }
  }
  for (const QuantType type : {QuantType::MXFP4, QuantType::NVFP4}) {
    std::vector<float> values(64);
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = 0.5f * quant::kE2m1Doubled[i * 7 % 16];
    }
    EXPECT_EQ(round_trip(type, values), values) << type_name(type);
  }
}

/// With a scale of 1 every code is its own nearest, as are values on either side of the middle.
TEST(QuantEncode, EveryCodeOfE4m3IsItsNearest) {
  for (int code = 0; code < 0x7e; ++code) {
    const float low = quant::e4m3(static_cast<std::uint8_t>(code));
    const float high = quant::e4m3(static_cast<std::uint8_t>(code + 1));
    const float middle = (low + high) / 2;
    std::vector<float> values(128);
    values[0] = 448.0f;
    values[1] = -low;
    values[2] = std::nextafter(middle, low);
    values[3] = std::nextafter(middle, high);
    values[4] = middle;
    const std::vector<float> got = round_trip(QuantType::E4M3, values);
    const std::vector<float> want = {448.0f, -low, low, high, code % 2 == 0 ? low : high};
    EXPECT_EQ(std::vector<float>(got.begin(), got.begin() + 5), want) << code;
  }
}

/// Signs, ternary digits and powers of two survive every number of rounds.
TEST(QuantEncode, DecodedWeightsAreEncodedToThemselves) {
  for (const QuantType type :
       {QuantType::TQ1_0, QuantType::TQ2_0, QuantType::Q1_0, QuantType::Q2_0, QuantType::MXFP4}) {
    const std::vector<float> once = round_trip(type, random_values(1024, 21, 1.0f));
    EXPECT_EQ(round_trip(type, once), once) << type_name(type);
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

/// An encoder gives the same bytes on every machine, with every compiler, until its search changes.
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
      {QuantType::E4M3, 0x5ce95f04u},
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
    EXPECT_EQ(hash, want) << type_name(type);
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
      EXPECT_EQ(got, want) << type_name(type) << " " << threads;
      std::vector<float> out(values.size(), kNaN);
      dequantize_rows(type, want.data(), kRows, kCols, out.data(), pool);
      std::vector<float> out_want(values.size());
      for (std::int64_t row = 0; row < kRows; ++row) {
        dequantize_row(type, want.data() + row * bytes, out_want.data() + row * kCols, kCols);
      }
      EXPECT_EQ(out, out_want) << type_name(type) << " " << threads;
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

}  // namespace
}  // namespace moesaic
