#include "forward/choose_path.hpp"

#include <algorithm>

#include "moesaic/forward.hpp"

namespace moesaic {

namespace forward {

PrecisionChoice choose_precision(std::int64_t num_pairs, std::int32_t num_experts,
                                 const Tuning& tuning) {
  if (tuning.precision != Precision::Auto) return {tuning.precision, "asked for"};
  if (tuning.batch_invariant) return {Precision::Exact, "batch_invariant"};
  if (num_pairs <= 2 * static_cast<std::int64_t>(num_experts)) {
    return {Precision::Exact, "at most two pairs per expert: memory is the limit"};
  }
  return {Precision::Fast, "more than two pairs per expert: arithmetic is the limit"};
}

std::int64_t computed_pairs(std::span<const std::int32_t> ids, std::int32_t num_experts) {
  return std::ranges::count_if(
      ids, [num_experts](std::int32_t id) { return id >= 0 && id < num_experts; });
}

Precision decide(Precision asked, std::int64_t num_pairs, std::int32_t num_experts,
                 const Tuning& tuning) {
  if (asked != Precision::Auto) return asked;
  return choose_precision(num_pairs, num_experts, tuning).precision;
}

}  // namespace forward

PathChoice choose_path(std::int64_t num_tokens, std::int64_t num_pairs, std::int32_t num_experts,
                       const Tuning& tuning) {
  PathChoice choice;
  choice.precision = forward::choose_precision(num_pairs, num_experts, tuning).precision;
  if (tuning.gemm == GemmMode::Auto && num_tokens <= 1) {
    choice.path = Path::Gemv;
    choice.reason =
        num_tokens == 0 ? "no tokens: nothing to compute" : "one token: no expert repeats";
    return choice;
  }
  choice.path = tuning.gemm == GemmMode::Aligned ? Path::Aligned : Path::Bucketed;
  choice.reason =
      tuning.gemm == GemmMode::Auto ? "several tokens: experts can repeat" : "gemm was asked for";
  // Packed rows cost a gather and give nothing to kernels that follow a row map.
  choice.row_space =
      tuning.row_space == RowSpaceMode::PackedRows ? RowSpace::PackedRows : RowSpace::TokenPairs;
  return choice;
}

}  // namespace moesaic
