#include "cuda/formats/units.hpp"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>

#include "cuda/formats/fields.h"

namespace moesaic::cuda {
namespace {

/// A weight as its lane sees it: k16 step s, register r, half h of an A fragment.
struct Position {
  int lane, s, r, h;
};
constexpr Position position_of(int row, int col, int lane_cols) {
  // The four lanes of a row share a run of 16 or 32 columns, for one or two steps.
  const int run = 4 * lane_cols, at = col % lane_cols;
  return {row % 8 * 4 + col % run / lane_cols, col / run * (lane_cols / 4) + at / 4,
          row / 8 + 2 * (at % 4 / 2), at % 2};
}

/// Where `count` bits of a code lie, from its bit `from` on.
struct Bits {
  int word, bit, count, from;
};

/// A code of `bits` bits in the fields of a lane's words.
std::vector<Bits> in_fields(const Position& p, int bits) {
  const int first = first_run_words(bits), pair = 4 * p.s + p.r;
  std::vector<Bits> found;
  for (int i = 0; i < num_field_pieces(bits, pair); ++i) {
    const FieldPiece piece = field_piece(bits, pair, i);
    const int word = piece.word < first ? p.lane * first + piece.word
                                        : 32 * first + p.lane * (bits - first) + piece.word - first;
    const int bit = (piece.bit + 16 * p.h) % 32;
    const int here = std::min(piece.count, 32 - bit);
    found.push_back({word, bit, here, piece.from});
    if (here < piece.count) found.push_back({word, 0, piece.count - here, piece.from + here});
  }
  return found;
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
      return in_fields(p, 2);
    case QuantType::Q3_K:
      return in_fields(p, 3);
    case QuantType::Q5_0:
    case QuantType::Q5_1:
    case QuantType::Q5_K:
      return in_fields(p, 5);
    case QuantType::Q6_K:
      return in_fields(p, 6);
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
      return in_fields(p, 4);
  }
}

}  // namespace

UnitMap::UnitMap(QuantType type, int words) {
  std::vector<std::vector<CodeBits>> by_word(at(words));
  for (int code = 0; code < kUnitCodes; ++code) {
    const Position position =
        position_of(code / kUnitCols, code % kUnitCols, lane_cols(static_cast<std::int32_t>(type)));
    for (const Bits& b : bits_of(type, position)) {
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
