// Planted: a thread's own array passed as a buffer.
#include "metal/kernels/rows.h"

kernel void planted(constant RowMapArgs& args [[buffer(0)]], device float* out [[buffer(1)]],
                    THREAD_POSITION) {
  uchar own[2] = {0, 0};
  thread const uchar* pointer = own;
  out[0] = load_input(pointer, 0);
}
