#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <utility>

#include "moesaic/edit.hpp"
#include "weights/check_codes.hpp"
#include "weights/reencode.hpp"

namespace moesaic {
namespace {

Problem problem(std::string what, std::string expected, std::string got, std::string hint = {}) {
  return {.operation = "with_expert",
          .what = std::move(what),
          .expected = std::move(expected),
          .got = std::move(got),
          .hint = std::move(hint)};
}

template <class Values>
void check_count(const Values& values, std::int64_t expected, const std::string& what) {
  require<ShapeError>(values.empty() || std::cmp_equal(values.size(), expected), [&] {
    return problem(what, std::to_string(expected) + " of them", std::to_string(values.size()));
  });
}

/// The low-rank term of one expert.
std::shared_ptr<const LowRankDelta> delta_of(const RoleWeights& from, std::int32_t expert) {
  if (from.delta == nullptr) return nullptr;
  const LowRankDelta& all = *from.delta;
  const auto cut = [expert](const std::vector<float>& values, std::int64_t size) {
    const auto begin = values.begin() + expert * size;
    return std::vector<float>(begin, begin + size);
  };
  return std::make_shared<const LowRankDelta>(LowRankDelta{all.rank, all.scale,
                                                           cut(all.a, all.rank * from.ref.cols),
                                                           cut(all.b, all.rank * from.ref.rows)});
}

/// One role of the new expert as a stack of one, in rows.
RoleWeights edited_role(const ExpertStack& stack, Role role, std::int32_t expert,
                        const RoleEdit& edit) {
  const RoleWeights& from = stack.role(role);
  const WeightRef& ref = from.ref;
  const std::string name = name_of(role);
  require<ShapeError>(static_cast<bool>(ref), [&] {
    return problem("gate", "no values, as the experts are ungated", "some");
  });
  require<ShapeError>(edit.values.empty() || edit.encoded.empty(), [&] {
    return problem(name, "a matrix of values, or an encoded one", "both");
  });
  check_count(edit.values, ref.rows * ref.cols, name + " values");
  check_count(edit.bias, ref.rows, name + " bias values");

  RoleWeights to = weights::allocate_rows(ref.type, 1, ref.rows, ref.cols);
  std::byte* const bytes = weights::writable_rows(to);
  check_count(edit.encoded, to.ref.expert_stride, name + " bytes");
  const float old_scale =
      from.scale != nullptr ? (*from.scale)[static_cast<std::size_t>(expert)] : 1.0F;
  float scale = edit.scale.value_or(old_scale);
  if (!edit.values.empty()) {
    // A matrix of values is the whole product; what stays outside of the encoded one is taken out.
    if (scale == 0.0F) scale = 1.0F;
    std::vector<float> row(static_cast<std::size_t>(ref.cols));
    for (std::int64_t r = 0; r < ref.rows; ++r) {
      std::transform(edit.values.begin() + r * ref.cols, edit.values.begin() + (r + 1) * ref.cols,
                     row.begin(), [scale](float value) { return value / scale; });
      quantize_row(ref.type, row.data(), bytes + r * to.ref.row_stride, ref.cols);
    }
  } else if (!edit.encoded.empty()) {
    weights::check_codes("with_expert", name, ref.type, edit.encoded, ref.cols);
    std::ranges::copy(edit.encoded, bytes);
  } else {
    for (std::int64_t r = 0; r < ref.rows; ++r) {
      encoded_expert_row(ref, expert, r, bytes + r * to.ref.row_stride);
    }
  }
  if (from.scale != nullptr || edit.scale) {
    to.scale = std::make_shared<const std::vector<float>>(1, scale);
  }
  to.delta = delta_of(from, expert);
  if (!edit.bias.empty()) {
    to.bias = std::make_shared<const std::vector<float>>(edit.bias);
  } else if (from.bias != nullptr) {
    const auto begin = from.bias->begin() + expert * ref.rows;
    to.bias = std::make_shared<const std::vector<float>>(begin, begin + ref.rows);
  }
  return to;
}

}  // namespace

ExpertStack with_expert(const ExpertStack& stack, std::int32_t expert, const ExpertEdit& edit,
                        const LoadOptions& options) {
  const auto start = weights::Clock::now();
  weights::check_on_host("with_expert", stack);
  std::vector<ExpertSource> sources;
  for (std::int32_t e = 0; e < stack.num_experts(); ++e) sources.push_back({&stack, e});
  require<ShapeError>(expert >= 0 && expert < stack.num_experts(), [&] {
    return problem("expert", "0 to " + std::to_string(stack.num_experts() - 1),
                   std::to_string(expert));
  });
  ExpertStack::Parts parts;
  parts.shape = stack.shape();
  parts.shape.num_experts = 1;
  for (const auto& [role, to, changes] :
       {std::tuple{Role::Gate, &parts.gate, &edit.gate}, std::tuple{Role::Up, &parts.up, &edit.up},
        std::tuple{Role::Down, &parts.down, &edit.down}}) {
    const bool changed = !changes->values.empty() || !changes->encoded.empty() ||
                         !changes->bias.empty() || changes->scale.has_value();
    if (!stack.role(role).ref && !changed) continue;
    *to = edited_role(stack, role, expert, *changes);
    weights::record(parts.report, role, *to, "expert", "copied", "it was edited");
  }
  const ExpertStack one = weights::finish_like(stack, std::move(parts), options, start);
  sources[static_cast<std::size_t>(expert)] = {&one, 0};
  return gather_experts(sources);
}

}  // namespace moesaic
