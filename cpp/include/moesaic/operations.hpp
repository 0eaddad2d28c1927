#pragma once

/// What a backend can be asked to do: one struct for each operation, the only form in which the
/// core, the CPU and CUDA know it. CUDA's function table (cuda/plugin.h) takes these structs, and a
/// kernel's copy differs from the caller's in pointers alone: arrays that a layer holds in host
/// memory ("host") are replaced by their copies on the device. Metal packs its arguments from them.
///
/// T tokens, P = T * top_k pairs, E experts, H and I the widths of the layer. Unless a field says
/// otherwise arrays are dense, f32 or int32, and do not overlap; f32 sums run in an order that
/// depends on the length of a row alone. Operations check nothing: ops/ and forward/ have done it
/// (cpp/README.md, "Checks").

#include <cstddef>
#include <cstdint>

#include "moesaic/operands.hpp"

namespace moesaic::op {

/// logits [T, E] = x [T, H] * weight [E, H]^T, f32.
struct RouterLogits {
  InputRows x{};
  const float* weight = nullptr;  ///< host
  std::int32_t num_experts = 0;
  float* logits = nullptr;
};

/// Scores, selection and weights of each row of logits (route_rows). With SelectOn::Given the ids
/// in `out` are read instead (-1: weight 0) and stay as they are.
struct Route : RouterRules {
  const float* router_bias = nullptr;     ///< host, [E] or null
  const float* selection_bias = nullptr;  ///< host, [E] or null
  const float* logits = nullptr;          ///< [T, E], rows row_stride elements apart
  std::int64_t row_stride = 0;
  RoutingView out{};
  /// Backend::route_scratch elements of 4 bytes. A device leaves in the first T of them, as int32,
  /// 1 for each row that held NaN or an infinity, else 0; its kernels take null as "do not say".
  void* scratch = nullptr;
};

/// The ids of `out`: row token_ids[t] of the table. A device gives -1 to all slots of a token
/// outside [0, num_rows); on the host the ids have been checked.
struct LookUpExperts {
  const std::int32_t* table = nullptr;  ///< host, [num_rows, top_k]
  std::int64_t num_rows = 0;
  const std::int32_t* token_ids = nullptr;  ///< [T]
  RoutingView out{};                        ///< only topk_ids is written
};

/// The routing [T, 1] of a shared expert: ids 0, weights sigmoid(logits[t]), or 1 without logits.
struct SharedRouting {
  const float* logits = nullptr;  ///< [T] or null
  RoutingView out{};
};

/// Stable sort of the pairs by expert (build_bucket_plan). A device takes ids outside [0, E) as -1;
/// on the host they have been checked. Behind expert_offsets[E], row_token and row_pair are -1.
struct BucketPlan {
  RoutingView routing{};  ///< topk_ids alone is read
  std::int32_t num_experts = 0;
  BucketPlanView out{};  ///< with scratch, 64-byte aligned
};

/// Pads each expert's rows to whole blocks (align_block_size).
struct Align {
  BucketPlanView plan{};  ///< expert_offsets and row_pair are read
  std::int64_t num_pairs = 0;
  std::int32_t num_experts = 0;
  std::int32_t block_size = 0;
  /// aligned_block_capacity; sorted_ids holds block_size times as many. Both are written to the end.
  std::int64_t block_capacity = 0;
  RowSpace row_space = RowSpace::TokenPairs;
  AlignedRoutingView out{};
};

/// out [rows, cols of x] f32: out[r] = x[index[r]], zeros for a negative index.
struct Gather {
  InputRows x{};
  const std::int32_t* index = nullptr;  ///< [rows]
  std::int64_t rows = 0;
  float* out = nullptr;
};

/// out[destination] = W[expert] * in[source] for each entry of the map; [limit, rows of W]. Rows
/// that the map does not name are left alone.
struct Gemm {
  RoleRef weight{};
  RowMap map{};
  InputRows in{};
  void* out = nullptr;
  DType out_dtype = DType::F32;            ///< F32, or Backend::working_dtype
  Precision precision = Precision::Exact;  ///< Exact or Fast, already decided
  /// One kernel whatever the number of rows; CudaBackend sets it from its context's tuning.
  bool batch_invariant = false;
  std::byte* scratch = nullptr;  ///< Backend::scratch_bytes of this size, 64-byte aligned
};

/// out[r] = W * in[r] with one matrix, for every row of `in`: f32, rounded once to the type of
/// `out`.
struct Linear {
  RoleRef weight{};  ///< num_experts is 1
  InputRows in{};
  OutputRows out{};         ///< [rows of in, rows of W]
  bool accumulate = false;  ///< add to out instead of assigning
  Precision precision = Precision::Exact;
  /// [rows of in, rows of W] and a routing of as many tokens with top_k 1, for a backend that
  /// composes this of smaller operations. Neither is touched where `out` is dense f32 that is
  /// assigned.
  float* rows = nullptr;
  RoutingView once{};
  std::byte* scratch = nullptr;  ///< as in Gemm, whose rows are those of `in`
};

/// hidden [rows, I] f32 = activation(gate row, up row), from rows `row_stride` elements apart.
struct Activate {
  Activation activation{};
  const float* gate = nullptr;  ///< not read by ungated kinds
  const float* up = nullptr;
  std::int64_t row_stride = 0;
  std::int64_t rows = 0;
  std::int64_t intermediate = 0;
  float* hidden = nullptr;
};

/// hidden[destination] = activation(gate row, up row) of in[source]; [limit, I].
struct GateUp {
  RoleRef gate{};  ///< without weights for ungated kinds
  RoleRef up{};
  Activation activation{};
  RowMap map{};
  InputRows in{};
  void* hidden = nullptr;
  DType hidden_dtype = DType::F32;  ///< F32, or Backend::working_dtype
  Precision precision = Precision::Exact;
  bool batch_invariant = false;  ///< as in Gemm
  /// [limit] factors of the input rows, by destination (LayerPart::InputWeights); null: none. With
  /// them gate and up are (W x) * factor * scale + bias.
  const float* row_weight = nullptr;
  /// [2, limit, I] (gate rows, then up rows; ungated: up rows only) when the backend does not fuse
  /// the activation, else null.
  float* gate_up = nullptr;
  std::byte* scratch = nullptr;  ///< as in Gemm, for the larger role
};

/// out[t] = sum over the slots of a token, in their order, of weight * rows[pair_row]; f32, rounded
/// once. Pairs with id -1 or packed row -1 are skipped; a token of only such pairs gets 0.
struct Combine {
  const void* rows = nullptr;              ///< [P, H]
  DType rows_dtype = DType::F32;           ///< F32, or Backend::working_dtype
  const std::int32_t* pair_row = nullptr;  ///< [P], or null: row = pair
  RoutingView routing{};                   ///< without weights all of them are 1
  OutputRows out{};                        ///< [T, H]
  bool accumulate = false;                 ///< add to out instead of assigning
  std::int32_t num_experts = INT32_MAX;    ///< a device takes ids from here on as -1
};

/// rows[destination] = W_down * hidden[source], then `combine`, whose rows these are; a backend may
/// do both at once and leave `rows` alone. The map holds the pairs of `combine`, each under the
/// expert of its id.
struct Down {
  RoleRef weight{};
  RowMap map{};
  InputRows in{};        ///< hidden rows [*, I], dense
  void* rows = nullptr;  ///< [P, H] of combine.rows_dtype
  Combine combine{};
  Precision precision = Precision::Exact;
  bool batch_invariant = false;  ///< as in Gemm
  std::byte* scratch = nullptr;  ///< as in Gemm
};

/// Zeroes the rows of out [rows, cols] whose id is -1 (on a device: outside [0, num_experts)).
struct ZeroSkipped {
  const std::int32_t* ids = nullptr;  ///< [rows]
  std::int32_t num_experts = 0;
  float* out = nullptr;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
};

/// out [rows, cols] f32 = x / sqrt(mean(x^2) + eps) * weight.
struct RmsNorm {
  InputRows x{};
  const float* weight = nullptr;  ///< host, [cols]
  float eps = 0.0F;
  float* out = nullptr;
};

/// out[t] += x[t] * the sum, in slot order, of the token's weights with ids in [first, first +
/// count): the identity experts of a routing. Tokens whose sum is 0 are left alone.
struct AddIdentity {
  InputRows x{};  ///< [T, H]
  RoutingView routing{};
  std::int32_t first = 0;
  std::int32_t count = 0;
  OutputRows out{};  ///< [T, H] f32
};

/// Sets every byte of a range.
struct Fill {
  void* data = nullptr;
  std::int64_t bytes = 0;
  std::uint8_t value = 0;
};

}  // namespace moesaic::op
