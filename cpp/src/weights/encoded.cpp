#include <utility>

#include "base/sizes.hpp"
#include "weights/load.hpp"

namespace moesaic {
namespace {

RoleWeights view_role(const ExpertStack::EncodedRole& source, Role role) {
  const auto problem = [&](const char* what, std::string expected, std::string got) {
    return Problem{.operation = "from_encoded",
                   .what = std::string(name_of(role)) + what,
                   .expected = std::move(expected),
                   .got = std::move(got),
                   .hint = {}};
  };
  require<ShapeError>(source.num_experts > 0 && source.rows > 0 && source.cols > 0, [&] {
    return problem(".shape", "[E, rows, cols], none of them 0",
                   "[" + std::to_string(source.num_experts) + ", " + std::to_string(source.rows) +
                       ", " + std::to_string(source.cols) + "]");
  });
  RoleWeights weights;
  WeightRef& ref = weights.ref;
  ref.type = source.type;
  ref.num_experts = source.num_experts;
  ref.rows = source.rows;
  ref.cols = source.cols;
  ref.row_stride = row_bytes(source.type, source.cols);
  const auto needed = static_cast<std::size_t>(
      product_of({ref.num_experts, ref.rows, ref.row_stride}, "from_encoded", name_of(role)));
  ref.expert_stride = ref.rows * ref.row_stride;
  require<ShapeError>(source.bytes == needed, [&] {
    return problem("",
                   std::to_string(needed) + " bytes of " + std::string(traits(source.type).name),
                   std::to_string(source.bytes) + " bytes");
  });
  ref.base = source.data;
  weights.owner = source.owner;
  return weights;
}

}  // namespace

ExpertStack ExpertStack::from_encoded(const EncodedRole& gate, const EncodedRole& up,
                                      const EncodedRole& down, const LoadOptions& options,
                                      Epilogues epilogues) {
  const auto start = weights::Clock::now();
  Parts parts;
  parts.shape = {up.num_experts, up.cols, up.rows};
  const auto take = [&](const EncodedRole& source, Role role, RoleWeights& weights) {
    weights = view_role(source, role);
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
