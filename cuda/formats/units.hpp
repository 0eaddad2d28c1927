#pragma once

/// Where a unit holds the code of each of its 16 x 64 weights: the host's view of codes.cuh, which
/// says why.

#include <cstdint>
#include <vector>

#include "layout.h"
#include "moesaic/quant.hpp"

namespace moesaic::cuda {

/// Codes of a unit, [16][64].
inline constexpr int kUnitCodes = kUnitRows * kUnitCols;
using Codes = std::uint32_t[kUnitCodes];

/// Bits [from, from + count) of code `code` lie in a word from bit `bit` on.
struct CodeBits {
  std::uint16_t code;
  std::uint8_t bit;
  std::uint8_t from;
  std::uint32_t mask;  ///< `count` ones
};

class UnitMap {
 public:
  /// Of a type of formats.inc, or of INT4.
  static const UnitMap& of(QuantType type);

  int words() const { return static_cast<int>(first_.size()) - 1; }
  /// Places of word `word`, and the end of them.
  const CodeBits* begin(int word) const { return code_bits_.data() + first_[at(word)]; }
  const CodeBits* end(int word) const { return code_bits_.data() + first_[at(word) + 1]; }

  /// `unit` is unit_bytes of any alignment.
  void write(const Codes& codes, std::uint8_t* unit) const;
  /// The inverse.
  void read(const std::uint8_t* unit, Codes& codes) const;

 private:
  explicit UnitMap(QuantType type, int words);
  static std::size_t at(int i) { return static_cast<std::size_t>(i); }

  std::vector<CodeBits> code_bits_;  ///< word after word
  std::vector<std::int32_t> first_;
};

}  // namespace moesaic::cuda
