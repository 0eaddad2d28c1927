#pragma once

/// The rules behind choose_path.

#include <cstdint>
#include <span>
#include <string_view>

#include "moesaic/plan.hpp"
#include "moesaic/tuning.hpp"

namespace moesaic::forward {

struct PrecisionChoice {
  Precision precision;  ///< Exact or Fast
  std::string_view reason;
};
PrecisionChoice choose_precision(std::int64_t num_pairs, std::int32_t num_experts,
                                 const Tuning& tuning);

/// How many of the ids, in host memory, are those of experts: the pairs that cost work.
std::int64_t computed_pairs(std::span<const std::int32_t> ids, std::int32_t num_experts);

/// What an operation by name was asked for, or choose_precision for its rows.
Precision decide(Precision asked, std::int64_t num_pairs, std::int32_t num_experts,
                 const Tuning& tuning);

}  // namespace moesaic::forward
