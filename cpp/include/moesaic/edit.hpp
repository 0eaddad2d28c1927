#pragma once

/// Stacks and layers made of the experts of others. What is there does not change; the results
/// share its weights, and keep them alive.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "moesaic/expert_stack.hpp"
#include "moesaic/layer.hpp"

namespace moesaic {

/// One expert of a stack.
struct ExpertSource {
  const ExpertStack* stack = nullptr;
  std::int32_t expert = 0;
};

/// The stack whose expert i is sources[i]; an expert may come more than once. Each role keeps its
/// type and layout, which have to be one for all sources. An expert of a stack without biases,
/// scales or deltas gets zeros, a 1 and zeros where another has some. Deltas of different scales
/// have them in their B. Errors: ShapeError (no sources, an expert that is not there, other sizes),
/// DTypeError (a role in several types), UnsupportedError (a stack on a device; layouts that
/// differ).
ExpertStack gather_experts(std::span<const ExpertSource> sources);

/// What changes of one role of an expert; empty parts stay as they are.
struct RoleEdit {
  /// The matrix [rows * cols] as dequantize gives it, to be encoded in the type of the role; a scale
  /// that stays is taken out of it first.
  std::vector<float> values{};
  std::vector<std::byte> encoded{};  ///< the matrix as a file holds it, in the type of the role
  std::vector<float> bias{};         ///< [rows]; the other experts of a role without get zeros
  std::optional<float> scale{};
};
struct ExpertEdit {
  RoleEdit gate{}, up{}, down{};
};
/// `stack` with another expert `expert`, laid out by `options` where its layout is not rows. Errors:
/// ShapeError naming the role, UnsupportedError (a type without an encoder, INT4, a device),
/// ConfigError (E4M3 codes of NaN).
ExpertStack with_expert(const ExpertStack& stack, std::int32_t expert, const ExpertEdit& edit,
                        const LoadOptions& options = {});

/// One delta for each role, or null.
struct RoleDeltas {
  std::shared_ptr<const LowRankDelta> gate, up, down;
};
/// `stack` with these deltas in place of its own. Errors: ShapeError naming the role,
/// UnsupportedError (a device).
ExpertStack with_deltas(const ExpertStack& stack, RoleDeltas deltas);

/// The types that roles are encoded in.
struct RoleTypes {
  std::optional<QuantType> gate, up, down;
};
/// `stack` with its deltas added to the matrices of their roles, which are encoded again in `types`
/// (none: the type that the role has); other roles stay. Errors: UnsupportedError (a type without an
/// encoder), ShapeError (one whose blocks do not fit), OutOfMemoryError, OperationCancelled.
ExpertStack bake_deltas(const ExpertStack& stack, const RoleTypes& types,
                        const LoadOptions& options = {});

/// `layer` with experts `ids` as its experts 0, 1, ..: rows and biases of the router and the table
/// of experts by token id follow, identity experts stay last. An expert that comes more than once
/// stands in the table as the first of its copies. Errors: as gather_experts; ConfigError (fewer
/// experts than top_k, experts that leave their group, one that the table needs), UnsupportedError
/// (experts in slow memory).
MoeLayer select_experts(const MoeLayer& layer, std::span<const std::int32_t> ids);

}  // namespace moesaic
