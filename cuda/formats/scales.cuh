// Scales of a unit to promotions: weight = scale * code + offset, for rows g and g + 8 of each
// scale group of columns. Scale records are laid out by ScaleLayout; factors are combined in f32
// exactly as ggml does, kBias is what the fragments hold in excess of the file's code.
#pragma once

#include "device.cuh"
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
    const uint8_t* unit;
    const uint8_t* span;

    MOESAIC_DEV void step(const PackedWeight&) {
      static_assert(kWalkUnits % kSpanUnits == 0);
      unit += kWalkUnits / kSpanUnits * kSpanBytes;
      if constexpr (kSpanHalves > 0) span += kWalkUnits / kSpanUnits * kSpanBytes;
    }
  };
  static MOESAIC_DEV Place place(const uint8_t* row_block, int index, int g) {
    const uint8_t* const record = row_block + int64_t{index / kSpanUnits} * kSpanBytes;
    return {record + kFirstUnitAt + (index % kSpanUnits * 8 + g) * kLaneBytes,
            record + g * 4 * kSpanHalves};
  }
  static MOESAIC_DEV ScaleRecord load(const Place& place) {
    ScaleRecord r;
    load_words(place.unit, r.unit);
    if constexpr (kSpanHalves > 0) load_words(place.span, r.span);
    return r;
  }
  MOESAIC_DEV uint32_t byte(int i) const { return unit[i / 4] >> (i % 4 * 8) & 255U; }
};

// The base of scales whose scale record has a layout of its own.
template <ScaleLayout kLayout>
struct RecordScale {
  using Scales = ScaleRecord<kLayout>;
  using ScalePlace = typename Scales::Place;
  static constexpr int kScaleLoads = Scales::kSpanHalves > 0 ? 2 : 1;
  static MOESAIC_DEV ScalePlace scale_place(const PackedWeight&, const uint8_t* row_block, int unit,
                                            int g) {
    return Scales::place(row_block, unit, g);
  }
  static MOESAIC_DEV Scales load_scales(const ScalePlace& place) { return Scales::load(place); }
};

// Codes that are the weights.
struct NoScale {
  static constexpr int kScaleGroups = 0;
  static constexpr bool kOffset = false;
  static constexpr int kFixedShift = 0;
  static constexpr int kScaleLoads = 0;
  struct Scales {};
  struct ScalePlace {
    MOESAIC_DEV void step(const PackedWeight&) {}
  };
  static MOESAIC_DEV ScalePlace scale_place(const PackedWeight&, const uint8_t*, int, int) {
    return {};
  }
  static MOESAIC_DEV Scales load_scales(const ScalePlace&) { return {}; }
  static MOESAIC_DEV Promotion promotion(const Scales&, int) { return {{1.0F, 1.0F}, {}}; }
};

// d * (code - kZero); kShift = kBias + kZero.
template <int kShift>
struct Scale32 : RecordScale<kScale32> {
  static constexpr int kScaleGroups = 2;
  static constexpr bool kOffset = kShift != 0;
  static constexpr int kFixedShift = kShift;
  static MOESAIC_DEV Promotion promotion(const Scales& s, int scale_group) {
    const float2 d = dev::unpack_f16(s.unit[scale_group]);
    return {{d.x, d.y}, {-kShift * d.x, -kShift * d.y}};
  }
};

// d * code + m
template <int kBias>
struct ScaleMin32 : RecordScale<kScaleMin32> {
  static constexpr int kScaleGroups = 2;
  static constexpr bool kOffset = true;
  static constexpr int kFixedShift = 0;
  static MOESAIC_DEV Promotion promotion(const Scales& s, int scale_group) {
    const float2 d = dev::unpack_f16(s.unit[2 * scale_group]);
    const float2 m = dev::unpack_f16(s.unit[2 * scale_group + 1]);
    return {{d.x, d.y}, {m.x - kBias * d.x, m.y - kBias * d.y}};
  }
};

// d * scale * code - dmin * min, a byte each per 32 columns.
template <int kBias>
struct SuperScaleMin32 : RecordScale<kSuperScaleMin32> {
  static constexpr int kScaleGroups = 2;
  static constexpr bool kOffset = true;
  static constexpr int kFixedShift = 0;
  static MOESAIC_DEV Promotion promotion(const Scales& s, int scale_group) {
    const float2 d = dev::unpack_f16(s.span[0]);
    const float2 dmin = dev::unpack_f16(s.span[1]);
    const float first = d.x * static_cast<float>(s.byte(4 * scale_group));
    const float second = d.y * static_cast<float>(s.byte(4 * scale_group + 2));
    return {{first, second},
            {-kBias * first - dmin.x * static_cast<float>(s.byte(4 * scale_group + 1)),
             -kBias * second - dmin.y * static_cast<float>(s.byte(4 * scale_group + 3))}};
  }
};

// d * scale * code - dmin * min, 4 bits each in one byte per 16 columns.
template <int kBias>
struct SuperScaleMin16 : RecordScale<kSuperScaleMin16> {
  static constexpr int kScaleGroups = 4;
  static constexpr bool kOffset = true;
  static constexpr int kFixedShift = 0;
  static MOESAIC_DEV Promotion promotion(const Scales& s, int scale_group) {
    const float2 d = dev::unpack_f16(s.span[0]);
    const float2 dmin = dev::unpack_f16(s.span[1]);
    const uint32_t a = s.byte(2 * scale_group), b = s.byte(2 * scale_group + 1);
    const float first = d.x * static_cast<float>(a & 15U);
    const float second = d.y * static_cast<float>(b & 15U);
    return {{first, second},
            {-kBias * first - dmin.x * static_cast<float>(a >> 4),
             -kBias * second - dmin.y * static_cast<float>(b >> 4)}};
  }
};

// d * scale * (code - kZero), where scale is a signed byte per 32 or 16 columns, stored with
// kExcess added in formats whose file has fewer bits for it. kShift = kBias + kZero.
template <ScaleLayout kLayout, bool kSigned, int kExcess, int kShift>
struct SuperScale : RecordScale<kLayout> {
  using typename RecordScale<kLayout>::Scales;
  static constexpr int kScaleGroups = kLayout.unit_values;
  static constexpr bool kOffset = kShift != 0;
  static constexpr int kFixedShift = kShift;
  static MOESAIC_DEV Promotion promotion(const Scales& s, int scale_group) {
    const float2 d = dev::unpack_f16(s.span[0]);
    const float first = d.x * value(s.byte(2 * scale_group));
    const float second = d.y * value(s.byte(2 * scale_group + 1));
    return {{first, second}, {-kShift * first, -kShift * second}};
  }

 private:
  static MOESAIC_DEV float value(uint32_t byte) {
    const int v = kSigned ? static_cast<int8_t>(byte) : static_cast<int>(byte);
    return static_cast<float>(v - kExcess);
  }
};

// 2^(e - 128), which is half an E8M0 scale; the two smallest are subnormal.
struct HalfE8m0 {
  static MOESAIC_DEV float decode(uint32_t e) {
    return __uint_as_float(e < 2 ? 0x00200000U << e : (e - 1) << 23);
  }
};
// Half an unsigned E4M3 scale (bias 7, the top bit ignored); the NaN code 0x7f gives 0.
struct HalfUe4m3 {
  static MOESAIC_DEV float decode(uint32_t code) {
    const uint32_t exponent = code >> 3 & 15U, mantissa = code & 7U;
    if (code == 0x7FU) return 0.0F;
    if (exponent == 0) return static_cast<float>(mantissa) * 0x1p-10F;
    return __uint_as_float((exponent + 127U - 8U) << 23 | mantissa << 20);
  }
};

// The scale is one byte per 32 or 16 columns, decoded by Byte.
template <ScaleLayout kLayout, class Byte>
struct ByteScale : RecordScale<kLayout> {
  using typename RecordScale<kLayout>::Scales;
  static constexpr int kScaleGroups = kLayout.unit_values;
  static constexpr bool kOffset = false;
  static constexpr int kFixedShift = 0;
  static MOESAIC_DEV Promotion promotion(const Scales& s, int scale_group) {
    return {{Byte::decode(s.byte(2 * scale_group)), Byte::decode(s.byte(2 * scale_group + 1))}, {}};
  }
};

// scale * (code - zero), where each scale group has a scale, f32 or f16, and a zero point (8 when
// none are stored). kUnitScaleGroups is 2 for scale groups of 32 columns, 1 for those of a unit or
// more.
template <int kUnitScaleGroups, int kBias, bool kF32, bool kZeros>
struct Int4Scale {
  static constexpr int kScaleGroups = kUnitScaleGroups;
  static constexpr bool kOffset = true;
  static constexpr int kFixedShift = kZeros ? 0 : kBias + 8;
  static constexpr int kScaleLoads = kUnitScaleGroups * (kZeros ? 2 : 1);
  static constexpr int kPairWords = kF32 ? 2 : 1;  // of the scales of rows g and g + 8
  static constexpr int kGroupBytes = 8 * 4 * kPairWords;
  static constexpr int kZerosAt = int4_zeros_at(kUnitScaleGroups, kF32);
  struct Scales {
    uint32_t scale[kUnitScaleGroups][kPairWords];
    uint32_t zeros[kUnitScaleGroups];  // bytes: rows g and g + 8
  };
  struct ScalePlace {
    const uint8_t* scale;
    const uint8_t* zeros;

    MOESAIC_DEV void step(const PackedWeight& w) {
      const int bytes = (kWalkUnits >> w.span_shift) * w.span_bytes;
      scale += bytes;
      if constexpr (kZeros) zeros += bytes;
    }
  };
  static MOESAIC_DEV ScalePlace scale_place(const PackedWeight& w, const uint8_t* row_block,
                                            int unit, int g) {
    const uint8_t* const record =
        row_block + static_cast<int64_t>(unit >> w.span_shift) * w.span_bytes;
    return {record + 4 * kPairWords * g, record + kZerosAt + 2 * g};
  }
  static MOESAIC_DEV Scales load_scales(const ScalePlace& place) {
    Scales s = {};  // Formats without zero points leave theirs.
    MOESAIC_UNROLL
    for (int j = 0; j < kUnitScaleGroups; ++j) {
      load_words(place.scale + j * kGroupBytes, s.scale[j]);
      if constexpr (kZeros) {
        s.zeros[j] =
            dev::load_scale(reinterpret_cast<const uint16_t*>(place.zeros + j * kUnitRows));
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
    float first = kBias + 8, second = kBias + 8;
    if constexpr (kZeros) {
      first = static_cast<float>(kBias + (s.zeros[scale_group] & 255U));
      second = static_cast<float>(kBias + (s.zeros[scale_group] >> 8));
    }
    return {{scale.x, scale.y}, {-first * scale.x, -second * scale.y}};
  }
};

}  // namespace moesaic::cuda
