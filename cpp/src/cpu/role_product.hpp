#pragma once

/// The product of one role on its own, from a row map to finished rows: what expert_gemm and linear
/// share. gate_up and down, which do more to a panel while it is in the cache, are built of the
/// pieces of product.hpp themselves.

#include <limits>

#include "cpu/cpu_backend.hpp"
#include "cpu/epilogue.hpp"
#include "cpu/isa.hpp"
#include "cpu/low_rank.hpp"
#include "cpu/product.hpp"
#include "moesaic/context.hpp"

namespace moesaic::cpu {

/// put(rows, values, to) stores `rows` f32 products, scale, bias and low-rank term included, for
/// each row that the map names and each panel; `to` is where they belong in `out`, whose rows are
/// `stride` elements apart.
template <class T, class Put>
void role_product(Context& context, const RoleRef& role, const RowMap& map, const InputRows& in,
                  Precision precision, std::byte* scratch, T* out, std::int64_t stride,
                  const Put& put) {
  const WeightRef& weight = role.ref;
  const IsaKernels& kernels = kernels_of(active_isa(context.tuning()));
  Carver carver(scratch, std::numeric_limits<std::size_t>::max());
  const Buckets buckets = make_buckets(map, weight, carver);
  if (buckets.num == 0) return;
  const LowRankRows low_rank =
      low_rank_rows(context, role, {}, in, map, buckets, nullptr, carver).first;
  const Activations activations = prepare_activations(context, kernels, in, weight, map, buckets,
                                                      planes_of(weight.type, precision), carver);
  const PanelCut cut(weight);
  const std::int64_t jobs = plan_jobs(
      buckets, cut, static_cast<double>(weight.expert_bytes()) / static_cast<double>(cut.panels()),
      2.0 * kPanel * static_cast<double>(weight.cols), context.pool().threads());
  run_jobs(context.pool(), cut, jobs, [&](std::int64_t i, int) {
    const Job job = find_job(buckets, cut, jobs, i);
    const Epilogue epilogue(role, job.bucket->expert);
    run_job(
        weight, activations, map, buckets, job, nullptr,
        [&](int t) {
          const std::int32_t entry = buckets.entries[job.bucket->first + job.first_token + t];
          return out + map.destination_of(entry) * stride;
        },
        [&](std::int64_t row, int rows, float* values, T* to) {
          epilogue.apply(row, rows, values);
          if (low_rank) {
            low_rank.apply(job.bucket->expert, (to - row - out) / stride, row, rows, values);
          }
          put(rows, values, to);
        });
  });
}

}  // namespace moesaic::cpu
