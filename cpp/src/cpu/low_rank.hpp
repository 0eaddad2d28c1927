#pragma once

/// The low-rank term of a product: y += scale * B[e] (A[e] x). A x is computed for all entries of
/// the map before the jobs; the jobs add B (A x) to the rows that they finish.

#include <cstdint>

#include "cpu/product.hpp"

namespace moesaic::cpu {

/// scale * A[e] x for each row that a product writes; empty for a role without a low-rank term.
struct LowRankRows {
  LowRankRef term{};
  std::int64_t rows_of_b = 0;
  const float* values = nullptr;  ///< [limit of the map, rank], by destination

  explicit operator bool() const { return static_cast<bool>(term); }
  /// Adds the term, which is there, to the products of rows [row, row + count) of `expert` for row `destination` of
  /// the output.
  void apply(std::int32_t expert, std::int64_t destination, std::int64_t row, int count,
             float* products) const;
};

/// Bytes that low_rank_rows takes from a Carver for products of up to `num_pairs` rows and roles of
/// `rank` together.
std::size_t low_rank_bytes(std::int64_t num_pairs, std::int64_t rank);

/// A x of one or two roles over the same rows of `in`; `factors` [limit] or null multiplies the
/// rows by destination. Sums run in an order that depends on the number of columns alone.
struct LowRankPair {
  LowRankRows first, second;
};
LowRankPair low_rank_rows(Context& context, const RoleRef& first, const RoleRef& second,
                          const InputRows& in, const RowMap& map, const Buckets& buckets,
                          const float* factors, Carver& carver);

}  // namespace moesaic::cpu
