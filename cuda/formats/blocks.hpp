#pragma once

/// Where a file's quant blocks hold codes and scales, bit by bit. The layouts are those of ggml
/// (MIT).

#include <array>
#include <cstdint>
#include <vector>

#include "moesaic/quant.hpp"

namespace moesaic::cuda {

/// Says that `count` bits from bit `shift` of byte `byte` of a block are bits [to, to + count) of a
/// value.
struct Piece {
  std::uint8_t byte = 0;
  std::uint8_t shift = 0;
  std::uint8_t count = 0;
  std::uint8_t to = 0;
};
/// The pieces that make up one value; unused ones have count 0.
using Pieces = std::array<Piece, 4>;

/// The pieces of `length` codes from code `first` on, which lie in consecutive bytes; `piece` is
/// that of the first one.
struct Run {
  Piece piece;
  int first, length;
};

/// A block as pieces: the codes, the scale values in the order of a record (layout.h), and the f16
/// factors of the whole block.
struct BlockBits {
  QuantType type;
  int elems, bytes;
  std::vector<Run> codes;      ///< none crosses a multiple of 64 codes
  std::vector<Pieces> values;  ///< scale values of the block
  int halves_at = 0;           ///< byte of the first f16 factor; the others follow
};

/// Null for types that are not in formats.inc.
const BlockBits* find_block_bits(QuantType type);

inline std::uint32_t read_bits(const Pieces& pieces, const std::uint8_t* block) {
  std::uint32_t value = 0;
  for (const Piece& p : pieces) {
    value |= (block[p.byte] >> p.shift & ((1U << p.count) - 1U)) << p.to;
  }
  return value;
}
/// The inverse of read_bits, into a block of zeros.
inline void write_bits(const Pieces& pieces, std::uint32_t value, std::uint8_t* block) {
  for (const Piece& p : pieces) {
    block[p.byte] = static_cast<std::uint8_t>(block[p.byte] |
                                              (value >> p.to & ((1U << p.count) - 1U)) << p.shift);
  }
}

/// Codes [first, first + count) of a row, as `count` values; `first` is a multiple of 64.
void read_codes(const BlockBits& bits, const std::uint8_t* row, std::int64_t first, int count,
                std::uint32_t* codes);
/// The inverse of read_codes, into a row of zeros.
void write_codes(const BlockBits& bits, const std::uint32_t* codes, std::int64_t first, int count,
                 std::uint8_t* row);

}  // namespace moesaic::cuda
