#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "moesaic/quantize.hpp"
#include "moesaic/quantize_stack.hpp"
#include "moesaic/thread_pool.hpp"
#include "weights/load.hpp"
#include "weights/reencode.hpp"
#include "weights/role_sources.hpp"

namespace moesaic {
namespace {

void check_view(const ConstTensorView& view, const char* name, const char* expected,
                const std::int64_t (&shape)[3]) {
  require<ShapeError>(view.rank == 3 && view.data != nullptr && view.dim(0) == shape[0] &&
                          view.dim(1) == shape[1] && view.dim(2) == shape[2],
                      [&] {
                        return Problem{
                            .operation = "from_dense_stacks",
                            .what = name,
                            .expected = std::string(expected) + " = [" + std::to_string(shape[0]) +
                                        ", " + std::to_string(shape[1]) + ", " +
                                        std::to_string(shape[2]) + "]",
                            .got = describe(view),
                            .hint = view.rank == 3 && view.dim(0) == shape[0] &&
                                            view.dim(1) == shape[2] && view.dim(2) == shape[1]
                                        ? "transposed: swapaxes(1, 2)"
                                        : ""};
                      });
  require<DeviceError>(view.device.type == DeviceType::Cpu, [&] {
    return Problem{.operation = "from_dense_stacks",
                   .what = name,
                   .expected = "host memory",
                   .got = to_string(view.device),
                   .hint = {}};
  });
}

/// One expert of a role, [rows, cols], with the elements of a row one behind the other; a copy in
/// `memory` where they are not.
ConstTensorView expert_rows(const ConstTensorView& view, std::int64_t expert,
                            std::vector<std::byte>& memory) {
  const std::size_t size = size_of(view.dtype);
  const auto at = [&](std::int64_t row, std::int64_t col) {
    return static_cast<const std::byte*>(view.data) +
           (expert * view.stride(0) + row * view.stride(1) + col * view.stride(2)) *
               static_cast<std::int64_t>(size);
  };
  ConstTensorView rows(at(0, 0), view.dtype, {view.dim(1), view.dim(2)});
  if (view.dim(2) == 1 || view.stride(2) == 1) {
    rows.strides[0] = view.stride(1);
    return rows;
  }
  memory.resize(static_cast<std::size_t>(rows.num_elements()) * size);
  std::byte* to = memory.data();
  for (std::int64_t row = 0; row < view.dim(1); ++row) {
    for (std::int64_t col = 0; col < view.dim(2); ++col, to += size) {
      std::memcpy(to, at(row, col), size);
    }
  }
  rows.data = memory.data();
  return rows;
}

/// Throws unless the importances of a role fit it and the type that it becomes.
void check_importance(const ConstTensorView& importance, const ConstTensorView& values,
                      bool encoded, QuantType type, Role role) {
  const std::string what = std::string("weights['") + name_of(role) + "']";
  require<ConfigError>(encoded, [&] {
    return Problem{.operation = "from_dense_stacks",
                   .what = what,
                   .expected = "none for a role that is not encoded",
                   .got = "an importance matrix",
                   .hint = "quant= names the type of the role"};
  });
  require<UnsupportedError>(takes_importance(type), [&] {
    return Problem{.operation = "from_dense_stacks",
                   .what = what,
                   .expected = "none for " + std::string(traits(type).name),
                   .got = "an importance matrix",
                   .hint = "the encoder of this type has no use for one"};
  });
  const int rank = importance.rank;
  const std::int64_t experts = values.dim(0), cols = values.dim(2);
  const auto one_or = [&](int dim, std::int64_t size) {
    return importance.dim(dim) == size || importance.dim(dim) == 1;
  };
  require<ShapeError>(rank >= 1 && rank <= 3 && importance.dim(rank - 1) == cols &&
                          (cols == 1 || importance.stride(rank - 1) == 1) &&
                          (rank < 2 || one_or(0, experts)) &&
                          (rank < 3 || one_or(1, values.dim(1))),
                      [&] {
                        return Problem{.operation = "from_dense_stacks",
                                       .what = what,
                                       .expected = "[" + std::to_string(cols) + "], or [" +
                                                   std::to_string(experts) + ", " +
                                                   std::to_string(cols) + "] for each expert",
                                       .got = describe(importance),
                                       .hint = {}};
                      });
}

/// What of a role's importances is one expert's: [cols] or [1 or rows, cols].
ConstTensorView importance_of(const ConstTensorView& importance, std::int64_t expert) {
  if (importance.rank < 2) return importance;
  ConstTensorView one = importance;
  one.rank = importance.rank - 1;
  for (int i = 0; i < one.rank; ++i) {
    one.shape[static_cast<std::size_t>(i)] = importance.dim(i + 1);
    one.strides[static_cast<std::size_t>(i)] = importance.stride(i + 1);
  }
  if (importance.dim(0) > 1) {
    one.data = static_cast<const float*>(importance.data) + expert * importance.stride(0);
  }
  return one;
}

/// A role encoded expert after expert, in memory of its own.
RoleWeights encode_role(const ConstTensorView& view, QuantType type,
                        const ConstTensorView& importance, const char* name,
                        const LoadOptions& options, std::int64_t& done, std::int64_t total) {
  RoleWeights weights = weights::allocate_rows(type, static_cast<std::int32_t>(view.dim(0)),
                                               view.dim(1), view.dim(2));
  const WeightRef& ref = weights.ref;
  std::byte* const bytes = weights::writable_rows(weights);
  ThreadPool alone(1);
  ThreadPool& pool = options.pool != nullptr ? *options.pool : alone;
  std::vector<std::byte> copy;
  for (std::int32_t e = 0; e < ref.num_experts; ++e) {
    try {
      quantize_rows(type, expert_rows(view, e, copy), importance_of(importance, e),
                    bytes + e * ref.expert_stride, pool);
    } catch (const ConfigError& error) {
      throw ConfigError(Problem{
          .operation = "from_dense_stacks",
          .what = std::string(name) + " of expert " + std::to_string(e) + ": " + error.what(),
          .expected = {},
          .got = {},
          .hint = {}});
    }
    done += ref.rows * ref.cols * static_cast<std::int64_t>(size_of(view.dtype));
    weights::report_progress(options, done, total, std::string("encode ") + name);
  }
  return weights;
}

}  // namespace

ExpertStack ExpertStack::from_dense_stacks(const ConstTensorView& gate, const ConstTensorView& up,
                                           const ConstTensorView& down, const LoadOptions& options,
                                           Epilogues epilogues) {
  return quantize_dense_stacks(gate, up, down, {}, options, std::move(epilogues));
}

ExpertStack quantize_dense_stacks(const ConstTensorView& gate, const ConstTensorView& up,
                                  const ConstTensorView& down, const RoleTypes& types,
                                  const LoadOptions& options, Epilogues epilogues,
                                  const RoleImportances& importances) {
  using Parts = ExpertStack::Parts;
  const auto start = weights::Clock::now();
  require<ShapeError>(up.rank == 3 && !up.empty() && up.dim(0) <= INT32_MAX, [&] {
    return Problem{.operation = "from_dense_stacks",
                   .what = "up",
                   .expected = "[E, I, H], none of them 0",
                   .got = describe(up),
                   .hint = {}};
  });
  const std::int64_t experts = up.dim(0), intermediate = up.dim(1), hidden = up.dim(2);
  const bool gated = gate.data != nullptr;
  if (gated) check_view(gate, "gate", "[E, I, H]", {experts, intermediate, hidden});
  check_view(up, "up", "[E, I, H]", {experts, intermediate, hidden});
  check_view(down, "down", "[E, H, I]", {experts, hidden, intermediate});

  const auto type_of = [](const char* name, const ConstTensorView& view) {
    return weights::dense_type("from_dense_stacks", name, view);
  };
  struct Source {
    Role role;
    const ConstTensorView* view;
    RoleWeights Parts::* weights;
    QuantType type;
    std::optional<QuantType> wanted;
    const ConstTensorView* importance;

    bool encoded() const { return view->data != nullptr && wanted && *wanted != type; }
  };
  const Source sources[] = {
      {Role::Gate, &gate, &Parts::gate, gated ? type_of("gate", gate) : QuantType::F32, types.gate,
       &importances.gate},
      {Role::Up, &up, &Parts::up, type_of("up", up), types.up, &importances.up},
      {Role::Down, &down, &Parts::down, type_of("down", down), types.down, &importances.down}};
  for (const Source& s : sources) {
    if (s.importance->data == nullptr) continue;
    check_importance(*s.importance, *s.view, s.encoded(), s.wanted.value_or(s.type), s.role);
  }

  Parts parts;
  parts.shape = {static_cast<std::int32_t>(experts), hidden, intermediate};
  const auto bytes = [](const Source& s) {
    return s.view->num_elements() * static_cast<std::int64_t>(size_of(s.view->dtype));
  };
  std::int64_t total = 0, done = 0;
  for (const Source& s : sources) {
    if (s.view->data != nullptr) total += bytes(s);
  }
  for (const Source& s : sources) {
    if (s.view->data == nullptr) continue;
    if (s.encoded()) {
      RoleWeights& weights = parts.*s.weights;
      weights =
          encode_role(*s.view, *s.wanted, *s.importance, name_of(s.role), options, done, total);
      weights::record(parts.report, s.role, weights, "array", "encoded", "asked for");
      parts.report.roles.back().stored = s.type;
      continue;
    }
    parts.*s.weights = weights::copy_role(*s.view);
    weights::record(parts.report, s.role, parts.*s.weights, "array", "copied",
                    "arrays belong to the caller");
    done += bytes(s);
    weights::report_progress(options, done, total, std::string("copy ") + name_of(s.role));
  }
  weights::take_epilogues("from_dense_stacks", parts, std::move(epilogues));
  return weights::finish(std::move(parts), options, start);
}

}  // namespace moesaic
