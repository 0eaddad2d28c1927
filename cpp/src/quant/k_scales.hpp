#pragma once

/// The 6-bit sub-block scales of the K types, packed into 12 bytes in two different orders.

#include <cstdint>

namespace moesaic::quant {

/// Scale and minimum of the 8 sub-blocks of Q4_K and Q5_K.
struct ScaleMin6 {
  std::uint8_t scale[8];
  std::uint8_t min[8];
};

/// Sub-blocks 0..3 lie whole in the low 6 bits of bytes 0..3 (scale) and 4..7 (minimum); of
/// sub-blocks 4..7 the low 4 bits lie in bytes 8..11 and the high 2 in the top of bytes 0..7.
inline ScaleMin6 unpack_scale_min6(const std::uint8_t* p) {
  ScaleMin6 s;
  for (int j = 0; j < 4; ++j) {
    s.scale[j] = p[j] & 63;
    s.min[j] = p[j + 4] & 63;
    s.scale[j + 4] = static_cast<std::uint8_t>((p[j + 8] & 15) | (p[j] >> 6) << 4);
    s.min[j + 4] = static_cast<std::uint8_t>((p[j + 8] >> 4) | (p[j + 4] >> 6) << 4);
  }
  return s;
}

inline void pack_scale_min6(const std::uint8_t* scale, const std::uint8_t* min, std::uint8_t* p) {
  for (int j = 0; j < 4; ++j) {
    p[j] = static_cast<std::uint8_t>(scale[j] | (scale[j + 4] >> 4) << 6);
    p[j + 4] = static_cast<std::uint8_t>(min[j] | (min[j + 4] >> 4) << 6);
    p[j + 8] = static_cast<std::uint8_t>((scale[j + 4] & 15) | (min[j + 4] & 15) << 4);
  }
}

/// Q3_K: 16 signed scales, -32..31. The low 4 bits of scale j are nibble j/8 of byte j%8, the high
/// 2 bits pair j/4 of byte 8 + j%4.
inline void unpack_scale6(const std::uint8_t* p, std::int8_t* scale) {
  for (int j = 0; j < 16; ++j) {
    const int low = p[j % 8] >> (4 * (j / 8)) & 15;
    const int high = p[8 + j % 4] >> (2 * (j / 4)) & 3;
    scale[j] = static_cast<std::int8_t>((low | high << 4) - 32);
  }
}

inline void pack_scale6(const std::int8_t* scale, std::uint8_t* p) {
  for (int j = 0; j < 12; ++j) p[j] = 0;
  for (int j = 0; j < 16; ++j) {
    const int code = scale[j] + 32;
    p[j % 8] = static_cast<std::uint8_t>(p[j % 8] | (code & 15) << (4 * (j / 8)));
    p[8 + j % 4] = static_cast<std::uint8_t>(p[8 + j % 4] | (code >> 4) << (2 * (j / 4)));
  }
}

}  // namespace moesaic::quant
