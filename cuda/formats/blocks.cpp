#include "cuda/formats/blocks.hpp"

#include <algorithm>
#include <utility>

#include "cuda/formats/layout.h"

namespace moesaic::cuda {
namespace {

using PieceFn = Pieces (*)(int index);

constexpr Piece piece(int byte, int shift, int count, int to = 0) {
  return {static_cast<std::uint8_t>(byte), static_cast<std::uint8_t>(shift),
          static_cast<std::uint8_t>(count), static_cast<std::uint8_t>(to)};
}

/// A value of kWidth bytes, low byte first: value `index` of those that start at byte kAt.
template <int kAt, int kWidth>
Pieces bytes(int index) {
  Pieces pieces{};
  for (int i = 0; i < kWidth; ++i) {
    pieces[static_cast<std::size_t>(i)] = piece(kAt + kWidth * index + i, 0, 8, 8 * i);
  }
  return pieces;
}

/// Nibbles of blocks of 32 weights: the low ones are weights 0 .. 15, the high ones 16 .. 31.
template <int kAt>
Pieces nibble32(int i) {
  return {piece(kAt + i % 16, 4 * (i / 16), 4)};
}
template <int kAt, int kHighAt>
Pieces five32(int i) {
  return {nibble32<kAt>(i)[0], piece(kHighAt + i / 8, i % 8, 1, 4)};
}

/// Nibbles of the K types: 32 bytes hold 64 weights, the first half of them in the low nibbles.
template <int kAt>
Pieces nibble64(int i) {
  return {piece(kAt + 32 * (i / 64) + i % 32, 4 * (i / 32 % 2), 4)};
}
/// Two-bit codes of the K types: 32 bytes hold 128 weights, 32 in each pair of bits.
template <int kAt>
Pieces two128(int i) {
  return {piece(kAt + 32 * (i / 128) + i % 32, 2 * (i % 128 / 32), 2)};
}

Pieces code_q3_k(int i) { return {two128<32>(i)[0], piece(i % 32, i / 32, 1, 2)}; }
Pieces code_q5_k(int i) { return {nibble64<48>(i)[0], piece(16 + i % 32, i / 32, 1, 4)}; }
Pieces code_q6_k(int i) {
  const int half = i / 128, quarter = i % 128 / 32, at = i % 32;
  return {piece(64 * half + at + 32 * (quarter % 2), 4 * (quarter / 2), 4),
          piece(128 + 32 * half + at, 2 * quarter, 2, 4)};
}
Pieces code_iq4_xs(int i) { return {piece(8 + 16 * (i / 32) + i % 16, 4 * (i % 32 / 16), 4)}; }
Pieces code_nvfp4(int i) { return {piece(4 + 8 * (i / 16) + i % 8, 4 * (i % 16 / 8), 4)}; }

/// The 6-bit scale and minimum `j` of Q4_K and Q5_K; quant/k_scales.hpp draws them.
Pieces scale6(int j) {
  if (j < 4) return {piece(4 + j, 0, 6)};
  return {piece(8 + j, 0, 4), piece(j, 6, 2, 4)};
}
Pieces min6(int j) {
  if (j < 4) return {piece(8 + j, 0, 6)};
  return {piece(8 + j, 4, 4), piece(4 + j, 6, 2, 4)};
}
/// Scales and minima of Q4_K and Q5_K as the kernels take them: two scales of a unit, then its two
/// minima.
Pieces scale_min6(int i) {
  const int j = i / 4 * 2 + i % 2;
  return i % 4 < 2 ? scale6(j) : min6(j);
}
Pieces scale_q3_k(int j) {
  return {piece(96 + j % 8, 4 * (j / 8), 4), piece(104 + j % 4, 2 * (j / 4), 2, 4)};
}
Pieces scale_iq4_xs(int j) {
  return {piece(4 + j / 2, 4 * (j % 2), 4), piece(2 + j / 4, 2 * (j % 4), 2, 4)};
}
Pieces no_value(int) { return {}; }

struct Description {
  QuantType type;
  PieceFn code;
  PieceFn value;
  int halves_at;
};

constexpr Description kDescriptions[] = {
    {QuantType::Q4_0, nibble32<2>, bytes<0, 2>, 0},
    {QuantType::Q4_1, nibble32<4>, bytes<0, 2>, 0},
    {QuantType::Q5_0, five32<6, 2>, bytes<0, 2>, 0},
    {QuantType::Q5_1, five32<8, 4>, bytes<0, 2>, 0},
    {QuantType::Q2_K, two128<16>, bytes<0, 1>, 80},
    {QuantType::Q3_K, code_q3_k, scale_q3_k, 108},
    {QuantType::Q4_K, nibble64<16>, scale_min6, 0},
    {QuantType::Q5_K, code_q5_k, scale_min6, 0},
    {QuantType::Q6_K, code_q6_k, bytes<192, 1>, 208},
    {QuantType::Q8_0, bytes<2, 1>, bytes<0, 2>, 0},
    {QuantType::IQ4_NL, nibble32<2>, bytes<0, 2>, 0},
    {QuantType::IQ4_XS, code_iq4_xs, scale_iq4_xs, 0},
    {QuantType::MXFP4, nibble32<1>, bytes<0, 1>, 0},
    {QuantType::NVFP4, code_nvfp4, bytes<0, 1>, 0},
    {QuantType::F32, bytes<0, 4>, no_value, 0},
    {QuantType::F16, bytes<0, 2>, no_value, 0},
    {QuantType::BF16, bytes<0, 2>, no_value, 0},
};

#define MOESAIC_FORMAT(TYPE, value, name, unit_bytes, scale) \
  static_assert(static_cast<int>(QuantType::TYPE) == (value));
#include "formats.inc"
#undef MOESAIC_FORMAT
static_assert(std::size(kDescriptions) == std::size(kFormats));

/// Gathers the pieces of all codes of a block; neighbouring codes whose pieces lie at the same bits
/// of neighbouring bytes become one run.
std::vector<Run> runs_of(PieceFn code, int elems) {
  std::vector<Run> runs;
  for (int first = 0; first < elems; first += kUnitCols) {
    const int end = std::min(first + kUnitCols, elems);
    for (std::size_t k = 0; k < Pieces{}.size(); ++k) {
      const std::size_t before = runs.size();
      for (int i = first; i < end; ++i) {
        const Piece p = code(i)[k];
        if (p.count == 0) continue;
        const Run* last = runs.size() > before ? &runs.back() : nullptr;
        const bool follows = last != nullptr && last->first + last->length == i &&
                             last->piece.byte + last->length == p.byte &&
                             last->piece.shift == p.shift;
        if (follows) {
          ++runs.back().length;
        } else {
          runs.push_back({p, i, 1});
        }
      }
    }
  }
  return runs;
}

std::vector<BlockBits> describe_all() {
  std::vector<BlockBits> all;
  for (const Description& d : kDescriptions) {
    const QuantTraits& facts = traits(d.type);
    const int values = find_format(static_cast<std::int32_t>(d.type))->scale.unit_values *
                       facts.block_elems / kUnitCols;
    BlockBits bits{.type = d.type,
                   .elems = facts.block_elems,
                   .bytes = facts.block_bytes,
                   .codes = runs_of(d.code, facts.block_elems),
                   .values = {},
                   .halves_at = d.halves_at};
    for (int i = 0; i < values; ++i) bits.values.push_back(d.value(i));
    all.push_back(std::move(bits));
  }
  return all;
}

/// Calls visit(run, block, codes of the block that starts with or before `first`) for each run of
/// codes [first, first + count).
template <class Row, class Code, class Visit>
void for_each_run(const BlockBits& bits, Row* row, std::int64_t first, int count, Code* codes,
                  const Visit& visit) {
  Row* block = row + first / bits.elems * bits.bytes;
  const int skip = static_cast<int>(first % bits.elems);  // codes of the block before `first`
  for (int done = 0; done < count; done += bits.elems, block += bits.bytes) {
    for (const Run& run : bits.codes) {
      if (run.first < skip) continue;
      if (run.first >= skip + count - done) break;
      visit(run, block, codes + done + run.first - skip);
    }
  }
}

}  // namespace

const BlockBits* find_block_bits(QuantType type) {
  // Never destroyed: where a process ends during a call, threads read on.
  static const auto& all = *new std::vector<BlockBits>(describe_all());
  for (const BlockBits& bits : all) {
    if (bits.type == type) return &bits;
  }
  return nullptr;
}

void read_codes(const BlockBits& bits, const std::uint8_t* row, std::int64_t first, int count,
                std::uint32_t* codes) {
  std::fill_n(codes, count, 0U);
  for_each_run(bits, row, first, count, codes,
               [](const Run& run, const std::uint8_t* block, std::uint32_t* to) {
                 const Piece p = run.piece;
                 const std::uint32_t mask = (1U << p.count) - 1U;
                 for (int i = 0; i < run.length; ++i) {
                   to[i] |= (static_cast<std::uint32_t>(block[p.byte + i]) >> p.shift & mask)
                            << p.to;
                 }
               });
}

void write_codes(const BlockBits& bits, const std::uint32_t* codes, std::int64_t first, int count,
                 std::uint8_t* row) {
  for_each_run(bits, row, first, count, codes,
               [](const Run& run, std::uint8_t* block, const std::uint32_t* from) {
                 const Piece p = run.piece;
                 const std::uint32_t mask = (1U << p.count) - 1U;
                 for (int i = 0; i < run.length; ++i) {
                   std::uint8_t& byte = block[p.byte + i];
                   byte = static_cast<std::uint8_t>(byte | (from[i] >> p.to & mask) << p.shift);
                 }
               });
}

}  // namespace moesaic::cuda
