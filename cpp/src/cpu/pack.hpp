#pragma once

/// Row panels: kPanelRows rows side by side, so that one vector holds the same 4 columns of every
/// row. kernels/panel_format.hpp says where each byte lies.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "moesaic/expert_stack.hpp"

namespace moesaic::cpu {

inline constexpr int kPanelRows = 16;

/// The inverse of the repack for one row: writes the row's quant blocks exactly as the file had
/// them. Errors: UnsupportedError for weights that are not in panels.
void panel_row(const WeightRef& weight, std::int32_t expert, std::int64_t row, std::byte* blocks);

/// Fills `panels` with how the weights of `rows` would lie in panels, one expert behind the other,
/// without memory of their own; false for types without panels.
bool panel_layout(const WeightRef& rows, WeightRef& panels);

/// A row of zeros, for the rows that the last panel of `from` lacks; empty when it lacks none.
std::vector<std::byte> absent_row(const WeightRef& from);
/// Repacks panels [first, last) of one expert, whose rows start at `expert`, one behind the other
/// into `to`. `from` says how its rows lie; `absent` is its absent_row.
void pack_panels(const WeightRef& from, const std::byte* expert, std::int64_t first,
                 std::int64_t last, std::span<const std::byte> absent, std::byte* to);

/// For rows that cost more than to read: gives a role without rows the panels that
/// LoadOptions::weight_cache has of what its origin names, and returns the reason for reports.
/// Nothing where it has none: once the rows are there, prepare() packs and keeps them. Errors: as
/// find_panels, OperationCancelled.
std::optional<std::string> take_cached_panels(RoleWeights& weights, const LoadOptions& options);

}  // namespace moesaic::cpu
