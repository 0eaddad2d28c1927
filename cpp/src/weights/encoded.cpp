#include <utility>

#include "weights/load.hpp"
#include "weights/role_sources.hpp"

namespace moesaic {

ExpertStack ExpertStack::from_encoded(const EncodedRole& gate, const EncodedRole& up,
                                      const EncodedRole& down, const LoadOptions& options,
                                      Epilogues epilogues) {
  const auto start = weights::Clock::now();
  Parts parts;
  parts.shape = {up.num_experts, up.cols, up.rows};
  const auto take = [&](const EncodedRole& source, Role role, RoleWeights& weights) {
    weights = weights::view_role("from_encoded", name_of(role), source);
    weights::record(parts.report, role, weights, "array", "referenced",
                    "the bytes are already encoded");
  };
  if (gate.data != nullptr) take(gate, Role::Gate, parts.gate);
  take(up, Role::Up, parts.up);
  take(down, Role::Down, parts.down);
  weights::take_epilogues("from_encoded", parts, std::move(epilogues));
  return weights::finish(std::move(parts), options, start);
}

}  // namespace moesaic
