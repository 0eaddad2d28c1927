/// The small operations that the forward is made of.

#include <pybind11/stl.h>

#include "arrays.hpp"
#include "calls.hpp"
#include "moesaic/error.hpp"
#include "moesaic/forward.hpp"
#include "routing.hpp"

namespace moesaic::python {
namespace {

/// Size of the last dimension; ShapeError for a scalar.
std::int64_t last_dim(const ArrayRef& array, const char* operation, const char* name) {
  require<ShapeError>(array.view.rank >= 2, [&] {
    return Problem{operation, name, "a matrix", describe(array.read()), {}};
  });
  return array.view.dim(array.view.rank - 1);
}

/// The one body of all operations with one array: run(context, in, out).
template <class Run>
py::object apply(const char* operation, const char* name, const py::object& x, const ArrayRef& in,
                 const std::vector<std::int64_t>& shape, const py::object& out, bool accumulate,
                 Run&& run) {
  require<ConfigError>(!accumulate || !out.is_none(), [&] {
    return Problem{operation, "accumulate", "an out= to add to", "none", {}};
  });
  Result result(x, in, DType::F32, shape, out, operation);
  require_disjoint(result.view(), in.read(), operation, name);
  Call call;
  {
    const py::gil_scoped_release release;
    run(call.context, in.read(), result.view());
  }
  return result.finish();
}

py::object gather(const py::object& x, const PlanObject& plan, const py::object& out) {
  const ArrayRef in = import_array(x, "gather_rows", "x");
  const auto held = plan.value;
  return apply("gather_rows", "x", x, in, {held->num_pairs(), last_dim(in, "gather_rows", "x")},
               out, false,
               [&](Context& context, const ConstTensorView& from, const TensorView& to) {
                 gather_rows(context, from, *held, to);
               });
}

py::object multiply(const py::object& gate_up, const py::object& out) {
  const ArrayRef in = import_array(gate_up, "silu_mul", "gate_up");
  const std::int64_t cols = last_dim(in, "silu_mul", "gate_up");
  require<ShapeError>(cols % 2 == 0, [&] {
    return Problem{
        "silu_mul", "gate_up", "an even last dimension, gate then up", describe(in.read()), {}};
  });
  return apply("silu_mul", "gate_up", gate_up, in, {in.view.dim(0), cols / 2}, out, false,
               [&](Context& context, const ConstTensorView& from, const TensorView& to) {
                 silu_mul(context, from, to);
               });
}

py::object combine_rows(const py::object& rows, const PlanObject& plan,
                        const RoutingObject& routing, const py::object& out, bool accumulate) {
  const ArrayRef in = import_array(rows, "combine", "rows");
  const auto held_plan = plan.value;
  const auto held = routing.value;
  return apply("combine", "rows", rows, in, {held->num_tokens(), last_dim(in, "combine", "rows")},
               out, accumulate,
               [&](Context& context, const ConstTensorView& from, const TensorView& to) {
                 combine(context, from, *held_plan, *held, to, accumulate);
               });
}

py::object sum_pairs(const py::object& pairs, const RoutingObject& routing, const py::object& out,
                     bool accumulate) {
  const ArrayRef in = import_array(pairs, "weighted_sum", "pairs");
  const auto held = routing.value;
  return apply("weighted_sum", "pairs", pairs, in,
               {held->num_tokens(), last_dim(in, "weighted_sum", "pairs")}, out, accumulate,
               [&](Context& context, const ConstTensorView& from, const TensorView& to) {
                 weighted_sum(context, from, *held, to, accumulate);
               });
}

}  // namespace

void bind_operations(py::module_& m) {
  m.def("gather_rows", &gather, py::arg("x"), py::arg("plan"), py::kw_only(),
        py::arg("out") = py::none(),
        "f32 [P, H]: the rows of x [T, H] in packed order; rows behind the last pair are zero.");
  m.def("silu_mul", &multiply, py::arg("gate_up"), py::kw_only(), py::arg("out") = py::none(),
        "f32 [P, I]: silu(gate) * up of gate_up [P, 2I], gate first.");
  m.def("combine", &combine_rows, py::arg("rows"), py::arg("plan"), py::arg("routing"),
        py::kw_only(), py::arg("out") = py::none(), py::arg("accumulate") = false,
        "f32 [T, H]: per token the weighted sum of its rows [P, H], which are in packed order.");
  m.def("weighted_sum", &sum_pairs, py::arg("pairs"), py::arg("routing"), py::kw_only(),
        py::arg("out") = py::none(), py::arg("accumulate") = false,
        "f32 [T, H]: per token the weighted sum of its rows of pairs, which are in pair order.");
}

}  // namespace moesaic::python
