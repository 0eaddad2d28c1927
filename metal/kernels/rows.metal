// The small steps around the products, on rows of f32: gather_rows, activate_rows, combine_rows,
// shared_routing, zero_skipped; and fill_words and copy_words, on 32-bit machine words.
//
//   gather, activate, zero   one threadgroup per row, threads over its columns
//   combine                  one thread per element of the output, which adds slots in order, so
//                            that the sum does not depend on the batch
//
// Offsets are 64-bit; rows may start at any element. Not measured on hardware.

#include "activation.h"
#include "device.h"
#include "rows.h"

/// Rounds to nearest even; NaN stays NaN.
inline ushort float_to_bf16(float value) {
  const uint bits = as_type<uint>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return ushort((bits >> 16) | 0x40u);
  return ushort((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/// Element i of an output whose type is the function constant `output_type`.
inline float load_output(device const uchar* out, long i) {
  if (output_type == kTypeF16) return float(((device const half*)out)[i]);
  if (output_type == kTypeBF16) return bf16_to_float(((device const ushort*)out)[i]);
  return ((device const float*)out)[i];
}
inline void store_output(device uchar* out, long i, float value) {
  if (output_type == kTypeF16) {
    ((device half*)out)[i] = half(value);
  } else if (output_type == kTypeBF16) {
    ((device ushort*)out)[i] = float_to_bf16(value);
  } else {
    ((device float*)out)[i] = value;
  }
}

kernel void gather_rows(constant GatherArgs& args [[buffer(0)]],
                        device const uchar* x [[buffer(1)]], device const int* index [[buffer(2)]],
                        device float* out [[buffer(3)]], THREAD_POSITION) {
  const InputArgs in = args.in;
  const int from = index[position.x];
  device const uchar* row = input_row(x, in, max(from, 0));
  device float* to = out + long(position.x) * args.cols;
  const int cols = int(args.cols);
  for (int c = int(simdgroup * kSimdWidth + lane); c < cols; c += kRowThreads) {
    to[c] = from < 0 ? 0.0f : load_input(row, c);
  }
}

kernel void activate_rows(constant ActivateArgs& args [[buffer(0)]],
                          device const float* gate [[buffer(1)]],
                          device const float* up [[buffer(2)]], device float* hidden [[buffer(3)]],
                          THREAD_POSITION) {
  const ActivationArgs activation = args.activation;
  const bool gated = activation_kind != kGeluTanh && activation_kind != kReluSquared;
  const long from = long(position.x) * args.row_stride;
  device float* to = hidden + long(position.x) * args.cols;
  for (long c = simdgroup * kSimdWidth + lane; c < args.cols; c += kRowThreads) {
    to[c] = activate(activation, gated ? gate[from + c] : 0.0f, up[from + c]);
  }
}

kernel void combine_rows(constant CombineArgs& args [[buffer(0)]],
                         device const float* rows [[buffer(1)]],
                         device const int* pair_row [[buffer(2)]],
                         device const int* topk_ids [[buffer(3)]],
                         device const float* topk_weights [[buffer(4)]],
                         device uchar* out [[buffer(5)]], THREAD_POSITION) {
  const int c = int(position.x * kRowThreads + simdgroup * kSimdWidth + lane);
  if (c >= args.cols) return;
  const long token = position.y;
  float sum = 0.0f;
  for (int slot = 0; slot < args.top_k; ++slot) {
    const long pair = token * args.top_k + slot;
    const int id = topk_ids[pair];
    if (id < 0 || (args.num_experts > 0 && id >= args.num_experts)) continue;
    const long row = (args.flags & kHasPairRow) != 0 ? long(pair_row[pair]) : pair;
    if (row < 0) continue;
    const float weight = (args.flags & kHasPairWeights) != 0 ? topk_weights[pair] : 1.0f;
    sum += weight * rows[row * args.cols + c];
  }
  const long at = token * args.out_stride + c;
  if ((args.flags & kAccumulate) != 0) sum = load_output(out, at) + sum;
  store_output(out, at, sum);
}

kernel void shared_routing(constant SharedRoutingArgs& args [[buffer(0)]],
                           device const float* logits [[buffer(1)]],
                           device int* topk_ids [[buffer(2)]],
                           device float* topk_weights [[buffer(3)]], THREAD_POSITION) {
  const int t = int(position.x * kRowThreads + simdgroup * kSimdWidth + lane);
  if (t >= args.num_tokens) return;
  topk_ids[t] = 0;
  topk_weights[t] = args.has_logits != 0 ? sigmoid(logits[t]) : 1.0f;
}

kernel void zero_skipped(constant ZeroSkippedArgs& args [[buffer(0)]],
                         device const int* ids [[buffer(1)]], device float* out [[buffer(2)]],
                         THREAD_POSITION) {
  const int id = ids[position.x];
  if (id >= 0 && id < args.num_experts) return;
  device float* row = out + long(position.x) * args.cols;
  for (long c = simdgroup * kSimdWidth + lane; c < args.cols; c += kRowThreads) row[c] = 0.0f;
}

kernel void fill_words(constant WordsArgs& args [[buffer(0)]], device uint* to [[buffer(1)]],
                       THREAD_POSITION) {
  const long i = long(position.x) * kRowThreads + simdgroup * kSimdWidth + lane;
  if (i < args.words) to[i] = args.value;
}

kernel void copy_words(constant WordsArgs& args [[buffer(0)]],
                       device const uint* from [[buffer(1)]], device uint* to [[buffer(2)]],
                       THREAD_POSITION) {
  const long i = long(position.x) * kRowThreads + simdgroup * kSimdWidth + lane;
  if (i < args.words) to[i] = from[i];
}
