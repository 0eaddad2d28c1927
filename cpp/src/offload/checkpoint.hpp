#pragma once

/// Experts of a safetensors checkpoint, which are read one by one and become what kernels read. What
/// is where, and in which form, comes from whoever read names and configuration (in Python:
/// moesaic/safetensors/stored.py).

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moesaic/expert_stack.hpp"
#include "moesaic/marlin_stack.hpp"
#include "offload/source.hpp"

namespace moesaic::offload {

/// How a matrix [n, k] lies in a checkpoint.
enum class StoredForm : std::uint8_t {
  Rows,     ///< as kernels read it
  Floats,   ///< the same elements in other places
  Codes8,   ///< FP8 or INT8 with a grid of scales: E4M3 blocks, or the products as BF16
  Mxfp4,    ///< columns 2i and 2i + 1 in byte i; an E8M0 scale for 32
  Nvfp4,    ///< the same, an E4M3 scale for 16
  Q4Words,  ///< 8 neighbours in a word, a scale for each group of whole 32: Q4_0
  Int4,     ///< what an INT4 stack keeps (marlin_stack.hpp)
};
enum class Code8 : std::uint8_t { E4m3, E5m2, Int8 };
enum class ScaleType : std::uint8_t { F32, F16, Bf16, F64, E8m0 };

/// A role of every expert of a layer, as a part of the matrix that holds it.
struct StoredRole {
  StoredForm form = StoredForm::Rows;
  QuantType type = QuantType::F32;  ///< of its rows afterwards; not for Int4
  /// Which pieces of the expert have the values, the scales and the zero points; -1: none.
  int values = 0, scales = -1, zeros = -1;
  /// Row r of the role is row first_row + r * row_step of the matrix, which has `matrix_rows`.
  std::int64_t matrix_rows = 0, first_row = 0, row_step = 1;
  bool transposed = false;  ///< Floats: stored [k, n]
  Code8 code = Code8::E4m3;
  ScaleType scale = ScaleType::F32;
  float scale_factor = 1.0F;  ///< Codes8: on every scale
  /// Codes8: a scale is for so many rows and columns; each of `grid_parts` of the rows starts anew.
  std::int64_t grid_rows = 1, grid_cols = 1, grid_parts = 1;
  std::int64_t group_size = 0;  ///< Q4Words, Int4; -1: all columns
  CheckpointFormat format = CheckpointFormat::Gptq;
  bool scale_f32 = false;         ///< Int4: the stack keeps scales in f32
  std::optional<bool> symmetric;  ///< Int4: what the configuration says of the zero points

  std::vector<float> factor{};           ///< empty or [E], on the output of each expert
  std::vector<float> bias{};             ///< empty or [E * rows]
  std::string source, decision, reason;  ///< for the report of the stack
  std::vector<std::string> names{};      ///< of the tensors of each expert, for errors: [E]
};

/// The experts of one layer.
struct StoredLayer {
  std::int32_t block = 0;
  StackShape shape;
  std::optional<StoredRole> gate;  ///< none: ungated
  StoredRole up, down;
  std::vector<ExpertRanges> ranges;  ///< [E], as many pieces of each
};

/// The experts of a whole model.
struct StoredExperts {
  std::string name;  ///< of the checkpoint, for errors
  std::vector<std::string> files;
  std::vector<std::int64_t> file_bytes;  ///< of each, when it was looked at
  std::vector<StoredLayer> layers;
};

/// A stack of the layer's shape, types, biases and factors that has no expert in memory. Errors:
/// ShapeError, UnsupportedError for rows that the type does not have.
ExpertStack stack_without_experts(const StoredLayer& layer);

/// What makes rows and panels of the pieces of the layer's experts: those that `stack`, which is
/// stack_without_experts(layer), describes. Errors: FormatError where a piece is smaller than its
/// role needs.
std::shared_ptr<const ExpertDecoder> make_decoder(const StoredLayer& layer,
                                                  const ExpertStack& stack);

}  // namespace moesaic::offload
