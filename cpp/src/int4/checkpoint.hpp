#pragma once

/// Reads the tensors of one linear layer of an INT4 checkpoint, whichever format packed them
/// (CheckpointFormat; README.md has the layouts).

#include <cstdint>
#include <string>
#include <vector>

#include "moesaic/marlin_stack.hpp"

namespace moesaic::int4 {

/// The number of groups of a layer with K input columns; group_size -1 means one group.
std::int64_t count_groups(std::int64_t k, std::int64_t group_size);

/// Copies a g_idx row [K]. Errors: ShapeError, DTypeError; FormatError for a group out of range.
std::vector<std::int32_t> read_g_idx(const ConstTensorView& g_idx, std::int64_t k,
                                     std::int64_t groups, const std::string& name);

/// The tensors of one expert of a stack: views without the leading E. Errors: ShapeError.
GptqTensors expert_slice(const GptqTensors& tensors, std::int32_t expert);

/// K and N of one linear layer, from the last two dimensions of its qweight. Errors: ShapeError,
/// UnsupportedError for a K that is not a multiple of 8.
struct LinearSize {
  std::int64_t k = 0, n = 0;
};
LinearSize linear_size(const GptqTensors& tensors, const std::string& name);

/// Codes, scales and zero points by position. Holds views only.
class LinearReader {
 public:
  /// `tensors` has no leading E. Errors: ShapeError, DTypeError, DeviceError naming `name` and the
  /// tensor.
  LinearReader(const GptqTensors& tensors, const std::string& name);

  std::int64_t k() const { return k_; }
  std::int64_t n() const { return n_; }
  std::int64_t groups() const { return groups_; }
  DType scale_dtype() const { return scale_dtype_; }

  /// out[i] = code[k, n + i] for i < count.
  void codes(std::int64_t k, std::int64_t n, int count, std::uint32_t* out) const;
  float scale(std::int64_t group, std::int64_t n) const;
  /// The zero point of a group and column, 0 .. 16; 8 where the checkpoint has none.
  int zero(std::int64_t group, std::int64_t n) const;
  /// When every zero point is this one, a stack does not store them.
  static constexpr int kSymmetricZero = 8;
  bool symmetric() const;

 private:
  std::int64_t k_ = 0, n_ = 0, groups_ = 0, zero_words_ = 0;
  CheckpointFormat format_;
  DType scale_dtype_;
  const std::uint32_t* qweight_;
  const void* scales_;
  const std::uint32_t* qzeros_;
};

}  // namespace moesaic::int4
