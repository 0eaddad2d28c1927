#pragma once

/// The grids of the IQ1, IQ2 and IQ3 types: the points (8 or 4 weights) that a code can mean.

#include "block.h"

#define MOESAIC_IQ_POINTS(name, count) constant ushort kPoints##name[count]
#include "../../../cpp/src/quant/iq_points.inc"

/// `value`, negated where the lowest bit of `sign` is set.
inline float with_sign(float value, uint sign) {
  return as_type<float>(as_type<uint>(value) ^ sign << 31);
}
/// IQ2_XXS, IQ2_XS and IQ3_XXS store 7 signs; the eighth makes the number of minus signs even.
inline uint full_signs(uint signs) {
  const uint parity = signs ^ signs >> 4;
  return signs | (0x6996u >> (parity & 15) & 1) << 7;
}
/// Four times 7 signs and a 4-bit scale on top: those of run `run` of 8 weights.
inline uint signs_of_run(uint word, int run) { return full_signs(word >> (7 * run) & 127); }

inline float iq2_scale(float d, uint code) { return d * (0.5f + float(code)) * 0.25f; }

/// 8 codes of an IQ2 type, whose levels are 8, 25 and 43.
inline void decode_eight(uint point, uint signs, thread float* codes) {
  for (int k = 0; k < 8; k++) {
    const uint i = point >> (2 * k) & 3;
    codes[k] = with_sign(float(8 + 17 * i + (i >> 1)), signs >> k);
  }
}
/// 8 codes of an IQ1 type: levels -1, 0 and 1, all of them shifted.
inline void decode_shifted(uint point, float shift, thread float* codes) {
  for (int k = 0; k < 8; k++) {
    codes[k] = float(int(point >> (2 * k) & 3) - 1) + shift;
  }
}
