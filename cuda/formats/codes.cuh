// From the codes of a unit (16 rows x 64 columns) to A fragments of mma.m16n8k16 in bf16.
//
//          k16 step 0   step 1   step 2   step 3
//   row  0 [ 16 cols  |        |        |        ]   lane l of a warp (g = l / 4, t = l % 4) holds
//    ..    [          |        |        |        ]   32 codes of the unit, of rows g and g + 8:
//   row 15 [          |        |        |        ]   eight for each k16 step s
//
// Code (s, r, h), r = 0 .. 3, h = 0 .. 1, is half h of register r of the fragment:
//   row g + 8 (r & 1), column 16 s + 2 t + h + 8 (r >> 1).
//
// How a lane's codes are stored depends on the format:
//
//   field of b = 4, 2, 1 bits   b words per lane, lane after lane. With c = 4 s + r the bits are in
//                               word c b / 16, from bit c b % 16 + 16 h on. b = 4 is "P4".
//   signed bytes                byte (r & 1) + 2 h + 4 (r >> 1) of the eight bytes of step s
//   nibbles for such bytes      the same nibble of the word of step s: four nibbles in a row are a
//                               selector for a byte lookup
//   16-bit floats               word r of the 16 bytes of step s, half h
//   f32                         word 2 r + h of the 32 bytes of step s
//
// A lane reads at most 16 bytes at once. Wider codes are stored as [piece][lane][16 bytes], so that
// each load of a warp is one contiguous run. Preconditions: units aligned to 16 bytes, whole warps.
#pragma once

#include "device.cuh"

namespace moesaic::cuda {

// Where codes are read from.
struct FromGlobal {
  static MOESAIC_DEV uint4 load16(const uint8_t* p) { return dev::load_weight16(p); }
  template <class T>
  static MOESAIC_DEV T load(const uint8_t* p) {
    return dev::load_weight(reinterpret_cast<const T*>(p));
  }
};
struct FromShared {
  static MOESAIC_DEV uint4 load16(const uint8_t* p) { return *reinterpret_cast<const uint4*>(p); }
  template <class T>
  static MOESAIC_DEV T load(const uint8_t* p) {
    return *reinterpret_cast<const T*>(p);
  }
};

// Loads a lane's kPieces pieces of 16 bytes, which lie 512 bytes apart.
template <class From, int kPieces>
MOESAIC_DEV void load_pieces(const uint8_t* first, uint32_t* words) {
  MOESAIC_UNROLL
  for (int i = 0; i < kPieces; ++i) {
    const uint4 piece = From::load16(first + 512 * i);
    words[4 * i] = piece.x;
    words[4 * i + 1] = piece.y;
    words[4 * i + 2] = piece.z;
    words[4 * i + 3] = piece.w;
  }
}

// Loads a lane's words of a field of kBits per code.
template <class From, int kBits>
MOESAIC_DEV void load_bit_field(const uint8_t* field, uint32_t* words) {
  if constexpr (kBits == 4) {
    load_pieces<From, 1>(field, words);
  } else if constexpr (kBits == 2) {
    const uint2 pair = From::template load<uint2>(field);
    words[0] = pair.x;
    words[1] = pair.y;
  } else {
    static_assert(kBits == 1);
    words[0] = From::template load<uint32_t>(field);
  }
}

inline constexpr int kAndOr = 0xEA;  // lop3 table of (a & b) | c

MOESAIC_DEV constexpr uint32_t in_both_halves(uint32_t half) { return half << 16 | half; }

// Two times a small integer, which bf16 holds exactly.
template <int kValue>
MOESAIC_DEV uint32_t bf16_pair() {
  constexpr uint32_t kBits = __builtin_bit_cast(uint32_t, static_cast<float>(kValue)) >> 16;
  return kBits << 16 | kBits;
}

// A word with its bits moved from bit kFrom to bit kTo of both halves.
template <int kFrom, int kTo>
MOESAIC_DEV uint32_t moved(uint32_t word) {
  return kFrom >= kTo ? word >> (kFrom >= kTo ? kFrom - kTo : 0)
                      : word << (kFrom < kTo ? kTo - kFrom : 0);
}

// Unsigned codes of kLow + kHigh bits: a field of the low ones, then one of the high ones. The bits
// are or-ed into the top of the mantissa of bf16 2^(kLow + kHigh): the fragment holds kBias + code.
template <int kLow, int kHigh>
struct BitFieldCodes {
  static constexpr int kUnitBytes = 128 * (kLow + kHigh);
  static constexpr int kPlanes = 1;
  static constexpr int kBias = 1 << (kLow + kHigh);
  struct Codes {
    uint32_t words[kLow + kHigh];
  };
  struct CodePlace {
    const uint8_t* low;
    const uint8_t* high;

    MOESAIC_DEV void step(int bytes) {
      low += bytes;
      if constexpr (kHigh > 0) high += bytes;
    }
  };

  static MOESAIC_DEV CodePlace code_place(const uint8_t* unit, int lane) {
    return {unit + 4 * kLow * lane, unit + 128 * kLow + 4 * kHigh * lane};
  }
  template <class From>
  static MOESAIC_DEV Codes load_from(const CodePlace& place) {
    Codes codes;
    load_bit_field<From, kLow>(place.low, codes.words);
    if constexpr (kHigh > 0) load_bit_field<From, kHigh>(place.high, codes.words + kLow);
    return codes;
  }

  template <int kStep, int kPlane = 0>
  static MOESAIC_DEV void fragment(const Codes& codes, uint32_t (&a)[4]) {
    a[0] = pair<4 * kStep>(codes);
    a[1] = pair<4 * kStep + 1>(codes);
    a[2] = pair<4 * kStep + 2>(codes);
    a[3] = pair<4 * kStep + 3>(codes);
  }

 private:
  static constexpr uint32_t kOne = (127U + kLow + kHigh) << 7;  // bf16 kBias
  static constexpr int kLowAt = 7 - kLow - kHigh;
  static constexpr int kHighAt = 7 - kHigh;

  // Register r of step s, with c = 4 s + r: codes h = 0 and h = 1 as a pair of bf16.
  template <int c>
  static MOESAIC_DEV uint32_t pair(const Codes& codes) {
    uint32_t p =
        dev::lop3<kAndOr>(moved<c * kLow % 16, kLowAt>(codes.words[c * kLow / 16]),
                          in_both_halves(((1U << kLow) - 1U) << kLowAt), in_both_halves(kOne));
    if constexpr (kHigh > 0) {
      p = dev::lop3<kAndOr>(moved<c * kHigh % 16, kHighAt>(codes.words[kLow + c * kHigh / 16]),
                            in_both_halves(((1U << kHigh) - 1U) << kHighAt), p);
    }
    return p;
  }
};

// Codes that take kPieces times 16 bytes per lane. Their fragments hold the codes themselves,
// without an excess (kBias 0).
template <int kPieces, int kBf16Planes>
struct PieceCodes {
  static constexpr int kUnitBytes = 512 * kPieces;
  static constexpr int kPlanes = kBf16Planes;
  static constexpr int kBias = 0;
  struct Codes {
    uint32_t words[4 * kPieces];
  };
  struct CodePlace {
    const uint8_t* first;

    MOESAIC_DEV void step(int bytes) { first += bytes; }
  };

  static MOESAIC_DEV CodePlace code_place(const uint8_t* unit, int lane) {
    return {unit + 16 * lane};
  }
  template <class From>
  static MOESAIC_DEV Codes load_from(const CodePlace& place) {
    Codes codes;
    load_pieces<From, kPieces>(place.first, codes.words);
    return codes;
  }
};

// Bytes 0 and 2 of a word, which are signed, as two bf16, exactly: the low seven bits are or-ed
// into the mantissa of 128, then 128 is subtracted or, for a negative byte, 256.
MOESAIC_DEV uint32_t signed_bytes_to_bf16(uint32_t word) {
  const uint32_t magnitude = dev::lop3<kAndOr>(word, 0x007F007FU, 0x43004300U);
  const uint32_t offset = dev::lop3<kAndOr>(word, 0x00800080U, 0xC300C300U);
  return dev::bf16x2_add(magnitude, offset);
}

MOESAIC_DEV void byte_fragment(uint32_t first, uint32_t second, uint32_t (&a)[4]) {
  a[0] = signed_bytes_to_bf16(first);
  a[1] = signed_bytes_to_bf16(first >> 8);
  a[2] = signed_bytes_to_bf16(second);
  a[3] = signed_bytes_to_bf16(second >> 8);
}

struct ByteCodes : PieceCodes<2, 1> {
  template <int kStep, int kPlane = 0>
  static MOESAIC_DEV void fragment(const Codes& codes, uint32_t (&a)[4]) {
    byte_fragment(codes.words[2 * kStep], codes.words[2 * kStep + 1], a);
  }
};

// The code book of IQ4_NL and IQ4_XS (a constant of ggml, MIT licence).
struct Iq4Levels {
  static constexpr int kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                      1,    13,   25,  38,  53,  69,  89,  113};
};
// Twice the E2M1 values, so that they are integers; the scales are halved in return.
struct Fp4Doubled {
  static constexpr int kLevels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
};

// Four levels of a code book as the bytes of a word.
template <class Book, int kAt>
inline constexpr uint32_t kBookByte = static_cast<uint8_t>(Book::kLevels[kAt]);
template <class Book, int kAt>
inline constexpr uint32_t kBookWord =
    kBookByte<Book, kAt> | kBookByte<Book, kAt + 1> << 8 | kBookByte<Book, kAt + 2> << 16 |
    kBookByte<Book, kAt + 3> << 24;

// Nibbles that stand for signed bytes of a code book.
template <class Book>
struct BookCodes : PieceCodes<1, 1> {
  template <int kStep, int kPlane = 0>
  static MOESAIC_DEV void fragment(const Codes& codes, uint32_t (&a)[4]) {
    const uint32_t word = codes.words[kStep];
    byte_fragment(look_up(word & 0xFFFFU), look_up(word >> 16), a);
  }

 private:
  // Four bytes for four nibbles: each is looked up in both halves of the table, and the nibble's
  // top bit says which of the two bytes is taken.
  static MOESAIC_DEV uint32_t look_up(uint32_t nibbles) {
    constexpr uint32_t k0 = kBookWord<Book, 0>, k1 = kBookWord<Book, 4>;
    constexpr uint32_t k2 = kBookWord<Book, 8>, k3 = kBookWord<Book, 12>;
    const uint32_t low = dev::prmt(k0, k1, nibbles & 0x7777U);
    const uint32_t high = dev::prmt(k2, k3, nibbles & 0x7777U);
    return dev::prmt(low, high, 0x3210U | (nibbles & 0x8888U) >> 1);
  }
};

struct Bf16Codes : PieceCodes<4, 1> {
  template <int kStep, int kPlane = 0>
  static MOESAIC_DEV void fragment(const Codes& codes, uint32_t (&a)[4]) {
    MOESAIC_UNROLL
    for (int r = 0; r < 4; ++r) a[r] = codes.words[4 * kStep + r];
  }
};

// Plane kPlane of two f32 as bf16: plane 0 is the value rounded, plane 1 what that left, plane 2
// what both left. With 8 bits of mantissa each, three planes hold all of an f32, two all of an f16.
template <int kPlane>
MOESAIC_DEV uint32_t bf16_plane(float low, float high) {
  const uint32_t pair = dev::pack_bf16(low, high);
  if constexpr (kPlane == 0) {
    return pair;
  } else {
    const float2 rounded = dev::unpack_bf16(pair);
    return bf16_plane<kPlane - 1>(low - rounded.x, high - rounded.y);
  }
}

struct F16Codes : PieceCodes<4, 2> {
  template <int kStep, int kPlane = 0>
  static MOESAIC_DEV void fragment(const Codes& codes, uint32_t (&a)[4]) {
    MOESAIC_UNROLL
    for (int r = 0; r < 4; ++r) {
      const float2 pair = dev::unpack_f16(codes.words[4 * kStep + r]);
      a[r] = bf16_plane<kPlane>(pair.x, pair.y);
    }
  }
};

struct F32Codes : PieceCodes<8, 3> {
  template <int kStep, int kPlane = 0>
  static MOESAIC_DEV void fragment(const Codes& codes, uint32_t (&a)[4]) {
    MOESAIC_UNROLL
    for (int r = 0; r < 4; ++r) {
      const uint32_t* const pair = codes.words + 8 * kStep + 2 * r;
      a[r] = bf16_plane<kPlane>(__uint_as_float(pair[0]), __uint_as_float(pair[1]));
    }
  }
};

}  // namespace moesaic::cuda
