#pragma once

/// The loop of E4M3 weights: out[T][16] = one panel * x [cols][T], in f32.
///
///   columns k .. k + 3   [ 16 rows ] times x[k + c][t], broadcast   ->  chain c of token t
///   128 columns          ((chain 0 + chain 1) + (chain 2 + chain 3)) * 2^8 * scale  ->  out[t]
///
/// A code becomes f32 by way of f16, which holds each value times 2^-8 exactly, the subnormal ones
/// included; the factor is made good once for a block, with its scale. The order of sums is fixed,
/// whatever T is. Few tokens decode in registers (multiply_codes); more share a FloatRecord.
///
/// Preconditions: a multiple of 128 columns; bundles of up to kMaxBundle[0] tokens; no codes of NaN,
/// which f16 does not tell from numbers (weights/check_codes.hpp).

#include "cpu/kernels/gemm_float.hpp"

namespace moesaic::cpu {
namespace {

struct e4m3 {
  static constexpr QuantType kType = QuantType::E4M3;
  static constexpr int kScaleCols = 128;  // columns that share a scale: a block
  static constexpr float kFactor = 256.0F;
  static MOESAIC_ALWAYS_INLINE void weights(const std::uint8_t* p, F (&columns)[kChains]) {
    load_e4m3(p, columns);
  }
};

/// Tokens whose chains are in registers at once, of which AVX2 has half as many.
constexpr int kPassTokens = kLanes == 8 ? 2 : kMaxBundle[0];

/// A record without its scales, as floats.
struct alignas(64) FloatRecord {
  float weights[kRecordCols][kRows];
};

/// The scales of the rows of a vector in one block.
template <class D>
MOESAIC_ALWAYS_INLINE F block_scale(const Record& record, int block, int row) {
  float scale[kLanes];
  std::memcpy(scale,
              record.p + record.steps * (kActBlock * kRows) +
                  (block * kRows + row) * static_cast<int>(sizeof(float)),
              sizeof scale);
  return load_f(scale);
}

/// out[t][16] += scale * the products of one block, for tokens 0 .. N - 1 of T in `x` and `out`.
/// columns(k, w) gives columns k .. k + 3; step(s) is called before each 32.
template <class D, int T, int N, class Columns, class OnStep>
MOESAIC_ALWAYS_INLINE void multiply_block(const Columns& columns, const OnStep& on_step, F scale,
                                          const float* x, float* out) {
  F acc[kChains][N];
#pragma GCC unroll 4
  for (int chain = 0; chain < kChains; ++chain) {
#pragma GCC unroll 8
    for (int t = 0; t < N; ++t) acc[chain][t] = set_f(0.0F);
  }
  for (int step = 0; step < D::kScaleCols / kActBlock; ++step) {
    on_step(step);
    for (int k = step * kActBlock; k < (step + 1) * kActBlock; k += kChains) {
      F w[kChains];
      columns(k, w);
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) {
        const float* xk = x + (k + chain) * T;
#pragma GCC unroll 8
        for (int t = 0; t < N; ++t) {
          acc[chain][t] = fma(w[chain], broadcast_f(xk + t), acc[chain][t]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < N; ++t) {
    const F sum = add(add(acc[0][t], acc[1][t]), add(acc[2][t], acc[3][t]));
    float* const to = out + t * kRows;
    store_f(to, fma(mul(sum, set_f(D::kFactor)), scale, load_f(to)));
  }
}

/// out[T][16] += record * x, unpacking in registers.
template <class D, int T>
MOESAIC_NOINLINE void multiply_codes(const Record& record, const float* x, float* out) {
  constexpr int kSteps = D::kScaleCols / kActBlock;
  for_lanes([&](int row) __attribute__((always_inline)) {
    for (int block = 0; block * kSteps < record.steps; ++block) {
      const std::uint8_t* codes = record.p + block * (D::kScaleCols * kRows) + row * 2;
      multiply_block<D, T, T>(
          [&](int k, F(&w)[kChains])
              __attribute__((always_inline)) { D::weights(codes + k * kRows, w); },
          [&](int step) __attribute__((always_inline)) {
            if (row == 0) fetch(record.ahead, block * kSteps + step);
          },
          block_scale<D>(record, block, row), x + block * (D::kScaleCols * T), out + row);
    }
  });
}

template <class D>
MOESAIC_NOINLINE void decode_floats(const Record& record, FloatRecord& decoded) {
  for_lanes([&](int row) __attribute__((always_inline)) {
    for (int step = 0; step < record.steps; ++step) {
      if (row == 0) fetch(record.ahead, step);
      for (int k = step * kActBlock; k < (step + 1) * kActBlock; k += kChains) {
        F w[kChains];
        D::weights(record.p + k * kRows + row * 2, w);
#pragma GCC unroll 4
        for (int c = 0; c < kChains; ++c) store_f(decoded.weights[k + c] + row, w[c]);
      }
    }
  });
}

/// Tokens First .. T - 1 with one block of a decoded record, kPassTokens at a time.
template <class D, int T, int First = 0>
MOESAIC_ALWAYS_INLINE void multiply_passes(const float* weights, F scale, const float* x,
                                           float* out) {
  constexpr int kTokens = T - First < kPassTokens ? T - First : kPassTokens;
  multiply_block<D, T, kTokens>(
      [&](int k, F(&w)[kChains]) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int c = 0; c < kChains; ++c) w[c] = load_f(weights + (k + c) * kRows);
      },
      [](int) {}, scale, x + First, out + First * kRows);
  if constexpr (First + kTokens < T) {
    multiply_passes<D, T, First + kTokens>(weights, scale, x, out);
  }
}

/// out[T][16] += decoded record * x; `record` has the scales.
template <class D, int T>
MOESAIC_NOINLINE void multiply_floats(const FloatRecord& decoded, const Record& record,
                                      const float* x, float* out) {
  for_lanes([&](int row) __attribute__((always_inline)) {
    for (int block = 0; block * D::kScaleCols < record.steps * kActBlock; ++block) {
      multiply_passes<D, T>(decoded.weights[block * D::kScaleCols] + row,
                            block_scale<D>(record, block, row), x + block * (D::kScaleCols * T),
                            out + row);
    }
  });
}

using CodesFn = void (*)(const Record&, const float*, float*);
template <class D, int T = 1>
constexpr CodesFn codes_fn(int tokens) {
  if constexpr (T > kPassTokens) {
    return nullptr;
  } else {
    return tokens == T ? &multiply_codes<D, T> : codes_fn<D, T + 1>(tokens);
  }
}
using FloatsFn = void (*)(const FloatRecord&, const Record&, const float*, float*);
template <class D, int T = 1>
constexpr FloatsFn floats_fn(int tokens) {
  if constexpr (T > kMaxBundle[0]) {
    return nullptr;
  } else {
    return tokens == T ? &multiply_floats<D, T> : floats_fn<D, T + 1>(tokens);
  }
}

template <class D>
void gemm_scaled(const PanelTask& task) {
  constexpr const PanelFormat& format = *find_panel_format(D::kType);
  constexpr std::int64_t kBytes = record_bytes(format);
  static_assert(format.block_elems == D::kScaleCols && format.fields[0].chunk == 2);
  alignas(64) std::uint8_t gathered[kBytes];
  FloatRecord decoded;
  const bool in_one = task.tokens <= task.bundle;  // so the bundle is as wide as there are tokens
  const CodesFn multiply_few = in_one ? codes_fn<D>(task.tokens) : nullptr;
  const std::int64_t records = (task.cols + kRecordCols - 1) / kRecordCols;
  std::memset(task.out, 0, sizeof(float) * kRows * static_cast<std::size_t>(task.tokens));

  for (std::int64_t index = 0; index < records; ++index) {
    const std::int64_t begin = index * kRecordCols;
    const std::int64_t left = (task.cols - begin) / kActBlock;
    Record record{find_record(task, format, index, gathered), static_cast<int>(left < 8 ? left : 8),
                  false};
    if (!task.rows_layout) look_ahead(task, kBytes, index, record);
    const auto* x = reinterpret_cast<const float*>(task.activations);
    if (multiply_few != nullptr) {
      multiply_few(record, x + begin * task.tokens, task.out);
      continue;
    }
    decode_floats<D>(record, decoded);
    for (int first = 0; first < task.tokens; first += task.bundle) {
      const int rest = task.tokens - first;
      const int tokens = rest < task.bundle ? rest : task.bundle;
      floats_fn<D>(tokens)(decoded, record, x + begin * tokens, task.out + first * kRows);
      x += task.cols * tokens;
    }
  }
}

}  // namespace
}  // namespace moesaic::cpu
