/// The parts of an ExpertStack: encoded bytes, decoded matrices, biases and scales.

#include "stack_parts.hpp"

#include <pybind11/stl.h>

#include <limits>

#include "arrays.hpp"
#include "base/first_error.hpp"
#include "calls.hpp"
#include "gil.hpp"
#include "moesaic/thread_pool.hpp"
#include "quant.hpp"
#include "values.hpp"

namespace moesaic::python {
namespace {

constexpr Role kRoles[] = {Role::Gate, Role::Up, Role::Down};

/// A role of this name that the stack has. Throws ConfigError and ShapeError.
Role role_of(const ExpertStack& stack, const std::string& name, const char* operation) {
  const Role role = parse_name<Role>(name, operation, "role");
  require<ShapeError>(static_cast<bool>(stack.role(role).ref), [&] {
    return Problem{operation, "role", "a role of the stack", "gate of ungated experts", {}};
  });
  return role;
}

/// Calls read(expert, row) for the rows of experts [first, last) on the threads of the tuning,
/// without the GIL; Ctrl-C ends it between two rows.
template <class Read>
void read_rows(const WeightRef& weight, std::int32_t first, std::int32_t last, const Read& read) {
  const auto pool = shared_pool(current_tuning());
  const InterruptibleRelease release;
  for (std::int32_t e = first; e < last; ++e) {
    Interrupt::check();
    FirstError error;
    pool->parallel_for(weight.rows,
                       [&](std::int64_t row, int) { error.during([&] { read(e, row); }); });
    error.rethrow();
  }
}

/// Throws ShapeError unless there is such an expert, or none is asked for.
void check_expert(const WeightRef& weight, std::optional<std::int32_t> expert,
                  const char* operation) {
  require<ShapeError>(!expert || (*expert >= 0 && *expert < weight.num_experts), [&] {
    return Problem{operation,
                   "expert",
                   "0 to " + std::to_string(weight.num_experts - 1),
                   std::to_string(*expert),
                   {}};
  });
}

/// [rows, cols] of one expert, or [E, rows, cols] of all, times the scales. Throws ShapeError unless
/// there is such an expert.
py::array decoded_matrices(const WeightRef& weight, std::optional<std::int32_t> expert,
                           const std::vector<float>* scales, const char* operation) {
  check_expert(weight, expert, operation);
  std::vector<py::ssize_t> shape{weight.rows, weight.cols};
  if (!expert) shape.insert(shape.begin(), weight.num_experts);
  py::array_t<float> out(shape);
  float* const to = out.mutable_data();
  const std::int32_t first = expert.value_or(0);
  read_rows(weight, first, expert ? first + 1 : weight.num_experts,
            [&](std::int32_t e, std::int64_t row) {
              float* const values = to + ((e - first) * weight.rows + row) * weight.cols;
              dequantize_expert_row(weight, e, row, values);
              if (scales == nullptr) return;
              const float factor = (*scales)[static_cast<std::size_t>(e)];
              for (std::int64_t i = 0; i < weight.cols; ++i) values[i] *= factor;
            });
  return out;
}

py::array dequantize_role(const ExpertStack& stack, const std::string& name,
                          std::optional<std::int32_t> expert) {
  constexpr const char* kOperation = "ExpertStack.dequantize";
  const RoleWeights& weights = stack.role(role_of(stack, name, kOperation));
  return decoded_matrices(weights.ref, expert, weights.scale.get(), kOperation);
}

/// The stored rows of one expert, or of all, in memory of `shape`, [.., row bytes].
py::array encoded_rows(const WeightRef& ref, const std::vector<py::ssize_t>& shape,
                       std::optional<std::int32_t> expert = {}) {
  const std::int64_t bytes = row_bytes(ref.type, ref.cols);
  py::array_t<std::uint8_t> out(shape);
  auto* const to = reinterpret_cast<std::byte*>(out.mutable_data());
  const std::int32_t first = expert.value_or(0);
  read_rows(ref, first, expert ? first + 1 : ref.num_experts,
            [&](std::int32_t e, std::int64_t row) {
              encoded_expert_row(ref, e, row, to + ((e - first) * ref.rows + row) * bytes);
            });
  return out;
}

py::array encoded_bytes(const ExpertStack& stack, const std::string& name,
                        std::optional<std::int32_t> expert) {
  constexpr const char* kOperation = "ExpertStack.encoded";
  const WeightRef& ref = stack.role(role_of(stack, name, kOperation)).ref;
  require<UnsupportedError>(ref.type != QuantType::INT4, [&] {
    return Problem{kOperation, name, "a type with blocks along a row", "INT4",
                   "marlin(role) is the stack that holds them, and its unpack() gives the groups"};
  });
  check_expert(ref, expert, kOperation);
  std::vector<py::ssize_t> shape{ref.rows, row_bytes(ref.type, ref.cols)};
  if (!expert) shape.insert(shape.begin(), ref.num_experts);
  return encoded_rows(ref, shape, expert);
}

py::dict biases_of(const ExpertStack& stack) {
  py::dict biases;
  for (const Role role : kRoles) {
    const RoleWeights& weights = stack.role(role);
    if (weights.bias == nullptr) continue;
    biases[name_of(role)] = numpy_view(DType::F32, {stack.num_experts(), weights.ref.rows},
                                       weights.bias->data(), weights.bias);
  }
  return biases;
}

py::dict scales_of(const ExpertStack& stack) {
  py::dict scales;
  for (const Role role : kRoles) {
    const RoleWeights& weights = stack.role(role);
    if (weights.scale == nullptr) continue;
    scales[name_of(role)] =
        numpy_view(DType::F32, {stack.num_experts()}, weights.scale->data(), weights.scale);
  }
  return scales;
}

Epilogues::Values& values_of(Epilogues& epilogues, Role role) {
  return role == Role::Gate ? epilogues.gate : role == Role::Up ? epilogues.up : epilogues.down;
}

}  // namespace

py::array decoded_expert(const WeightRef& weight, std::int32_t expert, const char* operation) {
  return decoded_matrices(weight, expert, nullptr, operation);
}

py::array decoded_matrix(const RoleWeights& weights, const char* operation) {
  return decoded_matrices(weights.ref, 0, weights.scale.get(), operation);
}

py::array encoded_matrix(const RoleWeights& weights) {
  const WeightRef& ref = weights.ref;
  return encoded_rows(ref, {ref.rows, row_bytes(ref.type, ref.cols)});
}

std::vector<float> values_of_shape(py::handle value, const std::vector<std::int64_t>& shape,
                                   const std::string& name, const char* operation) {
  const ConstTensorView view = import_array(value, operation, name.c_str()).read();
  bool same = view.rank == static_cast<int>(shape.size());
  for (std::size_t i = 0; same && i < shape.size(); ++i)
    same = view.dim(static_cast<int>(i)) == shape[i];
  require<ShapeError>(
      same, [&] { return Problem{operation, name, shape_text(shape), describe(view), {}}; });
  return import_floats(value, operation, name.c_str());
}

ExpertStack::EncodedRole encoded_role(const py::object& argument, const char* operation,
                                      const char* name) {
  ExpertStack::EncodedRole role;
  if (argument.is_none()) return role;
  const auto problem = [&](std::string got) {
    return Problem{operation,
                   name,
                   "(bytes, type, (E, rows, cols)) or (array [E, rows, bytes], type)",
                   std::move(got),
                   {}};
  };
  require<DTypeError>(py::isinstance<py::tuple>(argument),
                      [&] { return problem(type_name(argument)); });
  const auto parts = argument.cast<py::tuple>();
  require<ShapeError>(parts.size() == 2 || parts.size() == 3,
                      [&] { return problem("a tuple of " + std::to_string(parts.size())); });
  const ArrayRef ref = import_array(parts[0], operation, name);
  const ConstTensorView view = ref.read();
  require<DTypeError>(py::isinstance<py::str>(parts[1]),
                      [&] { return problem("a type of " + type_name(parts[1])); });
  const QuantType type = parse_quant_type(parts[1].cast<std::string>(), operation, name);
  require<ShapeError>(is_dense(view),
                      [&] { return Problem{operation, name, "dense bytes", describe(view), {}}; });
  std::array<std::int64_t, 3> shape{};
  if (parts.size() == 3) {
    try {
      shape = parts[2].cast<std::array<std::int64_t, 3>>();
    } catch (const py::cast_error&) {
      throw ShapeError(problem("a shape of another kind"));
    }
  } else {
    const auto item = static_cast<std::int64_t>(size_of(view.dtype));
    const QuantTraits& facts = traits(type);
    require<ShapeError>(view.rank == 3 && view.dim(2) * item % facts.block_bytes == 0, [&] {
      return Problem{operation, name,
                     "[E, rows, bytes], with rows of whole blocks of " +
                         std::to_string(facts.block_bytes) + " bytes",
                     describe(view), "or give the shape: (bytes, type, (E, rows, cols))"};
    });
    shape = {view.dim(0), view.dim(1), view.dim(2) * item / facts.block_bytes * facts.block_elems};
  }
  require<ShapeError>(shape[0] >= 0 && shape[0] <= std::numeric_limits<std::int32_t>::max(), [&] {
    return Problem{operation, name, "(E, rows, cols)", std::to_string(shape[0]) + " experts", {}};
  });
  role.type = type;
  role.num_experts = static_cast<std::int32_t>(shape[0]);
  role.rows = shape[1];
  role.cols = shape[2];
  role.data = static_cast<const std::byte*>(view.data);
  role.bytes = static_cast<std::size_t>(view.num_elements()) * size_of(view.dtype);
  role.owner = share_object(ref.keep);
  return role;
}

RoleTypes import_role_types(const py::object& quant, const char* operation) {
  RoleTypes types;
  if (py::isinstance<py::str>(quant)) {
    types.gate = types.up = types.down = parse_quant_type(quant.cast<std::string>(), operation);
    return types;
  }
  for_each_role(quant, "quant", operation, [&](Role role, py::handle value, const auto&) {
    (role == Role::Gate ? types.gate
     : role == Role::Up ? types.up
                        : types.down) = parse_quant_type(std::string(py::str(value)), operation);
  });
  return types;
}

Epilogues import_epilogues(const py::object& biases, const py::object& scales,
                           const StackShape& shape, const char* operation) {
  Epilogues epilogues;
  for_each_role(biases, "biases", operation, [&](Role role, py::handle value, const auto& name) {
    const std::int64_t rows = role == Role::Down ? shape.hidden_size : shape.intermediate_size;
    values_of(epilogues, role).bias =
        values_of_shape(value, {shape.num_experts, rows}, name, operation);
  });
  for_each_role(scales, "scales", operation, [&](Role role, py::handle value, const auto& name) {
    values_of(epilogues, role).scale = values_of_shape(value, {shape.num_experts}, name, operation);
  });
  return epilogues;
}

void define_parts(StackClass& type) {
  type.def("dequantize", &dequantize_role, py::arg("role"), py::arg("expert") = py::none())
      .def("encoded", &encoded_bytes, py::arg("role"), py::arg("expert") = py::none())
      .def_property_readonly("biases", &biases_of)
      .def_property_readonly("scales", &scales_of);
}

}  // namespace moesaic::python
