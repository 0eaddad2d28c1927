#pragma once

/// Experts that come one by one, as checkpoints other than GGUF store them.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "moesaic/expert_stack.hpp"
#include "weights/load.hpp"

namespace moesaic::weights {

/// Gathers encoded matrices into memory of its own, so that a load needs little more than its
/// result.
class Builder {
 public:
  /// How one role comes; the strings go to the report.
  struct RoleSpec {
    QuantType type = QuantType::F32;
    std::string source, decision, reason;
  };

  /// `gate` may be null (ungated experts). With `experts` the stack keeps those of the shape's alone.
  /// Errors: ShapeError (a size below 1, columns that are no multiple of the type's block, an id of
  /// `experts` that is not there or named twice), UnsupportedError (a type without a decoder),
  /// OutOfMemoryError.
  Builder(const StackShape& shape, const RoleSpec* gate, const RoleSpec& up, const RoleSpec& down,
          std::optional<std::vector<std::int32_t>> experts = {});

  /// What the rows of a role will be made of, for LoadOptions::weight_cache.
  struct RoleOrigin {
    Role role;
    WeightOrigin origin;
  };
  /// Before the first add(): takes from the weight cache what it has, and returns the roles of that,
  /// whose rows are not asked for then; the others are kept there by build(). Errors: ShapeError (no
  /// such role), those of check_weight_cache, IoError, OperationCancelled.
  std::vector<Role> find_cached(const std::vector<RoleOrigin>& origins, const LoadOptions& options);

  /// One expert's matrix, row after row (empty: of a role that was in the cache), with its scale and
  /// its bias (empty: none).
  /// Errors: ShapeError (sizes, an expert that is not kept or given twice, no such role), ConfigError
  /// (E4M3 codes of NaN).
  void add(Role role, std::int32_t expert, std::span<const std::byte> rows, float scale = 1.0F,
           std::span<const float> bias = {});

  /// Call once. Errors: ShapeError when matrices or biases are missing; those of the end of a load.
  ExpertStack build(const LoadOptions& options) &&;

 private:
  /// What was gathered of one role so far, by the places of the experts that are kept.
  struct RoleBuffer {
    Role role;
    RoleWeights weights;
    std::byte* memory = nullptr;  ///< null for a role that was in the cache
    std::vector<bool> seen;
    std::vector<float> scales;  ///< [n]
    std::vector<float> biases;  ///< empty or [n * rows]
    std::int64_t with_bias = 0;
    RoleSpec spec;
  };
  RoleBuffer& buffer_of(Role role);
  void make(Role role, const RoleSpec& spec, std::int64_t rows, std::int64_t cols);
  RoleWeights take(RoleBuffer& buffer, LoadReport& report) const;
  std::int32_t id_of(std::size_t place) const;

  StackShape shape_;  ///< of the experts that are kept
  std::optional<KeptExperts> kept_;
  std::vector<RoleBuffer> buffers_;
  Clock::time_point start_ = Clock::now();
};

}  // namespace moesaic::weights
