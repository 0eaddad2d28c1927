#pragma once

/// The loop of the integer formats: out[T][16] = one panel * the activations of T tokens.
///
///              step 0       step 1    ..  step 7            P planes of T tokens (activations.hpp)
///   row  0  [ 32 columns | 32 columns | .. ]
///    ..       vector k = 16 rows x 4 columns,      times     4 activations of one token and plane,
///   row 15  [ k = 0 .. 7 in each step      | .. ]            broadcast to all 16 rows
///           \____________ record _____________/
///
/// For each step and token the integer dot products of the step's one or two scale groups are
/// exact; the two planes join as 256 * high + low. Then follow, in f32 and for the 16 rows at once,
///
///   f   = scale0 * dot0 [+ add0 * sum0] [+ scale1 * dot1 + add1 * sum1]
///   acc = f * activation scale + acc
///
/// in this order whatever T is, so an element does not depend on the tokens beside it. Few tokens
/// decode in registers (multiply_fused, up to kMaxFused tokens x planes); more share a
/// DecodedRecord.
///
/// Preconditions: a multiple of 32 columns, at most kMaxTaskTokens tokens in bundles of up to
/// kMaxBundle[P], activations of the same bundle size.
///
/// Measured on one thread of a Zen 5 VM with AVX-512 VNNI, weights in the first cache, 8 tokens:
/// Q4_K 660 GOP/s in registers and 716 from decoded records, Q6_K 537 and 670; the instruction's
/// peak is 1060 to 1080 (README.md here says what limits them).

#include "cpu/kernels/activations.hpp"
#include "cpu/kernels/decode_int4.hpp"
#include "cpu/kernels/kernel.hpp"
#include "cpu/kernels/records.hpp"

namespace moesaic::cpu {
namespace {

/// The facts of a decoder that the loop over a decoded record depends on. Formats that agree in
/// them share the code.
template <int kSub_, bool kAdd_, int kOffset_, bool kWide_>
struct Shape {
  static constexpr int kSub = kSub_;
  static constexpr bool kAdd = kAdd_;
  static constexpr int kOffset = kOffset_;
  static constexpr bool kWide = kWide_;
};
template <class D>
using ShapeOf = Shape<D::kSub, D::kAdd, D::kOffset, D::kWide>;

/// acc[t] += the products of one step. `weight(k)` gives the k-th of its 8 vectors; scale and
/// add_row point at the first of the step's scale groups.
template <class S, int T, int P, class Weight>
MOESAIC_ALWAYS_INLINE void multiply_step(const Weight& weight, const float* scale,
                                         const float* add_row, const ActRecord& a, int step,
                                         F (&acc)[T]) {
  constexpr int kParts = 32 / S::kSub;
  constexpr int kVectors = 8 / kParts;
  const std::int32_t* q = a.q + step * (8 * T * P);
  F f[T];
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    const int sub = (kParts * step + part) * T;
    const std::int32_t* negsum = (kParts == 2 ? a.negsum16 : a.negsum) + sub;
    I c[T * P];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      if constexpr (P == 2) c[2 * t] = zero_i();
      if constexpr (S::kOffset != kNoOffset) {
        c[P * t + P - 1] = broadcast_shifted<S::kOffset>(negsum + t);
      } else {
        c[P * t + P - 1] = zero_i();
      }
    }
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) {
      const V w = weight(part * kVectors + k);
      const std::int32_t* qk = q + (part * kVectors + k) * (T * P);
#pragma GCC unroll 16
      for (int i = 0; i < T * P; ++i) c[i] = dot<S::kWide>(c[i], w, qk + i);
    }
    const F row_scale = load_f(scale + part * kRows);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const F v = to_float(P == 2 ? join_planes(c[P * t], c[P * t + P - 1]) : c[P * t]);
      f[t] = part == 0 ? mul(v, row_scale) : fma(v, row_scale, f[t]);
    }
    if constexpr (S::kAdd) {
      const F row_add = load_f(add_row + part * kRows);
      const float* sum = (kParts == 2 ? a.sum16 : a.sum) + sub;
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) f[t] = fma(row_add, broadcast_f(sum + t), f[t]);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) acc[t] = fma(f[t], broadcast_f(a.scale + step * T + t), acc[t]);
}

template <int T>
MOESAIC_ALWAYS_INLINE void load_sums(const float* out, int row, F (&acc)[T]) {
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) acc[t] = load_f(out + t * kRows + row);
}
template <int T>
MOESAIC_ALWAYS_INLINE void store_sums(float* out, int row, const F (&acc)[T]) {
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) store_f(out + t * kRows + row, acc[t]);
}

/// out[T][16] += decoded record * activations
template <class S, int T, int P>
MOESAIC_NOINLINE void multiply_decoded(const DecodedRecord& decoded, int steps, const Ahead& ahead,
                                       const ActRecord& a, float* out) {
  constexpr int kParts = 32 / S::kSub;
  for_lanes([&](int row) __attribute__((always_inline)) {
    F acc[T];
    load_sums(out, row, acc);
    for (int step = 0; step < steps; ++step) {
      const std::uint8_t* q = decoded.q + step * kStep + row * 4;
      if (row == 0) fetch(ahead, step);
      multiply_step<S, T, P>(
          [&](int k) __attribute__((always_inline)) { return load(q + k * kVector); },
          decoded.scale[kParts * step] + row, decoded.add[kParts * step] + row, a, step, acc);
    }
    store_sums(out, row, acc);
  });
}

/// out[T][16] += record * activations, unpacking in registers.
template <class D, int T, int P>
MOESAIC_NOINLINE void multiply_fused(const Record& record, const ActRecord& a, float* out) {
  constexpr int kParts = 32 / D::kSub;
  alignas(64) float scale[16][kRows];
  alignas(64) float add_row[16][kRows];
  D::scales(record, scale, add_row);
  for_lanes([&](int row) __attribute__((always_inline)) {
    F acc[T];
    load_sums(out, row, acc);
    for (int base = 0; base < record.steps; base += D::kPeriod) {
      unroll<D::kPeriod>([&](auto s) __attribute__((always_inline)) {
        V w[8];
        const int step = base + decltype(s)::value;
        if (row == 0) fetch(record.ahead, step);
        D::template weights<decltype(s)::value>(record, base, row * 4, w);
        multiply_step<ShapeOf<D>, T, P>([&](int k) __attribute__((always_inline)) { return w[k]; },
                                        scale[kParts * step] + row, add_row[kParts * step] + row, a,
                                        step, acc);
      });
    }
    store_sums(out, row, acc);
  });
}

using DecodedFn = void (*)(const DecodedRecord&, int, const Ahead&, const ActRecord&, float*);
using FusedFn = void (*)(const Record&, const ActRecord&, float*);

template <class S, int P, int T = 1>
constexpr DecodedFn decoded_fn(int tokens) {
  if constexpr (T > kMaxBundle[P]) {
    return nullptr;
  } else {
    return tokens == T ? &multiply_decoded<S, T, P> : decoded_fn<S, P, T + 1>(tokens);
  }
}
template <class D, int P, int T = 1>
constexpr FusedFn fused_fn(int tokens) {
  if constexpr (!D::kFused || T * P > kMaxFused) {
    return nullptr;
  } else {
    return tokens == T ? &multiply_fused<D, T, P> : fused_fn<D, P, T + 1>(tokens);
  }
}

/// Multiplies all tokens of a task with the records that record_at(index, steps) finds.
template <class D, class RecordAt>
MOESAIC_ALWAYS_INLINE void multiply_records(const PanelTask& task, const RecordAt& record_at) {
  DecodedRecord decoded;
  const int planes = task.planes;
  const std::int64_t records = (task.cols + kRecordCols - 1) / kRecordCols;
  const std::int64_t bundle_bytes = act_token_bytes(task.cols, planes) * task.bundle;
  const FusedFn fused = planes == 2 ? fused_fn<D, 2>(task.tokens) : fused_fn<D, 1>(task.tokens);
  std::memset(task.out, 0, sizeof(float) * kRows * static_cast<std::size_t>(task.tokens));

  for (std::int64_t index = 0; index < records; ++index) {
    const std::int64_t left = (task.cols - index * kRecordCols) / 32;
    const int steps = static_cast<int>(left < 8 ? left : 8);
    const auto record = record_at(index, steps);
    if (fused != nullptr) {
      fused(record, act_record(task.activations, task.tokens, planes, index, steps), task.out);
      continue;
    }
    decode_record<D>(record, decoded);
    const int bundles = (task.tokens + task.bundle - 1) / task.bundle;
    Ahead ahead{record.ahead.from, (record.ahead.bytes + bundles - 1) / bundles};
    const std::uint8_t* bundle = task.activations;
    for (int first = 0; first < task.tokens; first += task.bundle, bundle += bundle_bytes) {
      const int left_tokens = task.tokens - first;
      const int tokens = left_tokens < task.bundle ? left_tokens : task.bundle;
      const DecodedFn multiply =
          planes == 2 ? decoded_fn<ShapeOf<D>, 2>(tokens) : decoded_fn<ShapeOf<D>, 1>(tokens);
      multiply(decoded, steps, ahead, act_record(bundle, tokens, planes, index, steps),
               task.out + first * kRows);
      ahead.from += 8 * ahead.bytes;
    }
  }
}

template <class D>
void gemm_int(const PanelTask& task) {
  over_records<D>(task, [&](const auto& record_at) __attribute__((always_inline)) {
    multiply_records<D>(task, record_at);
  });
}

template <bool kZeros>
void multiply_int4(const PanelTask& task) {
  over_int4_records<kZeros>(task, [&](const auto& record_at) __attribute__((always_inline)) {
    multiply_records<int4<kZeros>>(task, record_at);
  });
}

/// The kernel of QuantType::INT4.
inline void gemm_int4(const PanelTask& task) {
  if (task.zeros) {
    multiply_int4<true>(task);
  } else {
    multiply_int4<false>(task);
  }
}

}  // namespace
}  // namespace moesaic::cpu
