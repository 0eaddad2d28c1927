#pragma once

/// What generic code and the kernels of an instruction set share: plain data, no functions.

#include <cstdint>

#include "moesaic/config.hpp"
#include "moesaic/quant.hpp"

namespace moesaic::cpu {

inline constexpr int kMaxTaskTokens = 64;  ///< tokens of one PanelTask
inline constexpr int kNumFormats = 256;    ///< more than the largest QuantType

enum class Source : std::uint8_t { F32, F16, BF16 };

/// A panel of 16 rows times some tokens. Tokens come in bundles of `bundle` (the last one
/// smaller), the activations of a bundle interleaved (activations.hpp), bundles one after another.
struct PanelTask {
  const std::uint8_t* weights = nullptr;       ///< panel, or first row in the row layout
  const std::uint8_t* next_weights = nullptr;  ///< what this thread reads after it, null if unknown
  bool rows_layout = false;
  std::int64_t row_stride = 0;  ///< row layout: bytes between rows
  int rows = 0;                 ///< row layout: rows of the panel that exist
  std::int64_t cols = 0;
  const std::uint8_t* activations = nullptr;
  int tokens = 1;
  int bundle = 1;
  int planes = 1;          ///< 1 Fast, 2 Exact; ignored by the f32 formats
  int scale_cols = 0;      ///< INT4 (int4_format.hpp); `cols` are its packed ones
  bool scale_f32 = false;  ///< INT4
  bool zeros = false;      ///< INT4
  float* out = nullptr;    ///< [tokens][16], assigned
};

using PanelKernel = void (*)(const PanelTask& task);

/// hidden[i] = activation(hidden[i], up[i]); `hidden` holds the gate rows, which ungated kinds do
/// not read.
using ActivateKernel = void (*)(const Activation& activation, float* hidden, const float* up,
                                int n);
inline constexpr int kNumActivations = static_cast<int>(ActivationKind::SiTu) + 1;

/// The kernels of one instruction set.
struct IsaKernels {
  int bundle_tokens[3] = {1, 1, 1};    ///< largest bundle by planes; [0] is of the f32 formats
  PanelKernel gemm[kNumFormats] = {};  ///< by QuantType; null: not a weight format

  /// Quantises one row (planes 1 or 2) or converts it to f32 (planes 0), as token t of a bundle of
  /// `tokens`. A block of 32 with a NaN or an infinity gets the scale NaN. With `gather`, value i
  /// is row[gather[i]], 0 where that is -1.
  void (*quantize)(const void* row, Source source, std::int64_t cols, int planes,
                   const std::int32_t* gather, std::uint8_t* bundle, int tokens, int t) = nullptr;
  /// Copies a bundle of one token into token t of a bundle of `tokens`.
  void (*copy_token)(const std::uint8_t* row, std::int64_t cols, int planes, std::uint8_t* bundle,
                     int tokens, int t) = nullptr;
  ActivateKernel activate[kNumActivations] = {};  ///< by ActivationKind
};

namespace scalar {
extern const IsaKernels kKernels;
}
namespace avx2 {
extern const IsaKernels kKernels;
}
namespace avxvnni {
extern const IsaKernels kKernels;
}
namespace avx512vnni {
extern const IsaKernels kKernels;
}
namespace neon {
extern const IsaKernels kKernels;
}

}  // namespace moesaic::cpu
