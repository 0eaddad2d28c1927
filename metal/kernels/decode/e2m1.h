#pragma once

#include "block.h"

/// Twice the value of an e2m1 code: sign, 2 bits of exponent, 1 bit of fraction.
inline float doubled_e2m1(uint code) {
  const uint exponent = code >> 1 & 3;
  const uint fraction = code & 1;
  const float magnitude = float(exponent == 0 ? fraction : (2 + fraction) << (exponent - 1));
  return (code & 8) != 0 ? -magnitude : magnitude;
}
