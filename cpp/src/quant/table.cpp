#include <array>
#include <limits>
#include <string>

#include "moesaic/error.hpp"
#include "moesaic/quant.hpp"
#include "quant/decode.hpp"

namespace moesaic {
namespace {

using namespace quant;
using Q = QuantType;

constexpr QuantTraits kTable[] = {
    // type, name, block elements, block bytes, decoder
    {Q::F32, "F32", 1, 4, decode_f32},
    {Q::F16, "F16", 1, 2, decode_f16},
    {Q::Q4_0, "Q4_0", 32, 18, decode_q4_0},
    {Q::Q4_1, "Q4_1", 32, 20, decode_q4_1},
    {Q::Q5_0, "Q5_0", 32, 22, decode_q5_0},
    {Q::Q5_1, "Q5_1", 32, 24, decode_q5_1},
    {Q::Q8_0, "Q8_0", 32, 34, decode_q8_0},
    {Q::Q8_1, "Q8_1", 32, 36, nullptr},
    {Q::Q2_K, "Q2_K", 256, 84, decode_q2_k},
    {Q::Q3_K, "Q3_K", 256, 110, decode_q3_k},
    {Q::Q4_K, "Q4_K", 256, 144, decode_q4_k},
    {Q::Q5_K, "Q5_K", 256, 176, decode_q5_k},
    {Q::Q6_K, "Q6_K", 256, 210, decode_q6_k},
    {Q::Q8_K, "Q8_K", 256, 292, nullptr},
    {Q::IQ2_XXS, "IQ2_XXS", 256, 66, decode_iq2_xxs},
    {Q::IQ2_XS, "IQ2_XS", 256, 74, decode_iq2_xs},
    {Q::IQ3_XXS, "IQ3_XXS", 256, 98, decode_iq3_xxs},
    {Q::IQ1_S, "IQ1_S", 256, 50, decode_iq1_s},
    {Q::IQ4_NL, "IQ4_NL", 32, 18, decode_iq4_nl},
    {Q::IQ3_S, "IQ3_S", 256, 110, decode_iq3_s},
    {Q::IQ2_S, "IQ2_S", 256, 82, decode_iq2_s},
    {Q::IQ4_XS, "IQ4_XS", 256, 136, decode_iq4_xs},
    {Q::I8, "I8", 1, 1, nullptr},
    {Q::I16, "I16", 1, 2, nullptr},
    {Q::I32, "I32", 1, 4, nullptr},
    {Q::I64, "I64", 1, 8, nullptr},
    {Q::F64, "F64", 1, 8, decode_f64},
    {Q::IQ1_M, "IQ1_M", 256, 56, decode_iq1_m},
    {Q::BF16, "BF16", 1, 2, decode_bf16},
    {Q::TQ1_0, "TQ1_0", 256, 54, decode_tq1_0},
    {Q::TQ2_0, "TQ2_0", 256, 66, decode_tq2_0},
    {Q::MXFP4, "MXFP4", 32, 17, decode_mxfp4},
    {Q::NVFP4, "NVFP4", 64, 36, decode_nvfp4},
    {Q::Q1_0, "Q1_0", 128, 18, decode_q1_0},
    {Q::Q2_0, "Q2_0", 64, 18, decode_q2_0},
    {Q::E4M3, "E4M3", 128, 132, decode_e4m3},
};

/// Codes alone, 8 to 4 bytes; WeightRef::expert_bytes adds scales and zero points.
constexpr QuantTraits kInt4 = {Q::INT4, "INT4", 8, 4, nullptr};

/// For types that have no row: their blocks are as unknown as their decoder.
constexpr QuantTraits kUnknown = {Q::Unknown, "unknown", 1, 1, nullptr};

/// Position in the table for each id; -1 where there is no type.
constexpr auto kIndex = [] {
  std::array<std::int8_t, 256> index{};
  index.fill(-1);
  for (std::size_t i = 0; i < std::size(kTable); ++i) {
    index[static_cast<std::size_t>(kTable[i].type)] = static_cast<std::int8_t>(i);
  }
  return index;
}();

}  // namespace

std::span<const QuantTraits> quant_table() noexcept { return kTable; }

const QuantTraits& traits(QuantType type) noexcept {
  if (type == Q::INT4) return kInt4;
  const std::int8_t index = kIndex[static_cast<std::size_t>(type)];
  return index < 0 ? kUnknown : kTable[static_cast<std::size_t>(index)];
}

std::optional<QuantType> quant_type_from_id(std::uint32_t id) noexcept {
  if (id >= kIndex.size() || kIndex[id] < 0) return std::nullopt;
  const auto type = static_cast<QuantType>(id);
  return is_ggml_type(type) ? std::optional(type) : std::nullopt;
}

std::optional<QuantType> quant_type_from_name(std::string_view name) noexcept {
  for (const QuantTraits& t : kTable) {
    if (t.name == name) return t.type;
  }
  return std::nullopt;
}

std::int64_t row_bytes(QuantType type, std::int64_t cols) {
  const QuantTraits& t = traits(type);
  constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
  require<ShapeError>(
      cols >= 0 && cols % t.block_elems == 0 && cols / t.block_elems <= kMax / t.block_bytes, [&] {
        return Problem{"row_bytes", "cols of " + std::string(t.name),
                       "a multiple of " + std::to_string(t.block_elems), std::to_string(cols), ""};
      });
  return cols / t.block_elems * t.block_bytes;
}

}  // namespace moesaic
