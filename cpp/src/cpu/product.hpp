#pragma once

/// One grouped product, of which gate_up, down and expert_gemm are made:
///
///   make_buckets         the entries of a row map, sorted by expert
///   prepare_activations  their input rows, quantised, in the bundles that the kernels read
///   plan_jobs            the work, cut into jobs of some tokens x some panels
///   run_jobs             the jobs, each by a thread of the node that its panels lie on
///   run_job              one job on one thread: panel after panel, kernel, then sink
///
/// "Token" here means an entry of the map: a row of x that meets one expert.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/dispatch.hpp"
#include "moesaic/backend.hpp"
#include "moesaic/thread_pool.hpp"
#include "moesaic/workspace.hpp"

namespace moesaic::cpu {

/// The entries of one expert, from all segments that name it, in segment order.
struct Bucket {
  std::int32_t expert = 0;
  std::int32_t first = 0;  ///< position of its first entry in Buckets::entries
  std::int32_t count = 0;
  std::int32_t bundle = 1;      ///< tokens of a bundle of activations
  std::int32_t job_tokens = 1;  ///< tokens of a job, a multiple of `bundle`
  std::int32_t panel_jobs = 1;  ///< jobs that together cover a node's panels for the same tokens
  std::int64_t first_job = 0;   ///< of those of a node
  const ProductKernels* kernels = nullptr;
};

struct Buckets {
  Bucket* list = nullptr;  ///< in descending order of their number of entries
  std::int32_t num = 0;
  std::int32_t* entries = nullptr;  ///< map entries, bucket after bucket
  std::int32_t num_entries = 0;
};

/// The bucket that holds position `at` of Buckets::entries.
const Bucket& bucket_at(const Buckets& buckets, std::int64_t at);

/// Sorts the map's entries by expert, so that a weight is read once in whatever order the pairs
/// came. Entries of experts that are not resident are left out.
Buckets make_buckets(const RowMap& map, const WeightRef& weight, Carver& carver);

/// The input rows of all entries, quantised.
struct Activations {
  int planes = 0;
  std::int64_t token_bytes = 0;
  std::uint8_t* packed = nullptr;  ///< bucket b at b.first * token_bytes, bundle after bundle
  std::uint8_t* rows = nullptr;    ///< a bundle of one token for each source row, or null
};
/// Sets Bucket::kernels, Bucket::bundle and Bucket::job_tokens. Source rows that several entries share are quantised
/// once, unless the experts of `weight` want their columns in different orders.
Activations prepare_activations(Context& context, const IsaKernels& kernels, const InputRows& in,
                                const WeightRef& weight, const RowMap& map, const Buckets& buckets,
                                int planes, Carver& carver);

/// Columns of a row as the kernels read them.
inline std::int64_t kernel_cols(const WeightRef& weight) {
  return weight.type == QuantType::INT4 ? weight.int4.packed_cols : weight.cols;
}
/// Whether both roles read the same activations when their planes are the same.
inline bool same_columns(const WeightRef& a, const WeightRef& b) {
  return a.int4.gather == b.int4.gather && a.int4.gather_stride == b.int4.gather_stride &&
         kernel_cols(a) == kernel_cols(b);
}

/// Bytes that the functions above take from a Carver for a product of up to these sizes.
std::size_t product_bytes(std::int32_t num_experts, std::int64_t num_pairs, std::int64_t cols);

inline constexpr std::int64_t kPanel = 16;  ///< rows of a panel
inline std::int64_t panels_of(const WeightRef& weight) {
  return (weight.rows + kPanel - 1) / kPanel;
}
/// Where a panel (or its first row, in the row layout) lies.
inline const std::uint8_t* panel_bytes(const WeightRef& weight, std::int32_t expert,
                                       std::int64_t panel) {
  return reinterpret_cast<const std::uint8_t*>(weight.layout == WeightLayout::Rows
                                                   ? weight.expert(expert) +
                                                         panel * kPanel * weight.row_stride
                                                   : weight.panel(expert, panel));
}

/// The panels of a role by the nodes that have them: one share of all, where they lie together.
class PanelCut {
 public:
  explicit PanelCut(const WeightRef& weight) : panels_(panels_of(weight)), dealt_(weight.shares) {}
  std::int64_t panels() const { return panels_; }
  std::int32_t shares() const { return dealt_ != nullptr ? dealt_->count : 1; }
  std::int64_t first(std::int64_t share) const {
    return dealt_ != nullptr ? dealt_->first[share] : share * panels_;
  }
  std::int64_t size(std::int64_t share) const { return first(share + 1) - first(share); }
  std::int64_t largest() const {  ///< of the shares' sizes
    std::int64_t most = 0;
    for (std::int32_t s = 0; s < shares(); ++s) most = std::max(most, size(s));
    return most;
  }

 private:
  std::int64_t panels_;
  const PanelShares* dealt_;
};

/// Cuts the buckets into jobs of some tokens x some panels: enough of them for the threads to share
/// the work evenly, none so small that taking it costs more than a few percent. Sets the buckets'
/// job fields and returns the number of jobs of each share, which is the same for all.
/// `bytes_per_panel` are read once per job, `ops_per_panel_token` done for each of its tokens.
std::int64_t plan_jobs(const Buckets& buckets, const PanelCut& cut, double bytes_per_panel,
                       double ops_per_panel_token, int threads);

/// Calls body(job, thread) for the `per_share` jobs of each share, numbered one share behind the
/// other; by the threads of a share's node where the pool has as many nodes as there are shares.
template <class Body>
void run_jobs(ThreadPool& pool, const PanelCut& cut, std::int64_t per_share, const Body& body) {
  if (cut.shares() > 1 && cut.shares() == pool.nodes()) {
    pool.parallel_for_nodes(per_share, body);
  } else {
    pool.parallel_for(cut.shares() * per_share, body);
  }
}

/// Panels [first, last) are part `part` of `parts` of a share; none where it has fewer than parts.
struct PanelRange {
  std::int64_t first, last;
};
inline PanelRange part_of(const PanelCut& cut, std::int64_t share, std::int64_t part,
                          std::int64_t parts) {
  const std::int64_t begin = cut.first(share);
  const std::int64_t size = cut.size(share);
  return {begin + size * part / parts, begin + size * (part + 1) / parts};
}

/// Some tokens of one bucket x some panels of its expert: what one thread does without a break.
struct Job {
  const Bucket* bucket;
  std::int32_t first_token;  ///< in the bucket
  std::int32_t tokens;
  std::int64_t first_panel, last_panel;
};
/// Job number `job` of those that run_jobs counts.
Job find_job(const Buckets& buckets, const PanelCut& cut, std::int64_t per_share, std::int64_t job);

/// The task of a job as run_job gives it to the kernel, but for weights, rows and output, which
/// change from panel to panel.
PanelTask job_task(const WeightRef& weight, const Activations& activations, const RowMap& map,
                   const Buckets& buckets, const Job& job);

/// Copies the products of one panel and token. Nearly always the panel is whole, and then the copy
/// has a constant size.
inline void copy_products(float* to, const float* from, int rows) {
  if (rows == kPanel) {
    std::memcpy(to, from, sizeof(float) * kPanel);
  } else {
    std::memcpy(to, from, sizeof(float) * static_cast<std::size_t>(rows));
  }
}

/// Runs one role over one job. target(t) points to where the products of token t belong: row r goes
/// to target(t)[r]. sink(row, rows, values, to) puts the f32 products of rows [row, row + rows)
/// there, to = target(t) + row. `next_weights` is what the thread reads after this job (null if unknown);
/// its loads start while the last panel is worked on. The lines that the sink will write are
/// fetched before the kernel runs.
template <class Target, class Sink>
void run_job(const WeightRef& weight, const Activations& activations, const RowMap& map,
             const Buckets& buckets, const Job& job, const std::uint8_t* next_weights,
             const Target& target, const Sink& sink) {
  alignas(64) float values[kMaxTaskTokens * kPanel];
  decltype(target(0)) to[kMaxTaskTokens];
  for (int t = 0; t < job.tokens; ++t) to[t] = target(t);
  PanelTask task = job_task(weight, activations, map, buckets, job);
  task.out = values;
  const ProductKernels& kernels = *job.bucket->kernels;
  const PanelKernel kernel = kernels.gemm[static_cast<int>(weight.type)];
  // A thread reads one stream of weights at a time: interleaved streams cost half the bandwidth.
  task.weights = panel_bytes(weight, job.bucket->expert, job.first_panel);
  if (kernels.begin_job != nullptr) kernels.begin_job(weight.type, task);
  for (std::int64_t panel = job.first_panel; panel < job.last_panel; ++panel) {
    const std::int64_t row = panel * kPanel;
    const int rows = static_cast<int>(std::min(kPanel, weight.rows - row));
    const bool last = panel + 1 == job.last_panel;
    const std::uint8_t* next = panel_bytes(weight, job.bucket->expert, panel + 1);
    task.rows = rows;
    task.next_weights = last ? next_weights : next;
    for (int t = 0; t < job.tokens; ++t) __builtin_prefetch(to[t] + row, 1);
    kernel(task);
    task.weights = next;
    for (int t = 0; t < job.tokens; ++t) sink(row, rows, values + t * kPanel, to[t] + row);
  }
  if (kernels.end_job != nullptr) kernels.end_job();
}

}  // namespace moesaic::cpu
