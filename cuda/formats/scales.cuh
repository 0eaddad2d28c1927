// Scales of a unit to promotions, for rows g and g + 8 of each scale group of columns. Scale records
// are laid out by ScaleLayout; factors are combined in f32 exactly as ggml does, kBias is what the
// fragments hold in excess of the file's code.
#pragma once

#include "device.cuh"
#include "formats/codes.cuh"
#include "formats/packed.cuh"

namespace moesaic::cuda {

// Reads words of a scale record, aligned to their size.
template <int kWords>
MOESAIC_DEV void load_words(const uint8_t* p, uint32_t (&words)[kWords]) {
  if constexpr (kWords == 4) {
    const uint4 v = dev::load_scale(reinterpret_cast<const uint4*>(p));
    words[0] = v.x;
    words[1] = v.y;
    words[2] = v.z;
    words[3] = v.w;
  } else if constexpr (kWords == 2) {
    const uint2 v = dev::load_scale(reinterpret_cast<const uint2*>(p));
    words[0] = v.x;
    words[1] = v.y;
  } else {
    static_assert(kWords == 1);
    words[0] = dev::load_scale(reinterpret_cast<const uint32_t*>(p));
  }
}

// The words of rows g and g + 8 in a scale record of layout kLayout, as they are stored: what they
// stand for is worked out where it is used, so that nothing waits for them earlier.
template <ScaleLayout kLayout>
struct ScaleRecord {
  static constexpr int kLaneBytes = 2 * kLayout.unit_values * kLayout.value_bytes;
  static constexpr int kSpanUnits = kLayout.span_units;
  static constexpr int kSpanHalves = kLayout.span_halves;
  static constexpr int kSpanBytes = kLayout.span_bytes();
  static constexpr int kFirstUnitAt = kLayout.unit_at(0);

  uint32_t unit[kLaneBytes / 4];
  uint32_t span[kSpanHalves > 0 ? kSpanHalves : 1];

  // Where they lie.
  struct Place {
    Offset unit;
    Offset span;

    MOESAIC_DEV void step(const PackedWeight&) {
      static_assert(kWalkUnits % kSpanUnits == 0);
      unit += kWalkUnits / kSpanUnits * kSpanBytes / 2;
      if constexpr (kSpanHalves > 0) span += kWalkUnits / kSpanUnits * kSpanBytes / 2;
    }
  };
  static MOESAIC_DEV Place place(Offset row_block, int index, int g) {
    const auto unit = static_cast<Offset>(index), lane = static_cast<Offset>(g);
    const Offset record = row_block + unit / kSpanUnits * (kSpanBytes / 2);
    return {record + kFirstUnitAt / 2 + (unit % kSpanUnits * 8 + lane) * (kLaneBytes / 2),
            record + lane * 2 * kSpanHalves};
  }
  static MOESAIC_DEV ScaleRecord load(const uint8_t* base, const Place& place) {
    ScaleRecord r;
    load_words(at(base, place.unit), r.unit);
    if constexpr (kSpanHalves > 0) load_words(at(base, place.span), r.span);
    return r;
  }
};

// (2^15 + byte `i` of a word) / 2^kDown: one permutation of bytes, where a conversion would take a
// shift, a mask and a slower instruction. kDown is even.
template <int kDown = 0>
MOESAIC_DEV float byte_above(uint32_t word, int i) {
  static_assert(kDown % 2 == 0);
  constexpr uint32_t kTop = (0x47U - kDown / 2) << 24;
  return __uint_as_float(dev::prmt(word, kTop, 0x7404U | static_cast<uint32_t>(i) << 4));
}
// d * (byte - kExcess) / 2^kDown, rounded once: what is subtracted is exact, as d is an f16 and
// 2^15 + kExcess has few bits, or as kExcess is 0.
template <int kExcess = 0, int kDown = 0>
MOESAIC_DEV float times_byte(float d, uint32_t word, int i) {
  constexpr float kAbove = static_cast<float>((1 << 15) + kExcess) / (1 << kDown);
  return fmaf(d, byte_above<kDown>(word, i), -kAbove * d);
}

// The base of scales whose scale record has a layout of its own.
template <ScaleLayout kLayout>
struct RecordScale {
  using Scales = ScaleRecord<kLayout>;
  using ScalePlace = typename Scales::Place;
  static constexpr int kScaleLoads = Scales::kSpanHalves > 0 ? 2 : 1;
  static MOESAIC_DEV ScalePlace scale_place(const PackedWeight&, Offset row_block, int unit,
                                            int g) {
    return Scales::place(row_block, unit, g);
  }
  static MOESAIC_DEV Scales load_scales(const uint8_t* base, const ScalePlace& place) {
    return Scales::load(base, place);
  }
};

// Codes that are the weights.
struct NoScale {
  static constexpr int kScaleGroups = 0;
  static constexpr int kShift = 0;
  static constexpr bool kOffset = false;
  static constexpr bool kMinima = false;
  static constexpr int kScaleLoads = 0;
  struct Scales {};
  struct ScalePlace {
    MOESAIC_DEV void step(const PackedWeight&) {}
  };
  static MOESAIC_DEV ScalePlace scale_place(const PackedWeight&, Offset, int, int) { return {}; }
  static MOESAIC_DEV Scales load_scales(const uint8_t*, const ScalePlace&) { return {}; }
  static MOESAIC_DEV Promotion promotion(const Scales&, int) { return {{1.0F, 1.0F}, {}}; }
};

// d * (code - kZero); kExcess = kBias + kZero.
template <int kExcess>
struct Scale32 : RecordScale<kScale32> {
  static constexpr int kScaleGroups = 2;
  static constexpr int kShift = kExcess;
  static constexpr bool kOffset = false;
  static constexpr bool kMinima = false;
  static MOESAIC_DEV Promotion promotion(const Scales& s, int scale_group) {
    const float2 d = dev::unpack_f16(s.unit[scale_group]);
    return {{d.x, d.y}, {}};
  }
};

// d * code + m
template <int kBias>
struct ScaleMin32 : RecordScale<kScaleMin32> {
  static constexpr int kScaleGroups = 2;
  static constexpr int kShift = kBias;
  static constexpr bool kOffset = true;
  static constexpr bool kMinima = false;
  static MOESAIC_DEV Promotion promotion(const Scales& s, int scale_group) {
    const float2 d = dev::unpack_f16(s.unit[2 * scale_group]);
    const float2 m = dev::unpack_f16(s.unit[2 * scale_group + 1]);
    return {{d.x, d.y}, {m.x * (-1.0F / kBias), m.y * (-1.0F / kBias)}};
  }
};

// d * scale * code - dmin * min, a byte each per 32 columns. Minima below 128 are exact in bf16, so
// a matrix product with the sums of x adds those of a whole unit at once.
template <int kBias>
struct SuperScaleMin32 : RecordScale<kSuperScaleMin32> {
  static constexpr int kScaleGroups = 2;
  static constexpr int kShift = kBias;
  static constexpr bool kOffset = false;
  static constexpr bool kMinima = true;
  static MOESAIC_DEV Promotion promotion(const Scales& s, int scale_group) {
    const float2 d = dev::unpack_f16(s.span[0]);
    return {{times_byte(d.x, s.unit[0], 2 * scale_group),
             times_byte(d.y, s.unit[0], 2 * scale_group + 1)},
            {}};
  }
  // Bytes 0 and 2 are those of row g, 1 and 3 those of row g + 8; or-ed into bf16 128.
  static MOESAIC_DEV void minima(const Scales& s, uint32_t (&a)[2]) {
    a[0] = dev::bf16x2_add(dev::prmt(s.unit[1], 0x43434343U, 0x4240U), bf16_pair(-128));
    a[1] = dev::bf16x2_add(dev::prmt(s.unit[1], 0x43434343U, 0x4341U), bf16_pair(-128));
  }
  static MOESAIC_DEV float2 minima_scale(const Scales& s) { return dev::unpack_f16(s.span[1]); }
};

// d * scale * code - dmin * min, 4 bits each in one byte per 16 columns.
template <int kBias>
struct SuperScaleMin16 : RecordScale<kSuperScaleMin16> {
  static constexpr int kScaleGroups = 4;
  static constexpr int kShift = kBias;
  static constexpr bool kOffset = true;
  static constexpr bool kMinima = false;
  static MOESAIC_DEV Promotion promotion(const Scales& s, int scale_group) {
    static_assert(kBias == 4);
    const float2 d = dev::unpack_f16(s.span[0]);
    const float2 dmin = dev::unpack_f16(s.span[1]);
    const uint32_t word = s.unit[scale_group / 2];
    const uint32_t scales = word & 0x0F0F0F0FU, minima = word >> 4 & 0x0F0F0F0FU;
    const int at = scale_group % 2 * 2;
    return {{times_byte(d.x, scales, at), times_byte(d.y, scales, at + 1)},
            {times_byte<0, 2>(dmin.x, minima, at), times_byte<0, 2>(dmin.y, minima, at + 1)}};
  }
};

// d * scale * (code - kZero), where scale is a byte per 32 or 16 columns: a signed one, or one with
// kExcess added in formats whose file has fewer bits for it. kShift = kBias + kZero.
template <ScaleLayout kLayout, bool kSigned, int kExcess, int kCodeShift>
struct SuperScale : RecordScale<kLayout> {
  using typename RecordScale<kLayout>::Scales;
  static constexpr int kScaleGroups = kLayout.unit_values;
  static constexpr int kShift = kCodeShift;
  static constexpr bool kOffset = false;
  static constexpr bool kMinima = false;
  static MOESAIC_DEV Promotion promotion(const Scales& s, int scale_group) {
    // A signed byte with its top bit turned is one with 128 added.
    constexpr int kAdded = kSigned ? 128 : kExcess;
    const float2 d = dev::unpack_f16(s.span[0]);
    const uint32_t word = s.unit[scale_group / 2] ^ (kSigned ? 0x80808080U : 0U);
    const int at = scale_group % 2 * 2;
    return {{times_byte<kAdded>(d.x, word, at), times_byte<kAdded>(d.y, word, at + 1)}, {}};
  }
};

// 2^(e - 128), which is half an E8M0 scale; the two smallest are subnormal. `at`: which byte of a
// word.
struct HalfE8m0 {
  static MOESAIC_DEV float decode(uint32_t word, int at) {
    const uint32_t e = word >> 8 * at & 255U;
    return __uint_as_float(e < 2 ? 0x00200000U << e : (e - 1) << 23);
  }
};
// Half an unsigned E4M3 scale (bias 7, the top bit ignored); the NaN code 0x7f gives 0. Moved to
// where f32 has its exponent the bits are a scale too small by a power of two, subnormal ones
// included, so that one exact product makes it.
struct HalfUe4m3 {
  static MOESAIC_DEV float decode(uint32_t word, int at) {
    constexpr int kTo = 20;
    const uint32_t codes = without_nan(word);
    const uint32_t bits = 8 * at <= kTo ? codes << (kTo - 8 * at) : codes >> (8 * at - kTo);
    return __uint_as_float(bits & 0x7FU << kTo) * 0x1p119F;
  }

 private:
  // For all four bytes: where adding one to seven ones carries, they are cleared.
  static MOESAIC_DEV uint32_t without_nan(uint32_t word) {
    const uint32_t nan = ((word & 0x7F7F7F7FU) + 0x01010101U) & 0x80808080U;
    return word & ~(nan - (nan >> 7));
  }
};

// The scale is one byte per 32 or 16 columns, decoded by Byte.
template <ScaleLayout kLayout, class Byte>
struct ByteScale : RecordScale<kLayout> {
  using typename RecordScale<kLayout>::Scales;
  static constexpr int kScaleGroups = kLayout.unit_values;
  static constexpr int kShift = 0;
  static constexpr bool kOffset = false;
  static constexpr bool kMinima = false;
  static MOESAIC_DEV Promotion promotion(const Scales& s, int scale_group) {
    const uint32_t word = s.unit[scale_group / 2];
    const int at = scale_group % 2 * 2;
    return {{Byte::decode(word, at), Byte::decode(word, at + 1)}, {}};
  }
};

// scale * (code - zero), where each scale group has a scale, f32 or f16, and a zero point (8 when
// none are stored). kUnitScaleGroups is 2 for scale groups of 32 columns, 1 for those of a unit or
// more.
template <int kUnitScaleGroups, int kBias, bool kF32, bool kZeros>
struct Int4Scale {
  static constexpr int kScaleGroups = kUnitScaleGroups;
  static constexpr int kShift = kZeros ? kBias : kBias + 8;
  static constexpr bool kOffset = kZeros;
  static constexpr bool kMinima = false;
  static constexpr int kScaleLoads = kUnitScaleGroups * (kZeros ? 2 : 1);
  static constexpr int kPairWords = kF32 ? 2 : 1;  // of the scales of rows g and g + 8
  static constexpr int kGroupBytes = 8 * 4 * kPairWords;
  static constexpr int kZerosAt = int4_zeros_at(kUnitScaleGroups, kF32);
  struct Scales {
    uint32_t scale[kUnitScaleGroups][kPairWords];
    uint32_t zeros[kUnitScaleGroups];  // bytes: rows g and g + 8
  };
  struct ScalePlace {
    Offset scale;
    Offset zeros;

    MOESAIC_DEV void step(const PackedWeight& w) {
      const Offset pairs = static_cast<Offset>(kWalkUnits >> w.span_shift) * (w.span_bytes / 2);
      scale += pairs;
      if constexpr (kZeros) zeros += pairs;
    }
  };
  static MOESAIC_DEV ScalePlace scale_place(const PackedWeight& w, Offset row_block, int unit,
                                            int g) {
    const auto lane = static_cast<Offset>(g);
    const Offset record =
        row_block + static_cast<Offset>(unit >> w.span_shift) * (w.span_bytes / 2);
    return {record + 2 * kPairWords * lane, record + kZerosAt / 2 + lane};
  }
  static MOESAIC_DEV Scales load_scales(const uint8_t* base, const ScalePlace& place) {
    Scales s = {};  // Formats without zero points leave theirs.
    MOESAIC_UNROLL
    for (int j = 0; j < kUnitScaleGroups; ++j) {
      load_words(at(base, place.scale) + j * kGroupBytes, s.scale[j]);
      if constexpr (kZeros) {
        s.zeros[j] = dev::load_scale(
            reinterpret_cast<const uint16_t*>(at(base, place.zeros) + j * kUnitRows));
      }
    }
    return s;
  }
  static MOESAIC_DEV Promotion promotion(const Scales& s, int scale_group) {
    const uint32_t* const words = s.scale[scale_group];
    float2 scale;
    if constexpr (kF32) {
      scale = make_float2(__uint_as_float(words[0]), __uint_as_float(words[1]));
    } else {
      scale = dev::unpack_f16(words[0]);
    }
    if constexpr (kZeros) {
      static_assert(kBias == 16);
      return {{scale.x, scale.y},
              {times_byte<0, 4>(scale.x, s.zeros[scale_group], 0),
               times_byte<0, 4>(scale.y, s.zeros[scale_group], 1)}};
    } else {
      return {{scale.x, scale.y}, {}};
    }
  }
};

}  // namespace moesaic::cuda
