// Planted: a pointer without an address space, which Metal refuses and OpenCL takes for any.
#include "metal/kernels/device.h"

inline float first(const float* tile) { return tile[0]; }

kernel void planted(constant RowMapArgs& args [[buffer(0)]], device float* out [[buffer(1)]],
                    THREAD_POSITION) {
  out[0] = first(out);
}
