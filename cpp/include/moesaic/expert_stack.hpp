#pragma once

/// The expert weights of one layer: up to three roles (gate, up, down), each a view of bytes that
/// stay compressed.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moesaic/error.hpp"
#include "moesaic/quant.hpp"
#include "moesaic/types.hpp"

namespace moesaic {

class Backend;
class GgufFile;
class MarlinExpertStack;
class ThreadPool;

struct StackShape {
  std::int32_t num_experts = 0;
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;
  bool operator==(const StackShape&) const = default;
};

enum class Role : std::uint8_t { Gate, Up, Down };

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
  Second,  ///< this role is that other one
};

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

/// What a kernel sees of one role: [E, rows, cols] in a quant type. Plain data, owns nothing.
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
  Int4Format int4{};  ///< set for QuantType::INT4, which is never in the row layout

  const std::byte* expert(std::int32_t e) const {
    const std::int64_t slot = slot_map != nullptr ? slot_map[e] : e;
    return table != nullptr ? table[slot] : base + slot * expert_stride;
  }
  explicit operator bool() const { return base != nullptr || table != nullptr; }
  std::int64_t expert_bytes() const;  ///< bytes of one expert's values, without padding
};

/// One role with what keeps it alive and its epilogue: y = (W x) * scale[e] + bias[e].
struct RoleWeights {
  WeightRef ref;
  std::shared_ptr<const void> owner;
  std::shared_ptr<const std::vector<float>> bias;   ///< null or [E * rows]
  std::shared_ptr<const std::vector<float>> scale;  ///< null or [E]
  /// Copies of bias and scale on the device of the stack; null on the CPU.
  std::shared_ptr<const float> device_bias, device_scale;
};

/// What happened to one role at load, and why.
struct RoleReport {
  Role role;
  QuantType stored;      ///< type in the source
  QuantType kept;        ///< type in memory
  std::string source;    ///< tensor name or "array"
  std::string decision;  ///< "mapped", "read", "copied", "repacked", "dequantized"
  std::string reason;
  std::int64_t bytes = 0;
};
struct LoadReport {
  std::vector<RoleReport> roles;
  double seconds = 0.0;
};

struct Progress {
  std::int64_t done_bytes, total_bytes;
  std::string what;
};
/// Called between pieces of a load; returning false aborts it with OperationCancelled.
using ProgressFn = std::function<bool(const Progress&)>;
struct OperationCancelled : Error {
  using Error::Error;
};

enum class StackLayout : std::uint8_t {
  Auto,  ///< what the backend runs fastest (CPU: panels, own memory)
  File,  ///< the bytes as stored, no copy
};

struct LoadOptions {
  StackLayout layout = StackLayout::Auto;
  std::optional<QuantType> dequantize;  ///< F32, F16 or BF16: decode all roles to it
  const Backend* backend = nullptr;     ///< prepares the weights; null: kept as stored
  ThreadPool* pool = nullptr;
  ProgressFn progress;
};

class ExpertStack {
 public:
  /// Shape, roles and report, as a loader gathers them; moved into a stack by the constructor.
  struct Parts {
    StackShape shape;
    Device device{};   ///< where the roles lie
    RoleWeights gate;  ///< empty for ungated experts
    RoleWeights up;
    RoleWeights down;
    LoadReport report;
    /// The Marlin stacks whose memory the roles view, or null.
    std::shared_ptr<const MarlinExpertStack> gate_up_marlin, down_marlin;
  };

  /// Checks every role against the shape. Errors: ShapeError naming the role.
  explicit ExpertStack(Parts parts);

  /// Copies gate [E, I, H], up [E, I, H] and down [E, H, I], f32, f16 or bf16; `gate` may be a null
  /// view (ungated). Errors: ShapeError and DTypeError naming the tensor.
  static ExpertStack from_dense_stacks(const ConstTensorView& gate, const ConstTensorView& up,
                                       const ConstTensorView& down,
                                       const LoadOptions& options = {});
  /// Encoded arrays as a GGUF tensor holds them, kept where they are while their owner lives.
  /// `gate` may be null (ungated). Errors: ShapeError and UnsupportedError naming the role.
  struct EncodedRole {
    QuantType type = QuantType::F32;
    std::int32_t num_experts = 0;
    std::int64_t rows = 0, cols = 0;
    const std::byte* data = nullptr;
    std::size_t bytes = 0;
    std::shared_ptr<const void> owner;
  };
  static ExpertStack from_encoded(const EncodedRole& gate, const EncodedRole& up,
                                  const EncodedRole& down, const LoadOptions& options = {});
  /// Shapes come from the file. Errors: FormatError (missing or inconsistent tensors, a file
  /// without experts), UnsupportedError (a type without a decoder).
  static ExpertStack load_from_gguf(const std::shared_ptr<GgufFile>& file, std::int32_t layer,
                                    const LoadOptions& options = {});
  static ExpertStack open_and_load(const std::filesystem::path& path, std::int32_t layer,
                                   const LoadOptions& options = {});

  /// INT4 experts: gate_up has K = H and n_per_expert = 2I, columns [gate | up]; down has K = I and
  /// n_per_expert = H. Their memory is shared. Errors: ShapeError.
  static ExpertStack from_marlin(std::shared_ptr<const MarlinExpertStack> gate_up,
                                 std::shared_ptr<const MarlinExpertStack> down,
                                 const LoadOptions& options = {});

  const StackShape& shape() const { return parts_.shape; }
  Device device() const { return parts_.device; }
  std::int32_t num_experts() const { return parts_.shape.num_experts; }
  bool gated() const { return static_cast<bool>(parts_.gate.ref); }
  const RoleWeights& gate() const { return parts_.gate; }
  const RoleWeights& up() const { return parts_.up; }
  const RoleWeights& down() const { return parts_.down; }
  const RoleWeights& role(Role role) const;
  /// The Marlin stack that holds this role (gate and up: one for both), or null.
  const std::shared_ptr<const MarlinExpertStack>& marlin(Role role) const;
  const LoadReport& report() const { return parts_.report; }
  /// "stacked", "per_expert" or "marlin"; derived from the references, so it cannot contradict
  /// them.
  const char* kind() const;
  std::int64_t nbytes() const;  ///< bytes of all roles as they are in memory
  std::int64_t bytes_per_expert() const;
  std::int64_t packed_cols() const;  ///< packed columns of the widest INT4 role; 0 without one
  bool shares_units() const;         ///< whether gate and up share units (UnitHalf)

 private:
  Parts parts_;
};

/// Decodes row `row` of expert `expert` to f32 [cols], whatever the layout. The reference
/// (moe_forward_cpu) reads weights only through this, so that it shares nothing with the kernels.
void dequantize_expert_row(const WeightRef& weight, std::int32_t expert, std::int64_t row,
                           float* out);

}  // namespace moesaic
