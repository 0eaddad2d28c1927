#pragma once

/// Every element type an expert weight can have in a GGUF file or in memory, and one table of its
/// facts. Layouts and constants are those of ggml (MIT), whose type ids the enumerators carry; what
/// ggml does not have is_ggml_type tells.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string_view>

#include "moesaic/operands.hpp"

namespace moesaic {

struct QuantTraits {
  QuantType type;
  std::string_view name;     ///< as ggml spells it: "Q4_K", "F16"; or "E4M3"
  std::int32_t block_elems;  ///< weights per block, along a row
  std::int32_t block_bytes;
  /// Decodes `elems` weights (a multiple of block_elems) to f32, exactly as ggml does.
  /// Null for types that are stored but never multiplied (integers, Q8_1, Q8_K).
  void (*dequantize)(const std::byte* blocks, float* out, std::int64_t elems);

  double bits_per_weight() const { return 8.0 * block_bytes / block_elems; }
};

/// All types with blocks along a row, by ascending id: those of ggml, and E4M3.
std::span<const QuantTraits> quant_table() noexcept;
const QuantTraits& traits(QuantType type) noexcept;
/// Whether ggml has this type, so that a tensor of a GGUF file can be of it.
constexpr bool is_ggml_type(QuantType type) noexcept { return type < QuantType::INT4; }
/// Empty for ids that ggml removed or never had.
std::optional<QuantType> quant_type_from_id(std::uint32_t id) noexcept;
std::optional<QuantType> quant_type_from_name(std::string_view name) noexcept;
/// Why an id is refused: "removed from ggml (Q4_2)", "ik_llama.cpp private type IQ4_KS", "unknown";
/// empty for known ids.
std::string_view quant_id_remark(std::uint32_t id) noexcept;

/// Bytes of a row of `cols` weights. Throws ShapeError when cols is not a multiple of block_elems.
std::int64_t row_bytes(QuantType type, std::int64_t cols);

/// Fills `out` with the bytes of weights that are mapped at `from`, by reading the file. Errors:
/// IoError, FormatError.
using ReadBytes = std::function<void(const std::byte* from, std::span<std::byte> out)>;

/// Decodes one row to f32. Throws UnsupportedError for types without a decoder, ShapeError for a
/// bad `cols`.
void dequantize_row(QuantType type, const std::byte* row, float* out, std::int64_t cols);

/// Encodes one row to any type of weights but F64, with scales of least squared error. Errors:
/// UnsupportedError, ShapeError (a bad `cols`), ConfigError (a value that is not finite or too
/// large; F32, F16 and BF16 take all). moesaic/quantize.hpp has more.
void quantize_row(QuantType type, const float* values, std::byte* row, std::int64_t cols);
bool has_encoder(QuantType type) noexcept;

}  // namespace moesaic
