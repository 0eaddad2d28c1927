// Planted: a buffer passed where threadgroup memory is expected.
#include "metal/kernels/device.h"

inline float first(threadgroup const float* tile) { return tile[0]; }

kernel void planted(constant RowMapArgs& args [[buffer(0)]], device float* out [[buffer(1)]],
                    THREAD_POSITION) {
  out[0] = first(out);
}
