/// The products of ExpertStack: one expert of one role at a time, over ids or over a plan.

#include <pybind11/stl.h>

#include "expert_stack.hpp"
#include "moesaic/forward.hpp"
#include "products.hpp"
#include "routing.hpp"
#include "values.hpp"

namespace moesaic::python {
namespace {

std::int64_t rows_of(const ExpertStack& stack, Role role) {
  return role == Role::Down ? stack.shape().hidden_size : stack.shape().intermediate_size;
}

/// The shape of a result: that of the ids, with `rows` values for each. Throws ShapeError.
std::vector<std::int64_t> gemv_shape(const Ids& ids, std::int64_t rows, const char* operation) {
  require<ShapeError>(ids.view.rank >= 1 && ids.view.rank < kMaxRank, [&] {
    return Problem{operation, "ids", "[k] or [T, k]", describe(ids.view), {}};
  });
  std::vector<std::int64_t> shape(ids.view.shape.begin(), ids.view.shape.begin() + ids.view.rank);
  shape.push_back(rows);
  return shape;
}

/// A product over ids: run(context, x, ids, out), with `rows` results per id.
template <class Run>
py::object gemv(const char* operation, const char* x_name, const ExpertStack& stack,
                std::int64_t rows, const py::object& x, const py::object& ids,
                const py::object& out, const std::optional<std::string>& precision,
                const py::object& stream, Run&& run) {
  const DeviceStream target = device_stream(stack.device(), stream, x, operation);
  ArrayRef in = import_rows(x, operation, x_name, target);
  Ids experts = import_ids(ids, operation, "ids", target);
  const std::vector<std::int64_t> shape = gemv_shape(experts, rows, operation);
  // Dimensions of the ids before [T, k] are dimensions of x too, and count as tokens.
  const int tokens = experts.view.rank - 1;
  TensorView flat_x = in.view;
  if (tokens > 1) flat_x = merged_in(in, tokens, operation, x_name, target);
  experts.merge_first(tokens);
  return run_product(
      {operation, x, out, precision, stack.device(), target}, in, flat_x, shape,
      [&](Context& context, HostArrays& arrays, const ConstTensorView& from, const TensorView& to) {
        run(context, from, arrays.read(experts.view), merged_out(to, tokens, operation));
      });
}

py::object gemv_gate_up_silu(const ExpertStack& stack, const py::object& x, const py::object& ids,
                             const py::object& out, const std::optional<std::string>& precision,
                             const py::object& stream) {
  return gemv("ExpertStack.gemv_gate_up_silu", "x", stack, stack.shape().intermediate_size, x, ids,
              out, precision, stream,
              [&](Context& context, const ConstTensorView& in, const ConstTensorView& experts,
                  const TensorView& to) {
                expert_gemv_gate_up(context, stack, Activation{}, in, experts, to);
              });
}

/// Adds gemv_gate, gemv_up or gemv_down.
void define_gemv(StackClass& type, const char* name, const char* operation, Role role,
                 const char* x_name) {
  type.def(
      name,
      [=](const ExpertStack& stack, const py::object& x, const py::object& ids,
          const py::object& out, const std::optional<std::string>& precision,
          const py::object& stream) {
        return gemv(
            operation, x_name, stack, rows_of(stack, role), x, ids, out, precision, stream,
            [&](Context& context, const ConstTensorView& in, const ConstTensorView& experts,
                const TensorView& to) { expert_gemv(context, stack, role, in, experts, to); });
      },
      py::arg(x_name), py::arg("ids"), py::kw_only(), py::arg("out") = py::none(),
      py::arg("precision") = py::none(), py::arg("stream") = py::none());
}

/// Adds gemm_gate, gemm_up or gemm_down.
void define_gemm(StackClass& type, const char* name, const char* operation, Role role,
                 const char* x_name) {
  type.def(
      name,
      [=](const ExpertStack& stack, const py::object& x, const PlanObject& plan,
          const py::object& out, const std::optional<std::string>& precision,
          const py::object& stream) {
        const DeviceStream target = device_stream(stack.device(), stream, x, operation);
        const TokenRows in = import_tokens(x, operation, x_name, target);
        const auto held = plan.value;
        return run_product(
            {operation, x, out, precision, stack.device(), target}, in.array, in.rows,
            {held->num_pairs(), rows_of(stack, role)},
            [&](Context& context, HostArrays&, const ConstTensorView& from, const TensorView& to) {
              expert_gemm(context, stack, role, from, *held, to);
            });
      },
      py::arg(x_name), py::arg("plan"), py::kw_only(), py::arg("out") = py::none(),
      py::arg("precision") = py::none(), py::arg("stream") = py::none());
}

}  // namespace

void define_products(StackClass& type) {
  define_gemv(type, "gemv_gate", "ExpertStack.gemv_gate", Role::Gate, "x");
  define_gemv(type, "gemv_up", "ExpertStack.gemv_up", Role::Up, "x");
  define_gemv(type, "gemv_down", "ExpertStack.gemv_down", Role::Down, "h");
  type.def("gemv_gate_up_silu", &gemv_gate_up_silu, py::arg("x"), py::arg("ids"), py::kw_only(),
           py::arg("out") = py::none(), py::arg("precision") = py::none(),
           py::arg("stream") = py::none());
  define_gemm(type, "gemm_gate", "ExpertStack.gemm_gate", Role::Gate, "x");
  define_gemm(type, "gemm_up", "ExpertStack.gemm_up", Role::Up, "x");
  define_gemm(type, "gemm_down", "ExpertStack.gemm_down", Role::Down, "h");
}

}  // namespace moesaic::python
