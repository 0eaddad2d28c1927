/// Stacks made of the experts of others: select, permute, concat, with_expert, deltas, bake.

#include <pybind11/stl.h>

#include <algorithm>

#include "arrays.hpp"
#include "calls.hpp"
#include "expert_ids.hpp"
#include "lists.hpp"
#include "load.hpp"
#include "moesaic/edit.hpp"
#include "stack_parts.hpp"
#include "values.hpp"

namespace moesaic::python {
namespace {

using Edited = std::shared_ptr<ExpertStack>;

Edited share(ExpertStack stack) { return std::make_shared<ExpertStack>(std::move(stack)); }

Edited select_stack(const ExpertStack& stack, const std::vector<std::int32_t>& ids) {
  std::vector<ExpertSource> sources;
  for (const std::int32_t e : ids) sources.push_back({&stack, e});
  return share(gather_experts(sources));
}

Edited concat_stacks(const std::vector<Edited>& stacks) {
  require_no_none(stacks, "ExpertStack.concat", "stacks", "ExpertStack");
  std::vector<ExpertSource> sources;
  for (const Edited& stack : stacks) {
    for (std::int32_t e = 0; e < stack->num_experts(); ++e) sources.push_back({stack.get(), e});
  }
  return share(gather_experts(sources));
}

template <class Roles>
auto& member_of(Roles& roles, Role role) {
  return role == Role::Gate ? roles.gate : role == Role::Up ? roles.up : roles.down;
}

std::int64_t rows_of_role(const ExpertStack& stack, Role role) {
  return role == Role::Down ? stack.shape().hidden_size : stack.shape().intermediate_size;
}
std::int64_t cols_of_role(const ExpertStack& stack, Role role) {
  return role == Role::Down ? stack.shape().intermediate_size : stack.shape().hidden_size;
}

/// A matrix [rows, cols] of values, or (array [rows, bytes], type) of the type that the role has.
void import_matrix(const ExpertStack& stack, Role role, const py::object& value, RoleEdit& edit) {
  constexpr const char* kOperation = "ExpertStack.with_expert";
  if (value.is_none()) return;
  const char* const name = name_of(role);
  const std::int64_t rows = rows_of_role(stack, role), cols = cols_of_role(stack, role);
  if (!py::isinstance<py::tuple>(value)) {
    edit.values = values_of_shape(value, {rows, cols}, name, kOperation);
    return;
  }
  const auto pair = value.cast<py::tuple>();
  const QuantType type = stack.role(role).ref.type;
  const auto type_text = std::string(traits(type).name);
  require<DTypeError>(pair.size() == 2 && py::isinstance<py::str>(pair[1]) &&
                          pair[1].cast<std::string>() == type_text,
                      [&] {
                        return Problem{kOperation, name, "(bytes, '" + type_text + "')",
                                       std::string(py::str(py::repr(pair[pair.size() - 1]))),
                                       "an expert has the types of its stack"};
                      });
  const ArrayRef array = import_array(pair[0], kOperation, name);
  const ConstTensorView view = array.read();
  require<ShapeError>(is_dense(view),
                      [&] { return Problem{kOperation, name, "dense bytes", describe(view), {}}; });
  const auto* const data = static_cast<const std::byte*>(view.data);
  edit.encoded.assign(data,
                      data + view.num_elements() * static_cast<std::int64_t>(size_of(view.dtype)));
}

Edited edit_expert(const ExpertStack& stack, std::int32_t expert, const py::object& gate,
                   const py::object& up, const py::object& down, const py::object& biases,
                   const py::object& scales) {
  constexpr const char* kOperation = "ExpertStack.with_expert";
  ExpertEdit edit;
  import_matrix(stack, Role::Gate, gate, edit.gate);
  import_matrix(stack, Role::Up, up, edit.up);
  import_matrix(stack, Role::Down, down, edit.down);
  for_each_role(biases, "biases", kOperation, [&](Role role, py::handle value, const auto& name) {
    member_of(edit, role).bias =
        values_of_shape(value, {rows_of_role(stack, role)}, name, kOperation);
  });
  for_each_role(scales, "scales", kOperation, [&](Role role, py::handle value, const auto& name) {
    try {
      member_of(edit, role).scale = value.cast<float>();
    } catch (const py::cast_error&) {
      throw DTypeError(Problem{kOperation, name, "a number", type_name(value), {}});
    }
  });
  Loading loading(kOperation, "cpu", "auto", std::nullopt, py::none());
  return loading.run(
      [&](const LoadOptions& options) { return share(with_expert(stack, expert, edit, options)); });
}

py::dict deltas_of(const ExpertStack& stack) {
  py::dict deltas;
  for (const Role role : {Role::Gate, Role::Up, Role::Down}) {
    const auto& delta = stack.role(role).delta;
    if (delta == nullptr) continue;
    const WeightRef& ref = stack.role(role).ref;
    deltas[name_of(role)] = py::make_tuple(
        numpy_view(DType::F32, {ref.num_experts, delta->rank, ref.cols}, delta->a.data(), delta),
        numpy_view(DType::F32, {ref.num_experts, ref.rows, delta->rank}, delta->b.data(), delta),
        delta->scale);
  }
  return deltas;
}

/// (A [E, r, cols], B [E, rows, r]) or (A, B, scale).
std::shared_ptr<const LowRankDelta> import_delta(const ExpertStack& stack, Role role,
                                                 py::handle value, const std::string& name) {
  constexpr const char* kOperation = "ExpertStack.with_deltas";
  require<DTypeError>(
      py::isinstance<py::tuple>(value) && (py::len(value) == 2 || py::len(value) == 3), [&] {
        return Problem{kOperation, name, "a tuple (A, B) or (A, B, scale)", type_name(value), {}};
      });
  const auto parts = py::reinterpret_borrow<py::tuple>(value);
  auto delta = std::make_shared<LowRankDelta>();
  const ConstTensorView a = import_array(parts[0], kOperation, name.c_str()).read();
  require<ShapeError>(a.rank == 3 && a.dim(1) >= 1, [&] {
    return Problem{kOperation,
                   name,
                   "A of [E, r, " + std::to_string(cols_of_role(stack, role)) + "]",
                   describe(a),
                   {}};
  });
  const std::int64_t experts = stack.num_experts();
  delta->rank = a.dim(1);
  delta->a = values_of_shape(parts[0], {experts, delta->rank, cols_of_role(stack, role)},
                             name + "[0], A [E, r, columns]", kOperation);
  delta->b = values_of_shape(parts[1], {experts, rows_of_role(stack, role), delta->rank},
                             name + "[1], B [E, rows, r]", kOperation);
  if (parts.size() == 3) {
    try {
      delta->scale = parts[2].cast<float>();
    } catch (const py::cast_error&) {
      throw DTypeError(Problem{kOperation, name, "a number as scale", type_name(parts[2]), {}});
    }
  }
  return delta;
}

Edited set_deltas(const ExpertStack& stack, const py::object& deltas) {
  RoleDeltas all;
  for_each_role(deltas, "deltas", "ExpertStack.with_deltas",
                [&](Role role, py::handle value, const auto& name) {
                  member_of(all, role) = import_delta(stack, role, value, name);
                });
  return share(with_deltas(stack, std::move(all)));
}

Edited bake_stack(const ExpertStack& stack, const py::object& quant, const py::object& progress) {
  constexpr const char* kOperation = "ExpertStack.bake";
  const RoleTypes types = import_role_types(quant, kOperation);
  Loading loading(kOperation, "cpu", "auto", std::nullopt, progress);
  return loading.run(
      [&](const LoadOptions& options) { return share(bake_deltas(stack, types, options)); });
}

}  // namespace

void define_edits(StackClass& type) {
  type.def(
          "select",
          [](const ExpertStack& stack, const py::object& ids) {
            constexpr const char* kOperation = "ExpertStack.select";
            const auto experts = import_expert_ids(ids, kOperation, "ids");
            check_experts(experts, stack.num_experts(), kOperation);
            return select_stack(stack, experts);
          },
          py::arg("ids"))
      .def(
          "permute",
          [](const ExpertStack& stack, const py::object& order) {
            constexpr const char* kOperation = "ExpertStack.permute";
            const auto ids = import_expert_ids(order, kOperation, "order");
            check_permutation(ids, stack.num_experts(), kOperation);
            return select_stack(stack, ids);
          },
          py::arg("order"))
      .def_static("concat", &concat_stacks, py::arg("stacks"))
      .def("with_expert", &edit_expert, py::arg("expert"), py::kw_only(),
           py::arg("gate") = py::none(), py::arg("up") = py::none(), py::arg("down") = py::none(),
           py::arg("biases") = py::none(), py::arg("scales") = py::none())
      .def_property_readonly("deltas", &deltas_of)
      .def("with_deltas", &set_deltas, py::arg("deltas"))
      .def("bake", &bake_stack, py::arg("quant") = py::none(), py::kw_only(),
           py::arg("progress") = py::none());
}

}  // namespace moesaic::python
