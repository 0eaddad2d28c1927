#pragma once

/// The loop of F32, F16 and BF16 weights: out[T][16] = one panel [cols][16 rows] * x [cols][T], in
/// f32.
///
///   column k   [ 16 rows ] times x[k][t], broadcast   ->  chain k % 4 of token t
///   out[t]     = (chain 0 + chain 1) + (chain 2 + chain 3)
///
/// Four chains of sums hide the latency of a multiply-add, and their fixed order makes an element
/// independent of the tokens beside it. Preconditions: any number of columns; bundles of up to
/// kMaxBundle[0] tokens.

#include "cpu/kernels/gemm_int.hpp"

namespace moesaic::cpu {
namespace {

struct f32 {
  static constexpr QuantType kType = QuantType::F32;
  static MOESAIC_ALWAYS_INLINE F weights(const std::uint8_t* p) {
    float values[kLanes];
    std::memcpy(values, p, sizeof values);
    return load_f(values);
  }
};
struct f16 {
  static constexpr QuantType kType = QuantType::F16;
  static MOESAIC_ALWAYS_INLINE F weights(const std::uint8_t* p) { return load_f16(p); }
};
struct bf16 {
  static constexpr QuantType kType = QuantType::BF16;
  static MOESAIC_ALWAYS_INLINE F weights(const std::uint8_t* p) { return load_bf16(p); }
};

constexpr int kChains = 4;

/// sums[kChains][T][16] += the products of `cols` columns.
template <class D, int T>
MOESAIC_NOINLINE void multiply_columns(const std::uint8_t* w, std::int64_t cols, const float* x,
                                       float* sums) {
  constexpr std::int64_t kBytes = find_panel_format(D::kType)->block_bytes;
  for_lanes([&](int row) __attribute__((always_inline)) {
    F acc[kChains][T];
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain)
      load_sums(sums + chain * T * kRows, row, acc[chain]);
    const std::uint8_t* p = w + row * kBytes;
    std::int64_t k = 0;
    for (; k + kChains <= cols; k += kChains) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) {
        const F v = D::weights(p + (k + chain) * kRows * kBytes);
        const float* xk = x + (k + chain) * T;
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) acc[chain][t] = fma(v, broadcast_f(xk + t), acc[chain][t]);
      }
    }
#pragma GCC unroll 3
    for (int chain = 0; chain < kChains - 1; ++chain) {
      if (k + chain < cols) {
        const F v = D::weights(p + (k + chain) * kRows * kBytes);
        const float* xk = x + (k + chain) * T;
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) acc[chain][t] = fma(v, broadcast_f(xk + t), acc[chain][t]);
      }
    }
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain)
      store_sums(sums + chain * T * kRows, row, acc[chain]);
  });
}

using ColumnsFn = void (*)(const std::uint8_t*, std::int64_t, const float*, float*);
template <class D, int T = 1>
constexpr ColumnsFn columns_fn(int tokens) {
  if constexpr (T > kMaxBundle[0]) {
    return nullptr;
  } else {
    return tokens == T ? &multiply_columns<D, T> : columns_fn<D, T + 1>(tokens);
  }
}

template <class D>
void gemm_float(const PanelTask& task) {
  constexpr const PanelFormat& format = *find_panel_format(D::kType);
  alignas(64) std::uint8_t gathered[record_bytes(format)];
  alignas(64) float sums[kChains * kMaxBundle[0] * kRows];
  // The columns of a panel follow each other without records, so a whole panel is one piece; the
  // row layout is gathered record by record.
  const std::int64_t piece = task.rows_layout ? kRecordCols : task.cols;
  const float* x = reinterpret_cast<const float*>(task.activations);
  for (int first = 0; first < task.tokens; first += task.bundle) {
    const int left = task.tokens - first;
    const int tokens = left < task.bundle ? left : task.bundle;
    const ColumnsFn multiply = columns_fn<D>(tokens);
    std::memset(sums, 0, sizeof(float) * static_cast<std::size_t>(kChains * tokens * kRows));
    for (std::int64_t begin = 0; begin < task.cols; begin += piece) {
      const std::int64_t end = begin + piece < task.cols ? begin + piece : task.cols;
      multiply(find_record(task, format, begin / kRecordCols, gathered), end - begin,
               x + begin * tokens, sums);
    }
    float* out = task.out + first * kRows;
    const int chain = tokens * kRows;
    for (int i = 0; i < chain; ++i) {
      out[i] = (sums[i] + sums[chain + i]) + (sums[2 * chain + i] + sums[3 * chain + i]);
    }
    x += task.cols * tokens;
  }
}

}  // namespace
}  // namespace moesaic::cpu
