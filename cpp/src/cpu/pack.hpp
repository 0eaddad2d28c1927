#pragma once

/// Row panels: kPanelRows rows side by side, so that one vector holds the same 4 columns of every
/// row.

#include <cstddef>
#include <cstdint>

#include "moesaic/expert_stack.hpp"

namespace moesaic::cpu {

inline constexpr int kPanelRows = 16;

/// Inverse of the repack for one row: writes the row's blocks exactly as the file had them.
void panel_row(const WeightRef& weight, std::int32_t expert, std::int64_t row, std::byte* blocks);

}  // namespace moesaic::cpu
