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

/// A low-rank term of every expert of a role, added to a product whose weights stay as they are:
/// y += scale * B[e] (A[e] x).
struct LowRankDelta {
  std::int64_t rank = 0;
  float scale = 1.0F;
  std::vector<float> a;  ///< [E * rank * cols]
  std::vector<float> b;  ///< [E * rows * rank]
};

/// What in files a role is made of, for what keeps a repacked copy (LoadOptions::weight_cache).
struct WeightOrigin {
  std::uint64_t file = 0;       ///< GgufFile::fingerprint(), or a hash of a checkpoint's files
  std::string tensor;           ///< name of the tensor, or of the first of several
  std::uint64_t selection = 0;  ///< hash of the tensors, rows and experts that are taken
};

/// One role with what keeps it alive and what follows its product:
/// y = (W x) * scale[e] + bias[e], plus the low-rank term.
struct RoleWeights {
  WeightRef ref;
  std::shared_ptr<const void> owner;
  ReadBytes read;  ///< for weights in a mapping, which what copies them reads by; else empty
  std::shared_ptr<const WeightOrigin> origin;       ///< of rows as a file has them; else null
  std::shared_ptr<const std::vector<float>> bias;   ///< null or [E * rows]
  std::shared_ptr<const std::vector<float>> scale;  ///< null or [E]
  std::shared_ptr<const LowRankDelta> delta;        ///< or null; in host memory
  /// Copies of both on the device of the stack; null on the CPU.
  std::shared_ptr<const float> device_bias, device_scale;

  /// For operations of the backend whose memory holds the role.
  RoleRef view() const {
    const auto values = [](const auto& device, const auto& host) {
      return device != nullptr ? device.get() : host != nullptr ? host->data() : nullptr;
    };
    return {ref, values(device_scale, scale), values(device_bias, bias),
            delta == nullptr
                ? LowRankRef{}
                : LowRankRef{delta->a.data(), delta->b.data(), delta->rank, delta->scale}};
  }
};

/// Biases and scales as the constructors of a stack take them, each empty where a role has none.
struct Epilogues {
  struct Values {
    std::vector<float> bias{};   ///< [E * rows]
    std::vector<float> scale{};  ///< [E]
  };
  Values gate{}, up{}, down{};
};

/// What happened to one role at load, and why.
struct RoleReport {
  Role role;
  QuantType stored;      ///< type in the source
  QuantType kept;        ///< type in memory
  std::string source;    ///< tensor name or "array"
  std::string decision;  ///< "mapped", "read", "copied", "repacked", "cached", "dequantized"
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
  /// The routed experts that loaders of files read and keep, by their ids in the file; unset: all.
  /// Only the CPU runs stacks that keep some.
  std::optional<std::vector<std::int32_t>> experts{};
  /// A folder for the repacked weights of files on the CPU, one file a role. Where it has those of
  /// this load they are mapped, else they are made and kept there. Loaders of mapped GGUF files and
  /// of checkpoints take it.
  std::optional<std::filesystem::path> weight_cache{};
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
                                       const ConstTensorView& down, const LoadOptions& options = {},
                                       Epilogues epilogues = {});
  /// Encoded arrays as a GGUF tensor holds them, kept where they are while their owner lives.
  /// `gate` may be null (ungated). Errors: ShapeError, UnsupportedError and ConfigError (E4M3 codes
  /// of NaN) naming the role.
  struct EncodedRole {
    QuantType type = QuantType::F32;
    std::int32_t num_experts = 0;
    std::int64_t rows = 0, cols = 0;
    const std::byte* data = nullptr;
    std::size_t bytes = 0;
    std::shared_ptr<const void> owner;
  };
  static ExpertStack from_encoded(const EncodedRole& gate, const EncodedRole& up,
                                  const EncodedRole& down, const LoadOptions& options = {},
                                  Epilogues epilogues = {});
  /// Shapes come from the file. With LoadOptions::experts only those are read; they go by their ids
  /// in the file, and a call that needs another is an error. Errors: FormatError (missing or
  /// inconsistent tensors, a file without experts), UnsupportedError (a type without a decoder, some
  /// experts on a device), ShapeError (an id that is not there, or named twice).
  static ExpertStack load_from_gguf(const std::shared_ptr<GgufFile>& file, std::int32_t layer,
                                    const LoadOptions& options = {});
  static ExpertStack open_and_load(const std::filesystem::path& path, std::int32_t layer,
                                   const LoadOptions& options = {});

  /// INT4 experts: gate_up has K = H and n_per_expert = 2I, columns [gate | up]; down has K = I and
  /// n_per_expert = H. Their memory is shared. Errors: ShapeError.
  static ExpertStack from_marlin(std::shared_ptr<const MarlinExpertStack> gate_up,
                                 std::shared_ptr<const MarlinExpertStack> down,
                                 const LoadOptions& options = {}, Epilogues epilogues = {});

  const StackShape& shape() const { return parts_.shape; }
  Device device() const { return parts_.device; }
  std::int32_t num_experts() const { return parts_.shape.num_experts; }
  /// Whether expert `e` of 0 .. E-1 is in memory: LoadOptions::experts may have left it out.
  bool keeps(std::int32_t e) const {
    return parts_.down.ref.slot_map == nullptr || parts_.down.ref.slot_map[e] >= 0;
  }
  std::int32_t num_kept() const;                   ///< experts in memory
  std::vector<std::int32_t> kept_experts() const;  ///< their ids, ascending
  bool gated() const { return static_cast<bool>(parts_.gate.ref); }
  const RoleWeights& gate() const { return parts_.gate; }
  const RoleWeights& up() const { return parts_.up; }
  const RoleWeights& down() const { return parts_.down; }
  const RoleWeights& role(Role role) const;
  /// The Marlin stack that holds this role (gate and up: one for both); null for others, and where
  /// some experts are left out.
  const std::shared_ptr<const MarlinExpertStack>& marlin(Role role) const;
  const LoadReport& report() const { return parts_.report; }
  /// "stacked", "per_expert" or "marlin"; derived from the references, so it cannot contradict
  /// them.
  const char* kind() const;
  std::int64_t nbytes() const;  ///< bytes of all roles of the experts in memory, as they are there
  std::int64_t bytes_per_expert() const;
  std::int64_t packed_cols() const;  ///< packed columns of the widest INT4 role; 0 without one
  bool shares_units() const;         ///< whether gate and up share units (UnitHalf)
  std::int64_t low_rank() const;     ///< the larger of both phases' ranks of deltas; 0 without any

 private:
  Parts parts_;
};

/// Decodes row `row` of expert `expert` to f32 [cols], whatever the layout. The reference
/// (moe_forward_cpu) reads weights only through this, so that it shares nothing with the kernels.
void dequantize_expert_row(const WeightRef& weight, std::int32_t expert, std::int64_t row,
                           float* out);

/// Writes row `row` of expert `expert` as the quant blocks that a file holds, row_bytes(type, cols)
/// bytes, whatever the layout. Errors: as dequantize_expert_row; UnsupportedError for INT4, which
/// has no blocks along a row.
void encoded_expert_row(const WeightRef& weight, std::int32_t expert, std::int64_t row,
                        std::byte* out);

}  // namespace moesaic
