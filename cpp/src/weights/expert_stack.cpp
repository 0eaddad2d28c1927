#include "moesaic/expert_stack.hpp"

#include <algorithm>
#include <utility>

#include "moesaic/backend.hpp"
#include "weights/load.hpp"

namespace moesaic {

std::int64_t WeightRef::expert_bytes() const {
  std::int64_t bytes = rows * row_bytes(type, cols);
  if (type == QuantType::INT4) {
    bytes += rows * int4.groups * ((int4.scale_f32 ? 4 : 2) + (int4.zeros ? 1 : 0));
  }
  return bytes;
}

namespace {

std::string dims(std::int64_t a, std::int64_t b, std::int64_t c) {
  return "[" + std::to_string(a) + ", " + std::to_string(b) + ", " + std::to_string(c) + "]";
}

void check_count(const char* role, const char* part, std::size_t got, std::int64_t expected) {
  require<ShapeError>(static_cast<std::int64_t>(got) == expected, [&] {
    return Problem{.operation = "ExpertStack",
                   .what = std::string(role) + "." + part,
                   .expected = std::to_string(expected) + " values",
                   .got = std::to_string(got),
                   .hint = {}};
  });
}

void check_delta(const LowRankDelta& delta, const char* role, std::int64_t experts,
                 std::int64_t rows, std::int64_t cols) {
  require<ShapeError>(delta.rank >= 1, [&] {
    return Problem{.operation = "ExpertStack",
                   .what = std::string(role) + ".delta",
                   .expected = "a rank of at least 1",
                   .got = std::to_string(delta.rank),
                   .hint = {}};
  });
  check_count(role, "delta.a", delta.a.size(), experts * delta.rank * cols);
  check_count(role, "delta.b", delta.b.size(), experts * delta.rank * rows);
}

void check_role(const RoleWeights& weights, Role role, const StackShape& shape) {
  const WeightRef& ref = weights.ref;
  const char* name = name_of(role);
  const bool is_down = role == Role::Down;
  const std::int64_t rows = is_down ? shape.hidden_size : shape.intermediate_size;
  const std::int64_t cols = is_down ? shape.intermediate_size : shape.hidden_size;
  require<ShapeError>(static_cast<bool>(ref), [&] {
    return Problem{.operation = "ExpertStack",
                   .what = name,
                   .expected = "weights " + dims(shape.num_experts, rows, cols),
                   .got = "none",
                   .hint = {}};
  });
  require<ShapeError>(ref.num_experts == shape.num_experts && ref.rows == rows && ref.cols == cols,
                      [&] {
                        return Problem{.operation = "ExpertStack",
                                       .what = name,
                                       .expected = dims(shape.num_experts, rows, cols),
                                       .got = dims(ref.num_experts, ref.rows, ref.cols),
                                       .hint = "gate and up are [E, I, H], down is [E, H, I]"};
                      });
  const QuantTraits& facts = traits(ref.type);
  const bool int4 =
      ref.type == QuantType::INT4 && ref.layout != WeightLayout::Rows && ref.int4.packed_cols > 0;
  require<UnsupportedError>(facts.dequantize != nullptr || int4, [&] {
    return Problem{.operation = "ExpertStack",
                   .what = name,
                   .expected = "a weight type with a decoder",
                   .got = std::string(facts.name),
                   .hint = {}};
  });
  require<ShapeError>(cols % facts.block_elems == 0, [&] {
    return Problem{.operation = "ExpertStack",
                   .what = std::string(name) + " columns",
                   .expected = "a multiple of " + std::to_string(facts.block_elems) + " (" +
                               std::string(facts.name) + ")",
                   .got = std::to_string(cols),
                   .hint = {}};
  });
  if (ref.layout == WeightLayout::Rows) {
    const std::int64_t bytes = row_bytes(ref.type, cols);
    require<ShapeError>(ref.row_stride >= bytes, [&] {
      return Problem{.operation = "ExpertStack",
                     .what = std::string(name) + " row stride",
                     .expected = "at least " + std::to_string(bytes) + " bytes",
                     .got = std::to_string(ref.row_stride),
                     .hint = {}};
    });
    const std::int64_t expert_span = (rows - 1) * ref.row_stride + bytes;
    require<ShapeError>(
        ref.table != nullptr || shape.num_experts == 1 || ref.expert_stride >= expert_span, [&] {
          return Problem{.operation = "ExpertStack",
                         .what = std::string(name) + " expert stride",
                         .expected = "at least " + std::to_string(expert_span) + " bytes",
                         .got = std::to_string(ref.expert_stride),
                         .hint = {}};
        });
  }
  if (weights.bias) check_count(name, "bias", weights.bias->size(), shape.num_experts * rows);
  if (weights.scale) check_count(name, "scale", weights.scale->size(), shape.num_experts);
  if (weights.delta != nullptr) check_delta(*weights.delta, name, shape.num_experts, rows, cols);
}

}  // namespace

void weights::check_parts(const ExpertStack::Parts& parts) {
  const StackShape& shape = parts.shape;
  require<ShapeError>(
      shape.num_experts >= 1 && shape.hidden_size >= 1 && shape.intermediate_size >= 1, [&] {
        return Problem{.operation = "ExpertStack",
                       .what = "shape",
                       .expected = "E, I and H of at least 1",
                       .got = dims(shape.num_experts, shape.intermediate_size, shape.hidden_size),
                       .hint = {}};
      });
  if (parts.gate.ref) check_role(parts.gate, Role::Gate, shape);
  check_role(parts.up, Role::Up, shape);
  check_role(parts.down, Role::Down, shape);
  for (const RoleWeights* role : {&parts.gate, &parts.up, &parts.down}) {
    require<ShapeError>(role->ref || role->delta == nullptr, [] {
      return Problem{.operation = "ExpertStack",
                     .what = "gate.delta",
                     .expected = "none, as the experts are ungated",
                     .got = "one",
                     .hint = {}};
    });
    require<UnsupportedError>(role->delta == nullptr || parts.device.type == DeviceType::Cpu, [&] {
      return Problem{.operation = "ExpertStack",
                     .what = "low-rank deltas",
                     .expected = "weights on the CPU, which alone runs them",
                     .got = to_string(parts.device),
                     .hint = "bake the deltas before the weights go to a device"};
    });
  }
}

void weights::take_epilogues(const char* operation, ExpertStack::Parts& parts,
                             Epilogues epilogues) {
  const auto share = [](std::vector<float>& values) {
    return values.empty() ? nullptr : std::make_shared<const std::vector<float>>(std::move(values));
  };
  for (const auto& [role, values] :
       {std::pair{&parts.gate, &epilogues.gate}, std::pair{&parts.up, &epilogues.up},
        std::pair{&parts.down, &epilogues.down}}) {
    require<ShapeError>(role->ref || (values->bias.empty() && values->scale.empty()), [&] {
      return Problem{.operation = operation,
                     .what = "gate",
                     .expected = "no bias and no scale, as there are no weights",
                     .got = "some",
                     .hint = {}};
    });
    role->bias = share(values->bias);
    role->scale = share(values->scale);
  }
}

ExpertStack::Parts weights::parts_of(const ExpertStack& stack) {
  ExpertStack::Parts parts;
  parts.shape = stack.shape();
  parts.device = stack.device();
  parts.gate = stack.gate();
  parts.up = stack.up();
  parts.down = stack.down();
  parts.report = stack.report();
  parts.gate_up_marlin = stack.marlin(Role::Up);
  parts.down_marlin = stack.marlin(Role::Down);
  return parts;
}

void weights::check_weight_cache(const char* operation, const LoadOptions& options) {
  const auto problem = [&](std::string expected, std::string got, std::string hint) {
    return Problem{.operation = operation,
                   .what = "weight_cache",
                   .expected = std::move(expected),
                   .got = std::move(got),
                   .hint = std::move(hint)};
  };
  const Backend* const backend = options.backend;
  require<UnsupportedError>(backend == nullptr || backend->device_type() == DeviceType::Cpu, [&] {
    return problem("weights on the CPU", to_string(backend->device()), {});
  });
  require<ConfigError>(backend != nullptr && options.layout == StackLayout::Auto, [&] {
    return problem("a layout that repacks weights", "weights that stay as the file has them",
                   "the file itself is mapped then");
  });
  require<ConfigError>(!options.dequantize, [&] {
    return problem("weights in the type of the file", "dequantize", "leave out one of the two");
  });
}

ExpertStack weights::finish(ExpertStack::Parts parts, const LoadOptions& options,
                            Clock::time_point start) {
  check_parts(parts);
  if (options.dequantize) dequantize_roles(parts, *options.dequantize, options);
  if (options.backend != nullptr) options.backend->prepare(parts, options);
  parts.report.seconds = std::chrono::duration<double>(Clock::now() - start).count();
  return ExpertStack(std::move(parts));
}

ExpertStack::ExpertStack(Parts parts) : parts_(std::move(parts)) { weights::check_parts(parts_); }

const RoleWeights& ExpertStack::role(Role role) const {
  switch (role) {
    case Role::Gate:
      return parts_.gate;
    case Role::Up:
      return parts_.up;
    case Role::Down:
      break;
  }
  return parts_.down;
}

const char* ExpertStack::kind() const {
  if (parts_.down.ref.type == QuantType::INT4) return "marlin";
  // A stack of its own whose panels are dealt to nodes has a table too, but keeps its stride.
  const WeightRef& down = parts_.down.ref;
  const bool own = down.shares != nullptr && down.expert_stride > 0;
  return down.table != nullptr && !own ? "per_expert" : "stacked";
}

std::int64_t ExpertStack::bytes_per_expert() const {
  std::int64_t bytes = 0;
  for (const RoleWeights* role : {&parts_.gate, &parts_.up, &parts_.down}) {
    if (role->ref) bytes += role->ref.expert_bytes();
    if (role->delta == nullptr) continue;
    bytes += role->delta->rank * (role->ref.rows + role->ref.cols) *
             static_cast<std::int64_t>(sizeof(float));
  }
  return bytes;
}

std::int64_t ExpertStack::packed_cols() const {
  std::int64_t cols = 0;
  for (const RoleWeights* role : {&parts_.gate, &parts_.up, &parts_.down}) {
    cols = std::max(cols, role->ref.int4.packed_cols);
  }
  return cols;
}

std::int64_t ExpertStack::low_rank() const {
  const auto rank = [](const RoleWeights& role) {
    return role.delta != nullptr ? role.delta->rank : 0;
  };
  return std::max(rank(parts_.gate) + rank(parts_.up), rank(parts_.down));
}

bool ExpertStack::shares_units() const {
  const WeightRef& gate = parts_.gate.ref;
  const WeightRef& up = parts_.up.ref;
  return gate.half == UnitHalf::First && up.half == UnitHalf::Second && gate.base == up.base &&
         gate.table == up.table;
}

std::int32_t ExpertStack::num_kept() const {
  const std::int32_t* const slots = parts_.down.ref.slot_map;
  if (slots == nullptr) return num_experts();
  return static_cast<std::int32_t>(
      std::count_if(slots, slots + num_experts(), [](std::int32_t slot) { return slot >= 0; }));
}

std::vector<std::int32_t> ExpertStack::kept_experts() const {
  std::vector<std::int32_t> ids;
  for (std::int32_t e = 0; e < num_experts(); ++e) {
    if (keeps(e)) ids.push_back(e);
  }
  return ids;
}

std::int64_t ExpertStack::nbytes() const { return bytes_per_expert() * num_kept(); }

}  // namespace moesaic
