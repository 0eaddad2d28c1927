// router_logits: logits [T, E] = x [T, H] * weight [E, H]^T in f32.
//
//   one simdgroup per expert and token, 4 experts per threadgroup;
//   lane l sums columns l, l + 32, ...
//
// The order of the sum depends on H alone. Not measured on hardware.

#include "device.h"
#include "rows.h"

kernel void router_logits(constant RouterLogitsArgs& args [[buffer(0)]],
                          device const uchar* x [[buffer(1)]],
                          device const float* weight [[buffer(2)]],
                          device float* logits [[buffer(3)]], THREAD_POSITION) {
  const int expert = int(position.x * (kLogitsThreads / kSimdWidth) + simdgroup);
  if (expert >= args.num_experts) return;
  const InputArgs in = args.in;
  const int token = int(position.y);
  const int cols = int(args.cols);
  device const uchar* row = input_row(x, in, token);
  device const float* w = weight + long(expert) * cols;
  float sum = 0.0f;
  for (int c = int(lane); c < cols; c += kSimdWidth) sum += load_input(row, c) * w[c];
  sum = simd_sum(sum);
  if (lane == 0) logits[long(token) * args.num_experts + expert] = sum;
}
