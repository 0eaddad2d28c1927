#include <utility>

#include "weights/load.hpp"

namespace moesaic::weights {

void report_progress(const LoadOptions& options, std::int64_t done, std::int64_t total,
                     const std::string& what) {
  if (!options.progress || options.progress(Progress{done, total, what})) return;
  throw OperationCancelled(Problem{.operation = "load",
                                   .what = what,
                                   .expected = {},
                                   .got = "cancelled by the progress callback",
                                   .hint = {}});
}

void record(LoadReport& report, Role role, const RoleWeights& weights, std::string source,
            std::string decision, std::string reason) {
  report.roles.push_back(RoleReport{.role = role,
                                    .stored = weights.ref.type,
                                    .kept = weights.ref.type,
                                    .source = std::move(source),
                                    .decision = std::move(decision),
                                    .reason = std::move(reason),
                                    .bytes = weights.ref.num_experts * weights.ref.expert_bytes()});
}

}  // namespace moesaic::weights
