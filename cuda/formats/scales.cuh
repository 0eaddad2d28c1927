// Scales of a unit to promotions: weight = scale * code + offset, for rows g and g + 8 of each
// scale group of columns. Scale records are laid out by ScaleLayout; factors are combined in f32
// exactly as ggml does, kBias is what the fragments hold in excess of the file's code.
#pragma once

#include "device.cuh"
#include "formats/packed.cuh"

namespace moesaic::cuda {

// The values of rows g and g + 8 in a scale record of layout kLayout.
template <ScaleLayout kLayout>
struct ScaleRecord {
  static constexpr int kLaneBytes = 2 * kLayout.unit_values * kLayout.value_bytes;
  static constexpr int kSpanUnits = kLayout.span_units;
  static constexpr int kSpanHalves = kLayout.span_halves;
  static constexpr int kSpanBytes = kLayout.span_bytes();
  static constexpr int kFirstUnitAt = kLayout.unit_at(0);

  uint32_t unit[kLaneBytes / 4];
  uint32_t span[kSpanHalves > 0 ? kSpanHalves : 1];

  static MOESAIC_DEV ScaleRecord load(const uint8_t* row_block, int index, int g) {
    const uint8_t* const record = row_block + int64_t{index / kSpanUnits} * kSpanBytes;
    ScaleRecord r;
    read(record + kFirstUnitAt + (index % kSpanUnits * 8 + g) * kLaneBytes, r.unit);
    if constexpr (kSpanHalves > 0) read(record + g * 4 * kSpanHalves, r.span);
    return r;
  }
  MOESAIC_DEV uint32_t byte(int i) const { return unit[i / 4] >> (i % 4 * 8) & 255U; }

 private:
  template <int kWords>
  static MOESAIC_DEV void read(const uint8_t* p, uint32_t (&words)[kWords]) {
    if constexpr (kWords == 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(p);
      words[0] = v.x;
      words[1] = v.y;
      words[2] = v.z;
      words[3] = v.w;
    } else if constexpr (kWords == 2) {
      const uint2 v = *reinterpret_cast<const uint2*>(p);
      words[0] = v.x;
      words[1] = v.y;
    } else {
      static_assert(kWords == 1);
      words[0] = *reinterpret_cast<const uint32_t*>(p);
    }
  }
};

// The base of scales that are loaded as their scale record is stored.
template <ScaleLayout kLayout>
struct RecordScale {
  using Scales = ScaleRecord<kLayout>;
  static MOESAIC_DEV Scales load_scales(const PackedWeight&, const uint8_t* row_block, int unit,
                                        int g) {
    return Scales::load(row_block, unit, g);
  }
};

// Codes that are the weights.
struct NoScale {
  static constexpr int kScaleGroups = 0;
  static constexpr bool kOffset = false;
  struct Scales {};
  static MOESAIC_DEV Scales load_scales(const PackedWeight&, const uint8_t*, int, int) {
    return {};
  }
  static MOESAIC_DEV Promotion promotion(const Scales&, int) { return {{1.0F, 1.0F}, {}}; }
};

// d * (code - kZero); kShift = kBias + kZero.
template <int kShift>
struct Scale32 : RecordScale<kScale32> {
  static constexpr int kScaleGroups = 2;
  static constexpr bool kOffset = kShift != 0;
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
  static MOESAIC_DEV Promotion promotion(const Scales& s, int scale_group) {
    return {{Byte::decode(s.byte(2 * scale_group)), Byte::decode(s.byte(2 * scale_group + 1))}, {}};
  }
};

// scale * (code - zero), where each scale group has a scale and a zero point (8 when none are
// stored). kUnitScaleGroups is 2 for scale groups of 32 columns, 1 for those of a unit or more.
template <int kUnitScaleGroups, int kBias>
struct Int4Scale {
  static constexpr int kScaleGroups = kUnitScaleGroups;
  static constexpr bool kOffset = true;
  struct Scales {
    float2 scale[kUnitScaleGroups];
    uint32_t zeros[kUnitScaleGroups];  // bytes: rows g and g + 8
  };
  static MOESAIC_DEV Scales load_scales(const PackedWeight& w, const uint8_t* row_block, int unit,
                                        int g) {
    const uint8_t* const record =
        row_block + static_cast<int64_t>(unit >> w.span_shift) * w.span_bytes;
    const uint8_t* const zeros = record + kUnitScaleGroups * kUnitRows * (w.scale_f32 != 0 ? 4 : 2);
    Scales s;
    MOESAIC_UNROLL
    for (int j = 0; j < kUnitScaleGroups; ++j) {
      const int pair = 8 * j + g;
      s.scale[j] = w.scale_f32 != 0
                       ? *reinterpret_cast<const float2*>(record + 8 * pair)
                       : dev::unpack_f16(*reinterpret_cast<const uint32_t*>(record + 4 * pair));
      s.zeros[j] = w.zeros != 0 ? *reinterpret_cast<const uint16_t*>(zeros + 2 * pair) : 0x0808U;
    }
    return s;
  }
  static MOESAIC_DEV Promotion promotion(const Scales& s, int scale_group) {
    const float2 scale = s.scale[scale_group];
    const float first = static_cast<float>(kBias + (s.zeros[scale_group] & 255U));
    const float second = static_cast<float>(kBias + (s.zeros[scale_group] >> 8));
    return {{scale.x, scale.y}, {-first * scale.x, -second * scale.y}};
  }
};

}  // namespace moesaic::cuda
