#pragma once

/// What operations read and write: plain data that the core, every backend and the kernels share.
/// Everything here is trivially copyable, owns nothing and needs no standard library, so that nvcc
/// and the plug-in's function table (cuda/plugin.h) take it as it is. Pointers are memory of the
/// backend that runs the operation, unless they say otherwise.

#include <cstddef>
#include <cstdint>

/// Members that kernels call too. They are always inlined: the emulator's race checker must see
/// their loads in the kernels that it instruments, not in a copy from the library.
#if defined(__CUDACC__)
#define MOESAIC_ANYWHERE __host__ __device__ __forceinline__
#else
#define MOESAIC_ANYWHERE __attribute__((always_inline)) inline
#endif

namespace moesaic {

// ---------------------------------------------------------------------------- enumerations ----

enum class DType : std::uint8_t { F32, F16, BF16, F64, I32, I64, U8, U16, Bool };

/// How activations meet quantised weights on the CPU.
enum class Precision : std::uint8_t {
  Auto,  ///< Exact where memory is the limit (few pairs per expert) and it costs nothing, else Fast
  Exact,  ///< two int8 planes per activation, about 16 bits
  Fast,   ///< one int8 plane
};

/// The values are ggml's type ids, except for those of 240 and more.
enum class QuantType : std::uint8_t {
  // clang-format off
  F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q8_1 = 9,
  Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14, Q8_K = 15,
  IQ2_XXS = 16, IQ2_XS = 17, IQ3_XXS = 18, IQ1_S = 19, IQ4_NL = 20, IQ3_S = 21, IQ2_S = 22,
  IQ4_XS = 23, I8 = 24, I16 = 25, I32 = 26, I64 = 27, F64 = 28, IQ1_M = 29, BF16 = 30,
  TQ1_0 = 34, TQ2_0 = 35, MXFP4 = 39, NVFP4 = 40, Q1_0 = 41, Q2_0 = 42,
  // clang-format on
  /// GPTQ and AWQ groups (marlin_stack.hpp): never in a GGUF file, no blocks along a row.
  INT4 = 240,
  /// FP8: E4M3 codes, of which 128 along a row share an f32 scale. Checkpoints of Hugging Face have
  /// them (their scales of larger blocks are repeated for each row), GGUF files never.
  E4M3 = 241,
  /// A type of a GGUF file that this library does not know: it has a name, and nothing reads it.
  Unknown = 255,
};

/// How the bytes of one role lie in memory.
enum class WeightLayout : std::uint8_t {
  Rows,       ///< as in the file: row after row, blocks along a row
  Panels,     ///< CPU repack: rows side by side (cpp/src/cpu/kernels/README.md)
  CudaUnits,  ///< CUDA repack, on the device: units of 16 rows (cuda/formats/README.md)
};

/// Which rows of the 16-row units of the CUDA layout are a role's.
enum class UnitHalf : std::uint8_t {
  Alone,   ///< 16 rows of this role
  First,   ///< rows 0 .. 7 are of this role (gate), 8 .. 15 of the other (up); both share memory
  Second,  ///< rows 8 .. 15 are of this role (up), 0 .. 7 of the other, in that memory
};

/// What a sorted id counts.
enum class RowSpace : std::uint8_t {
  TokenPairs,  ///< pairs, whose rows a product reads in place
  PackedRows,  ///< packed rows of a bucket plan, gathered before the product
};

// ------------------------------------------------------------------------------------ rows ----

/// Input rows, addressed as (r / inner_count) * outer_stride + (r % inner_count) * inner_stride
/// elements. A rank-2 view has inner_count 1; inner_stride 0 broadcasts one row to all slots. No
/// alignment beyond the element's is promised.
struct InputRows {
  const void* data = nullptr;
  DType dtype = DType::F32;  ///< F32, F16 or BF16
  std::int64_t num_rows = 0;
  std::int64_t cols = 0;
  std::int64_t inner_count = 1;
  std::int64_t outer_stride = 0;
  std::int64_t inner_stride = 0;

  MOESAIC_ANYWHERE std::int64_t element_offset(std::int64_t row) const {
    return (row / inner_count) * outer_stride + (row % inner_count) * inner_stride;
  }
};

/// Output rows of `cols` contiguous elements, `stride` elements apart.
struct OutputRows {
  void* data = nullptr;
  DType dtype = DType::F32;  ///< F32, F16 or BF16
  std::int64_t cols = 0;
  std::int64_t stride = 0;
};

/// Rows of a grouped product: out[destination] = W[expert] * in[source]. All entry forms (pairs,
/// packed rows, buckets, aligned blocks, dispatch lists) reduce to it. Segment s covers entries
/// [offsets[s], offsets[s + 1]), or [s * width, (s + 1) * width) without offsets.
struct RowMap {
  std::int32_t num_segments = 0;
  /// [segments], or null: the segment index. Experts outside [0, E) skip their segment.
  const std::int32_t* expert = nullptr;
  const std::int32_t* offsets = nullptr;      ///< [segments + 1] or null
  std::int32_t width = 1;                     ///< entries per segment without offsets
  const std::int32_t* source = nullptr;       ///< [entries] or null: the entry index
  const std::int32_t* destination = nullptr;  ///< [entries] or null: the entry index
  std::int32_t source_divisor = 1;            ///< the source row is source / source_divisor
  /// Rows of the output; no more than this many entries are real. Destinations outside [0, limit)
  /// are padding, trailing in their segment.
  std::int32_t limit = 0;

  MOESAIC_ANYWHERE std::int32_t begin(std::int32_t s) const {
    return offsets != nullptr ? offsets[s] : s * width;
  }
  MOESAIC_ANYWHERE std::int32_t end(std::int32_t s) const { return begin(s + 1); }
  MOESAIC_ANYWHERE std::int32_t expert_of(std::int32_t s) const {
    return expert != nullptr ? expert[s] : s;
  }
  MOESAIC_ANYWHERE std::int32_t source_of(std::int32_t entry) const {
    return (source != nullptr ? source[entry] : entry) / source_divisor;
  }
  MOESAIC_ANYWHERE std::int32_t destination_of(std::int32_t entry) const {
    return destination != nullptr ? destination[entry] : entry;
  }
  MOESAIC_ANYWHERE bool is_padding(std::int32_t entry) const {
    const std::int32_t to = destination_of(entry);
    return to < 0 || to >= limit;
  }
  /// Entries of segment s without its trailing padding.
  std::int32_t count(std::int32_t s) const {
    const std::int32_t first = begin(s);
    std::int32_t last = end(s);
    while (last > first && is_padding(last - 1)) --last;
    return last - first;
  }
};

// --------------------------------------------------------------------------------- weights ----

/// How an INT4 role lies in its panels (cpp/src/int4/README.md); unset for other types. Columns are
/// stored group after group, in the order of `gather`, each group padded to whole steps of 32.
struct Int4Format {
  std::int64_t group_size = 0;  ///< as in the checkpoint; all columns when there is one group
  std::int64_t groups = 0;
  std::int64_t packed_cols = 0;  ///< columns in memory, a multiple of 32
  std::int32_t scale_cols = 0;   ///< columns of a scale group: 32, 64, 128 or 256
  bool scale_f32 = false;        ///< scales are f32, else f16
  bool zeros = false;            ///< a zero point per scale, else 8 everywhere
  /// [packed_cols]: which column of x each packed column is, -1 for padding; null: its own number.
  const std::int32_t* gather = nullptr;
  std::int64_t gather_stride = 0;  ///< elements to the next expert's `gather`; 0: all share it

  const std::int32_t* gather_of(std::int32_t expert) const {
    return gather != nullptr ? gather + expert * gather_stride : nullptr;
  }
};

/// The matrices of one role: [E, rows, cols] in a quant type.
/// Row panels dealt to NUMA nodes: of every expert, each node has a fixed share in memory of its own.
struct PanelShares {
  std::int32_t count = 0;  ///< of nodes, at least 2
  const std::int64_t* first =
      nullptr;  ///< [count + 1]: share s has panels first[s] .. first[s + 1] - 1
  const std::byte* const* table = nullptr;  ///< [count, slots]: where a share of an expert starts
  std::int64_t slots = 0;                   ///< experts of the table
};

struct WeightRef {
  const std::byte* base = nullptr;          ///< expert e at base + e * expert_stride ...
  const std::byte* const* table = nullptr;  ///< ... or at table[e] when each expert lies elsewhere
  std::int64_t expert_stride = 0;           ///< bytes
  std::int64_t row_stride = 0;              ///< bytes from row to row, or from panel to panel
  std::int32_t num_experts = 0;
  std::int64_t rows = 0;  ///< output features
  std::int64_t cols = 0;  ///< input features
  QuantType type = QuantType::F32;
  WeightLayout layout = WeightLayout::Rows;
  UnitHalf half = UnitHalf::Alone;
  const std::int32_t* slot_map = nullptr;  ///< null, or [E]: slot of each expert, -1 = not resident
  Int4Format int4{};                       ///< for QuantType::INT4, which is never in rows
  /// Null, or where panels lie that are dealt to nodes; `table` is then that of the first share.
  const PanelShares* shares = nullptr;

  const std::byte* expert(std::int32_t e) const {
    const std::int64_t slot = slot_map != nullptr ? slot_map[e] : e;
    return table != nullptr ? table[slot] : base + slot * expert_stride;
  }
  /// Panel `p` of expert `e`, or where it would lie behind the last one. For the panel layout.
  const std::byte* panel(std::int32_t e, std::int64_t p) const {
    if (shares == nullptr) return expert(e) + p * row_stride;
    std::int32_t s = 0;
    while (s + 1 < shares->count && p >= shares->first[s + 1]) ++s;
    const std::int64_t slot = slot_map != nullptr ? slot_map[e] : e;
    return shares->table[s * shares->slots + slot] + (p - shares->first[s]) * row_stride;
  }
  explicit operator bool() const { return base != nullptr || table != nullptr; }
  std::int64_t expert_bytes() const;  ///< one expert's quantised values, without padding
};

/// A low-rank term of a role: y += scale * B[e] (A[e] x). Only the CPU runs it.
struct LowRankRef {
  const float* a = nullptr;  ///< null (no such term) or [E, rank, cols]
  const float* b = nullptr;  ///< [E, rows, rank]
  std::int64_t rank = 0;
  float scale = 0.0F;

  explicit operator bool() const { return a != nullptr; }
};

/// One role as an operation reads it: y = (W x) * scale[e] + bias[e], plus the low-rank term.
struct RoleRef {
  WeightRef ref{};
  const float* scale = nullptr;  ///< null or [E]
  const float* bias = nullptr;   ///< null or [E, rows]
  LowRankRef low_rank{};
};

// ------------------------------------------------------------------------------ activation ----

/// Activation of an expert; g = gate row, u = up row.
enum class ActivationKind : std::uint8_t {
  SwiGlu,             ///< silu(g) * u
  SwiGluClampInput,   ///< silu(min(g, L)) * clamp(u, -L, L)
  SwiGluClampOutput,  ///< min(silu(g), L) * clamp(u, -L, L)
  SwiGluOai,          ///< g' = min(g, L), u' = clamp(u, -L, L): g' * sigmoid(alpha * g') * (u' + 1)
  GeGluTanh,          ///< gelu_tanh(g) * u
  ReGlu,              ///< relu(g) * u
  GeluTanh,           ///< gelu_tanh(u), no gate
  ReluSquared,        ///< relu(u)^2, no gate
  SiTu,               ///< b*tanh(g/b) * sigmoid(g) * lb*tanh(u/lb); lb = 0 means plain u
};

struct Activation {
  ActivationKind kind = ActivationKind::SwiGlu;
  float limit = 7.0F;        ///< L of the clamped forms
  float alpha = 1.702F;      ///< SwiGluOai
  float beta = 1.0F;         ///< SiTu b
  float linear_beta = 0.0F;  ///< SiTu lb
  bool gated() const {
    return kind != ActivationKind::GeluTanh && kind != ActivationKind::ReluSquared;
  }
};

// --------------------------------------------------------------------------------- routing ----

/// What turns a logit into a score.
enum class ScoreFunction : std::uint8_t {
  Softmax,          ///< softmax over all experts, then top-k
  SoftmaxSelected,  ///< top-k on the logits, then softmax over the selected
  Sigmoid,
  SqrtSoftplus,  ///< sqrt(log(1 + exp(logit)))
};
/// The score of a group of experts: the sum of its two best (DeepSeek-V3) or its best
/// (DeepSeek-V2).
enum class GroupReduce : std::uint8_t { Top2Sum, Max };
/// What the scores of the experts in other groups become before top-k. With Zero an expert of a
/// chosen group whose biased score is negative loses to a masked one, as in some models.
enum class GroupMask : std::uint8_t { MinusInfinity, Zero };
/// What keeps the renormalising division from zero.
enum class NormGuard : std::uint8_t {
  None,
  AddEps,    ///< w / (sum + eps)
  ClampMin,  ///< w / max(sum, eps)
};
/// Where the weight of a pair acts.
enum class WeightOn : std::uint8_t {
  Output,
  Input,  ///< x is scaled before the expert (Llama-4), whose output then counts with weight 1
};
/// What the selection reads.
enum class SelectOn : std::uint8_t {
  Scores,
  Logits,
  Given,  ///< ids from the caller or a table by token id; only their weights are computed
};

/// A router without its biases, factored into facts that do not depend on one another. The steps in
/// their order: logits (+ router_bias), score, selection (score or logit, + selection_bias, group
/// limit), top-k, weights from the unbiased scores, renormalisation, scale. Those of each model,
/// with their source, stand in model/model_table.hpp.
struct RouterRules {
  std::int32_t num_experts = 0;  ///< E of the logits, identity experts included
  std::int32_t top_k = 0;
  ScoreFunction score = ScoreFunction::Softmax;
  bool renormalize = true;
  NormGuard guard = NormGuard::None;
  float guard_eps = 0.0F;
  float scale = 1.0F;  ///< factor on the weights; 0 and 1 both mean none
  SelectOn select_on = SelectOn::Scores;
  std::int32_t num_groups = 1;
  std::int32_t groups_used = 1;
  GroupReduce group_reduce = GroupReduce::Top2Sum;
  GroupMask group_mask = GroupMask::MinusInfinity;
  WeightOn weight_on = WeightOn::Output;
  std::int32_t identity_experts = 0;  ///< the last ids, without weights: they give x itself
};

/// topk_ids i32 [T, top_k] and topk_weights f32 [T, top_k], both dense. The slots of a token stand
/// in descending order of what the selection read (which is the order of the weights where no bias
/// and no group takes part); of equal ones the lower expert id comes first. A pair is `token *
/// top_k + slot`; id -1 marks a skipped one.
struct RoutingView {
  std::int32_t* topk_ids = nullptr;
  float* topk_weights = nullptr;
  std::int64_t num_tokens = 0;
  std::int32_t top_k = 0;
  MOESAIC_ANYWHERE std::int64_t num_pairs() const { return num_tokens * top_k; }
};

/// The arrays of a bucket plan, in memory of the caller. A packed row is the position of a pair
/// after a stable sort by expert.
struct BucketPlanView {
  std::int32_t* expert_offsets = nullptr;  ///< [E + 1], exclusive prefix of pairs per expert
  std::int32_t* row_token = nullptr;  ///< [P], token of a packed row; valid up to expert_offsets[E]
  std::int32_t* row_pair = nullptr;   ///< [P], pair of a packed row; valid up to expert_offsets[E]
  std::int32_t* pair_row = nullptr;   ///< [P], packed row of a pair, -1 for a skipped pair
  std::byte* scratch = nullptr;       ///< for builders on a device (Backend::scratch_bytes)
};

/// A bucket plan padded to blocks, in memory of the caller.
struct AlignedRoutingView {
  std::int32_t* sorted_ids = nullptr;  ///< [capacity]; padding is exactly P, trailing in its block
  std::int32_t* block_experts = nullptr;  ///< [block_capacity]; -1 behind the last block
  std::int32_t* num_post_pad = nullptr;   ///< [1]
};

}  // namespace moesaic
