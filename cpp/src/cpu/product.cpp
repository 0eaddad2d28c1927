#include "cpu/product.hpp"

#include <memory>

#include "cpu/ops/ranges.hpp"
#include "moesaic/context.hpp"

namespace moesaic::cpu {
namespace {

/// Segments of an expert below 0, or of one that is not resident, take no part.
bool skipped(const WeightRef& weight, std::int32_t expert) {
  return expert < 0 || (weight.slot_map != nullptr && weight.slot_map[expert] < 0);
}

Source source_of(DType dtype) {
  switch (dtype) {
    case DType::F16:
      return Source::F16;
    case DType::BF16:
      return Source::BF16;
    default:
      return Source::F32;
  }
}

const void* row_pointer(const InputRows& in, std::int64_t row) {
  const std::int64_t bytes = in.dtype == DType::F32 ? 4 : 2;
  return static_cast<const std::byte*>(in.data) + in.element_offset(row) * bytes;
}

/// Where entry `t` of a bucket lies: its bundle, the tokens of that bundle, and which of them it
/// is.
struct BundlePosition {
  std::uint8_t* bundle;
  int tokens, t;
};
BundlePosition bundle_position(const Activations& a, const Bucket& bucket, std::int32_t t) {
  const std::int32_t first = t / bucket.bundle * bucket.bundle;
  return {a.packed + (bucket.first + first) * a.token_bytes,
          std::min(bucket.bundle, bucket.count - first), t - first};
}

/// The most bytes that one token's activations take, in any of the formats.
std::int64_t worst_token_bytes(std::int64_t cols) { return (cols + 31) / 32 * 32 * 4; }

}  // namespace

const Bucket& bucket_at(const Buckets& buckets, std::int64_t at) {
  const Bucket* b = std::upper_bound(
      buckets.list, buckets.list + buckets.num, at,
      [](std::int64_t position, const Bucket& bucket) { return position < bucket.first; });
  return b[-1];
}

Buckets make_buckets(const RowMap& map, const WeightRef& weight, Carver& carver) {
  Buckets out;
  auto* cursor = carver.take<std::int32_t>(weight.num_experts, "expert entries");
  std::fill_n(cursor, weight.num_experts, 0);
  std::int32_t experts = 0;
  for (std::int32_t s = 0; s < map.num_segments; ++s) {
    const std::int32_t e = map.expert_of(s);
    if (skipped(weight, e)) continue;
    const std::int32_t count = map.count(s);
    if (count > 0 && cursor[e] == 0) ++experts;
    cursor[e] += count;
    out.num_entries += count;
  }
  out.list = carver.take<Bucket>(experts, "buckets");
  out.entries = carver.take<std::int32_t>(out.num_entries, "entries");
  for (std::int32_t e = 0; e < weight.num_experts; ++e) {
    if (cursor[e] == 0) continue;
    Bucket& bucket = *std::construct_at(out.list + out.num++);
    bucket.expert = e;
    bucket.count = cursor[e];
  }
  std::sort(out.list, out.list + out.num, [](const Bucket& a, const Bucket& b) {
    return a.count != b.count ? a.count > b.count : a.expert < b.expert;
  });
  std::int32_t first = 0;
  for (std::int32_t b = 0; b < out.num; ++b) {
    out.list[b].first = first;
    cursor[out.list[b].expert] = first;
    first += out.list[b].count;
  }
  for (std::int32_t s = 0; s < map.num_segments; ++s) {
    const std::int32_t e = map.expert_of(s);
    if (skipped(weight, e)) continue;
    const std::int32_t begin = map.begin(s);
    const std::int32_t count = map.count(s);
    for (std::int32_t i = 0; i < count; ++i) out.entries[cursor[e]++] = begin + i;
  }
  return out;
}

Activations prepare_activations(Context& context, const IsaKernels& kernels, const InputRows& in,
                                const WeightRef& weight, const RowMap& map, const Buckets& buckets,
                                int planes, Carver& carver) {
  for (std::int32_t b = 0; b < buckets.num; ++b) {
    Bucket& bucket = buckets.list[b];
    bucket.kernels = &kernels.products(weight.type, planes, bucket.count);
    const int max_bundle = bucket.kernels->bundle_tokens[planes];
    const std::int32_t bundles = (bucket.count + max_bundle - 1) / max_bundle;
    bucket.bundle = (bucket.count + bundles - 1) / bundles;
    bucket.job_tokens = kMaxTaskTokens / bucket.bundle * bucket.bundle;
  }
  Activations out;
  out.planes = planes;
  const std::int64_t cols = kernel_cols(weight);
  const Int4Format& int4 = weight.int4;
  out.token_bytes = activation_bytes(cols, planes);
  const bool share = 2 * in.num_rows <= buckets.num_entries && int4.gather_stride == 0;
  const std::int64_t work = cols * 4;
  const Source source = source_of(in.dtype);
  if (share) {
    out.rows = carver.take<std::uint8_t>(in.num_rows * out.token_bytes, "activation rows");
    parallel_ranges(
        context.pool(), in.num_rows, work, [&](std::int64_t begin, std::int64_t end, int) {
          for (std::int64_t row = begin; row < end; ++row) {
            kernels.vectors.quantize(row_pointer(in, row), source, cols, planes, int4.gather,
                                     out.rows + row * out.token_bytes, 1, 0);
          }
        });
    // A bucket of one entry reads the quantised row where it is. Such buckets come last.
    if (buckets.num > 0 && buckets.list[0].count == 1) return out;
  }
  out.packed = carver.take<std::uint8_t>(buckets.num_entries * out.token_bytes, "activations");
  parallel_ranges(
      context.pool(), buckets.num_entries, share ? work / 4 : work,
      [&](std::int64_t begin, std::int64_t end, int) {
        const Bucket* bucket = &bucket_at(buckets, begin);
        for (std::int64_t at = begin; at < end; ++at) {
          while (at >= bucket->first + bucket->count) ++bucket;
          if (share && bucket->count == 1) return;
          const BundlePosition to =
              bundle_position(out, *bucket, static_cast<std::int32_t>(at - bucket->first));
          const std::int32_t row = map.source_of(buckets.entries[at]);
          if (share) {
            bucket->kernels->copy_token(out.rows + row * out.token_bytes, cols, planes, to.bundle,
                                        to.tokens, to.t);
          } else {
            bucket->kernels->quantize(row_pointer(in, row), source, cols, planes,
                                      int4.gather_of(bucket->expert), to.bundle, to.tokens, to.t);
          }
        }
      });
  return out;
}

std::size_t product_bytes(std::int32_t num_experts, std::int64_t num_pairs, std::int64_t cols) {
  Carver counter = Carver::counting();
  counter.take<std::int32_t>(num_experts, "expert entries");
  counter.take<Bucket>(std::min<std::int64_t>(num_experts, num_pairs), "buckets");
  counter.take<std::int32_t>(num_pairs, "entries");
  // Rows are quantised once for several entries only when they are at most half as many.
  counter.take<std::uint8_t>(num_pairs / 2 * worst_token_bytes(cols), "activation rows");
  counter.take<std::uint8_t>(num_pairs * worst_token_bytes(cols), "activations");
  return counter.used();
}

std::int64_t plan_jobs(const Buckets& buckets, const PanelCut& cut, double bytes_per_panel,
                       double ops_per_panel_token, int threads) {
  // Roughly what one thread reads from memory and computes per nanosecond. They need not be exact:
  // only the sizes of the jobs depend on them, never a result.
  constexpr double kBytesPerNs = 20.0;
  constexpr double kOpsPerNs = 400.0;
  constexpr double kJobsPerThread = 8.0;
  constexpr double kMinNs = 20e3;
  constexpr double kMaxNs = 500e3;
  const auto panel_ns = [&](std::int64_t tokens) {
    return std::max(bytes_per_panel / kBytesPerNs,
                    ops_per_panel_token * static_cast<double>(tokens) / kOpsPerNs);
  };
  double total = 0;
  for (std::int32_t b = 0; b < buckets.num; ++b) {
    total += static_cast<double>(cut.panels()) * panel_ns(buckets.list[b].count);
  }
  const double target =
      threads == 1 ? kMaxNs : std::clamp(total / (threads * kJobsPerThread), kMinNs, kMaxNs);
  const std::int64_t panels = cut.largest();
  std::int64_t jobs = 0;
  for (std::int32_t b = 0; b < buckets.num; ++b) {
    Bucket& bucket = buckets.list[b];
    const std::int64_t tokens = std::min(bucket.job_tokens, bucket.count);
    const double ideal = target / panel_ns(tokens);
    const std::int64_t most = std::max<std::int64_t>(1, static_cast<std::int64_t>(ideal));
    bucket.panel_jobs = static_cast<std::int32_t>((panels + most - 1) / most);
    bucket.first_job = jobs;
    jobs += std::int64_t{bucket.panel_jobs} *
            ((bucket.count + bucket.job_tokens - 1) / bucket.job_tokens);
  }
  return jobs;
}

Job find_job(const Buckets& buckets, const PanelCut& cut, std::int64_t per_share,
             std::int64_t job) {
  const std::int64_t in_share = job % per_share;
  const Bucket* b = std::upper_bound(
      buckets.list, buckets.list + buckets.num, in_share,
      [](std::int64_t index, const Bucket& bucket) { return index < bucket.first_job; });
  const Bucket& bucket = b[-1];
  const std::int64_t local = in_share - bucket.first_job;
  Job out;
  out.bucket = &bucket;
  out.first_token = static_cast<std::int32_t>(local / bucket.panel_jobs) * bucket.job_tokens;
  out.tokens = std::min(bucket.job_tokens, bucket.count - out.first_token);
  const PanelRange range =
      part_of(cut, job / per_share, local % bucket.panel_jobs, bucket.panel_jobs);
  out.first_panel = range.first;
  out.last_panel = range.last;
  return out;
}

PanelTask job_task(const WeightRef& weight, const Activations& activations, const RowMap& map,
                   const Buckets& buckets, const Job& job) {
  const Bucket& bucket = *job.bucket;
  PanelTask task;
  task.rows_layout = weight.layout == WeightLayout::Rows;
  task.row_stride = weight.row_stride;
  task.cols = kernel_cols(weight);
  task.scale_cols = weight.int4.scale_cols;
  task.scale_f32 = weight.int4.scale_f32;
  task.zeros = weight.int4.zeros;
  task.planes = activations.planes;
  task.tokens = job.tokens;
  task.bundle = std::min(bucket.bundle, job.tokens);
  if (activations.rows != nullptr && bucket.count == 1) {
    const std::int32_t row = map.source_of(buckets.entries[bucket.first]);
    task.activations = activations.rows + row * activations.token_bytes;
  } else {
    task.activations =
        activations.packed + (bucket.first + job.first_token) * activations.token_bytes;
  }
  return task;
}

}  // namespace moesaic::cpu
