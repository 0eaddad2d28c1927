#pragma once

/// One matrix of weights outside of any expert: what an attention or output projection is.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moesaic/expert_stack.hpp"
#include "moesaic/forward.hpp"

namespace moesaic {

/// W [N, K], which stays compressed, with an optional factor and bias: y = (W x) * scale + bias.
/// Its bytes, layouts and kernels are those of a role of a stack of one expert. On the CPU alone:
/// loads for another device throw UnsupportedError.
class QuantMatrix {
 public:
  /// Copies `values` [N, K] of f32, f16 or bf16, or encodes them in `type`, with `importance` as
  /// quantize_rows takes it. `bias` is empty or [N]. Errors: ShapeError, DTypeError; where values
  /// are encoded those of quantize_rows (moesaic/quantize.hpp).
  static QuantMatrix from_dense(const ConstTensorView& values, std::optional<QuantType> type = {},
                                const ConstTensorView& importance = {},
                                const LoadOptions& options = {}, std::vector<float> bias = {});
  /// Encoded rows as a GGUF tensor holds them, kept where they are while their owner lives. Errors:
  /// ShapeError, UnsupportedError (a type without a decoder), ConfigError (E4M3 codes of NaN).
  struct Encoded {
    QuantType type = QuantType::F32;
    std::int64_t rows = 0, cols = 0;
    const std::byte* data = nullptr;
    std::size_t bytes = 0;
    std::shared_ptr<const void> owner;
    float scale = 1.0F;  ///< factor of the products
  };
  static QuantMatrix from_encoded(const Encoded& encoded, const LoadOptions& options = {},
                                  std::vector<float> bias = {});
  /// The tensor `name` of a file, [N, K] or [K] (one row), and the tensor `bias` [N] unless that is
  /// empty. A factor that the file keeps beside it ("blk.0.attn_q.scale" [1] for
  /// "blk.0.attn_q.weight") is applied. Errors: FormatError (no such tensor, or not of this shape),
  /// UnsupportedError (a type without a decoder), DeviceError (a closed file).
  static QuantMatrix from_gguf(const std::shared_ptr<GgufFile>& file, const std::string& name,
                               const std::string& bias = {}, const LoadOptions& options = {});

  std::int64_t rows() const { return weights_.ref.rows; }  ///< N
  std::int64_t cols() const { return weights_.ref.cols; }  ///< K
  QuantType type() const { return weights_.ref.type; }
  Device device() const { return {}; }
  /// The matrix as the one expert of a role.
  const RoleWeights& weights() const { return weights_; }
  std::int64_t nbytes() const { return weights_.ref.expert_bytes(); }  ///< without bias

 private:
  explicit QuantMatrix(RoleWeights weights) : weights_(std::move(weights)) {}
  static QuantMatrix finish(const char* operation, RoleWeights weights, std::vector<float> bias,
                            const LoadOptions& options);
  RoleWeights weights_;
};

/// Bytes a workspace must have to multiply up to `max_rows` rows. Errors: ShapeError (2^30 rows or
/// more).
std::size_t workspace_bytes(const Context& context, const QuantMatrix& matrix,
                            std::int64_t max_rows);

/// out [M, N] = x [M, K] * W^T * scale + bias, each f32, f16 or bf16 with rows at any distance; f32
/// inside, rounded once. With `accumulate` it is added to `out`. A precision of Auto leaves the
/// choice to the tuning, and without one there Exact holds up to two rows. M = 0 is legal. Errors:
/// ShapeError, DTypeError, DeviceError, WorkspaceError, UnsupportedError; nothing is written to
/// `out` on an error. No allocation.
void multiply(Context& context, const QuantMatrix& matrix, const ConstTensorView& x, TensorView out,
              Workspace& workspace, Precision precision = Precision::Auto, bool accumulate = false);

/// What multiply would do with `num_rows` rows: precision, layout, kernel, bytes, reasons.
Explanation explain(const Context& context, const QuantMatrix& matrix, std::int64_t num_rows);

}  // namespace moesaic
