#pragma once

/// Where a unit holds the code of each of its 16 x 64 weights: the host's view of what codes.cuh
/// draws and explains.

#include <cstdint>
#include <vector>

#include "layout.h"
#include "moesaic/quant.hpp"

namespace moesaic::cuda {

/// The codes of a unit, [16][64].
inline constexpr int kUnitCodes = kUnitRows * kUnitCols;
using Codes = std::uint32_t[kUnitCodes];

/// Says that bits [from, from + count) of code `code` lie in a word from bit `bit` on.
struct CodeBits {
  std::uint16_t code;
  std::uint8_t bit;
  std::uint8_t from;
  std::uint32_t mask;  ///< `count` ones
};

/// For each word of a unit, which bits of which codes it holds.
class UnitMap {
 public:
  /// The map of a type of formats.inc, or of INT4.
  static const UnitMap& of(QuantType type);

  int words() const { return static_cast<int>(first_.size()) - 1; }
  /// What word `word` holds, from begin to end.
  const CodeBits* begin(int word) const { return code_bits_.data() + first_[at(word)]; }
  const CodeBits* end(int word) const { return code_bits_.data() + first_[at(word) + 1]; }

  /// Writes the unit_bytes of a unit from its codes; `unit` may have any alignment.
  void write(const Codes& codes, std::uint8_t* unit) const;
  /// The inverse of write.
  void read(const std::uint8_t* unit, Codes& codes) const;

 private:
  explicit UnitMap(QuantType type, int words);
  static std::size_t at(int i) { return static_cast<std::size_t>(i); }

  std::vector<CodeBits> code_bits_;  ///< word after word
  std::vector<std::int32_t> first_;
};

}  // namespace moesaic::cuda
