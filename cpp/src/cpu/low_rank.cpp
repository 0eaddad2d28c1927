#include "cpu/low_rank.hpp"

#include "cpu/ops/convert.hpp"
#include "cpu/ops/ranges.hpp"
#include "cpu/ops/vec.hpp"
#include "moesaic/context.hpp"

namespace moesaic::cpu {
namespace {

constexpr std::int64_t kColumns = 1024;  ///< columns of x that are held as f32 at a time

/// The sum of a[i] * b[i] in 8 lanes, which are then added in a fixed tree.
float dot(const float* a, const float* b, std::int64_t count) {
  F4 low{}, high{};
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    low += load4(a + i) * load4(b + i);
    high += load4(a + i + kLanes) * load4(b + i + kLanes);
  }
  float tail = 0.0F;
  for (; i < count; ++i) tail += a[i] * b[i];
  const F4 sum = low + high;
  return ((sum[0] + sum[2]) + (sum[1] + sum[3])) + tail;
}

/// scale * factor * A x for one row of `in`.
void project(const LowRankRef& term, const float* a, const InputRows& in, std::int64_t row,
             float factor, float* out) {
  alignas(16) float block[kColumns];
  std::fill_n(out, term.rank, 0.0F);
  for (std::int64_t first = 0; first < in.cols; first += kColumns) {
    const std::int64_t count = std::min(kColumns, in.cols - first);
    row_to_f32(in, row, first, count, block);
    for (std::int64_t r = 0; r < term.rank; ++r) {
      out[r] += dot(a + r * in.cols + first, block, count);
    }
  }
  for (std::int64_t r = 0; r < term.rank; ++r) out[r] *= term.scale * factor;
}

}  // namespace

void LowRankRows::apply(std::int32_t expert, std::int64_t destination, std::int64_t row, int count,
                        float* products) const {
  const float* const x = values + destination * term.rank;
  const float* const b = term.b + (expert * rows_of_b + row) * term.rank;
  for (int i = 0; i < count; ++i) products[i] += dot(b + i * term.rank, x, term.rank);
}

std::size_t low_rank_bytes(std::int64_t num_pairs, std::int64_t rank) {
  Carver counter = Carver::counting();
  counter.take<float>(num_pairs * rank, "low rank");
  return counter.used();
}

LowRankPair low_rank_rows(Context& context, const RoleRef& first, const RoleRef& second,
                          const InputRows& in, const RowMap& map, const Buckets& buckets,
                          const float* factors, Carver& carver) {
  LowRankPair out{{first.low_rank, first.ref.rows}, {second.low_rank, second.ref.rows}};
  const std::int64_t rank = first.low_rank.rank + second.low_rank.rank;
  if (rank == 0) return out;
  auto* const values = carver.take<float>(map.limit * rank, "low rank");
  float* const rows[] = {values, values + map.limit * first.low_rank.rank};
  out.first.values = rows[0];
  out.second.values = rows[1];
  parallel_ranges(context.pool(), buckets.num_entries, 2 * rank * in.cols,
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t at = begin; at < end; ++at) {
                      const std::int32_t expert = bucket_at(buckets, at).expert;
                      const std::int32_t entry = buckets.entries[at];
                      const std::int64_t to = map.destination_of(entry);
                      const float factor = factors != nullptr ? factors[to] : 1.0F;
                      for (int i = 0; i < 2; ++i) {
                        const LowRankRef& term = (i == 0 ? out.first : out.second).term;
                        if (!term) continue;
                        project(term, term.a + expert * term.rank * in.cols, in,
                                map.source_of(entry), factor, rows[i] + to * term.rank);
                      }
                    }
                  });
  return out;
}

}  // namespace moesaic::cpu
