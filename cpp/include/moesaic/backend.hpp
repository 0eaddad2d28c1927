#pragma once

/// What a device must be able to do. The forward (forward/forward.cpp) calls these operations in
/// order; a backend may fuse neighbouring ones. A backend that was not built is registered as
/// absent, with its reason.

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moesaic/config.hpp"
#include "moesaic/expert_stack.hpp"
#include "moesaic/plan.hpp"
#include "moesaic/tuning.hpp"
#include "moesaic/types.hpp"

namespace moesaic {

class Context;

/// Rows of a grouped product: out[destination] = W[expert] * in[source]. All entry forms (pairs,
/// packed rows, buckets, aligned blocks, dispatch lists) reduce to it. Segment s covers entries
/// [offsets[s], offsets[s + 1]), or [s * width, (s + 1) * width) without offsets.
struct RowMap {
  std::int32_t num_segments = 0;
  /// [segments]; null: the segment index; -1: skip the segment
  const std::int32_t* expert = nullptr;
  const std::int32_t* offsets = nullptr;      ///< [segments + 1] or null
  std::int32_t width = 1;                     ///< entries per segment without offsets
  const std::int32_t* source = nullptr;       ///< [entries] or null: the entry index
  const std::int32_t* destination = nullptr;  ///< [entries] or null: the entry index
  std::int32_t source_divisor = 1;            ///< the source row is source / source_divisor
  /// Destinations < 0 or >= limit are padding, trailing in their segment.
  std::int32_t limit = 0;

  std::int32_t begin(std::int32_t s) const { return offsets != nullptr ? offsets[s] : s * width; }
  std::int32_t end(std::int32_t s) const {
    return offsets != nullptr ? offsets[s + 1] : (s + 1) * width;
  }
  std::int32_t expert_of(std::int32_t s) const { return expert != nullptr ? expert[s] : s; }
  std::int32_t source_of(std::int32_t i) const {
    return (source != nullptr ? source[i] : i) / source_divisor;
  }
  std::int32_t destination_of(std::int32_t i) const {
    return destination != nullptr ? destination[i] : i;
  }
  /// Entries of segment s without its trailing padding.
  std::int32_t count(std::int32_t s) const {
    const std::int32_t first = begin(s);
    std::int32_t last = end(s);
    while (last > first && (destination_of(last - 1) < 0 || destination_of(last - 1) >= limit))
      --last;
    return last - first;
  }
};

/// Input rows, addressed as (r / inner_count) * outer_stride + (r % inner_count) * inner_stride
/// elements. A rank-2 view has inner_count 1; inner_stride 0 broadcasts one row to all slots.
struct InputRows {
  const void* data = nullptr;
  DType dtype = DType::F32;
  std::int64_t num_rows = 0;
  std::int64_t cols = 0;
  std::int64_t inner_count = 1;
  std::int64_t outer_stride = 0;
  std::int64_t inner_stride = 0;
  std::int64_t element_offset(std::int64_t row) const {
    return (row / inner_count) * outer_stride + (row % inner_count) * inner_stride;
  }
};
/// From a rank-1, rank-2 or rank-3 view whose last dimension is contiguous (or of size 1). Errors:
/// ShapeError, DTypeError unless f32, f16 or bf16.
InputRows input_rows(const ConstTensorView& view, const char* operation, const char* name);

/// y = W x for each row of the map; `out` is f32 [limit, rows of W], dense.
struct GemmCall {
  const RoleWeights* weights = nullptr;
  RowMap rows;
  InputRows in;
  float* out = nullptr;
  Precision precision = Precision::Exact;  ///< Exact or Fast, already decided
  std::byte* scratch = nullptr;            ///< Backend::scratch_bytes of this size
};

/// hidden[destination] = activation(gate row, up row); f32 [limit, I], dense.
struct GateUpCall {
  const ExpertStack* stack = nullptr;
  Activation activation;
  RowMap rows;
  InputRows x;
  float* hidden = nullptr;
  /// Of the hidden rows: f32, or Backend::working_dtype; then `hidden` is only an address.
  DType working = DType::F32;
  Precision precision = Precision::Exact;
  /// [2, limit, I] (gate rows, then up rows; ungated: up rows only) when the backend does not fuse
  /// the activation, else null.
  float* gate_up = nullptr;
  std::byte* scratch = nullptr;
  /// [limit] factors of the input rows, by destination (LayerPart::InputWeights); null: none. With
  /// them gate and up are (W x) * factor * scale + bias.
  const float* row_weight = nullptr;
};

/// Weighted sum of a token's expert rows, in slot order. Pairs with id -1 are skipped; without
/// weights in the routing all of them are 1.
struct CombineCall {
  const float* rows = nullptr;             ///< f32 [P, H], dense
  const std::int32_t* pair_row = nullptr;  ///< [P], or null: row = pair
  RoutingView routing;
  TensorView out;           ///< [T, H] f32, f16 or bf16; last dimension contiguous
  bool accumulate = false;  ///< add to out instead of assigning
  /// Ids from here on count as -1; 0: the ids have been checked.
  std::int32_t num_experts = 0;
};

/// rows[destination] = W_down * hidden[source], then combine.
struct DownCall {
  const ExpertStack* stack = nullptr;
  RowMap rows;
  const float* hidden = nullptr;  ///< [*, I]
  std::int64_t hidden_rows = 0;
  float* down_rows = nullptr;  ///< [P, H]
  /// Of hidden and down_rows: f32, or Backend::working_dtype; then they are only addresses.
  DType working = DType::F32;
  CombineCall combine;
  Precision precision = Precision::Exact;
  std::byte* scratch = nullptr;
};

/// out[t] += x[t] * the sum, in slot order, of the token's weights with ids in [first, first +
/// count): the identity experts of a routing. Tokens whose sum is 0 are left alone.
struct IdentityCall {
  InputRows x;
  RoutingView routing;
  std::int32_t first = 0;
  std::int32_t count = 0;
  TensorView out;  ///< [T, H] f32; last dimension contiguous
};

/// Sizes that scratch depends on.
struct ScratchQuery {
  StackShape shape;
  std::int64_t num_tokens = 0;
  std::int32_t top_k = 0;
  std::int64_t num_pairs = 0;    ///< rows of the larger of the two phases
  std::int64_t packed_cols = 0;  ///< of the widest INT4 role (Int4Format), which can exceed H and I
  bool shared_units = false;     ///< gate and up lie together (UnitHalf), or one role runs alone
};

/// What a layer may have beyond routed and shared experts.
enum class LayerPart : std::uint8_t {
  InputWeights,     ///< router weights on the experts' input
  IdentityExperts,  ///< ids that pass x through
  GivenIds,         ///< ids from a table or the caller, weights from the router
  Norms,            ///< RMS norms of the inputs or of the latent sum
  LatentExperts,    ///< projections around the experts
};

/// Bytes of an array that a layer holds in host memory.
using HostValues = std::span<const std::byte>;
template <class T>
HostValues host_values(const std::vector<T>& values) {
  return std::as_bytes(std::span(values));
}

/// Asked on every forward, so it allocates nothing.
struct Support {
  bool ok = true;
  std::string_view reason;  ///< why not, or which slower way is taken; lives as long as the backend
};

struct BackendInfo {
  std::string name;  ///< "cpu", "cuda", "metal"
  bool available = true;
  std::string reason;  ///< why it is not
  std::vector<Device> devices;
  std::string detail;  ///< e.g. "avx512vnni (forced by MOESAIC_CPU_ISA)"
};

/// One kernel as listed by `info`, tests and bench.
struct KernelInfo {
  std::string operation;  ///< "expert_gemm"
  QuantType type;
  WeightLayout layout;
  std::string isa;
  std::string name;  ///< mechanical: gemm_q4_k_avx512vnni
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual BackendInfo info() const = 0;
  /// Where the memory it works on lies; the forward compares it with the tensors it is given.
  virtual DeviceType device_type() const { return DeviceType::Cpu; }
  virtual Device device() const { return {device_type(), 0}; }
  virtual std::vector<KernelInfo> kernels() const { return {}; }
  /// The kernel that would run this role, by name; for explain().
  virtual std::string kernel_name(const WeightRef& weight, const Tuning& tuning) const = 0;
  /// The same of `down` for pairs that are sorted by expert, or each a segment of its own.
  virtual std::string down_name(const WeightRef& weight, const Tuning& tuning,
                                std::int64_t num_pairs, bool sorted) const;
  /// Whether the weights can run here.
  virtual Support supports(const WeightRef& weight) const = 0;
  /// Whether layers with this part can run here.
  virtual Support supports_part(LayerPart) const {
    return {false, "not available on this backend"};
  }
  /// Activation and gate_up run as one; no [P, 2I] buffer is needed.
  virtual bool fuses_activation() const { return false; }
  /// Element type of the rows between the phases of a forward whose x has this type.
  virtual DType working_dtype(DType) const { return DType::F32; }

  /// 64-byte aligned; throws OutOfMemoryError.
  virtual void* allocate(std::size_t bytes) const = 0;
  virtual void deallocate(void* memory, std::size_t bytes) const noexcept = 0;
  virtual void copy(void* to, const void* from, std::size_t bytes) const = 0;
  /// A copy in the order of the context's stream.
  virtual void copy_on_stream(Context& context, void* to, const void* from,
                              std::size_t bytes) const;
  /// Sets every byte, in the order of the context's stream.
  virtual void fill(const Context& context, void* memory, std::uint8_t value,
                    std::size_t bytes) const;
  /// The end of every public operation: recorded work goes to the device.
  virtual void submit(Context&) const {}
  virtual void synchronize(Context& context) const = 0;
  /// Announces host values that calls will bring by this very address (router weights, norms, token
  /// tables), which must stay and not change while the result lives. Null where nothing is gained.
  virtual std::shared_ptr<const void> pin(HostValues) const { return nullptr; }
  /// Whether the context's stream records a graph: nothing may then be allocated or read back.
  virtual bool capturing(const Context&) const { return false; }
  /// Changes roles to the layout this backend runs fastest and records it in parts.report.
  virtual void prepare(ExpertStack::Parts& parts, const LoadOptions& options) const = 0;
  virtual std::size_t scratch_bytes(const ScratchQuery& query) const = 0;
  /// f32 elements of scratch that `route` needs.
  virtual std::int64_t route_scratch(const RouterConfig& config, std::int64_t num_tokens,
                                     int threads) const;

  /// Before the first launch of a forward: readies what its launches need of the host's router
  /// (null with a ready routing) and of the host arrays `weights`. Errors: CaptureError where that
  /// cannot be had now.
  virtual void before_launches(Context&, const RouterConfig*, std::initializer_list<HostValues>,
                               std::string_view) const {}

  /// logits f32 [T, E] = x [T, H] * weight [E, H]^T, f32 accumulation in a fixed order. `weight` is
  /// host memory, as a layer holds it.
  virtual void router_logits(Context& context, const InputRows& x, const float* weight,
                             std::int32_t num_experts, float* logits) const = 0;
  /// route_rows; `scratch` has route_scratch elements.
  virtual RouteStats route(Context& context, const float* logits, std::int64_t row_stride,
                           const RouterConfig& config, RoutingView out, float* scratch) const = 0;
  /// Rejects ids < -1 or >= num_experts. A device looks only under `strict`; its operations take
  /// such ids as -1.
  virtual void check_ids(Context& context, const RoutingView& routing, std::int32_t num_experts,
                         std::string_view operation) const;
  /// The ids of out: row token_ids[t] of the host's `table` [*, top_k]. A device gives -1 to all
  /// slots of a token outside the table.
  virtual void look_up_experts(Context& context, std::span<const std::int32_t> table,
                               const std::int32_t* token_ids, RoutingView out) const;
  /// The routing [T, 1] of a shared expert: ids 0, weights sigmoid(logits[t]), or 1 when null.
  virtual void shared_routing(Context& context, const float* logits, RoutingView out) const;
  /// out.scratch has scratch_bytes.
  virtual void bucket_plan(Context& context, const RoutingView& routing, std::int32_t num_experts,
                           BucketPlanView out) const = 0;
  virtual void align(Context& context, const BucketPlanView& plan, std::int64_t num_pairs,
                     std::int32_t num_experts, std::int32_t block_size, RowSpace row_space,
                     AlignedRoutingView out) const = 0;
  /// out[r] = x[index[r]] for r < rows, zeros for a negative index; f32, dense.
  virtual void gather(Context& context, const InputRows& x, const std::int32_t* index,
                      std::int64_t rows, float* out) const = 0;
  virtual void expert_gemm(Context& context, const GemmCall& call) const = 0;
  /// hidden [rows, I], dense, from gate and up rows that lie `row_stride` elements apart; `gate`
  /// may be null for ungated kinds.
  virtual void activate(Context& context, const Activation& activation, const float* gate,
                        const float* up, std::int64_t row_stride, std::int64_t rows,
                        std::int64_t intermediate, float* hidden) const = 0;
  /// The same from one array gate_up [rows, 2I] (gate first; [rows, I] for ungated kinds).
  void activate(Context& context, const Activation& activation, const float* gate_up,
                std::int64_t rows, std::int64_t intermediate, float* hidden) const {
    const std::int64_t up = activation.gated() ? intermediate : 0;
    activate(context, activation, gate_up, gate_up + up, up + intermediate, rows, intermediate,
             hidden);
  }
  virtual void combine(Context& context, const CombineCall& call) const = 0;
  /// Zeroes the rows [rows, cols] whose id is -1 (on a device: outside [0, num_ids)).
  virtual void zero_skipped(Context& context, const std::int32_t* ids, std::int32_t num_ids,
                            std::int64_t rows, std::int64_t cols, float* out) const;
  /// out [rows, cols] f32, dense = x / sqrt(mean(x^2) + eps) * weight; `weight` is host memory.
  /// Asked of backends that support LayerPart::Norms only.
  virtual void rms_norm(Context& context, const InputRows& x, const float* weight, float eps,
                        float* out) const;
  /// Asked of backends that support LayerPart::IdentityExperts only.
  virtual void add_identity(Context& context, const IdentityCall& call) const;

  /// Phases. The defaults compose the operations above.
  virtual void gate_up(Context& context, const GateUpCall& call) const;
  virtual void down(Context& context, const DownCall& call) const;

  /// `bytes` of host memory in memory of this backend. The backend must outlive the result.
  std::shared_ptr<void> upload(const void* from, std::size_t bytes) const;
};

/// Registered backends, the CPU first; absent ones are listed with their reason. The span stays
/// valid; its end moves with register_backend.
std::span<const std::shared_ptr<const Backend>> backends();
/// Of several for one device the latest registered. Throws DeviceError with the reason when the
/// device's backend is absent.
const Backend& backend_for(Device device);
/// Adds a backend for tests; returns a handle that removes it.
std::shared_ptr<void> register_backend(std::shared_ptr<const Backend> backend);

}  // namespace moesaic
