#pragma once

/// The border between the core and libmoesaic_cuda.so: one function table of plain C types, so that
/// the core needs no CUDA headers and the plug-in no part of the core. The emulator fills the same
/// table (tests/emulation). Pointers are device memory unless they say otherwise; `stream` is a
/// cudaStream_t. Functions give 0 or an error number that Table::error_text explains.
///
/// Launchers neither allocate, copy, synchronise nor read device memory on the host: a call can be
/// captured into a graph, and all sizes of its launches follow from the arguments.

#include <stdint.h>

namespace moesaic::cuda {

/// Raised with every change of a struct or of the table.
inline constexpr int32_t kPluginVersion = 1;

using Stream = void*;

// Values of the enumerations of the core with the same names (checked in backend/arguments.cpp).
inline constexpr int32_t kF32 = 0, kF16 = 1, kBF16 = 2;
inline constexpr int32_t kSoftmax = 0, kSoftmaxSelected = 1, kSigmoid = 2, kSqrtSoftplus = 3;
inline constexpr int32_t kScores = 0, kLogits = 1, kGiven = 2;
inline constexpr int32_t kTop2Sum = 0, kMax = 1;
inline constexpr int32_t kMinusInfinity = 0, kZero = 1;
inline constexpr int32_t kGuardNone = 0, kGuardAddEps = 1, kGuardClampMin = 2;
inline constexpr int32_t kTokenPairs = 0, kPackedRows = 1;

/// Limits of the kernels, checked before a launch.
inline constexpr int32_t kMaxExperts = 4096;
inline constexpr int32_t kMaxTopK = 64;

/// Error numbers of this library; positive ones are the driver's.
inline constexpr int32_t kOk = 0;
inline constexpr int32_t kUnsupported = -1;   ///< no kernel for these arguments
inline constexpr int32_t kBadArguments = -2;  ///< they contradict each other; a bug of the caller

// ------------------------------------------------------------------------------------ views ----

/// Rows of `cols` elements at data + (r / inner_count) * outer_stride + (r % inner_count) *
/// inner_stride elements. No alignment beyond the element's; inner_stride may be 0.
struct RowsArgs {
  const void* data;
  int32_t dtype;  ///< kF32, kF16, kBF16
  int32_t reserved;
  int64_t num_rows;
  int64_t cols;
  int64_t inner_count;
  int64_t outer_stride;
  int64_t inner_stride;
};

/// moesaic::RowMap with its arrays on the device. Segment s holds entries [offsets[s], offsets[s +
/// 1]), or [s * width, (s + 1) * width) without offsets. Entry i reads row source[i] /
/// source_divisor and writes row destination[i]; null arrays mean i. Experts outside [0, E) skip
/// their segment; destinations outside [0, limit) are padding, trailing in their segment.
struct MapArgs {
  const int32_t* expert;       ///< [segments] or null: the segment index
  const int32_t* offsets;      ///< [segments + 1] or null
  const int32_t* source;       ///< [entries] or null
  const int32_t* destination;  ///< [entries] or null
  int32_t num_segments;
  int32_t width;
  int32_t source_divisor;
  int32_t limit;  ///< rows of the output; no more than this many entries are real
};

/// Where the rows of a role stand in the 16-row units of a packed weight.
inline constexpr int32_t kAlone = 0;      ///< 16 rows of this role
inline constexpr int32_t kFirstHalf = 1;  ///< 8 rows of this role (gate), then 8 of the other (up)
inline constexpr int32_t kSecondHalf = 2;

/// One role, packed by cuda/formats: expert e is one run of bytes at base + slot * expert_stride,
/// or at table[slot]; slot = e, or slot_map[e], where -1 is not resident (its segments are
/// skipped). What lies where in the run follows from the fields below alone.
struct WeightArgs {
  const void* base;
  const void* const* table;  ///< [slots] or null
  const int32_t* slot_map;   ///< [E] or null
  int64_t expert_stride;     ///< bytes
  int64_t rows;              ///< output features of this role (without the other half)
  int64_t cols;              ///< input features
  int32_t num_experts;
  int32_t type;  ///< value of moesaic::QuantType
  int32_t half;  ///< kAlone, kFirstHalf, kSecondHalf
  // Of INT4 only, as in moesaic::Int4Format.
  int32_t zeros;       ///< not 0: zero points are stored
  int32_t scale_f32;   ///< not 0: scales are f32, else f16
  int32_t scale_cols;  ///< columns of a stored scale: 32, 64, 128 or 256
  int64_t group_size;
  int64_t packed_cols;    ///< columns in memory
  const int32_t* gather;  ///< [packed_cols] column of x, -1 = padding; null: as they are
  int64_t gather_stride;  ///< elements to the next expert's, 0: all share it
  const float* scale;     ///< [E] or null: products are multiplied by it ...
  const float* bias;      ///< [E, rows] or null: ... then this is added
};

struct ActivationArgs {
  int32_t kind;  ///< value of moesaic::ActivationKind
  float limit;
  float alpha;
  float beta;
  float linear_beta;
};

// ------------------------------------------------------------------------------- operations ----

/// logits [T, E] = x * weight^T, f32, summed in an order that depends on H alone.
struct RouterLogitsArgs {
  RowsArgs x;           ///< [T, H]
  const float* weight;  ///< [E, H]
  float* logits;        ///< [T, E], dense
  int32_t num_experts;
};

/// moesaic::route_rows.
struct RouteArgs {
  const float* logits;  ///< [T, E], rows row_stride elements apart
  int64_t row_stride;
  int64_t num_tokens;
  const float* router_bias;     ///< [E] or null
  const float* selection_bias;  ///< [E] or null
  int32_t* topk_ids;            ///< [T, top_k]
  float* topk_weights;          ///< [T, top_k]
  int32_t* nonfinite;           ///< [T] or null: 1 where the row held NaN or an infinity, else 0
  int32_t num_experts;
  int32_t top_k;
  int32_t score;        ///< kSoftmax ...
  int32_t renormalize;  ///< 0 or 1
  int32_t guard;        ///< kGuardNone ...
  int32_t select_on;    ///< kScores, kLogits, kGiven: topk_ids are read, -1 gives weight 0
  int32_t num_groups;
  int32_t groups_used;
  int32_t group_reduce;  ///< kTop2Sum, kMax
  int32_t group_mask;    ///< kMinusInfinity, kZero
  float guard_eps;
  float scale;  ///< 0 and 1 both mean none
};

/// topk_ids[t] = table[token_ids[t]]; -1 in all slots of a token outside the table.
struct LookUpArgs {
  const int32_t* table;      ///< [num_rows, top_k]
  const int32_t* token_ids;  ///< [T]
  int32_t* topk_ids;         ///< [T, top_k]
  int64_t num_tokens;
  int64_t num_rows;
  int32_t top_k;
  int32_t reserved;
};

/// ids [T] = 0, weights [T] = sigmoid(logits[t]), or 1 without logits: the routing of a shared
/// expert.
struct SharedRoutingArgs {
  const float* logits;  ///< [T] or null
  int32_t* topk_ids;
  float* topk_weights;
  int64_t num_tokens;
};

/// moesaic::build_bucket_plan; ids outside [0, E) count as -1. Behind expert_offsets[E], row_token
/// and row_pair are -1.
struct BucketPlanArgs {
  const int32_t* topk_ids;  ///< [P]
  int32_t* expert_offsets;  ///< [E + 1]
  int32_t* row_token;       ///< [P]
  int32_t* row_pair;        ///< [P]
  int32_t* pair_row;        ///< [P]
  void* scratch;            ///< Table::plan_scratch_bytes, 64-byte aligned
  int64_t num_pairs;
  int32_t top_k;
  int32_t num_experts;
};

/// moesaic::align_block_size.
struct AlignArgs {
  const int32_t* expert_offsets;  ///< [E + 1]
  const int32_t* row_pair;        ///< [P]
  int32_t* sorted_ids;            ///< [capacity], all written
  int32_t* block_experts;         ///< [block_capacity], all written
  int32_t* num_post_pad;          ///< [1]
  int64_t num_pairs;
  int64_t block_capacity;  ///< moesaic::aligned_block_capacity; capacity is this times block_size
  int32_t num_experts;
  int32_t block_size;
  int32_t row_space;  ///< kTokenPairs, kPackedRows
};

/// out [rows, cols] = x / sqrt(mean(x^2) + eps) * weight, f32, summed in an order that depends on
/// cols alone.
struct RmsNormArgs {
  RowsArgs x;
  const float* weight;  ///< [cols], or null: all 1
  float* out;           ///< dense
  float eps;
  int32_t reserved;
};

/// out[r] = x[index[r]], zeros for a negative index.
struct GatherArgs {
  RowsArgs x;
  const int32_t* index;  ///< [rows]
  void* out;             ///< [rows, cols], dense
  int64_t rows;
  int32_t out_dtype;  ///< kF32, or the type of x
};

/// hidden [rows, I], dense f32, from gate and up rows `row_stride` elements apart.
struct ActivateArgs {
  ActivationArgs activation;
  const float* gate;  ///< null for ungated kinds
  const float* up;
  float* hidden;
  int64_t row_stride;
  int64_t rows;
  int64_t intermediate;
};

/// out[t] += x[t] * the sum over slots, in order, of the weights whose id is in [first, first +
/// count). Tokens whose sum is 0 are left alone.
struct IdentityArgs {
  RowsArgs x;                 ///< [T, H]
  const int32_t* topk_ids;    ///< [T, top_k]
  const float* topk_weights;  ///< [T, top_k]
  float* out;                 ///< [T, H], rows out_stride elements apart
  int64_t out_stride;
  int32_t top_k;
  int32_t first;
  int32_t count;
  int32_t reserved;
};

/// out[t] (+)= sum over slots, in order, of weight * rows[pair_row[pair]]. Pairs whose id is
/// outside [0, num_experts) and rows outside [0, P) are skipped.
struct CombineArgs {
  const void* rows;           ///< [P, H], dense
  const int32_t* pair_row;    ///< [P] or null: row = pair
  const int32_t* topk_ids;    ///< [T, top_k]
  const float* topk_weights;  ///< [T, top_k], or null: all 1
  void* out;                  ///< [T, H], rows out_stride elements apart
  int64_t out_stride;
  int64_t num_tokens;
  int64_t hidden_size;
  int32_t rows_dtype;  ///< kF32, kF16, kBF16
  int32_t out_dtype;
  int32_t top_k;
  int32_t num_experts;
  int32_t accumulate;  ///< not 0: add to out
};

/// Rows whose id is outside [0, num_experts) become zero; others are left alone.
struct ZeroSkippedArgs {
  const int32_t* ids;  ///< [rows]
  float* out;          ///< [rows, cols], dense
  int64_t rows;
  int64_t cols;
  int32_t num_experts;
};

/// Every byte of a range; for poisoned workspaces.
struct FillArgs {
  void* data;
  int64_t bytes;
  int32_t value;  ///< 0 .. 255
};

// --------------------------------------------------------------------------------- products ----

/// A run of entries of one expert: what a block of threads works on.
struct Tile {
  int32_t expert;
  int32_t first;  ///< entry
  int32_t count;  ///< 1 .. tile width
  int32_t segment;
};

/// Cuts every segment with work into tiles of up to `width` entries, in the order of the segments.
struct TilesArgs {
  MapArgs map;
  Tile* tiles;         ///< [max_tiles]
  int32_t* num_tiles;  ///< [1]
  int32_t max_tiles;   ///< tiles_bound(map, width): a bound from the sizes alone
  int32_t width;
  int32_t num_experts;
};

/// Tiles that a map can have at most: a segment wastes at most one.
inline constexpr int64_t tiles_bound(const MapArgs& map, int64_t width) {
  const int64_t entries = map.limit;
  const int64_t segments = map.num_segments < entries ? map.num_segments : entries;
  if (map.offsets != nullptr) return segments + entries / width;
  // Fixed widths: the padding may leave work in every segment.
  return int64_t{map.num_segments} * ((map.width + width - 1) / width);
}

/// out[destination] = W[expert] * in[source] (* scale + bias); out is dense [limit, rows].
struct GemmArgs {
  WeightArgs weight;
  MapArgs map;
  RowsArgs in;
  void* out;
  int32_t out_dtype;
  /// Not 0: products of 16 bits of f32 input rows at least; 0: of 8 (bf16) or 11 (f16).
  int32_t exact;
  int32_t batch_invariant;  ///< not 0: the same kernel whatever the number of rows
  void* scratch;            ///< Table::gemm_scratch_bytes, 64-byte aligned, contents undefined
  int64_t scratch_bytes;
};

/// hidden[destination] = activation(gate row, up row); dense [limit, I].
struct GateUpArgs {
  WeightArgs gate;  ///< base and table null for ungated kinds
  WeightArgs up;
  ActivationArgs activation;
  MapArgs map;
  RowsArgs in;
  const float* row_weight;  ///< [limit] or null: factors of the products, by destination
  void* hidden;
  int32_t hidden_dtype;
  int32_t exact;
  int32_t batch_invariant;
  void* scratch;
  int64_t scratch_bytes;
};

/// rows[destination] = W_down * hidden[source], then combine; a kernel may do both and leave `rows`
/// alone. The map holds the pairs of `combine`, each under the expert of its id.
struct DownArgs {
  WeightArgs weight;
  MapArgs map;
  RowsArgs in;  ///< hidden rows, dense
  void* rows;   ///< [P, H] of combine.rows_dtype
  CombineArgs combine;
  int32_t exact;
  int32_t batch_invariant;
  void* scratch;
  int64_t scratch_bytes;
};

/// Sizes that the scratch of a phase depends on: the larger of both phases.
struct GemmScratchArgs {
  int64_t num_rows;  ///< output rows
  int64_t num_in;    ///< input rows
  int64_t cols;      ///< input features, packed
  int64_t out_cols;  ///< output features
  int32_t num_experts;
  int32_t separate;  ///< not 0: gate and up do not share units, so a phase may need room for one
};

/// One kernel, for info, explain, tests and bench. Text lives as long as the table.
struct KernelRow {
  const char* operation;  ///< "expert_gemm", "gate_up", "down"
  const char* name;       ///< mechanical: gate_up_q4_k_mma
  int32_t type;           ///< value of moesaic::QuantType
  int32_t min_arch;       ///< 80, 90
};

// ------------------------------------------------------------------------------------ table ----

struct DeviceProperties {
  char name[256];
  int32_t arch;  ///< 80, 90, ...
  int32_t num_sms;
  int64_t memory_bytes;
  int64_t l2_bytes;
  int32_t driver_version;   ///< as cuDriverGetVersion: 13000
  int32_t runtime_version;  ///< of the plug-in
  int32_t clock_khz;
  int32_t reserved;
};

struct Table {
  int32_t version;      ///< kPluginVersion
  int32_t table_bytes;  ///< sizeof(Table)
  const char* build;    ///< "CUDA 13.0, sm_80 sm_90a"

  // Host functions. The current device is the caller's: set_device gives back the one before.
  const char* (*error_text)(int32_t error);
  int32_t (*device_count)(int32_t* count);
  int32_t (*device_properties)(int32_t device, DeviceProperties* properties);
  int32_t (*set_device)(int32_t device, int32_t* previous);
  int32_t (*allocate)(int64_t bytes, void** memory);
  int32_t (*deallocate)(void* memory);
  /// Between any two of host and device, ordered on the stream.
  int32_t (*copy)(void* to, const void* from, int64_t bytes, Stream stream);
  int32_t (*synchronize)(Stream stream);
  int32_t (*is_capturing)(Stream stream, int32_t* capturing);

  // Sizes.
  int64_t (*plan_scratch_bytes)(int64_t num_pairs, int32_t num_experts);
  int64_t (*gemm_scratch_bytes)(const GemmScratchArgs*);

  // Operations.
  int32_t (*router_logits)(const RouterLogitsArgs*, Stream);
  int32_t (*route)(const RouteArgs*, Stream);
  int32_t (*look_up_experts)(const LookUpArgs*, Stream);
  int32_t (*shared_routing)(const SharedRoutingArgs*, Stream);
  int32_t (*bucket_plan)(const BucketPlanArgs*, Stream);
  int32_t (*align)(const AlignArgs*, Stream);
  int32_t (*gather)(const GatherArgs*, Stream);
  int32_t (*activate)(const ActivateArgs*, Stream);
  int32_t (*combine)(const CombineArgs*, Stream);
  int32_t (*rms_norm)(const RmsNormArgs*, Stream);
  int32_t (*add_identity)(const IdentityArgs*, Stream);
  int32_t (*zero_skipped)(const ZeroSkippedArgs*, Stream);
  int32_t (*fill)(const FillArgs*, Stream);
  int32_t (*gemm)(const GemmArgs*, Stream);
  int32_t (*gate_up)(const GateUpArgs*, Stream);
  int32_t (*down)(const DownArgs*, Stream);

  // Kernels by name.
  const KernelRow* kernels;
  int32_t num_kernels;
  int32_t reserved;
  /// The kernel that `gemm` would run, null where none can.
  const char* (*gemm_name)(const WeightArgs*, int64_t rows);
  /// The same of `down` for pairs that are sorted by expert, or each a segment of its own.
  const char* (*down_name)(const WeightArgs*, int64_t num_pairs, int32_t sorted);
};

}  // namespace moesaic::cuda

/// The one symbol of the plug-in.
extern "C" const moesaic::cuda::Table* moesaic_cuda_plugin(void);
