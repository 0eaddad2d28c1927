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
  ScaleMin s;
  if (j < 4) {
    s.scale = float(scales[j] & 63);
    s.min = float(scales[j + 4] & 63);
  } else {
    s.scale = float((scales[j + 4] & 15) | (scales[j - 4] >> 6) << 4);
    s.min = float((scales[j + 4] >> 4) | (scales[j] >> 6) << 4);
  }
  return s;
}
