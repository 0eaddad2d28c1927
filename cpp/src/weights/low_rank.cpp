#include <algorithm>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/first_error.hpp"
#include "moesaic/edit.hpp"
#include "moesaic/quantize.hpp"
#include "moesaic/thread_pool.hpp"
#include "weights/reencode.hpp"

namespace moesaic {
namespace {

/// W + scale * B A of every expert, in rows of `type`. The scales of the role stay outside of the
/// matrices, but for a 0, which nothing can be divided by.
RoleWeights baked_role(const RoleWeights& from, QuantType type, const LoadOptions& options,
                       std::int64_t& done, std::int64_t total) {
  const WeightRef& ref = from.ref;
  const LowRankDelta& delta = *from.delta;
  RoleWeights to = weights::allocate_rows(type, ref.num_experts, ref.rows, ref.cols);
  std::byte* const bytes = weights::writable_rows(to);
  to.bias = from.bias;
  std::vector<float> scales;
  if (from.scale != nullptr) scales = *from.scale;

  ThreadPool alone(1);
  ThreadPool& pool = options.pool != nullptr ? *options.pool : alone;
  const auto cols = static_cast<std::size_t>(ref.cols);
  std::vector<float> matrix(static_cast<std::size_t>(ref.rows) * cols);
  std::vector<std::vector<double>> sums(static_cast<std::size_t>(pool.threads()),
                                        std::vector<double>(cols));
  for (std::int32_t e = 0; e < ref.num_experts; ++e) {
    float* const scale = scales.empty() ? nullptr : &scales[static_cast<std::size_t>(e)];
    const bool off = scale != nullptr && *scale == 0.0F;
    if (off) *scale = 1.0F;
    const double factor = static_cast<double>(delta.scale) / (scale != nullptr ? *scale : 1.0F);
    const float* const a = delta.a.data() + e * delta.rank * ref.cols;
    const auto add = [&](std::int64_t row, int thread) {
      const std::span<float> values(matrix.data() + row * ref.cols, cols);
      std::vector<double>& sum = sums[static_cast<std::size_t>(thread)];
      dequantize_expert_row(ref, e, row, values.data());
      if (off) std::ranges::fill(values, 0.0F);
      std::ranges::copy(values, sum.begin());
      const float* const b = delta.b.data() + (e * ref.rows + row) * delta.rank;
      for (std::int64_t r = 0; r < delta.rank; ++r) {
        const double weight = factor * static_cast<double>(b[r]);
        for (std::size_t c = 0; c < cols; ++c) {
          sum[c] += weight * static_cast<double>(a[r * ref.cols + static_cast<std::int64_t>(c)]);
        }
      }
      std::ranges::transform(sum, values.begin(), [](double v) { return static_cast<float>(v); });
    };
    FirstError error;
    pool.parallel_for(
        ref.rows, [&](std::int64_t row, int thread) { error.during([&] { add(row, thread); }); });
    error.rethrow();
    quantize_rows(type, {matrix.data(), DType::F32, {ref.rows, ref.cols}}, {},
                  bytes + e * to.ref.expert_stride, pool);
    done += to.ref.expert_stride;
    weights::report_progress(options, done, total, "bake");
  }
  if (!scales.empty()) to.scale = std::make_shared<const std::vector<float>>(std::move(scales));
  return to;
}

}  // namespace

ExpertStack with_deltas(const ExpertStack& stack, RoleDeltas deltas) {
  ExpertStack::Parts parts = weights::parts_of(stack);
  parts.gate.delta = std::move(deltas.gate);
  parts.up.delta = std::move(deltas.up);
  parts.down.delta = std::move(deltas.down);
  for (RoleReport& report : parts.report.roles) {
    const RoleWeights& weights = report.role == Role::Gate ? parts.gate
                                 : report.role == Role::Up ? parts.up
                                                           : parts.down;
    report.reason = weights.delta == nullptr ? "the weights of another stack"
                                             : "the weights of another stack, with a low-rank "
                                               "delta of rank " +
                                                   std::to_string(weights.delta->rank);
    report.decision = "referenced";
    report.bytes = weights::role_bytes(weights);
  }
  return ExpertStack(std::move(parts));
}

ExpertStack bake_deltas(const ExpertStack& stack, const RoleTypes& types,
                        const LoadOptions& options) {
  const auto start = weights::Clock::now();
  weights::check_on_host("bake_deltas", stack);
  ExpertStack::Parts parts = weights::parts_of(stack);
  struct Baked {
    Role role;
    RoleWeights* weights;
    QuantType type;
  };
  std::vector<Baked> roles;
  std::int64_t total = 0, done = 0;
  for (const auto& [role, weights, type] :
       {std::tuple{Role::Gate, &parts.gate, types.gate}, std::tuple{Role::Up, &parts.up, types.up},
        std::tuple{Role::Down, &parts.down, types.down}}) {
    if (weights->delta == nullptr) continue;
    const WeightRef& ref = weights->ref;
    roles.push_back({role, weights, type.value_or(ref.type)});
    require<UnsupportedError>(has_encoder(roles.back().type), [&, role = role] {
      return Problem{.operation = "bake_deltas",
                     .what = name_of(role),
                     .expected = "a type with an encoder",
                     .got = std::string(traits(roles.back().type).name),
                     .hint = "ask for another type"};
    });
    total += ref.num_experts * ref.rows * row_bytes(roles.back().type, ref.cols);
  }
  if (roles.empty()) return stack;
  for (const Baked& baked : roles) {
    *baked.weights = baked_role(*baked.weights, baked.type, options, done, total);
    (baked.role == Role::Down ? parts.down_marlin : parts.gate_up_marlin) = nullptr;
    for (RoleReport& report : parts.report.roles) {
      if (report.role != baked.role) continue;
      report.kept = baked.type;
      report.decision = "encoded";
      report.reason = "a low-rank delta was added";
      report.bytes = weights::role_bytes(*baked.weights);
    }
  }
  return weights::finish_like(stack, std::move(parts), options, start);
}

}  // namespace moesaic
