#include <cstring>
#include <limits>

#include "cpu/cpu_backend.hpp"
#include "cpu/epilogue.hpp"
#include "cpu/isa.hpp"
#include "cpu/low_rank.hpp"
#include "cpu/product.hpp"
#include "moesaic/context.hpp"

namespace moesaic::cpu {

std::size_t CpuBackend::scratch_bytes(const ScratchQuery& query) const {
  const std::int64_t cols =
      std::max({query.shape.hidden_size, query.shape.intermediate_size, query.packed_cols});
  return product_bytes(query.shape.num_experts, query.num_pairs, cols) +
         low_rank_bytes(query.num_pairs, query.low_rank);
}

void CpuBackend::expert_gemm(Context& context, const op::Gemm& call) const {
  const WeightRef& weight = call.weight.ref;
  const IsaKernels& kernels = kernels_of(active_isa(context.tuning()));
  Carver carver(call.scratch, std::numeric_limits<std::size_t>::max());
  const Buckets buckets = make_buckets(call.map, weight, carver);
  if (buckets.num == 0) return;
  const LowRankRows low_rank =
      low_rank_rows(context, call.weight, {}, call.in, call.map, buckets, nullptr, carver).first;
  const Activations activations =
      prepare_activations(context, kernels, call.in, weight, call.map, buckets,
                          planes_of(weight.type, call.precision), carver);
  auto* const out = static_cast<float*>(call.out);
  const std::int64_t panels = panels_of(weight);
  const std::int64_t jobs = plan_jobs(
      buckets, panels, static_cast<double>(weight.expert_bytes()) / static_cast<double>(panels),
      2.0 * kPanel * static_cast<double>(weight.cols), context.pool().threads());
  context.pool().parallel_for(jobs, [&](std::int64_t i, int) {
    const Job job = find_job(buckets, panels, i);
    const Epilogue epilogue(call.weight, job.bucket->expert);
    run_job(
        kernels, weight, activations, call.map, buckets, job, nullptr,
        [&](int t) {
          const std::int32_t entry = buckets.entries[job.bucket->first + job.first_token + t];
          return out + call.map.destination_of(entry) * weight.rows;
        },
        [&](std::int64_t row, int rows, float* values, float* to) {
          epilogue.apply(row, rows, values);
          if (low_rank)
            low_rank.apply(job.bucket->expert, (to - out) / weight.rows, row, rows, values);
          copy_products(to, values, rows);
        });
  });
}

}  // namespace moesaic::cpu
