// route: the top-k of each row of logits, as moesaic::route_rows (cpp/src/route/route.cpp) defines
// it.
//
//   one simdgroup per token; lane l looks at experts l, l + 32, ...
//
//   key(e)   the selection score of expert e as an integer of the same order, after biases and the
//            limit to the best expert groups
//   pass s   finds slot s: the largest (key, -id) below that of pass s - 1. Nothing is marked or
//            stored, so any number of experts works; keys of the first 1024 are kept in
//            threadgroup memory
//   weights  slot s belongs to lane s % 32, so a lane has at most two slots
//
// Preconditions: top_k <= 64, num_groups <= 256 and dividing num_experts. Ids are those of the host
// except where two scores differ by less than the rounding of exp; weights agree to 1e-6, where the
// scores of the chosen experts do not add up to less than 2^-126 (renormalized, such a token shares
// its weight evenly). The GPU flushes subnormal numbers, so keys never pass through arithmetic that
// would make equals of different logits, and tiny scores become keys without being computed
// (flushed_key). No promise depends on whether products and sums are contracted.
// Not measured on hardware.

#include "device.h"

namespace router {

constant int kCached = 1024;
constant float kInf = INFINITY;
constant float kLargest = 3.402823466e+38f;
constant float kSmallest = 1.175494351e-38f;  // that is no subnormal number
constant float kExpEnd = -103.972084f;        // exp of less is 0 on the host
constant float kSigmoidEnd = -88.7228394f;    // exp of minus less is infinite

// Keys below that of -inf belong to NaNs; two of them mark what comes after every number.
constant int kNan = -2147483646;
constant int kMasked = -2147483647;

/// A float as an integer of the same order (-0 becomes +0), and back. Integers only: a sum with +0
/// would flush a subnormal value.
inline int to_key(float value) {
  const int bits = as_type<int>(value);
  return bits == int(0x80000000u) ? 0 : bits ^ ((bits >> 31) & 0x7fffffff);
}
inline float from_key(int key) { return as_type<float>(key ^ ((key >> 31) & 0x7fffffff)); }
inline int minus_infinity() { return to_key(-kInf); }

inline float clamp_finite(float value) {
  return value > kLargest ? kLargest : (value < -kLargest ? -kLargest : value);
}
/// True for finite values and +inf.
inline bool is_usable(float logit) { return logit > -kInf; }

/// log(1 + e), which keeps the digits of a small e.
inline float log1p_of(float e) {
  const float u = 1.0f + e;
  return u == 1.0f ? e : precise::log(u) * e / (u - 1.0f);
}

/// One row of logits and what is known about it.
struct Row {
  RouteArgs args;
  device const float* logits;
  device const float* router_bias;
  device const float* selection_bias;
  float largest;     // of the logits
  float reciprocal;  // of the sum of the exponentials, for Softmax
};

/// The logit with its bias; -inf where it is unusable.
inline float logit_of(thread const Row& row, int e) {
  const float logit = row.logits[e];
  if (!is_usable(logit)) return -kInf;
  const float finite = min(logit, kLargest);
  return (row.args.flags & kHasRouterBias) != 0 ? clamp_finite(finite + row.router_bias[e])
                                                : finite;
}

inline float score_of(thread const Row& row, int e) {
  const float x = logit_of(row, e);
  switch (row.args.score) {
    case 0:  // Softmax
      return precise::exp(x - row.largest) * row.reciprocal;
    case 1:  // SoftmaxSelected: the softmax follows the selection
      return x;
    case 2:  // Sigmoid
      return 1.0f / (1.0f + precise::exp(-x));
    default:  // SqrtSoftplus, linear above 20, where exp(-x) no longer changes a float
      // Far below 0 it is the root of exp(x), which may be subnormal though its root is not.
      if (x < -80.0f) return x < kExpEnd ? 0.0f : precise::exp(0.5f * x);
      return precise::sqrt(x > 20.0f ? x : log1p_of(precise::exp(x)));
  }
}

/// The key of the logit with its bias.
inline int logit_key(thread const Row& row, int e) {
  if ((row.args.flags & kHasRouterBias) != 0) return to_key(logit_of(row, e));
  return min(to_key(row.logits[e]), to_key(kLargest));
}

/// The key of exp(x) * factor where that is subnormal, as the host has it: the bits of a subnormal
/// number count units of 2^-149.
inline int subnormal_key(float x, float factor) {
  return int(rint(precise::exp(x + 103.278929903431851f) * factor));
}

/// The key of a score; of the smallest ones without computing them.
inline int score_key(thread const Row& row, int e) {
  if (row.args.score == 1) return logit_key(row, e);
  const float score = score_of(row, e);
  if (score >= kSmallest) return to_key(score);
  const float x = logit_of(row, e);
  if (row.args.score == 0) return subnormal_key(x - row.largest, row.reciprocal);
  if (row.args.score == 2) return x < kSigmoidEnd ? 0 : subnormal_key(x, 1.0f);
  return to_key(score);
}

/// What the selection compares, before the limit to the best expert groups.
inline int key_of(thread const Row& row, int e) {
  const float logit = row.logits[e];
  if (!is_usable(logit)) return isnan(logit) ? kNan : minus_infinity();
  const bool biased = (row.args.flags & kHasSelectionBias) != 0;
  const float bias = biased ? row.selection_bias[e] : 0.0f;
  if (bias == 0.0f) return row.args.select_on == 0 ? score_key(row, e) : logit_key(row, e);
  return to_key(
      clamp_finite((row.args.select_on == 0 ? score_of(row, e) : logit_of(row, e)) + bias));
}

/// The score of an expert group from its usable members; a group without any comes last.
inline int group_key(thread const Row& row, int group) {
  const int size = row.args.num_experts / row.args.num_groups;
  int best = kNan, second = kNan;
  for (int i = 0; i < size; ++i) {
    const int raw = key_of(row, group * size + i);
    const int key = raw > minus_infinity() ? raw : kNan;
    second = max(second, min(best, key));
    best = max(best, key);
  }
  const bool single = row.args.group_reduce == 1;  // Max
  if (single || second == kNan) return best;
  return to_key(clamp_finite(from_key(best) + from_key(second)));
}

/// Whether fewer than groups_used expert groups come before this one.
inline bool group_is_used(thread const Row& row, threadgroup const int* keys, int group) {
  int before = 0;
  for (int g = 0; g < row.args.num_groups; ++g) {
    before += keys[g] > keys[group] || (keys[g] == keys[group] && g < group) ? 1 : 0;
  }
  return before < row.args.groups_used;
}

/// The key of an expert after the limit to the best expert groups.
inline int limited_key(thread const Row& row, threadgroup const int* used, int e) {
  const int key = key_of(row, e);
  if (row.args.groups_used >= row.args.num_groups) return key;
  if (used[e / (row.args.num_experts / row.args.num_groups)] != 0) return key;
  if (row.args.group_mask == 0) return kMasked;  // MinusInfinity
  return key > minus_infinity() ? to_key(0.0f) : key;
}

}  // namespace router

kernel void route(constant RouteArgs& route_args [[buffer(0)]],
                  device const float* logits [[buffer(1)]],
                  device const float* router_bias [[buffer(2)]],
                  device const float* selection_bias [[buffer(3)]],
                  device int* topk_ids [[buffer(4)]], device float* topk_weights [[buffer(5)]],
                  device int* nonfinite [[buffer(6)]], THREAD_POSITION) {
  THREADGROUP_ARRAY(int, cached, [1024]);
  THREADGROUP_ARRAY(int, group_keys, [kRouteMaxGroups]);
  THREADGROUP_ARRAY(int, group_used, [kRouteMaxGroups]);

  const RouteArgs args = route_args;
  const int n = args.num_experts;
  const int k = args.top_k;
  router::Row row = {
      args, logits + long(position.x) * args.row_stride, router_bias, selection_bias, 0.0f, 0.0f};
  device int* ids = topk_ids + long(position.x) * k;
  device float* weights = topk_weights + long(position.x) * k;

  // What the row holds.
  int unusable = 0, usable = 0, strange = 0;
  float largest = -router::kInf;
  for (int e = lane; e < n; e += kSimdWidth) {
    const float logit = row.logits[e];
    usable |= router::is_usable(logit) ? 1 : 0;
    strange |= isnan(logit) || logit == router::kInf || logit == -router::kInf ? 1 : 0;
    largest = max(largest, router::logit_of(row, e));
  }
  unusable = simd_max(usable) == 0 ? 1 : 0;
  strange = simd_max(strange);
  row.largest = simd_max(largest);
  if (lane == 0 && (args.flags & kReportNonfinite) != 0) nonfinite[position.x] = strange;

  const bool given = args.select_on == 2;
  if (unusable != 0) {
    for (int slot = lane; slot < k; slot += kSimdWidth) {
      if (!given) ids[slot] = slot;
      const bool skipped = given && (ids[slot] < 0 || ids[slot] >= n);
      weights[slot] = skipped ? 0.0f : 1.0f / float(k);
    }
    return;
  }
  if (args.score == 0) {
    float sum = 0.0f;
    for (int e = lane; e < n; e += kSimdWidth) {
      sum += precise::exp(router::logit_of(row, e) - row.largest);
    }
    row.reciprocal = 1.0f / simd_sum(sum);
  }

  // Slots of this lane: lane and lane + 32.
  int chosen[2] = {-1, -1};
  if (given) {
    for (int i = 0; i < 2; ++i) {
      const int slot = int(lane) + i * kSimdWidth;
      if (slot < k && ids[slot] < n) chosen[i] = ids[slot];
    }
  } else {
    if (args.groups_used < args.num_groups) {
      for (int g = lane; g < args.num_groups; g += kSimdWidth) {
        group_keys[g] = router::group_key(row, g);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int g = lane; g < args.num_groups; g += kSimdWidth) {
        group_used[g] = router::group_is_used(row, group_keys, g) ? 1 : 0;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    // A lane reads back only what it wrote itself.
    for (int e = lane; e < min(n, router::kCached); e += kSimdWidth) {
      cached[e] = router::limited_key(row, group_used, e);
    }
    int last_key = 0, last_id = -1;
    for (int slot = 0; slot < k; ++slot) {
      int best = -2147483647 - 1, best_id = n;
      for (int e = lane; e < n; e += kSimdWidth) {
        const int key = e < router::kCached ? cached[e] : router::limited_key(row, group_used, e);
        const bool left = slot == 0 || key < last_key || (key == last_key && e > last_id);
        if (left && key > best) {
          best = key;
          best_id = e;
        }
      }
      last_key = simd_max(best);
      last_id = simd_min(best == last_key ? best_id : n);
      if (int(lane) == slot % kSimdWidth) {
        chosen[slot / kSimdWidth] = last_id;
        ids[slot] = last_id;
      }
    }
  }

  const bool selected = args.score == 1;  // SoftmaxSelected
  float weight[2];
  for (int i = 0; i < 2; ++i) {
    weight[i] =
        chosen[i] >= 0 ? router::score_of(row, chosen[i]) : (selected ? -router::kInf : 0.0f);
  }
  if (selected) {
    const float top = simd_max(max(weight[0], weight[1]));
    for (int i = 0; i < 2; ++i) {
      weight[i] = top > -router::kInf ? precise::exp(weight[i] - top) : 0.0f;
    }
    const float sum = simd_sum(weight[0] + weight[1]);
    for (int i = 0; i < 2; ++i) weight[i] *= sum > 0.0f ? 1.0f / sum : 0.0f;
  }
  if ((args.flags & kRenormalize) != 0) {
    float sum = simd_sum(weight[0] + weight[1]);
    if (args.guard == 1) sum += args.guard_eps;
    if (args.guard == 2) sum = max(sum, args.guard_eps);
    const bool share = args.guard == 0 && !(sum > 0.0f);
    for (int i = 0; i < 2; ++i) {
      if (share) {
        const bool counts = chosen[i] >= 0 && router::is_usable(row.logits[chosen[i]]);
        weight[i] = counts ? 1.0f / float(k) : 0.0f;
      } else {
        // A division, because the reciprocal of a tiny sum is infinite.
        weight[i] /= sum;
      }
    }
  }
  for (int i = 0; i < 2; ++i) {
    const int slot = int(lane) + i * kSimdWidth;
    if (slot < k) weights[slot] = weight[i] * args.scale;
  }
}
