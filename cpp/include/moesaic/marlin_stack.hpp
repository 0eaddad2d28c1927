#pragma once

/// INT4 expert weights in groups, from GPTQ, AWQ and compressed-tensors checkpoints:
///   value[k, n] = (code[k, n] - zero[g, n]) * scale[g, n]
/// with g = g_idx[k], else k / group_size.

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "moesaic/expert_stack.hpp"
#include "moesaic/plan.hpp"
#include "moesaic/tuning.hpp"

namespace moesaic {

class Context;

/// How a checkpoint packs codes and zero points.
enum class CheckpointFormat : std::uint8_t {
  Gptq,    ///< codes 8 to a word along K, low bits first; the stored zero point is one too small
  GptqV2,  ///< codes as Gptq; zero points as they are
  Awq,     ///< codes 8 to a word along N, interleaved; zero points as they are
  PackQuantized,  ///< compressed-tensors: rows are N; codes along K, zero points as they are
};

/// Tensors of a linear layer as a checkpoint holds them. For one expert the leading E is absent.
/// `groups` is K / group_size rounded up, 1 per channel. Any strides along E, the rest dense.
struct GptqTensors {
  ConstTensorView qweight;  ///< i32 [E, K/8, N]; Awq: [E, K, N/8]; PackQuantized: [E, N, K/8]
  ConstTensorView scales;   ///< f16, bf16 or f32 [E, groups, N]; PackQuantized: [E, N, groups]
  /// i32 [E, groups, N/8 rounded up], PackQuantized: [E, N/8, groups]; no data: all are 8
  ConstTensorView qzeros;
  ConstTensorView g_idx{};        ///< i32 [K] or [E, K], or no data: k / group_size
  std::int64_t group_size = 128;  ///< -1: one group (per channel)
  CheckpointFormat format = CheckpointFormat::Gptq;
};

/// One linear layer of one expert, unpacked: the form between all layouts.
struct Int4Matrix {
  std::int64_t k = 0, n = 0;
  std::int64_t group_size = 0;  ///< as in the checkpoint; k when there is one group
  std::int64_t groups = 0;
  std::vector<std::uint8_t> codes;  ///< [K, N], 0 .. 15
  std::vector<float> scales;        ///< [groups, N]
  std::vector<std::uint8_t> zeros;  ///< [groups, N], 0 .. 16
  std::vector<std::int32_t> g_idx;  ///< [K], or empty: k / group_size
  bool operator==(const Int4Matrix&) const = default;

  std::int64_t group_of(std::int64_t row) const {
    return g_idx.empty() ? row / group_size : g_idx[static_cast<std::size_t>(row)];
  }
  float value(std::int64_t row, std::int64_t col) const;
};

/// Unpacks one expert. Errors: ShapeError, DTypeError naming the tensor; FormatError (a g_idx
/// outside the groups).
Int4Matrix unpack_gptq(const GptqTensors& tensors, std::int32_t expert = 0);

/// out[out_row + i] = W[expert] in[in_row + i] for i < rows.
struct MarlinDispatch {
  std::int32_t expert = 0;
  std::int64_t in_row = 0, out_row = 0, rows = 0;
};

class MarlinLinear;  // a dense layer cut out of a stack

/// The matrices [K, n_per_expert] of all experts, INT4 in memory. gate_up stacks have n_per_expert
/// = 2I with columns [gate | up]. Copies share the memory.
class MarlinExpertStack {
 public:
  /// What must be known before the first expert is packed.
  struct Spec {
    std::int32_t num_experts = 0;
    std::int64_t k = 0, n_per_expert = 0;
    std::int64_t group_size = 128;  ///< -1: one group (per channel)
    CheckpointFormat format = CheckpointFormat::Gptq;
    DType scale_dtype = DType::F16;  ///< F16, or F32 for f32 and bf16 scales
    bool zeros = false;              ///< false: every zero point must be 8
    ConstTensorView g_idx{};         ///< i32 [K] or [E, K], or no data
  };

  /// Packs experts one by one into one buffer, so that a load needs little more than its result.
  class Builder {
   public:
    /// Errors: ShapeError, FormatError (a g_idx outside the groups), UnsupportedError,
    /// OutOfMemoryError.
    explicit Builder(const Spec& spec);
    ~Builder();
    Builder(Builder&&) noexcept;
    /// Columns [first_col, first_col + N) of one expert from tensors without the leading E; their
    /// g_idx is not read. `name` stands for them in errors. Errors: ShapeError, DTypeError,
    /// FormatError (zero points other than 8 where the spec says there are none; scales that the
    /// spec's type cannot hold).
    void add(std::int32_t expert, std::int64_t first_col, const GptqTensors& part,
             const std::string& name = "part", ThreadPool* pool = nullptr);
    /// Call once. Errors: ShapeError when columns are missing, or on a second call.
    MarlinExpertStack build() &&;

   private:
    struct State;
    State& live_state() const;
    std::unique_ptr<State> state_;
  };

  /// Packs all experts. Zero points that are all 8 are not stored.
  /// Errors: as unpack_gptq, UnsupportedError (K not a multiple of 8), OutOfMemoryError.
  static MarlinExpertStack from_gptq(const GptqTensors& tensors, ThreadPool* pool = nullptr);

  std::int32_t num_experts() const { return weights_.ref.num_experts; }
  std::int64_t k() const { return weights_.ref.cols; }
  std::int64_t n_per_expert() const { return weights_.ref.rows; }
  std::int64_t group_size() const { return weights_.ref.int4.group_size; }  ///< K when per channel
  bool symmetric() const { return !weights_.ref.int4.zeros; }
  bool act_order() const { return g_idx_ != nullptr; }
  Device device() const;        ///< where the products run
  std::int64_t nbytes() const;  ///< in memory of the device, with padding
  /// The host's panels, which every other use of the weights reads: [E, n_per_expert, K].
  const RoleWeights& weights() const { return weights_; }
  /// This stack with its products on the device of `options.backend` (null: the CPU), which must
  /// outlive it. CUDA gets a copy in its kernels' layout; Metal reads the host's panels.
  /// Errors: UnsupportedError (a backend without INT4 kernels), OutOfMemoryError,
  /// OperationCancelled.
  MarlinExpertStack to(const LoadOptions& options) const;
  /// The host's panels of output columns [first_col, first_col + cols) of all experts, sharing
  /// memory with this stack: [E, cols, K]. first_col is a multiple of 16. Errors: ShapeError.
  RoleWeights columns(std::int64_t first_col, std::int64_t cols) const;
  /// A copy of output columns [first_col, first_col + cols), from any column on. Errors:
  /// ShapeError, OutOfMemoryError.
  RoleWeights copy_columns(std::int64_t first_col, std::int64_t cols) const;
  /// One expert, unpacked; exactly what it was made of (scales of groups without columns are 0).
  Int4Matrix unpack(std::int32_t expert) const;

  /// Nothing here needs zeroing: kernels keep no locks and write whole outputs. Kept for callers
  /// that clear a Marlin workspace before each phase.
  void zero_workspace() const {}

  // The products of one phase, gate_up or down. x and out lie on the stack's device, which must be
  // the context's (else DeviceError); dispatches and aligned routings lie in host memory. A device
  // gets copies of them, and scratch for the length of the call, which is a CaptureError while its
  // stream records a graph.

  /// For each dispatch: out rows = W[expert] x rows. x f32, f16 or bf16 [*, K]; out f32 [*, N],
  /// dense. Any number of rows; rows of `out` that no dispatch names are left alone. Errors:
  /// ShapeError (rows outside x or out, an expert out of range, overlapping output rows),
  /// DTypeError.
  void gemm_phase_batched(Context& context, const ConstTensorView& x,
                          std::span<const MarlinDispatch> dispatches, TensorView out,
                          Precision precision = Precision::Auto) const;
  /// Over aligned blocks: sorted id v reads x row v / top_k and writes out row v; blocks of expert
  /// -1 and padding are skipped. x [P / top_k, K]; out f32 [P, N], dense, fully written: rows that
  /// no id names are zero. Errors: ShapeError (x rows * top_k is not P), DTypeError.
  void gemm_phase_vllm(Context& context, const ConstTensorView& x, const AlignedRouting& aligned,
                       std::int32_t top_k, TensorView out,
                       Precision precision = Precision::Auto) const;
  /// Columns [first_col, first_col + cols) of one expert as a layer of its own on the same device,
  /// where it shares memory with the stack (CPU) or has its own; cols -1 means to the end. Both are
  /// multiples of 64, or reach the end. `bias` is empty or has `cols` values. Errors: ShapeError.
  MarlinLinear make_expert_linear(std::int32_t expert, std::int64_t first_col = 0,
                                  std::int64_t cols = -1, std::vector<float> bias = {}) const;

 private:
  MarlinExpertStack() = default;
  /// What the kernels of the stack's device read.
  const RoleWeights& kernel_weights() const {
    return backend_ != nullptr ? device_weights_ : weights_;
  }
  RoleWeights weights_;
  const Backend* backend_ = nullptr;  ///< where device_weights_ lie; null: the CPU reads weights_
  RoleWeights device_weights_;
  std::shared_ptr<const std::vector<std::int32_t>> g_idx_;  ///< null, [K] or [E, K]
};

/// A dense layer y = W x + bias, cut out of one expert of a stack (make_expert_linear).
class MarlinLinear {
 public:
  std::int64_t in_features() const { return weights_.ref.cols; }
  std::int64_t out_features() const { return weights_.ref.rows; }
  Device device() const { return device_; }
  /// out [m, out_features] f32, dense = x [m, in_features] W^T + bias. The rules for x, out and
  /// devices are those of the products of a stack. Errors: ShapeError, DTypeError, DeviceError,
  /// CaptureError.
  void forward(Context& context, const ConstTensorView& x, TensorView out,
               Precision precision = Precision::Auto) const;

 private:
  friend class MarlinExpertStack;
  MarlinLinear(RoleWeights weights, Device device)
      : weights_(std::move(weights)), device_(device) {}
  RoleWeights weights_;
  Device device_;
};

}  // namespace moesaic
