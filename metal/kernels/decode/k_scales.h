#pragma once

#include "block.h"

/// The 6-bit scale and minimum of sub-block j of a Q4_K or Q5_K block. For j = 0..3 they are the
/// low 6 bits of bytes j and j + 4. For j = 4..7 their low 4 bits are the nibbles of byte j + 4,
/// and their high 2 bits the top of bytes j - 4 and j.
struct ScaleMin {
  float scale;
  float min;
};

inline ScaleMin scale_min(device const uchar* scales, int j) {
  const int i = j % 4;
  const uint a = scales[i], b = scales[i + 4], c = scales[i + 8];
  const bool early = j < 4;  // chosen without a branch: neighbouring lanes differ
  const uint scale = early ? a & 63 : (c & 15) | (a >> 6) << 4;
  const uint min = early ? b & 63 : c >> 4 | (b >> 6) << 4;
  const ScaleMin s = {float(scale), float(min)};
  return s;
}
