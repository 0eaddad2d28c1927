#include "cuda/formats/units.hpp"

#include <cstring>
#include <map>
#include <memory>

namespace moesaic::cuda {
namespace {

/// A weight as its lane sees it: k16 step s, register r, half h of an A fragment.
struct Position {
  int lane, s, r, h;
};
constexpr Position position_of(int row, int col) {
  return {row % 8 * 4 + col % 8 / 2, col / 16, row / 8 + 2 * (col % 16 / 8), col % 2};
}

/// Where `count` bits of a code lie, from its bit `from` on.
struct Bits {
  int word, bit, count, from;
};

/// A code's bits in a field of `bits` per code that starts at word `first`.
Bits in_bit_field(const Position& p, int first, int bits, int from) {
  const int at = (4 * p.s + p.r) * bits;
  return {first + p.lane * bits + at / 16, at % 16 + 16 * p.h, bits, from};
}
/// Word `index` of a lane's words, which are stored in pieces of four.
constexpr int piece_word(const Position& p, int index) {
  return index / 4 * 128 + p.lane * 4 + index % 4;
}
/// Which of the eight bytes of its step a code is; so for nibbles that stand for bytes.
constexpr int byte_of(const Position& p) { return (p.r & 1) + 2 * p.h + 4 * (p.r >> 1); }

std::vector<Bits> bits_of(QuantType type, const Position& p) {
  switch (type) {
    case QuantType::Q2_K:
      return {in_bit_field(p, 0, 2, 0)};
    case QuantType::Q3_K:
      return {in_bit_field(p, 0, 2, 0), in_bit_field(p, 64, 1, 2)};
    case QuantType::Q5_0:
    case QuantType::Q5_1:
    case QuantType::Q5_K:
      return {in_bit_field(p, 0, 4, 0), in_bit_field(p, 128, 1, 4)};
    case QuantType::Q6_K:
      return {in_bit_field(p, 0, 4, 0), in_bit_field(p, 128, 2, 4)};
    case QuantType::Q8_0:
      return {{piece_word(p, 2 * p.s + byte_of(p) / 4), byte_of(p) % 4 * 8, 8, 0}};
    case QuantType::IQ4_NL:
    case QuantType::IQ4_XS:
    case QuantType::MXFP4:
    case QuantType::NVFP4:
      return {{piece_word(p, p.s), 4 * byte_of(p), 4, 0}};
    case QuantType::F16:
    case QuantType::BF16:
      return {{piece_word(p, 4 * p.s + p.r), 16 * p.h, 16, 0}};
    case QuantType::F32:
      return {{piece_word(p, 8 * p.s + 2 * p.r + p.h), 0, 32, 0}};
    default:  // Q4_0, Q4_1, Q4_K, INT4
      return {in_bit_field(p, 0, 4, 0)};
  }
}

}  // namespace

UnitMap::UnitMap(QuantType type, int words) {
  std::vector<std::vector<CodeBits>> by_word(at(words));
  for (int code = 0; code < kUnitCodes; ++code) {
    for (const Bits& b : bits_of(type, position_of(code / kUnitCols, code % kUnitCols))) {
      by_word[at(b.word)].push_back(
          {static_cast<std::uint16_t>(code), static_cast<std::uint8_t>(b.bit),
           static_cast<std::uint8_t>(b.from), b.count == 32 ? ~0U : (1U << b.count) - 1U});
    }
  }
  for (const auto& bits : by_word) {
    first_.push_back(static_cast<std::int32_t>(code_bits_.size()));
    code_bits_.insert(code_bits_.end(), bits.begin(), bits.end());
  }
  first_.push_back(static_cast<std::int32_t>(code_bits_.size()));
}

const UnitMap& UnitMap::of(QuantType type) {
  // Never destroyed: where a process ends during a call, threads read on.
  static const auto& all = *[] {
    auto map = std::make_unique<std::map<QuantType, UnitMap>>();
    for (const FormatRow& row : kFormats) {
      const auto of = static_cast<QuantType>(row.type);
      map->emplace(of, UnitMap(of, row.unit_bytes / 4));
    }
    map->emplace(QuantType::INT4, UnitMap(QuantType::INT4, kInt4UnitBytes / 4));
    return map.release();
  }();
  return all.at(type);
}

void UnitMap::write(const Codes& codes, std::uint8_t* unit) const {
  for (int w = 0; w < words(); ++w, unit += 4) {
    std::uint32_t word = 0;
    for (const CodeBits* p = begin(w); p != end(w); ++p) {
      word |= (codes[p->code] >> p->from & p->mask) << p->bit;
    }
    std::memcpy(unit, &word, 4);
  }
}

void UnitMap::read(const std::uint8_t* unit, Codes& codes) const {
  std::memset(codes, 0, sizeof codes);
  for (int w = 0; w < words(); ++w, unit += 4) {
    std::uint32_t word;
    std::memcpy(&word, unit, 4);
    for (const CodeBits* p = begin(w); p != end(w); ++p) {
      codes[p->code] |= (word >> p->bit & p->mask) << p->from;
    }
  }
}

}  // namespace moesaic::cuda
