// From the codes of a unit (16 rows x 64 columns) to A fragments of mma.m16n8k16 in bf16.
//
//          k16 step 0   step 1   step 2   step 3
//   row  0 [ 16 cols  |        |        |        ]   lane l of a warp (g = l / 4, t = l % 4) holds
//    ..    [          |        |        |        ]   32 codes of the unit, of rows g and g + 8:
//   row 15 [          |        |        |        ]   eight for each k16 step s
//
// Code (s, r, h), r = 0 .. 3, h = 0 .. 1, is half h of register r of the fragment: row g + 8 (r & 1),
// and, as a product does not ask for the order of columns, that column of the unit whose x lane t
// reads side by side with others:
//   lane_cols 8   32 (s / 2) + 8 t + 4 (s % 2) + 2 (r >> 1) + h
//   lane_cols 4   16 s + 4 t + 2 (r >> 1) + h
//
// How a lane's codes are stored depends on the format:
//
//   2 .. 6 bits                 as many words per lane; fields.h says where in them
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
#include "formats/fields.h"

namespace moesaic::cuda {

// Where something lies in an expert, in pairs of bytes: takes half the registers of a pointer, and one
// instruction to be added to one. Experts are smaller than 8 GiB (pack_refusal).
using Offset = uint32_t;
MOESAIC_DEV Offset offset_of(int64_t bytes) { return static_cast<Offset>(bytes / 2); }
MOESAIC_DEV const uint8_t* at(const uint8_t* base, Offset offset) {
  return reinterpret_cast<const uint8_t*>(reinterpret_cast<const uint16_t*>(base) + offset);
}

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

// Loads 4, 2 or 1 words.
template <class From, int kWords>
MOESAIC_DEV void load_run(const uint8_t* run, uint32_t* words) {
  if constexpr (kWords == 4) {
    load_pieces<From, 1>(run, words);
  } else if constexpr (kWords == 2) {
    const uint2 pair = From::template load<uint2>(run);
    words[0] = pair.x;
    words[1] = pair.y;
  } else {
    static_assert(kWords == 1);
    words[0] = From::template load<uint32_t>(run);
  }
}

inline constexpr int kAndOr = 0xEA;  // lop3 table of (a & b) | c

MOESAIC_DEV constexpr uint32_t in_both_halves(uint32_t half) { return half << 16 | half; }

// Two times a small integer, which bf16 holds exactly.
MOESAIC_DEV constexpr uint32_t bf16_pair(int value) {
  return in_both_halves(__builtin_bit_cast(uint32_t, static_cast<float>(value)) >> 16);
}

// A word with `count` bits from bit kFrom on, and those 16 bits further, moved down to bit kTo.
template <int kFrom, int kCount, int kTo>
MOESAIC_DEV uint32_t moved(uint32_t word) {
  constexpr int kDown = kFrom - kTo;
  if constexpr (kDown == 0) {
    return word;
  } else if constexpr (kFrom + 16 + kCount <= 32) {
    return word >> kDown;
  } else {
    return word >> kDown | word << (32 - kDown);
  }
}

// Unsigned codes of kBits bits. They are or-ed into the top of the mantissa of bf16 2^kBits: the
// fragment holds kBias + code.
template <int kBits>
struct FieldCodes {
  static constexpr int kUnitBytes = 128 * kBits;
  static constexpr int kPlanes = 1;
  static constexpr int kBias = 1 << kBits;
  struct Codes {
    uint32_t words[kBits];
  };
  struct CodePlace {
    Offset first;
    Offset rest;

    MOESAIC_DEV void step(int bytes) {
      first += bytes / 2;
      if constexpr (kRestWords > 0) rest += bytes / 2;
    }
  };

  static MOESAIC_DEV CodePlace code_place(Offset unit, int lane) {
    return {unit + 2 * kFirstWords * lane, unit + 64 * kFirstWords + 2 * kRestWords * lane};
  }
  template <class From>
  static MOESAIC_DEV Codes load_from(const uint8_t* base, const CodePlace& place) {
    Codes codes;
    load_run<From, kFirstWords>(at(base, place.first), codes.words);
    if constexpr (kRestWords > 0) {
      load_run<From, kRestWords>(at(base, place.rest), codes.words + kFirstWords);
    }
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
  static constexpr int kFirstWords = first_run_words(kBits);
  static constexpr int kRestWords = kBits - kFirstWords;
  static constexpr uint32_t kOne = (127U + kBits) << 7;  // bf16 kBias

  // Codes h = 0 and h = 1 of a pair as bf16; `held` has the pieces before kPiece.
  template <int kPair, int kPiece = 0>
  static MOESAIC_DEV uint32_t pair(const Codes& codes, uint32_t held = in_both_halves(kOne)) {
    constexpr FieldPiece kFrom = field_piece(kBits, kPair, kPiece);
    constexpr int kTo = mantissa_bit(kBits) + kFrom.from;
    held = dev::lop3<kAndOr>(moved<kFrom.bit, kFrom.count, kTo>(codes.words[kFrom.word]),
                             in_both_halves(((1U << kFrom.count) - 1U) << kTo), held);
    if constexpr (kPiece + 1 < num_field_pieces(kBits, kPair)) {
      return pair<kPair, kPiece + 1>(codes, held);
    } else {
      return held;
    }
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
    Offset first;

    MOESAIC_DEV void step(int bytes) { first += bytes / 2; }
  };

  static MOESAIC_DEV CodePlace code_place(Offset unit, int lane) { return {unit + 8 * lane}; }
  template <class From>
  static MOESAIC_DEV Codes load_from(const uint8_t* base, const CodePlace& place) {
    Codes codes;
    load_pieces<From, kPieces>(at(base, place.first), codes.words);
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
