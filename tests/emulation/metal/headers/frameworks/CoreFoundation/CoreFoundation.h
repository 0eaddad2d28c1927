#pragma once

// The names of Core Foundation and Core Graphics that metal-cpp mentions.

#include <math.h>

#include <cstdint>

typedef double CFTimeInterval;
typedef const void* CFTypeRef;
typedef const struct __CFString* CFStringRef;
typedef double CGFloat;
struct CGSize {
  CGFloat width, height;
};
typedef struct CGColorSpace* CGColorSpaceRef;
