#pragma once

/// Where the words of a lane hold its 32 codes of 2 .. 6 bits: plain arithmetic, one for the packer
/// and the kernels.
///
/// A lane has kBits words of 32 bits. Code (s, r, h) is half h of pair 4 s + r (codes.cuh), and both
/// halves of a pair lie 16 bits apart, so that one shift and one mask take both. Counted upwards
/// from bit 7 - kBits, where the mantissa of a bf16 has room for a code, and from bit 31 on to bit
/// 0, a word's bits for half 0 are
///
///   kBits   whole fields            rest of 16 bits
///     4     [0 3][4 7][8 11][12 15]
///     6     [0  5][6 11]            [12 15]   pair 12 + i: four bits of a rest, two of another
///     5     [0 4][5 9][10 14]       [15]      pair 15: a bit of each word's rest
///     3     [0 2] .. [12 14]        [15]      likewise
///     2     [0 1] .. [14 15]
///
/// Fields are pairs in order, word after word. A field that stands where the mantissa wants it costs
/// one instruction, every other piece two.

#include "moesaic/operands.hpp"

namespace moesaic::cuda {

/// `count` bits, from bit `from` of a code on: for half 0 from bit `bit` of word `word` on, for half
/// 1 from 16 bits further. Bits from 32 on are those from 0 on.
struct FieldPiece {
  int word, bit, count, from;
};

/// Where bf16's mantissa of 7 bits begins to hold a code of `bits` bits.
MOESAIC_ANYWHERE constexpr int mantissa_bit(int bits) { return 7 - bits; }

/// Pairs that are whole fields.
MOESAIC_ANYWHERE constexpr int whole_fields(int bits) { return 16 / bits * bits; }

MOESAIC_ANYWHERE constexpr int num_field_pieces(int bits, int pair) {
  if (pair < whole_fields(bits)) return 1;
  return bits == 6 ? 2 : bits;
}

MOESAIC_ANYWHERE constexpr FieldPiece field_piece(int bits, int pair, int piece) {
  const int fields = 16 / bits, whole = whole_fields(bits);
  if (pair < whole) return {pair / fields, mantissa_bit(bits) + pair % fields * bits, bits, 0};
  const int rest = mantissa_bit(bits) + whole;  // as many fields as words: their bits are as many
  if (bits != 6) return {piece, rest, 1, piece};
  // Three words' rests make two codes: one each, and the halves of the third.
  const int i = pair - whole, word = i / 2 * 3;
  if (piece == 0) return {word + i % 2, rest, 4, 0};
  return {word + 2, rest + i % 2 * 2, 2, 4};
}

/// A lane's words are stored as two runs, lane after lane: the first so many of each, then the rest.
MOESAIC_ANYWHERE constexpr int first_run_words(int bits) { return bits < 4 ? 2 : 4; }

}  // namespace moesaic::cuda
