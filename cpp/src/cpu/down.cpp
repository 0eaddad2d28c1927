#include <cstring>
#include <limits>

#include "cpu/cpu_backend.hpp"
#include "cpu/epilogue.hpp"
#include "cpu/isa.hpp"
#include "cpu/low_rank.hpp"
#include "cpu/ops/convert.hpp"
#include "cpu/product.hpp"
#include "moesaic/context.hpp"

namespace moesaic::cpu {
namespace {

constexpr std::int64_t kSmallPairs = 128;     ///< up to which a job is some rows of all experts
constexpr std::int64_t kLocalFloats = 16384;  ///< 64 KiB of pair rows on a job's stack

/// What the jobs of one down product share.
struct DownPhase {
  Context& context;
  const op::Down& call;
  const Buckets& buckets;
  const Activations& activations;
  const WeightRef& weight;
  const LowRankRows& low_rank;

  /// rows[destination * stride + row - first_row] = W hidden for the job.
  void products(const Job& job, const std::uint8_t* next_weights, float* rows, std::int64_t stride,
                std::int64_t first_row) const {
    const Epilogue epilogue(call.weight, job.bucket->expert);
    run_job(
        weight, activations, call.map, buckets, job, next_weights,
        [&](int t) {
          const std::int32_t entry = buckets.entries[job.bucket->first + job.first_token + t];
          return rows + call.map.destination_of(entry) * stride - first_row;
        },
        [&](std::int64_t row, int count, float* values, float* to) {
          epilogue.apply(row, count, values);
          if (low_rank) {
            const std::int64_t destination = (to - row + first_row - rows) / stride;
            low_rank.apply(job.bucket->expert, destination, row, count, values);
          }
          copy_products(to, values, count);
        });
  }

  /// The weighted sums of columns [first, first + count) of every token; `rows` as above. The same
  /// operations in the same order as Backend::combine.
  void combine(const float* rows, std::int64_t stride, std::int64_t first,
               std::int64_t count) const {
    const op::Combine& combine = call.combine;
    const RoutingView& routing = combine.routing;
    float sum[kLocalFloats / 8];
    float before[kLocalFloats / 8];
    for (std::int64_t token = 0; token < routing.num_tokens; ++token) {
      std::fill_n(sum, count, 0.0F);
      for (std::int32_t slot = 0; slot < routing.top_k; ++slot) {
        const std::int64_t pair = token * routing.top_k + slot;
        if (routing.topk_ids[pair] < 0) continue;
        const std::int64_t row = combine.pair_row != nullptr ? combine.pair_row[pair] : pair;
        const float w = routing.topk_weights != nullptr ? routing.topk_weights[pair] : 1.0F;
        const float* values = rows + row * stride;
        for (std::int64_t i = 0; i < count; ++i) sum[i] += w * values[i];
      }
      const std::int64_t offset = token * combine.out.stride + first;
      if (combine.accumulate) {
        to_f32(combine.out.data, combine.out.dtype, offset, count, before);
        for (std::int64_t i = 0; i < count; ++i) sum[i] = before[i] + sum[i];
      }
      from_f32(sum, count, combine.out.dtype, combine.out.data, offset);
    }
  }

  /// Few pairs: a job is some rows of every expert; its pair rows stay in the cache.
  void few_pairs() const {
    const PanelCut cut(weight);
    const std::int64_t fit = std::min(kLocalFloats / call.map.limit, kLocalFloats / 8) / kPanel;
    const std::int64_t spread = cut.panels() / (std::int64_t{8} * context.pool().threads());
    const std::int64_t range = std::clamp<std::int64_t>(spread, 1, fit);
    const std::int64_t jobs = (cut.largest() + range - 1) / range;
    run_jobs(context.pool(), cut, jobs, [&](std::int64_t i, int) {
      alignas(64) float rows[kLocalFloats];
      const PanelRange panels = part_of(cut, i / jobs, i % jobs, jobs);
      if (panels.first == panels.last) return;  // a smaller share has fewer jobs
      const std::int64_t first = panels.first * kPanel;
      const std::int64_t count = std::min(panels.last * kPanel, weight.rows) - first;
      for (std::int32_t b = 0; b < buckets.num; ++b) {
        const Bucket& bucket = buckets.list[b];
        const std::uint8_t* next_weights =
            b + 1 < buckets.num ? panel_bytes(weight, buckets.list[b + 1].expert, panels.first)
                                : nullptr;
        for (std::int32_t t = 0; t < bucket.count; t += bucket.job_tokens) {
          products({&bucket, t, std::min(bucket.job_tokens, bucket.count - t), panels.first,
                    panels.last},
                   next_weights, rows, count, first);
        }
      }
      combine(rows, count, first, count);
    });
  }

  void many_pairs() const {
    const PanelCut cut(weight);
    const std::int64_t jobs =
        plan_jobs(buckets, cut,
                  static_cast<double>(weight.expert_bytes()) / static_cast<double>(cut.panels()),
                  2.0 * kPanel * static_cast<double>(weight.cols), context.pool().threads());
    run_jobs(context.pool(), cut, jobs, [&](std::int64_t i, int) {
      products(find_job(buckets, cut, jobs, i), nullptr, static_cast<float*>(call.rows),
               weight.rows, 0);
    });
  }
};

}  // namespace

void CpuBackend::down(Context& context, const op::Down& call) const {
  const WeightRef& weight = call.weight.ref;
  const bool few = call.map.limit > 0 && call.map.limit <= kSmallPairs;
  {
    const ScopedZone zone(context, Zone::Down);
    const IsaKernels& kernels = kernels_of(active_isa(context.tuning()));
    Carver carver(call.scratch, std::numeric_limits<std::size_t>::max());
    const Buckets buckets = make_buckets(call.map, weight, carver);
    if (buckets.num > 0) {
      const LowRankRows low_rank =
          low_rank_rows(context, call.weight, {}, call.in, call.map, buckets, nullptr, carver)
              .first;
      const Activations activations =
          prepare_activations(context, kernels, call.in, weight, call.map, buckets,
                              planes_of(weight.type, call.precision), carver);
      const DownPhase phase{context, call, buckets, activations, weight, low_rank};
      if (few) {
        phase.few_pairs();
        return;
      }
      phase.many_pairs();
    }
  }
  const ScopedZone zone(context, Zone::Combine);
  context.backend().combine(context, call.combine);
}

}  // namespace moesaic::cpu
