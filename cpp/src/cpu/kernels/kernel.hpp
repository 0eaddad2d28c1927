#pragma once

/// What generic code and the kernels of an instruction set share: plain data and pointers to
/// functions, so that nothing compiled for one instruction set is linked into another.

#include <cstdint>

#include "moesaic/config.hpp"
#include "moesaic/quant.hpp"

namespace moesaic::cpu {

inline constexpr int kMaxTaskTokens = 64;  ///< the most tokens of one PanelTask
inline constexpr int kNumFormats = 256;    ///< more than the largest value of QuantType

/// Element type of the rows that IsaKernels::quantize reads.
enum class Source : std::uint8_t { F32, F16, BF16 };

/// One call of a kernel: a panel of 16 rows times some tokens. Tokens come in bundles of `bundle`
/// (the last one may be smaller). The activations of a bundle are interleaved (activations.hpp),
/// and the bundles follow each other.
struct PanelTask {
  const std::uint8_t* weights = nullptr;       ///< the panel, or its first row in the row layout
  const std::uint8_t* next_weights = nullptr;  ///< what this thread reads after it, null if unknown
  bool rows_layout = false;
  std::int64_t row_stride = 0;  ///< row layout: bytes between rows
  int rows = 0;                 ///< row layout: rows of the panel that exist
  std::int64_t cols = 0;
  const std::uint8_t* activations = nullptr;
  int tokens = 1;
  int bundle = 1;
  int planes = 1;          ///< 1 Fast, 2 Exact; ignored by the f32 formats
  int scale_cols = 0;      ///< INT4 only (Int4Layout); `cols` then counts packed columns
  bool scale_f32 = false;  ///< INT4 only (Int4Layout)
  bool zeros = false;      ///< INT4 only (Int4Layout)
  float* out = nullptr;    ///< [tokens][16], assigned whatever it held
};

using PanelKernel = void (*)(const PanelTask& task);

/// hidden[i] = activation(hidden[i], up[i]) for i < n. `hidden` comes in with the products of the
/// gate, which ungated kinds do not read.
using ActivateKernel = void (*)(const Activation& activation, float* hidden, const float* up,
                                int n);
inline constexpr int kNumActivations = static_cast<int>(ActivationKind::SiTu) + 1;

/// The kernels of products that read activations in one order, and what puts them in that order.
struct ProductKernels {
  int bundle_tokens[3] = {1, 1, 1};    ///< largest bundle by planes; [0]: f32 formats
  PanelKernel gemm[kNumFormats] = {};  ///< by QuantType; null: it has none for the format

  /// What a thread calls before and after the kernels of one job, whose tasks differ in weights,
  /// rows and output only; null: nothing.
  void (*begin_job)(QuantType type, const PanelTask& task) = nullptr;
  void (*end_job)() = nullptr;

  /// Quantises one row (planes 1 or 2) or converts it to f32 (planes 0), as token t of a bundle of
  /// `tokens`. A step with a NaN or an infinity gets the scale NaN. With `gather`, value i is
  /// row[gather[i]], or 0 where gather[i] is -1.
  void (*quantize)(const void* row, Source source, std::int64_t cols, int planes,
                   const std::int32_t* gather, std::uint8_t* bundle, int tokens, int t) = nullptr;
  /// Copies a bundle of one token, quantised by the kernels of vectors, into token t of a bundle of
  /// `tokens`.
  void (*copy_token)(const std::uint8_t* row, std::int64_t cols, int planes, std::uint8_t* bundle,
                     int tokens, int t) = nullptr;
};

/// Kernels that multiply by tiles (gemm_tile.hpp): the same bits, and for many tokens less time.
struct TileKernels : ProductKernels {
  int min_tokens[3] = {};  ///< of an expert from which they are faster, by planes
};

/// The kernels of one instruction set.
struct IsaKernels {
  ProductKernels vectors;              ///< for any number of tokens, of every weight format
  const TileKernels* tiles = nullptr;  ///< null: it has no tiles
  ActivateKernel activate[kNumActivations] = {};  ///< by ActivationKind

  /// The kernels for `tokens` rows that meet one expert's weights of `type`.
  const ProductKernels& products(QuantType type, int planes, std::int64_t tokens) const {
    if (tiles == nullptr || tiles->gemm[static_cast<int>(type)] == nullptr) return vectors;
    return tokens >= tiles->min_tokens[planes] ? *tiles : vectors;
  }
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
namespace amx {
/// Only tiles: what else a CPU with AMX runs is avx512vnni's.
extern const TileKernels kTiles;
}  // namespace amx
namespace neon {
extern const IsaKernels kKernels;
}

}  // namespace moesaic::cpu
